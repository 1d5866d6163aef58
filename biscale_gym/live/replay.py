"""One run: a trace's requests, open loop, through live prefill and decode workers.

Each request takes two hops. A prefill worker computes its prompt and the first token, and answers where the KV lies; a
decode worker fetches the KV and makes all its tokens, the first once more. As in ``metrics``, TTFT is the time to the
prefill worker's token, and the tokens after it are the decode worker's second and later ones.

A worker that dies or hangs is replaced. What it had is served from the start again, a bounded number of times; a prompt
whose KV died with its prefill worker likewise. Latencies are those of the attempt that finished, counted from the
request's arrival.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.control.controllers import PlanContext
from biscale_gym.live import messages as m
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Died, Pool, WorkerProcess, all_sources, clock_mode
from biscale_gym.live.records import read_records
from biscale_gym.live.routing import next_of, start_level
from biscale_gym.live.served import Served, ledger_of
from biscale_gym.live.status import Status
from biscale_gym.live.vllm_adapter.engine import Output
from biscale_gym.live.vllm_adapter.options import FETCHED, PREFILL_PARAMS
from biscale_gym.traces import Trace

FloatArray = npt.NDArray[np.float64]
Watcher = Callable[[str, int, WorkerProcess], None]
"""Told of (``prefill`` or ``decode``, the request's number, the worker) just before a request is sent there."""

LEAD_S = 0.2
"""From the last worker's readiness to time 0 of the run."""
TURN_S = 0.05
REPORT_LIMIT_S = 30.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run.

    Attributes:
        controller: whose policies ran.
        requests: the ledger, times from the start of the run.
        itl_s: float64[any], times between consecutive tokens of finished requests.
        lag_s: float64[R], how late the client sent each request, NaN if never.
        states: how many requests ended ``finished``, ``failed``, ``rejected``, ``unfinished``.
        retried: attempts beyond the first.
        replaced: workers that died and were replaced, with why.
        energy_j: of all workers, from time 0 to ``end_s``; what a dead worker drew after its last message is missing.
        source: whether it was measured or modelled; nobody adds the one to the other.
        mode: whether clocks were set (``control``) or ``observe-only``.
        end_s: the trace's end or the last token, whichever is later.
        prompt_tokens: of requests whose decode finished.
        prompt_tokens_by_source: what decode workers did for their prompts: fetched KV, or computed.
        first_tokens_agree: whether decode's first token was prefill's in every finished request.
        control_s: float64[iterations], control time on record.
        records_dropped: iterations that are not on record.
    """

    controller: str
    requests: RequestLedger
    itl_s: FloatArray
    lag_s: FloatArray
    states: dict[str, int]
    retried: int
    replaced: tuple[str, ...]
    energy_j: float
    source: str
    mode: str
    end_s: float
    prompt_tokens: int
    prompt_tokens_by_source: dict[str, int]
    first_tokens_agree: bool
    control_s: FloatArray
    records_dropped: int

    def figures(self) -> dict[str, float]:
        """What of it is no figure of ``metrics.measure``, units in the names; of nothing, nothing."""
        found: dict[str, float] = {
            "requests_failed": self.states["failed"],
            "requests_unfinished": self.states["unfinished"],
            "requests_retried": self.retried,
            "workers_replaced": len(self.replaced),
            "prompt_tokens_transferred": self.prompt_tokens_by_source.get(FETCHED, 0),
            "prompt_tokens_decoded": self.prompt_tokens,
        }
        for name, values_s, percents in (
            ("itl", self.itl_s, (50, 90, 99)),
            ("client_lag", self.lag_s[np.isfinite(self.lag_s)], (50, 99)),
            ("control", self.control_s, (50, 99)),
        ):
            if values_s.size:
                found |= {f"{name}_p{percent}_s": float(np.percentile(values_s, percent)) for percent in percents}
        return found


@dataclass(slots=True)
class Tally:
    """What the client counts of one worker.

    Attributes:
        routed: requests sent there.
        completed: of them, whose phase was completed; an attempt that a worker's death undid later still counts.
        late: of those, whose phase broke its SLO.
        sent: (prompt tokens, arrival) of those sent to its present process.
        lost: what its former processes had shown last.
        weight, turn: for ``routing``.
    """

    routed: int = 0
    completed: int = 0
    late: int = 0
    sent: list[tuple[int, float]] = field(default_factory=list)
    lost: list[Status] = field(default_factory=list)
    weight: float = 1.0
    turn: float = 0.0


class Replay:
    """One run in progress.

    Args:
        pool: the workers, all up.
        trace: arrival times are kept, whatever the workers do.
        controller: ``NAME`` or ``NAME[KEY=VALUE,...]``, installed or ``module:Class``; None: every clock is held.
        context: what it knows; its scenario says how long the run may drain.
        folder: for records, one file per worker.
        seed: of the prompts' token ids.
        watcher: see ``Watcher``.
        governed: the controller's phases; the other phases' clocks are held, until ``hold`` names others.
        duration_s: how long the run lasts at least; None: the scenario's duration.
        held_mhz: by worker, the clock that is held at first; elsewhere the scenario's top clock.
        watched: whether workers show their status.

    Attributes:
        lock: of what other threads read while ``run`` runs in one of its own: counts and times of requests.
        started: set when the run's time is known: ``origin_s``, on ``time.monotonic``'s scale.
        tallies: by worker.

    Raises:
        ControllerError: no such controller.
    """

    def __init__(
        self,
        pool: Pool,
        trace: Trace,
        controller: str | None,
        context: PlanContext,
        folder: Path,
        seed: int = 0,
        watcher: Watcher | None = None,
        *,
        governed: Sequence[Phase] = PHASES,
        duration_s: float | None = None,
        held_mhz: Mapping[str, int] | None = None,
        watched: bool = False,
    ) -> None:
        self._pool, self._context, self._folder, self._seed = pool, context, folder, seed
        self._controller, self._watcher = controller, watcher
        self._variant = None if controller is None else m.Variant.parsed(controller)
        if self._variant is not None:
            self._variant.make()  # refused here, if at all
        self._governed, self._watched = governed, watched
        self._held_mhz = {each.setup.name: context.scenario.top_clock_mhz for each in pool.workers} | dict(
            held_mhz or {}
        )
        scenario = context.scenario
        self._duration_s = scenario.duration_s if duration_s is None else duration_s
        self._ttft_slo_s = scenario.slo.ttft_s - 1e-3 * scenario.cluster.serving_overhead_ms
        self.lock = threading.Lock()
        self.started = threading.Event()
        self.origin_s = 0.0
        self.tallies = {each.setup.name: Tally(weight=each.setup.weight) for each in pool.workers}
        self._stopping = False
        columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
        self._served = [Served(number, *row) for number, row in enumerate(zip(*columns, strict=True))]
        self._active: dict[str, Served] = {}
        self._queues: dict[Phase, deque[Served]] = {phase: deque() for phase in PHASES}
        self._records: list[Path] = []
        self._energy_j: dict[str, float] = {}  # of the present process of each worker
        self._lost_j = 0.0
        self._retried = 0
        self._replaced: list[str] = []

    def _now_s(self) -> float:
        return time.monotonic() - self.origin_s

    def stop(self) -> None:
        """Let ``run`` end soon, from another thread; what is in flight is given up."""
        self._stopping = True

    def hold(self, worker: WorkerProcess, clock_mhz: int) -> None:
        """Let a worker whose phase nobody governs hold a clock, before its next batch; returns at once."""
        self._held_mhz[worker.setup.name] = clock_mhz
        if worker.serving:  # else it begins with this clock
            worker.send(m.Clock(clock_mhz))

    def run(self) -> Outcome:
        """Serve the trace.

        Raises:
            LiveError: a worker died more often than it may.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for worker in self._pool.workers:
            worker.restarts = 0
            if worker.up:
                self._begin(worker)
        while not all(worker.serving for worker in self._pool.workers) and not self._stopping:
            self._listen(TURN_S)
        self.origin_s = time.monotonic() + LEAD_S
        for worker in self._pool.workers:
            worker.send(m.Go(self.origin_s))
        self.started.set()
        limit_s = self._duration_s + self._context.scenario.drain_limit_s
        coming = deque(self._served)
        while (coming or self._active or any(self._queues.values())) and not self._stopping:
            now_s = self._now_s()
            if now_s > limit_s:
                break
            while coming and coming[0].arrival_s <= now_s:
                with self.lock:
                    self._arrive(coming.popleft())
            until_s = coming[0].arrival_s - self._now_s() if coming else TURN_S
            self._listen(min(TURN_S, max(0.0, until_s)))
        end_s = max(self._duration_s, self._now_s())
        while self._now_s() < end_s and not self._stopping:
            self._listen(min(TURN_S, max(0.0, end_s - self._now_s())))
        self._give_up()
        return self._outcome(self._reports(), end_s)

    def _give_up(self) -> None:
        """Let the workers forget what is still in flight, so that the next run finds them empty."""
        for served in self._active.values():
            self._worker(served.worker).send(m.Abort(served.id))

    def _worker(self, name: str) -> WorkerProcess:
        return next(each for each in self._pool.workers if each.setup.name == name)

    def _begin(self, worker: WorkerProcess) -> None:
        path = self._folder / f"{worker.setup.name}{f'.{worker.restarts}' if worker.restarts else ''}.csv"
        self._records.append(path)
        self._energy_j[worker.setup.name] = 0.0
        name, governed = worker.setup.name, worker.setup.phase in self._governed
        variant = self._variant if governed else None
        self.tallies[name].sent = []
        worker.send(m.Run(variant, self._context, path, self._held_mhz[name], self._watched))

    # -- requests ------------------------------------------------------------------------------------------------------

    def _arrive(self, served: Served) -> None:
        settings = self._pool.settings
        served.sent_s = self._now_s()
        if served.prompt_tokens + served.output_tokens > settings.max_model_len:
            served.state = "rejected"
            return
        served.state = "unfinished"
        self._send(served, "prefill")

    def _send(self, served: Served, phase: Phase) -> None:
        """To the phase's next worker, or into the queue while there is none."""
        workers = self._pool.of(phase)
        if not workers:
            self._queues[phase].append(served)
            return
        chosen = next_of([self.tallies[each.setup.name] for each in workers])
        worker = next(each for each in workers if self.tallies[each.setup.name] is chosen)
        served.stage, served.worker = phase, worker.setup.name
        self._active[served.id] = served
        if self._watcher is not None:
            self._watcher(phase, served.number, worker)
        kv_params, output_tokens, first_token_s = served.kv_params, served.output_tokens, 0.0
        if phase == "prefill":
            served.prefill_sent_s, served.prefilled_by = self._now_s(), worker.setup.name
            kv_params, output_tokens = (PREFILL_PARAMS if served.output_tokens > 1 else None), 1
        else:
            first_token_s = served.token_s[0]
        tally = self.tallies[worker.setup.name]
        tally.routed += 1
        tally.sent.append((served.prompt_tokens, served.arrival_s))
        prompt = served.prompt(self._seed, self._pool.dimensions.vocabulary)
        worker.send(m.Add(served.id, prompt, output_tokens, kv_params, served.arrival_s, first_token_s))

    def _send_late(self, served: Served, phase: Phase) -> None:
        """To a phase that has a worker again; KV that nobody fetched has been freed after its lease."""
        if phase == "decode" and self._now_s() - served.token_s[0] > self._pool.settings.kv_lease_s:
            self._again(served)
        else:
            self._send(served, phase)

    def _again(self, served: Served) -> None:
        """Serve a request from the start, if it may have another attempt."""
        self._active.pop(served.id, None)
        if served.attempt == self._pool.settings.retries:
            served.state = "failed"
            return
        self._retried += 1
        served.attempt += 1
        served.token_s, served.made, served.kv_params = [], 0, None
        self._send(served, "prefill")

    # -- workers -------------------------------------------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> None:
        for worker, message in self._pool.messages(timeout_s):
            with self.lock:
                self._hear(worker, message)
            if isinstance(message, Died):
                return  # the other workers are heard again in the next turn

    def _hear(self, worker: WorkerProcess, message: object) -> None:
        match message:
            case m.Tokens():
                for output in message.outputs:
                    self._take(output)
            case m.Alive():
                self._energy_j[worker.setup.name] = message.energy_j
            case m.Ready():
                self._begin(worker)
            case m.Begun() if self.origin_s:
                others = [each for each in self._pool.of(worker.setup.phase) if each is not worker]
                start_level(self.tallies[worker.setup.name], [self.tallies[each.setup.name] for each in others])
                worker.send(m.Go(self.origin_s))
                waiting = self._queues[worker.setup.phase]
                for _ in range(len(waiting)):
                    self._send_late(waiting.popleft(), worker.setup.phase)
            case Died():
                self._mourn(worker, message.why)

    def _take(self, output: Output) -> None:
        served = self._active.get(output.request)
        if served is None:
            return  # of an attempt that was given up
        now_s = self._now_s()
        if output.failed:
            self._again(served)
            return
        if served.stage == "prefill":
            self._prefilled(served, output, now_s)
            return
        for token in output.tokens:
            served.made += 1
            if served.made == 1:
                served.agrees = token == served.first_token
            else:
                served.token_s.append(now_s)
        if output.finished:
            del self._active[served.id]
            if served.made != served.output_tokens:
                raise LiveError(f"request {served.number} has {served.made} tokens in place of {served.output_tokens}")
            served.state = "finished"
            tally = self.tallies[served.worker]
            tally.completed += 1
            tpot_slo_s = self._context.scenario.slo.tpot_s
            tally.late += now_s - served.token_s[0] > tpot_slo_s * (served.output_tokens - 1)

    def _prefilled(self, served: Served, output: Output, now_s: float) -> None:
        if not output.finished:
            return
        served.token_s, served.first_token = [now_s], output.tokens[0]
        served.kv_params = output.kv_params
        tally = self.tallies[served.worker]
        tally.completed += 1
        tally.late += now_s - served.arrival_s > self._ttft_slo_s
        del self._active[served.id]
        if served.output_tokens == 1:
            served.state = "finished"
        else:
            self._send(served, "decode")

    def _mourn(self, dead: WorkerProcess, why: str) -> None:
        name = dead.setup.name
        self._replaced.append(why)
        self._lost_j += self._energy_j.pop(name, 0.0)
        self.tallies[name].lost.append(dead.status)
        self._pool.replace(dead, why)
        waiting = self._queues["decode"]
        for served in [each for each in waiting if each.prefilled_by == name]:
            waiting.remove(served)
            self._again(served)
        for served in list(self._active.values()):
            if served.worker == name:
                self._again(served)
            elif served.stage == "decode" and served.prefilled_by == name and served.made == 0:
                # Its KV may have gone down with the prefill worker.
                self._worker(served.worker).send(m.Abort(served.id))
                self._again(served)

    def _reports(self) -> list[tuple[WorkerProcess, m.Report]]:
        # A worker that is still starting has nothing to report of this run.
        awaited = {worker.setup.name for worker in self._pool.workers if worker.serving}
        for worker in self._pool.workers:
            if worker.serving:
                worker.send(m.EndRun())
        reports: list[tuple[WorkerProcess, m.Report]] = []
        limit_s = time.monotonic() + REPORT_LIMIT_S
        while awaited and time.monotonic() < limit_s:
            for worker, message in self._pool.messages(TURN_S):
                if isinstance(message, m.Report):
                    reports.append((worker, message))
                    awaited.discard(worker.setup.name)
                    self._energy_j.pop(worker.setup.name, None)
                elif isinstance(message, Died):
                    self._mourn(worker, message.why)
                    awaited.discard(worker.setup.name)
                    break
        self._lost_j += sum(self._energy_j.values())
        return reports

    # -- what came of it -----------------------------------------------------------------------------------------------

    def _outcome(self, reports: list[tuple[WorkerProcess, m.Report]], end_s: float) -> Outcome:
        states = dict.fromkeys(("finished", "failed", "rejected", "unfinished"), 0)
        for served in self._served:
            state = "unfinished" if served.state == "expected" else served.state
            states[state] += 1
        finished = [served for served in self._served if served.state == "finished"]
        decoded = [served for served in finished if served.output_tokens > 1]
        gaps = [np.diff(served.token_s) for served in finished]
        decode_reports = [report for worker, report in reports if worker.setup.phase == "decode"]
        sources = {report.source for _, report in reports}
        return Outcome(
            controller=self._controller or "held",
            requests=self.ledger(),
            itl_s=np.concatenate(gaps) if gaps else np.zeros(0),
            lag_s=np.array([served.sent_s - served.arrival_s for served in self._served]),
            states=states,
            retried=self._retried,
            replaced=tuple(self._replaced),
            energy_j=self._lost_j + sum(report.energy_j for _, report in reports),
            source=next(iter(sources), ""),
            mode=clock_mode(self._pool.workers),
            end_s=end_s,
            prompt_tokens=sum(served.prompt_tokens for served in decoded),
            prompt_tokens_by_source=all_sources(decode_reports),
            first_tokens_agree=all(served.agrees for served in decoded),
            control_s=np.concatenate([read_records(path)["control_s"] for path in self._records if path.is_file()]),
            records_dropped=sum(report.records_dropped for _, report in reports),
        )

    def counts(self) -> dict[str, int]:
        """Requests that have arrived, finished, and were rejected or have failed, so far."""
        states = [served.state for served in self._served]
        return {
            "arrived": len(states) - states.count("expected"),
            "finished": states.count("finished"),
            "rejected": states.count("rejected") + states.count("failed"),
        }

    def ledger(self) -> RequestLedger:
        """The requests so far; a failed one counts as rejected."""
        return ledger_of(self._served, [worker.setup.name for worker in self._pool.workers])
