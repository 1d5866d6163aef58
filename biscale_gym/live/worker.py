"""A worker process: one vLLM engine, its device, and the governor between them.

Its loop takes messages from the parent, steps the engine, and sends what came of it. It ends when the parent does,
however the parent ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from biscale_gym.cluster.placement import PHASES
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.control.controllers import PlanContext, instance_policies
from biscale_gym.live import messages as m
from biscale_gym.live.device_choice import open_device
from biscale_gym.live.devices import NOTHING, Device
from biscale_gym.live.errors import LiveError
from biscale_gym.live.governor import Governor, InstanceSetting, Load, WaitingPrompt
from biscale_gym.live.records import RecordStream
from biscale_gym.live.setups import Setup
from biscale_gym.live.signals import ending_signals_raise
from biscale_gym.live.status import StatusWriter
from biscale_gym.live.vllm_adapter.engine import Engine, Output
from biscale_gym.live.vllm_adapter.scheduler import Batch

BEAT_S = 0.1
"""Period of ``Alive``."""
IDLE_WAIT_S = 0.02
EMPTY_STEP_S = 0.0005
"""Pause after a step that computed nothing, so that waiting for KV does not fill a core."""
ORPHAN_GRACE_S = 3.0
"""A worker whose parent is gone ends by itself within this, or is ended."""


@dataclass(slots=True)
class _Request:
    """A request that is here: queued, waiting for its KV, or running."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    first_token_s: float
    made: int = 0


class WorkerRun:
    """One run's part of a worker: device, governor, records, counts.

    Args:
        setup: of the worker.
        engine: hooked from now on.
        run: what the parent asks for.

    Attributes:
        notice: what there is to tell of its device.

    Raises:
        LiveError: its device cannot be opened, or does not have the run's clocks.
    """

    def __init__(self, setup: Setup, engine: Engine, run: m.Run) -> None:
        self.setup, self.engine = setup, engine
        context = run.context
        cluster, slo = context.scenario.cluster, context.scenario.slo
        self.slo_s = slo.tpot_s if setup.phase == "decode" else slo.ttft_s - 1e-3 * cluster.serving_overhead_ms
        policy: PhasePolicy | None = None
        if run.controller is not None:
            policy = instance_policies(run.controller.make(), context, "a live worker")[PHASES.index(setup.phase)]
        # Only now: until its first batch a device may hear nothing for as long as it takes to compile a policy.
        self.device, self.notice = self.open_device(context)
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.device)
            self.records = RecordStream(run.records)
            opened.callback(self.records.close)
            self.governor = self._governor(run, policy)
            opened.pop_all()
        self.status = StatusWriter(setup.block) if run.watched else None
        self.wants_slack = setup.phase == "decode" and (run.watched or (policy is not None and policy.slack))
        self.requests: dict[str, _Request] = {}  # in order of arrival here
        self.routed = self.completed = self.late = 0
        self.tokens_before = engine.prompt_tokens_by_source()
        self.began_j = 0.0
        self._empty = True
        engine.limit(run.token_budget)
        self.hook()

    def _governor(self, run: m.Run, policy: PhasePolicy | None) -> Governor:
        setup, context = self.setup, run.context
        instance = InstanceSetting(
            setup.phase,
            setup.tp,
            run.clock_mhz,
            self.slo_s,
            self.engine.kv_capacity_tokens,
            setup.token_budget,
            max_batch=setup.max_sequences,
        )
        return Governor(
            instance,
            policy,
            self.device,
            context.profile,
            context.clocks_mhz,
            self.records,
            setup.settings.stale_s,
        )

    def open_device(self, context: PlanContext) -> tuple[Device, str]:
        """The device, and what there is to tell of it."""
        setup = self.setup
        return open_device(setup.device, setup.name, setup.phase, setup.tp, context)

    def go(self, origin_s: float) -> None:
        """The run counts from ``origin_s`` on, on ``time.monotonic``'s scale."""
        self.governor.origin_s = origin_s
        self.began_j = self.device.reading().energy_j
        if self.status is not None:
            self.status.go(self.began_j)
            self._show(Load())

    def hold(self, clock_mhz: int) -> None:
        """Hold a clock from now on."""
        self.governor.hold(clock_mhz)

    def _show(self, load: Load) -> None:
        """Let the parent see the state at this boundary."""
        if self.status is not None:
            device = self.device
            self.status.boundary(load, self.governor.now_s(), device.reading(load.work), device.target_mhz)

    @property
    def energy_j(self) -> float:
        """Of the device since ``go``."""
        return self.device.reading().energy_j - self.began_j

    def note(self, add: m.Add) -> None:
        """Know of a request."""
        self.requests[add.request] = _Request(len(add.prompt), add.output_tokens, add.arrival_s, add.first_token_s)
        self.routed += 1

    def add(self, add: m.Add) -> None:
        """Queue a request."""
        self.note(add)
        self.engine.add(add.request, add.prompt.tolist(), add.output_tokens, add.kv_params)

    def abort(self, request: str) -> None:
        """Forget a request."""
        if self.requests.pop(request, None) is not None:
            self.engine.abort(request)

    def hook(self) -> None:
        """Let the engine ask for its clock before each batch, from now on."""
        self.engine.hook(self._before, self._after)

    def _before(self, batch: Batch) -> None:
        self._empty = not batch.tokens
        if self._empty and self.status is None:
            return
        load = self._load(batch)
        if not self._empty:
            self.governor.before(load)
        self._show(load)

    def _after(self, computed_s: float) -> None:
        if not self._empty:
            spent = self.governor.after(computed_s)
            if self.status is not None:
                self.status.ended(self.governor.work, spent, self.device.reading())

    @property
    def computed(self) -> bool:
        """Whether the last step computed anything."""
        return not self._empty

    def _load(self, batch: Batch) -> Load:
        decode = self.setup.phase == "decode"
        behind, waiting, oldest_s, slack_s = 0, [], float("inf"), []
        queue_tokens = 0
        now_s = self.governor.now_s()
        for name, request in self.requests.items():
            if name in batch.tokens:
                oldest_s = min(oldest_s, request.arrival_s)
                if self.wants_slack:
                    slack_s.append(request.first_token_s + self.slo_s * max(0, request.made - 1) - now_s)
            if decode:
                if name not in batch.tokens:
                    behind, queue_tokens = behind + 1, queue_tokens + request.prompt_tokens
                continue
            done = self.engine.computed_tokens(name)
            if done < request.prompt_tokens:
                waiting.append(WaitingPrompt(request.prompt_tokens, done, request.arrival_s))
                if done == 0:
                    behind, queue_tokens = behind + 1, queue_tokens + request.prompt_tokens
        return Load(
            batch.work,
            oldest_s,
            self.engine.kv_used_tokens,
            behind,
            queue_tokens,
            waiting,
            slack_s,
            self.routed,
            self.completed,
            self.late,
            len(batch.tokens),
        )

    def idle(self) -> None:
        """There is nothing to run."""
        load = self._load(Batch(NOTHING, {}))
        self.governor.idle(load)
        self._show(load)

    def take(self, outputs: Iterable[Output]) -> m.Tokens | None:
        """Count what an iteration brought; a message if there is anything to tell."""
        told = list(outputs)
        now_s = self.governor.now_s()
        for output in told:
            request = self.requests.get(output.request)
            if request is None:
                continue
            request.made += len(output.tokens)
            if output.finished:
                del self.requests[output.request]
                self.completed += not output.failed
                if self.setup.phase == "prefill":
                    self.late += now_s - request.arrival_s > self.slo_s
                else:
                    self.late += now_s - request.first_token_s > self.slo_s * (request.output_tokens - 1)
        return m.Tokens(now_s, told) if told else None

    def end(self) -> m.Report:
        """Close device and records, and report."""
        energy_j, flags = self.energy_j, self.device.reading().flags
        self.device.close()
        self.records.close()
        self.engine.limit(None)
        tokens = {
            source: count - self.tokens_before.get(source, 0)
            for source, count in self.engine.prompt_tokens_by_source().items()
        }
        return m.Report(
            energy_j,
            self.device.source,
            flags,
            tokens,
            self.records.written,
            self.records.dropped,
            self.governor.stale_decisions,
        )


