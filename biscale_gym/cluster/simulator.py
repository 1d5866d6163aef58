"""The modelled cluster's Python face: build a state, run it, re-place it, read its ledger."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster import engine, features
from biscale_gym.cluster.clocks import ask_clock
from biscale_gym.cluster.handle import Handle, handle_of
from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger, read_instances, read_requests
from biscale_gym.cluster.pages import Blocks
from biscale_gym.cluster.placement import (
    PHASES,
    InstanceSpec,
    Lane,
    Phase,
    Placement,
    check_placement,
    layout,
    transition,
)
from biscale_gym.cluster.policy import MEMORY_SIZE, hold
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.state import (
    ACTIVE,
    AWAITING_GPUS,
    COMPILED,
    DECODE,
    DRAINING,
    EXTERNAL,
    HOLD,
    LOADING,
    PREFILL,
    ROUTERS,
    State,
    copy_state,
    empty_state,
    request_arrays,
    restore_state,
    room_bytes,
    settled,
)
from biscale_gym.config import load_preset
from biscale_gym.profiles import Profile
from biscale_gym.profiles.kernels import idle_power_w
from biscale_gym.profiles.settings import SwitchingSettings, TransferSettings
from biscale_gym.traces import Trace

Vector = npt.NDArray[np.float64]
Spans = dict[tuple[str, int], tuple[int, int]]
"""Start and stop of each compiled profile, by precision and TP degree."""

ACTIVATION_BYTES = 2
"""Of one number that a pipeline stage hands to the next: 16 bits, whatever the weights' precision."""


class ClusterError(ValueError):
    """A cluster that cannot be built or driven so; the message names the place and the nearest valid choice."""


class PolicyError(ClusterError):
    """A policy that failed, or answered with a clock that does not exist."""


@dataclass(frozen=True)
class PhasePolicy:
    """A compiled policy for one phase's instances, and when it wants to be asked.

    Attributes:
        function: compiled with ``policy.POLICY_SIGNATURE``; None: the caller decides (stepwise).
        params: float64[:], handed to every call.
        on_arrival: ask when a prompt joins the queue of a running prefill instance.
        on_overrun: ask when an iteration overruns its prediction.
        on_idle: ask when an instance has nothing to run.
        slack: fill the decode observation's SLACK entries, which cost a little whenever a request joins or leaves.
        memory: how many numbers of memory it needs for every instance.
    """

    function: Any = None
    params: Vector = field(default_factory=lambda: np.zeros(1))
    on_arrival: bool = False
    on_overrun: bool = False
    on_idle: bool = False
    slack: bool = False
    memory: int = MEMORY_SIZE


@dataclass(frozen=True)
class Decision:
    """A decision that the caller must take.

    Attributes:
        instance: number of the instance that asks.
        phase: its phase.
        reason: features.BOUNDARY, ARRIVAL, OVERRUN or IDLE.
        obs: float64[features.SIZE], a copy.
    """

    instance: int
    phase: Phase
    reason: int
    obs: Vector


class Snapshot(NamedTuple):
    """Everything of a simulator that running, re-placing or another policy changes."""

    state: State
    lanes: dict[int, Lane]
    model_spans: Spans
    predicted_spans: Spans
    policies: tuple[PhasePolicy, PhasePolicy]


def lowest_idle_power_w(profile: Profile) -> float:
    """Power of a GPU that belongs to no instance: idle at the card's lowest clock [W]."""
    vector = profile.compile(profile.tensor_parallel_degrees[0], profile.clocks_mhz[:1], 1)
    return float(idle_power_w(vector, 0))


