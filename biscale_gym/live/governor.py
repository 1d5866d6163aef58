"""The governor: before every batch, what the model's engine would ask the clock policy, asked about a real worker.

It fills the same feature vector (``cluster.features``), calls the same compiled policy and hands the answer to the
device. Two things differ from the model: nothing is asked inside a running iteration (no ARRIVAL, OVERRUN, INTERVAL),
as the engine cannot be interrupted; and telemetry that is too old overrules the policy with the top clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import Phase
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.live.devices import NOTHING, Device, Spent, Work, check_clock
from biscale_gym.live.errors import LiveError
from biscale_gym.live.records import IterationRecord, RecordStream
from biscale_gym.profiles import Profile
from biscale_gym.profiles.kernels import iteration_latency

Vector = npt.NDArray[np.float64]

_SLACK_RANKS = (
    (f.SLACK_LEAST_S, 0),
    (f.SLACK_P1_S, 1),
    (f.SLACK_P5_S, 5),
    (f.SLACK_P25_S, 25),
    (f.SLACK_P50_S, 50),
)


@dataclass(frozen=True, slots=True)
class WaitingPrompt:
    """A prompt that waits on a prefill worker.

    Attributes:
        tokens: of the whole prompt.
        done: of them computed already (a chunk).
        arrival_s: of its request.
    """

    tokens: int
    done: int
    arrival_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """A worker at a batch boundary.

    Attributes:
        work: the batch about to start; empty: there is none.
        oldest_arrival_s: of the requests in it (prefill).
        kv_used_tokens: KV taken.
        queue_requests, queue_tokens: behind the batch, as ``features.QUEUE_REQUESTS`` says.
        waiting: the prompts behind the batch, in order, a chunked one first (prefill).
        slack_s: of every request in the batch (decode, for policies that ask for it).
        routed, completed, late: counts of the worker's requests so far.
        requests: in the batch.
    """

    work: Work = NOTHING
    oldest_arrival_s: float = np.inf
    kv_used_tokens: int = 0
    queue_requests: int = 0
    queue_tokens: int = 0
    waiting: Sequence[WaitingPrompt] = ()
    slack_s: Sequence[float] = ()
    routed: int = 0
    completed: int = 0
    late: int = 0
    requests: int = 0


def project_batches(waiting: Sequence[WaitingPrompt], budget: int, chunked: bool, limit: int) -> list[Vector]:
    """The queue cut into future batches by the scheduler's own rule: (tokens, sum of squares, oldest arrival) each.

    Args:
        waiting: prompts in order.
        budget: tokens of a batch.
        chunked: whether a prompt may be cut; otherwise one above the budget is a batch of its own.
        limit: so many batches at most.
    """
    batches: list[Vector] = []
    tokens, sum_sq, oldest_s = 0, 0.0, np.inf
    for prompt in waiting:
        start = prompt.done
        while start < prompt.tokens:
            if len(batches) == limit:
                return batches
            left, room = prompt.tokens - start, budget - tokens
            take = min(left, room) if chunked else left
            fits = take > 0 and (take <= room or tokens == 0)
            if fits:
                tokens += take
                sum_sq += float(start + take) ** 2 - float(start) ** 2
                oldest_s = min(oldest_s, prompt.arrival_s)
                start += take
            if not fits or take < left:
                batches.append(np.array([tokens, sum_sq, oldest_s]))
                tokens, sum_sq, oldest_s = 0, 0.0, np.inf
    if tokens > 0 and len(batches) < limit:
        batches.append(np.array([tokens, sum_sq, oldest_s]))
    return batches


@dataclass(frozen=True)
class InstanceSetting:
    """What does not change about a worker.

    Attributes:
        phase: prefill or decode.
        tp: GPUs.
        clock_mhz: held at first where there is no policy.
        slo_s: prefill: of TTFT, less the serving overhead; decode: of TPOT.
        kv_capacity_tokens: of the worker.
        token_budget: of a prefill batch.
        chunked: whether its prompts may be cut.
        max_batch: of decode.
    """

    phase: Phase
    tp: int
    clock_mhz: int
    slo_s: float
    kv_capacity_tokens: int
    token_budget: int
    chunked: bool = True
    max_batch: int = 1024


@dataclass
class Governor:
    """Applies a clock policy to one worker.

    Args:
        setting: of the worker.
        policy: the phase's policy; None holds the planned clock, or the one that ``hold`` names later.
        device: the worker's GPUs.
        profile: what the policy believes iterations cost.
        clocks_mhz: the run's ascending clock list; every entry must be one of the device's.
        records: where iterations go; None: nowhere.
        stale_s: telemetry older than this puts the top clock in the policy's place.
        origin_s: start of the run on ``time.monotonic``'s scale.

    Attributes:
        stale_decisions: how often the telemetry was too old.

    Raises:
        LiveError: a clock that the device does not have, or a policy without a compiled function.
        ProfileError: a TP degree or clock that the profile does not have.
    """

    setting: InstanceSetting
    policy: PhasePolicy | None
    device: Device
    profile: Profile
    clocks_mhz: Sequence[int]
    records: RecordStream | None = None
    stale_s: float = 2.0
    origin_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        setting = self.setting
        missing = sorted({*self.clocks_mhz, setting.clock_mhz} - set(self.device.clocks_mhz))
        if missing:
            raise LiveError(f"the device of a {setting.phase} instance has no clocks {missing}")
        if self.policy is not None and self.policy.function is None:
            raise LiveError(f"the {setting.phase} policy has no function; live workers need a compiled one")
        self._clocks = {clock: index for index, clock in enumerate(self.clocks_mhz)}
        self._model = self.profile.for_phase(setting.phase).compile(setting.tp, self.clocks_mhz, setting.max_batch)
        self._obs = np.zeros(f.SIZE)
        self._obs[f.CLOCK_COUNT], self._obs[f.SLO_S], self._obs[f.TP] = len(self.clocks_mhz), setting.slo_s, setting.tp
        self._obs[f.KV_CAPACITY_TOKENS] = setting.kv_capacity_tokens
        self._memory = np.zeros(MEMORY_SIZE if self.policy is None else self.policy.memory)
        self._params = np.ascontiguousarray(self.policy.params if self.policy else np.zeros(1), dtype=np.float64)
        self._load = Load()
        self._idle = False
        self._held_mhz = setting.clock_mhz
        self._before_s = self._predicted_s = 0.0
        self.stale_decisions = 0
        self._latency_s(Work(batch=1.0, kv_tokens=1.0), 0)  # compiled before the first batch
        self._latency_s(Work(prefill_tokens=1.0, sum_len_sq=1.0), 0)
        self.device.ask_clock(setting.clock_mhz)

    @property
    def work(self) -> Work:
        """The batch that runs, or ran last."""
        return self._load.work

    def now_s(self) -> float:
        """From the start of the run."""
        return time.monotonic() - self.origin_s

    def hold(self, clock_mhz: int) -> None:
        """Without a policy: hold another clock from now on.

        Raises:
            LiveError: a policy decides here.
            DeviceError: no such clock; the nearest is named.
        """
        if self.policy is not None:
            raise LiveError(f"the {self.setting.phase} policy decides this instance's clock; hold() cannot")
        check_clock(clock_mhz, self.device.clocks_mhz)
        self._held_mhz = clock_mhz
        if not self._stale():  # else the top clock stays
            self.device.ask_clock(clock_mhz)

    def _stale(self) -> bool:
        return time.monotonic() - self.device.reading().time_s > self.stale_s

    def before(self, load: Load) -> None:
        """A batch is about to start: decide and ask for its clock.

        Raises:
            LiveError: the policy answered with no clock of the list.
            DeviceError: the device failed.
        """
        began_s = time.perf_counter()
        self._load, self._idle = load, False
        self._decide(load, f.BOUNDARY)
        self._before_s = time.perf_counter() - began_s

    def idle(self, load: Load) -> None:
        """There is no batch; the policy is asked once, if it wants to be."""
        self.device.idle()
        if not self._idle and self.policy is not None and self.policy.on_idle:
            self._decide(load, f.IDLE)
        self._idle = True

    def after(self, computed_s: float) -> Spent:
        """The batch has been computed in ``computed_s``: spend its energy, stretch it if need be, record it.

        Raises:
            DeviceError: the device failed.
        """
        load, work = self._load, self._load.work
        spent = self.device.iteration(work, computed_s)
        began_s = time.perf_counter()
        clock = self._index(spent.clock_mhz)
        self._predicted_s = 0.0 if work.empty else self._latency_s(work, clock)
        obs = self._obs
        obs[f.LAST_OBSERVED_S], obs[f.LAST_PREDICTED_S] = spent.duration_s, self._predicted_s
        obs[f.ITERATION] += self.setting.phase == "decode"
        if self.records is not None:
            control_s = self._before_s + time.perf_counter() - began_s
            self.records.put(
                IterationRecord(
                    self.now_s(),
                    int(work.batch),
                    int(work.kv_tokens),
                    int(work.prefill_tokens),
                    work.sum_len_sq,
                    load.queue_requests,
                    load.kv_used_tokens,
                    self.device.target_mhz,
                    spent.clock_mhz,
                    computed_s,
                    spent.duration_s,
                    self._predicted_s,
                    spent.energy_j,
                    control_s,
                    self.device.source,
                )
            )
        return spent

    def _latency_s(self, work: Work, clock: int) -> float:
        return float(
            iteration_latency(self._model, clock, work.batch, work.kv_tokens, work.prefill_tokens, work.sum_len_sq)
        )

    def _index(self, clock_mhz: int) -> int:
        """Position in the run's list; of a clock outside it, the nearest."""
        index = self._clocks.get(clock_mhz)
        if index is None:
            index = int(np.argmin(np.abs(np.asarray(self.clocks_mhz) - clock_mhz)))
        return index

    def _decide(self, load: Load, reason: int) -> None:
        if self._stale():
            self.stale_decisions += 1
            self.device.ask_clock(self.clocks_mhz[-1])
            return
        if self.policy is None:
            self.device.ask_clock(self._held_mhz)  # a clock that was lost is set anew
            return
        self._observe(load, reason)
        answer = self.policy.function(self._obs, self._memory, self._params, self._model)
        if not 0 <= answer < len(self.clocks_mhz):
            raise LiveError(
                f"the {self.setting.phase} policy answered with clock {answer} at {self._obs[f.NOW_S]:.3f} s; "
                f"valid: 0 to {len(self.clocks_mhz) - 1}"
            )
        self.device.ask_clock(self.clocks_mhz[answer])

    def _observe(self, load: Load, reason: int) -> None:
        obs, work, device = self._obs, load.work, self.device
        target, clock = self._index(device.target_mhz), self._index(device.clock_mhz)
        obs[f.NOW_S], obs[f.REASON] = self.now_s(), reason
        obs[f.CLOCK], obs[f.TARGET], obs[f.SWITCH_PENDING] = clock, target, clock != target
        obs[f.KV_TOKENS] = load.kv_used_tokens
        obs[f.QUEUE_REQUESTS], obs[f.QUEUE_TOKENS] = load.queue_requests, load.queue_tokens
        obs[f.ROUTED], obs[f.COMPLETED], obs[f.LATE] = load.routed, load.completed, load.late
        if self.setting.phase == "prefill":
            self._observe_prefill(load, reason)
            return
        obs[f.BATCH], obs[f.BATCH_KV_TOKENS] = work.batch, work.kv_tokens
        obs[f.RECOMPUTE_TOKENS], obs[f.RECOMPUTE_SUM_SQ] = work.prefill_tokens, work.sum_len_sq
        if self.policy is not None and self.policy.slack:
            ascending = sorted(load.slack_s) or [0.0]
            for entry, percent in _SLACK_RANKS:
                obs[entry] = ascending[percent * (len(ascending) - 1) // 100]

    def _observe_prefill(self, load: Load, reason: int) -> None:
        obs, work = self._obs, load.work
        batches: list[Vector] = []
        if reason == f.BOUNDARY:
            batches = project_batches(load.waiting, self.setting.token_budget, self.setting.chunked, f.HORIZON - 1)
            batches.insert(0, np.array([work.prefill_tokens, work.sum_len_sq, load.oldest_arrival_s]))
        obs[f.WORK_LEFT], obs[f.BATCHES] = 1.0, len(batches)
        entries = obs[f.BATCH_FIRST : f.BATCH_FIRST + f.BATCH_STRIDE * f.HORIZON]
        entries[:] = 0.0
        if batches:
            entries[: f.BATCH_STRIDE * len(batches)] = np.concatenate(batches)