def _serve(setup: Setup, connection: Connection) -> None:
    engine = Engine(setup)
    connection.send(m.Ready(engine.kv_capacity_tokens, engine.block_tokens))
    run: WorkerRun | None = None
    beat_s = 0.0
    try:
        while True:
            pause_s = 0.0 if engine.busy else IDLE_WAIT_S
            while connection.poll(pause_s):
                pause_s = 0.0
                message = connection.recv()
                match message:
                    case m.Add() if run is not None:
                        run.add(message)
                    case m.Abort() if run is not None:
                        run.abort(message.request)
                    case m.Run():
                        if run is not None:
                            run.end()  # the parent gave it up before it had begun
                            run = None
                        try:
                            run = WorkerRun(setup, engine, message)
                        except LiveError as error:
                            connection.send(m.Refused(str(error)))
                        else:
                            connection.send(m.Begun(run.device.source, run.device.mode, run.notice))
                    case m.Clock() if run is not None:
                        run.hold(message.clock_mhz)
                    case m.ReadMeters() if run is not None:
                        connection.send(m.Meters(run.device.meters()))
                    case m.Go() if run is not None:
                        run.go(message.origin_s)
                    case m.EndRun() if run is not None:
                        connection.send(run.end())
                        run = None
                    case m.Stop():
                        return
            if engine.busy:
                outputs = list(engine.step())
                told = run.take(outputs) if run is not None else None
                if told is not None:
                    connection.send(told)
                if run is None or not run.computed:
                    time.sleep(EMPTY_STEP_S)
            elif run is not None:
                run.idle()
            now_s = time.monotonic()
            if now_s - beat_s > BEAT_S:
                beat_s = now_s
                connection.send(m.Alive(0.0 if run is None else run.energy_j, engine.kv_used_tokens))
    finally:
        if run is not None:
            run.device.close()
            run.records.close()
        engine.close()


def _end_with_parent() -> None:
    """End this process when its parent is gone, even if the loop hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


def main(setup: Setup, connection: Connection) -> None:
    """A worker's life."""
    # Engines of several GPUs have processes of their own, which daemons may not have; they end with this group.
    multiprocessing.current_process().daemon = False
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with ending_signals_raise():
            _serve(setup, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except Exception:
        connection.send(m.Broken(traceback.format_exc()))
        raise