class Simulator:
    """One modelled cluster serving one trace.

    Args:
        settings: the cluster.
        profile: what iterations truly cost.
        placement: the instances at the start.
        trace: the requests.
        clocks_mhz: ascending list of the clocks that may occur.
        slo: told to policies; nothing else depends on it.
        seed: of clock-switch durations and random routing.
        predicted: what controllers believe iterations cost; the truth if None.
        only: serve a single phase ("prefill": requests are finished at their first token; "decode": they arrive with
            their first token out and their KV at hand).
        log_events: keep so many events for ``events``.
        switching: how clocks switch, in place of the preset that ``settings`` names.
        capacity: room for so many lanes, those of later placements included (it grows on demand).

    Raises:
        PlacementError, ProfileError, ClusterError: the parts do not fit together.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        profile: Profile,
        placement: Placement,
        trace: Trace,
        clocks_mhz: Sequence[int],
        slo: SloSettings,
        seed: int | np.random.SeedSequence = 0,
        predicted: Profile | None = None,
        only: Phase | None = None,
        log_events: int = 0,
        capacity: int = 0,
        switching: SwitchingSettings | None = None,
    ) -> None:
        self.settings = settings
        self.profile = profile
        self.clocks_mhz = tuple(sorted(set(clocks_mhz)))
        self._predicted = predicted
        self._transfer = load_preset(TransferSettings, "transfer", settings.transfer)
        self._phases: tuple[Phase, ...] = PHASES if only is None else (only,)
        self._prefill = PhasePolicy(function=hold)
        self._decode = PhasePolicy(function=hold)
        self._lanes: dict[int, Lane] = {}
        self._model_spans: Spans = {}
        self._predicted_spans: Spans = {}
        self._handle: tuple[Handle, State, Any, Any] | None = None
        self._blocks = Blocks()
        check_placement(
            placement, profile.tensor_parallel_degrees, settings.nodes, settings.gpus_per_node, self._phases
        )
        lanes = layout(placement, settings.nodes, settings.gpus_per_node)
        self.state = empty_state(
            len(trace), settings.nodes, max(capacity, len(lanes)), settings.batching.max_decode_sequences, log_events
        )
        self._fill_arrivals(trace)
        self._fill_globals(slo, only, switching or settings.switching_settings())
        self._fill_seeds(seed)
        for lane in lanes:
            self._add_lane(lane)
        self._set_largest()
        for number in range(len(lanes)):
            engine.place_at_once(self.state, number)

    # -- building ------------------------------------------------------------------------------------------------------

    def _fill_arrivals(self, trace: Trace) -> None:
        engine.fill_arrivals(self.state.arrivals, trace.arrival_s, trace.prompt_tokens, trace.output_tokens)

    def _fill_seeds(self, seed: int | np.random.SeedSequence) -> None:
        if not isinstance(seed, np.random.SeedSequence) and seed < 0:
            raise ClusterError(f"seed is {seed}, expected a whole number of at least 0")
        streams = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        self.state.glob["rng_switching"], self.state.glob["rng_routing"] = streams.generate_state(2, np.uint64)

    def _fill_globals(self, slo: SloSettings, only: Phase | None, switching: SwitchingSettings) -> None:
        settings, glob = self.settings, self.state.glob[0]
        batching, routing = settings.batching, settings.routing
        glob["prefill_token_budget"] = batching.prefill_token_budget
        glob["chunked_prefill"] = batching.chunked_prefill
        glob["max_decode_sequences"] = batching.max_decode_sequences
        glob["full_admission"] = batching.decode_admission == "full"
        glob["preempt"] = batching.preemption == "recompute" and batching.decode_admission == "current"
        glob["extra_decode_iteration"] = batching.decode_iterations == "output-length"
        glob["arrivals_at_decode"] = only == "decode"
        glob["prefill_only"] = only == "prefill"
        glob["router_prefill"] = ROUTERS.index(routing.prefill)
        glob["router_decode"] = ROUTERS.index(routing.decode)
        glob["decode_load_counts_running"] = routing.decode_load == "requests"
        # What a policy can keep of TTFT is the part that the cluster spends.
        glob["ttft_slo_s"], glob["tpot_slo_s"] = slo.ttft_s - 1e-3 * settings.serving_overhead_ms, slo.tpot_s
        glob["overrun_margin"] = settings.overrun_margin
        glob["prediction_is_exact"] = self._predicted is None
        glob["clocks"] = len(self.clocks_mhz)
        glob["switch_median_s"] = switching.median_ms * 1e-3
        glob["switch_sigma"] = switching.sigma
        glob["settle_s"] = switching.settle_ms * 1e-3
        transfer = self._transfer
        glob["transfer_latency_s"] = transfer.launch_latency_s
        glob["kv_bytes_per_token"] = self.profile.kv_bytes_per_token
        glob["bytes_per_s_within_node"] = transfer.bytes_per_s(1, 1, True)
        glob["bytes_per_s_between_nodes"] = transfer.bytes_per_s(1, 1, False)
        glob["gpus"] = settings.gpus
        glob["unallocated_w_per_gpu"] = lowest_idle_power_w(self.profile)
        self.state.node["free_gpus"] = settings.gpus_per_node

    def _span(self, spec: InstanceSpec, believed: bool) -> tuple[int, int]:
        """Where an instance's compiled profile lies in ``models`` (or ``predicted``); compiled when first needed."""
        spans = self._predicted_spans if believed else self._model_spans
        whole = self._predicted if believed and self._predicted is not None else self.profile
        profile = whole.for_phase(spec.phase)
        key = (profile.precision, spec.tp)
        if key not in spans:
            vector = profile.compile(spec.tp, self.clocks_mhz, self.settings.batching.max_decode_sequences)
            name = "predicted" if believed else "models"
            present = getattr(self.state, name) if spans else np.zeros(0)
            spans[key] = (len(present), len(present) + len(vector))
            self.state = self.state._replace(**{name: np.concatenate([present, vector])})
        return spans[key]

    def _kv_capacity(self, spec: InstanceSpec) -> int:
        batching = self.settings.batching
        forced = batching.prefill_kv_tokens if spec.phase == "prefill" else batching.decode_kv_tokens
        if forced is not None:
            return forced
        tokens = self.profile.kv_capacity_for(spec.phase, spec.tp, spec.pp) // spec.pp
        if tokens <= 0:
            fitting = [
                tp
                for tp in self.profile.tensor_parallel_degrees
                if self.profile.kv_capacity_for(spec.phase, tp, spec.pp) > 0
            ]
            precision = self.profile.for_phase(spec.phase).precision
            raise ClusterError(
                f"{self.profile.model_name} in {precision} does not fit a {spec.phase} instance of "
                f"TP{spec.tp}; TP degrees that do: {fitting}"
            )
        return tokens

    def clock_index(self, clock_mhz: int) -> int:
        """Position of a clock in the run's list.

        Raises:
            ClusterError: the run has no such clock; the nearest is named.
        """
        if clock_mhz not in self.clocks_mhz:
            closest = min(self.clocks_mhz, key=lambda clock: abs(clock - clock_mhz))
            raise ClusterError(
                f"the run has no clock {clock_mhz} MHz; the nearest is {closest} (valid: {list(self.clocks_mhz)})"
            )
        return self.clocks_mhz.index(clock_mhz)

    def _add_lane(self, lane: Lane) -> int:
        number = int(self.state.glob[0]["instances"])
        if number == len(self.state.inst):
            self._grow()
        spec = lane.spec
        capacity_tokens = self._kv_capacity(spec)
        span, believed = self._span(spec, False), self._span(spec, True)
        inst = self.state.inst[number]
        inst["phase"] = PREFILL if spec.phase == "prefill" else DECODE
        inst["tp"], inst["node"] = spec.tp, lane.node
        inst["pp"], inst["first_lane"] = spec.pp, number - lane.number
        inst["handover_s"], inst["handover_s_per_token"] = self._handover_s(lane)
        inst["model_start"], inst["model_stop"] = span
        inst["predicted_start"], inst["predicted_stop"] = believed
        inst["kv_capacity"] = capacity_tokens
        inst["weight"] = spec.weight / spec.pp
        inst["clock"] = inst["target"] = self.clock_index(spec.clock_mhz)
        replacement = self.settings.replacement
        weight_bytes = self.profile.for_phase(spec.phase).weight_bytes
        inst["load_s"] = weight_bytes / (spec.tp * spec.pp * replacement.load_gb_per_s * 1e9) + replacement.start_s
        inst["load_extra_w"] = replacement.start_power_w
        self.state.glob[0]["instances"] = number + 1
        self._lanes[number] = lane
        return number

    def _handover_s(self, lane: Lane) -> tuple[float, float]:
        """What the hand-overs between stages take in one pass, and per token of its batch [s]."""
        spec = lane.spec
        token_bytes = ACTIVATION_BYTES * self.profile.model.hidden_size
        per_token_s = token_bytes / self._transfer.bytes_per_s(spec.tp, spec.tp, lane.one_node)
        return (spec.pp - 1) * self._transfer.stage_latency_s, (spec.pp - 1) * per_token_s

    def _grow(self) -> None:
        """Twice the room for lanes; every running timer is carried over."""
        old = self.state
        nodes, held = len(old.node), len(old.inst)
        new = empty_state(0, nodes, 2 * held, old.slack_s.shape[1])
        old_leaves, new_leaves = len(old.tree_s) // 2, len(new.tree_s) // 2
        old_times = old.tree_s[old_leaves:]
        leaves = new.tree_s[new_leaves:]
        leaves[: nodes + held] = old_times[: nodes + held]
        leaves[nodes + 2 * held : nodes + 3 * held] = old_times[nodes + held : nodes + 2 * held]
        for position in range(new_leaves - 1, 0, -1):
            left = 2 * position
            winner = left if new.tree_s[left] <= new.tree_s[left + 1] else left + 1
            new.tree_s[position], new.tree_entity[position] = new.tree_s[winner], new.tree_entity[winner]
        for name in ("inst", "finishing", "slack_s"):
            getattr(new, name)[:held] = getattr(old, name)
        new.route_heap[:, :held] = old.route_heap
        memory = np.zeros((2 * held, old.memory.shape[1]))
        memory[:held] = old.memory
        head = int(old.glob[0]["dirty_next"])
        new.dirty[:held] = np.roll(old.dirty, -head)
        glob = old.glob
        glob["dirty_next"], glob["capacity"], glob["leaves"] = 0, 2 * held, new_leaves
        self.state = old._replace(
            glob=glob,
            inst=new.inst,
            tree_s=new.tree_s,
            tree_entity=new.tree_entity,
            finishing=new.finishing,
            slack_s=new.slack_s,
            route_heap=new.route_heap,
            dirty=new.dirty,
            memory=memory,
        )

    def _set_largest(self) -> None:
        """Greatest KV capacity of the placement by phase: what fits nowhere is rejected."""
        inst = self.state.inst
        serving = np.isin(inst["status"], (AWAITING_GPUS, LOADING, ACTIVE))
        if not serving.any():
            serving = np.arange(len(inst)) < len(self._lanes)
        for phase, name in ((PREFILL, "largest_prefill_kv"), (DECODE, "largest_decode_kv")):
            self.state.glob[0][name] = inst["kv_capacity"][serving & (inst["phase"] == phase)].max(initial=0)

    def anew(self, trace: Trace, seed: int | np.random.SeedSequence) -> Simulator:
        """What a new simulator of the same cluster, placement and policies would be for another trace and seed.

        Compiled profiles are shared, presets are not read again: a tenth of the time of building one. Memory of those
        made so before that are gone is used again.

        Raises:
            ClusterError: this one has run already, or the seed is negative.
        """
        if self.now_s > 0.0 or self.state.glob[0]["arrived"] > 0:
            raise ClusterError(f"anew: this simulator has run, to {self.now_s:.6f} s")
        twin = copy.copy(self)
        state, nothing = self.state, np.zeros(0)
        bare = state._replace(arrivals=state.arrivals[:0], req=state.req[:0], models=nothing, predicted=nothing)
        arrivals, req = request_arrays(len(trace), self._blocks)
        twin.state = copy_state(bare)._replace(
            arrivals=arrivals, req=req, models=state.models, predicted=state.predicted
        )
        twin.state.glob["requests"] = len(trace)
        twin._lanes = dict(self._lanes)
        twin._model_spans, twin._predicted_spans = dict(self._model_spans), dict(self._predicted_spans)
        twin._fill_arrivals(trace)
        twin._fill_seeds(seed)
        return twin

    # -- driving -------------------------------------------------------------------------------------------------------

    def handle(self) -> Handle:
        """How compiled loops reach this simulator (biscale_gym.cluster.handle).

        Valid until its arrays or policies are replaced (``set_policies``, ``reconfigure``, ``restore``); not a copy.

        Raises:
            TypeError: a policy is not compiled for ``policy.POLICY_SIGNATURE``.
        """
        made_of = (self.state, self._prefill.function, self._decode.function)
        if self._handle is None or any(old is not new for old, new in zip(self._handle[1:], made_of, strict=True)):
            self._handle = (handle_of(*made_of), *made_of)
        return self._handle[0]

    @property
    def room_bytes(self) -> int:
        """How much room ``settle`` takes."""
        return room_bytes(self.state)

    def settle(self, room: npt.NDArray[np.uint8]) -> None:
        """Keep what every event touches in ``room`` from now on, until lanes are added beyond ``capacity``.

        Many simulators that take turns are faster side by side. Where the room is too small nothing changes.
        """
        if self.room_bytes <= len(room):
            self.state = settled(self.state, room)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the handle, whose addresses are this object's, and memory to be reused."""
        return {**self.__dict__, "_handle": None, "_blocks": Blocks()}

    def set_policies(
        self, prefill: PhasePolicy | None, decode: PhasePolicy | None, only_when_told: bool = False
    ) -> None:
        """Who decides clocks from now on; None holds each instance's clock.

        Args:
            prefill: the policy of prefill instances.
            decode: that of decode instances.
            only_when_told: ask them in ``ask_everyone`` alone, at no decision point of the engine's.
        """
        glob = self.state.glob[0]

        def mode(policy: PhasePolicy | None) -> int:
            if policy is None or only_when_told:
                return HOLD
            return EXTERNAL if policy.function is None else COMPILED

        glob["mode_prefill"], glob["mode_decode"] = mode(prefill), mode(decode)
        self._prefill = prefill if prefill is not None and prefill.function is not None else PhasePolicy(function=hold)
        self._decode = decode if decode is not None and decode.function is not None else PhasePolicy(function=hold)
        glob["ask_on_arrival"] = prefill is not None and prefill.on_arrival
        glob["ask_on_overrun_prefill"] = prefill is not None and prefill.on_overrun
        glob["ask_on_overrun_decode"] = decode is not None and decode.on_overrun
        glob["ask_on_idle_prefill"] = prefill is not None and prefill.on_idle
        glob["ask_on_idle_decode"] = decode is not None and decode.on_idle
        if decode is not None and decode.slack and not glob["observe_slack"]:
            engine.note_slacks(self.state)
        glob["observe_slack"] = decode is not None and decode.slack
        self.state.obs[DECODE, features.SLACK_LEAST_S : features.SLACK_P50_S + 1] = 0.0
        self._widen_memory(max((policy.memory for policy in (prefill, decode) if policy is not None), default=0))
        self.state = self.state._replace(
            params_prefill=np.ascontiguousarray(self._prefill.params, dtype=np.float64),
            params_decode=np.ascontiguousarray(self._decode.params, dtype=np.float64),
        )

    def _widen_memory(self, numbers: int) -> None:
        """Room for so many numbers of every instance's memory, at least; what is remembered stays."""
        held = self.state.memory
        if numbers > held.shape[1]:
            memory = np.zeros((len(held), numbers))
            memory[:, : held.shape[1]] = held
            self.state = self.state._replace(memory=memory)

    def run(self, until_s: float = np.inf, answer: int | None = None) -> Decision | None:
        """Run to the next decision of the caller's (returned), or to ``until_s`` or the end (None).

        Events at exactly ``until_s`` have not happened yet.

        Args:
            until_s: where to stop.
            answer: clock index for the decision that the previous call returned.

        Raises:
            PolicyError: a policy raised, or answered with a clock that does not exist; the decision still waits.
            ClusterError: ``until_s`` is NaN, or an answer to no decision.
        """
        if math.isnan(until_s):
            raise ClusterError("run: until_s is nan, expected a time in seconds")
        glob = self.state.glob[0]
        clock = engine.NO_ANSWER
        if answer is not None:
            if glob["pending_instance"] < 0:
                raise ClusterError(f"run: answer {answer!r}, but no decision waits for one at {self.now_s:.6f} s")
            clock = self._checked_clock(answer, self._asked())
        try:
            reached = engine.advance_at(self.handle(), until_s, clock)
        except Exception as error:
            raise PolicyError(f"a clock policy failed at {self.now_s:.6f} s: {error!r}") from error
        if reached == engine.BAD_ANSWER:
            self._checked_clock(int(glob["bad_answer"]), self._asked())
        if reached != engine.DECISION:
            return None
        number = int(glob["pending_instance"])
        obs = self.state.obs[self.state.inst[number]["phase"]].copy()
        return Decision(number, self._phase_of(number), int(glob["pending_reason"]), obs)

    def ask_everyone(self) -> None:
        """Ask the policies about every instance that serves, now, whatever it is doing (reason INTERVAL, or IDLE).

        Raises:
            PolicyError: a policy raised, or answered with a clock that does not exist; earlier answers hold.
        """
        try:
            failed = engine.ask_everyone_at(self.handle())
        except Exception as error:
            raise PolicyError(f"a clock policy failed at {self.now_s:.6f} s: {error!r}") from error
        if failed >= 0:
            who = f"the {self._phase_of(failed)} policy, for instance {failed} at {self.now_s:.6f} s,"
            self._checked_clock(int(self.state.glob[0]["bad_answer"]), who)

    def _asked(self) -> str:
        """Who was asked for the pending decision, where and when."""
        number = int(self.state.glob[0]["pending_instance"])
        return f"the {self._phase_of(number)} policy, for instance {number} at {self.now_s:.6f} s,"

    def _checked_clock(self, answer: Any, who: str) -> int:
        """``answer`` as an index into the clock list.

        Raises:
            PolicyError: it is none; the nearest is named.
        """
        top = len(self.clocks_mhz) - 1
        try:
            index = operator.index(answer)
        except TypeError:
            index = -1
        if 0 <= index <= top:
            return index
        valid = f"valid: 0 to {top} ({list(self.clocks_mhz)} MHz)"
        if isinstance(answer, (int, float, np.integer, np.floating)) and not math.isnan(answer):
            valid = f"the nearest is {round(min(max(answer, 0), top))}; {valid}"
        raise PolicyError(f"{who} answered {answer}, which is no clock index; {valid}")

    def _phase_of(self, number: int) -> Phase:
        return "prefill" if self.state.inst[number]["phase"] == PREFILL else "decode"

    def set_clock(self, number: int, clock: int) -> None:
        """Ask for a clock (an index) on an instance now, outside any decision point.

        Raises:
            PolicyError: no such clock; the nearest is named.
            ClusterError: no such instance, or one that is not there (any more).
        """
        index = self._checked_clock(clock, f"set_clock for instance {number}")
        status = self.state.inst["status"]
        present = [one for one in self._lanes if status[one] in (LOADING, ACTIVE, DRAINING)]
        if number not in present:
            raise ClusterError(f"set_clock: no instance {number} is running; valid: {present}")
        ask_clock(self.state, number, index)

    def reconfigure(self, placement: Placement) -> None:
        """Change the placement now (docs/cluster.md, Windows and re-placement).

        Raises:
            PlacementError, ProfileError, ClusterError: it cannot be; nothing has changed then.
        """
        settings = self.settings
        check_placement(
            placement, self.profile.tensor_parallel_degrees, settings.nodes, settings.gpus_per_node, self._phases
        )
        for spec in placement.instances:
            self._kv_capacity(spec)
            self.clock_index(spec.clock_mhz)
            self._span(spec, False)
            self._span(spec, True)
        status = self.state.inst["status"]
        running = [
            (number, lane) for number, lane in self._lanes.items() if status[number] in (AWAITING_GPUS, LOADING, ACTIVE)
        ]
        change = transition(running, placement, settings.nodes, settings.gpus_per_node)
        started = [self._add_lane(lane) for lane in change.start]
        for number in change.leave:
            engine.retire(self.state, number)
        at_once = settings.replacement.mode == "instant"
        for number in started:
            if at_once:
                engine.place_at_once(self.state, number)
            else:
                self.state.inst[number]["status"] = AWAITING_GPUS
        self._set_largest()
        for number, spec in change.keep:
            self._lanes[number] = replace(self._lanes[number], spec=spec)
            self.state.inst[number]["weight"] = spec.weight / spec.pp
            self._apply_base_clock(number, self.clock_index(spec.clock_mhz))
        engine.route_common_queues(self.state)
        for number in change.leave:
            engine.return_requests(self.state, number)
        for node in range(settings.nodes):
            engine.start_waiting_instances(self.state, node)

    def _apply_base_clock(self, number: int, clock: int) -> None:
        """Where nobody decides, a kept instance moves to its new base clock; one without GPUs yet will start at it."""
        glob, inst = self.state.glob[0], self.state.inst[number]
        mode = glob["mode_prefill"] if inst["phase"] == PREFILL else glob["mode_decode"]
        if mode != HOLD:
            return
        if inst["status"] == AWAITING_GPUS:
            inst["clock"] = inst["target"] = clock
        else:
            ask_clock(self.state, number, clock)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        """The engine's time."""
        return float(self.state.glob[0]["now_s"])

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Every lane that ever was, in instance order."""
        return tuple(self._lanes.values())

    def requests(self) -> RequestLedger:
        """The requests' ledger (a copy)."""
        return read_requests(self.state)

    def instances(self) -> InstanceLedger:
        """The instances' ledger up to now (a copy)."""
        return read_instances(self.state)

    def counts(self) -> dict[str, int]:
        """Requests that arrived, finished, were rejected, and are in flight."""
        glob = self.state.glob[0]
        arrived, finished, rejected = (int(glob[name]) for name in ("arrived", "finished", "rejected"))
        return {
            "arrived": arrived,
            "finished": finished,
            "rejected": rejected,
            "in_flight": arrived - finished - rejected,
        }

    @property
    def events(self) -> npt.NDArray[Any]:
        """The logged events, in order (state.EVENT)."""
        return self.state.log[: int(self.state.glob[0]["log_n"])].copy()

    def snapshot(self) -> Snapshot:
        """An exact copy of everything that running, re-placing or another policy changes."""
        return Snapshot(
            copy_state(self.state),
            dict(self._lanes),
            dict(self._model_spans),
            dict(self._predicted_spans),
            (self._prefill, self._decode),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this simulator; it stays usable."""
        if [array.shape for array in snapshot.state] != [array.shape for array in self.state]:
            self.state = copy_state(snapshot.state)
        else:
            restore_state(self.state, snapshot.state)
        self._lanes = dict(snapshot.lanes)
        self._model_spans = dict(snapshot.model_spans)
        self._predicted_spans = dict(snapshot.predicted_spans)
        self._prefill, self._decode = snapshot.policies
