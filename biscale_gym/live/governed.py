"""A governor inside a vLLM server that somebody else runs.

It is set up by a JSON or YAML file that ``$BISCALE_GYM_GOVERNOR`` names (or holds), opens the device, and governs every
batch of the server's scheduler. A client on the same machine speaks to it through a Unix socket in its folder, with the
messages that worker processes know: a run begins, with another controller perhaps, and ends with a report. Between
runs, and when the client is gone, the setting's own controller is in charge, or the top clock.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import ConfigError, Settings, read_yaml, validate
from biscale_gym.control.controllers import PlanContext, instance_policies
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live import messages as m
from biscale_gym.live.demand import prepared
from biscale_gym.live.device_choice import open_device
from biscale_gym.live.devices import NOTHING, Device
from biscale_gym.live.errors import LiveError
from biscale_gym.live.governor import Governor, InstanceSetting, Load, WaitingPrompt
from biscale_gym.live.records import RecordStream
from biscale_gym.live.settings import DeviceSettings
from biscale_gym.live.vllm_adapter.scheduler import (
    Held,
    batch_of,
    finished_requests,
    held_requests,
    kv_usage,
    limits_of,
)

VARIABLE = "BISCALE_GYM_GOVERNOR"
ARRIVAL, FIRST_TOKEN = "biscale_arrival_s", "biscale_first_token_s"
"""What a client may tell beside a request: its times from the start of the run."""
IDLE_BEAT_S = 0.5
SOCKET_PATH_LIMIT = 100
"""Bytes; the kernel's limit is 107."""


class GovernorSettings(Settings):
    """A server's governor.

    Attributes:
        name: of its socket and its records: ``prefill-0``, ``decode-0``, as the client counts its servers.
        phase: of the server.
        tp: GPUs of the server.
        scenario: preset or file with the clocks, the SLO and the profile that policies believe in.
        device: whose clocks.
        folder: for its socket, ``NAME.sock``, and the records of its own controller, ``NAME.csv``.
        controller: in charge while no client is; None: the top clock.
        stale_s: age of telemetry that puts the top clock in the policy's place.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    phase: Phase
    tp: Annotated[int, Field(ge=1)]
    scenario: str
    device: DeviceSettings
    folder: Path
    controller: str | None = None
    stale_s: Annotated[float, Field(gt=0)] = 2.0


def read_setting() -> GovernorSettings:
    """What ``$BISCALE_GYM_GOVERNOR`` says: a file of JSON or YAML, or JSON itself.

    Raises:
        ConfigError: it is not set, cannot be read, or is wrong.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        raise ConfigError(f"${VARIABLE} is not set: it names the file with the governor's settings (docs/live.md)")
    if not text.lstrip().startswith("{"):
        return validate(GovernorSettings, read_yaml(Path(text)), text)
    try:
        return validate(GovernorSettings, json.loads(text), f"${VARIABLE}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"${VARIABLE}: not JSON ({error})") from error


def socket_path(folder: Path, name: str) -> Path:
    """Where a governor listens.

    Raises:
        LiveError: the path is too long for a Unix socket.
    """
    path = folder.resolve() / f"{name}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise LiveError(f"{path}: too long for a Unix socket; take a folder with a shorter path")
    return path


@dataclass(frozen=True, slots=True)
class Begin:
    """To a governor: get ready for a run.

    Attributes:
        controller: whose clock policies to apply; None: the top clock.
        context: what it knows.
        records: file for the iterations, on the server's machine.
    """

    controller: str | None
    context: PlanContext
    records: Path


@dataclass(frozen=True, slots=True)
class Ask:
    """To a governor: say ``Alive``."""


@dataclass(frozen=True, slots=True)
class Hello:
    """From a governor that has accepted a connection.

    Attributes:
        name, phase, tp: of its setting.
        source, mode: of its device.
        pid: of its process.
    """

    name: str
    phase: Phase
    tp: int
    source: str
    mode: str
    pid: int


class _Run:
    """One run's part of a governor: policy, records, counts."""

    def __init__(
        self,
        setting: GovernorSettings,
        scheduler: Any,
        device: Device,
        controller: str | None,
        context: PlanContext,
        records: Path | None,
    ) -> None:
        limits = limits_of(scheduler)
        scenario = context.scenario
        self.phase, self.scheduler, self.device = setting.phase, scheduler, device
        self.kv_capacity_tokens = limits.kv_capacity_tokens
        overhead_s = 1e-3 * scenario.cluster.serving_overhead_ms
        self.slo_s = scenario.slo.tpot_s if setting.phase == "decode" else scenario.slo.ttft_s - overhead_s
        policy: PhasePolicy | None = None
        if controller is not None:
            policies = instance_policies(m.Variant.parsed(controller).make(), context, "a live worker")
            policy = policies[PHASES.index(setting.phase)]
        self.wants_slack = setting.phase == "decode" and policy is not None and policy.slack
        instance = InstanceSetting(
            setting.phase,
            setting.tp,
            scenario.top_clock_mhz,
            self.slo_s,
            limits.kv_capacity_tokens,
            limits.token_budget,
            limits.chunked,
            limits.max_sequences,
        )
        self.records = None if records is None else RecordStream(records)
        self.governor = Governor(
            instance, policy, device, context.profile, context.clocks_mhz, self.records, setting.stale_s
        )
        self.batch: dict[str, Held] = {}
        self.seen: set[str] = set()
        self.routed = self.completed = self.late = 0
        self.go(time.monotonic())

    def go(self, origin_s: float) -> None:
        """The run counts from ``origin_s`` on, on ``time.monotonic``'s scale."""
        self.governor.origin_s = origin_s
        self.epoch_s = time.time() - time.monotonic() + origin_s
        self.began_j = self.device.reading().energy_j

    @property
    def energy_j(self) -> float:
        return self.device.reading().energy_j - self.began_j

    def arrival_s(self, held: Held) -> float:
        return float(held.told.get(ARRIVAL, held.arrived_s - self.epoch_s))

    def first_token_s(self, held: Held) -> float:
        return float(held.told.get(FIRST_TOKEN, held.arrived_s - self.epoch_s))

    def load(self, scheduled: Any | None) -> Load:
        """The server at a batch boundary; None: nothing was scheduled."""
        held = {each.name: each for each in held_requests(self.scheduler)}
        now_s, decode = self.governor.now_s(), self.phase == "decode"
        self.routed += len(held.keys() - self.seen)
        self.seen = set(held)
        batch = None if scheduled is None else batch_of(self.scheduler, scheduled)
        self.batch = {} if batch is None else {name: held[name] for name in batch.tokens if name in held}
        running = self.batch.values()
        others = [each for name, each in held.items() if name not in self.batch]
        if decode:
            behind, waiting = others, []
        else:
            unfinished = [each for each in held.values() if each.computed_tokens < each.prompt_tokens]
            behind = [each for each in unfinished if each.computed_tokens == 0]
            waiting = [
                WaitingPrompt(each.prompt_tokens, each.computed_tokens, self.arrival_s(each)) for each in unfinished
            ]
        slack_s = []
        if self.wants_slack:
            slack_s = [self.first_token_s(each) + self.slo_s * max(0, each.made - 1) - now_s for each in running]
        return Load(
            NOTHING if batch is None else batch.work,
            oldest_arrival_s=min((self.arrival_s(each) for each in running), default=float("inf")),
            kv_used_tokens=round(kv_usage(self.scheduler) * self.kv_capacity_tokens),
            queue_requests=len(behind),
            queue_tokens=sum(each.prompt_tokens for each in behind),
            waiting=waiting,
            slack_s=slack_s,
            routed=self.routed,
            completed=self.completed,
            late=self.late,
        )

    def booked(self) -> None:
        """Count the requests that the batch has brought to their end."""
        now_s = self.governor.now_s()
        for name in finished_requests(self.scheduler, self.batch):
            held = self.batch[name]
            if held.made + 1 < held.output_tokens:
                continue  # aborted
            self.completed += 1
            if self.phase == "prefill":
                self.late += now_s - self.arrival_s(held) > self.slo_s
            else:
                self.late += now_s - self.first_token_s(held) > self.slo_s * (held.output_tokens - 1)

    def end(self) -> m.Report:
        """Close the records and report."""
        if self.records is not None:
            self.records.close()
        written, dropped = (0, 0) if self.records is None else (self.records.written, self.records.dropped)
        flags = self.device.reading().flags
        stale = self.governor.stale_decisions
        return m.Report(self.energy_j, self.device.source, flags, {}, written, dropped, stale)


class ServerGovernor:
    """The governor of the server that a scheduler belongs to.

    Args:
        setting: of the governor.
        scheduler: vLLM's; ``before``, ``after`` and ``booked`` are called at each of its batches.

    Raises:
        ConfigError, DeviceError, LiveError, ControllerError: what is wrong with the setting.
    """

    def __init__(self, setting: GovernorSettings, scheduler: Any) -> None:
        limits = limits_of(scheduler)
        if limits.phase not in (None, setting.phase):
            raise ConfigError(f"{setting.name}: phase is {setting.phase}, but the server's KV role says {limits.phase}")
        self._setting, self._scheduler = setting, scheduler
        scenario = load_scenario(setting.scenario)
        self._context = prepared(scenario, None, 0)[1]
        setting.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = socket_path(setting.folder, setting.name)
        self._device, notice = open_device(setting.device, setting.name, setting.phase, setting.tp, self._context)
        if notice:
            print(f"biscale-gym: {setting.name}: {notice}", file=sys.stderr, flush=True)
        self._lock = threading.Lock()
        self._run = self._own_run()
        self._began_s: float | None = None  # of the batch that runs
        self._energy_j = 0.0
        self._closed = threading.Event()
        self._listener = listener(path)
        for target in (self._accept, self._beat, self._end_with_parent):
            threading.Thread(target=target, daemon=True, name=f"governor {target.__name__}").start()

    def _own_run(self) -> _Run:
        setting = self._setting
        records = None if setting.controller is None else setting.folder / f"{setting.name}.csv"
        return _Run(setting, self._scheduler, self._device, setting.controller, self._context, records)

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def before(self, scheduled: Any) -> None:
        """A batch, perhaps an empty one, is about to run."""
        with self._lock:
            load = self._run.load(scheduled)
            if load.work.empty:
                self._run.governor.idle(load)
                return
            self._run.governor.before(load)
            self._began_s = time.perf_counter()

    def after(self) -> None:
        """It has run."""
        with self._lock:
            if self._began_s is not None:
                self._run.governor.after(time.perf_counter() - self._began_s)
                self._began_s = None

    def booked(self) -> None:
        """Its tokens have been given to its requests."""
        with self._lock:
            self._run.booked()

    def close(self) -> None:
        """Give the clocks back and end; further calls do nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._listener.close()
        with self._lock:
            self._run.end()
            self._device.close()

    # -- beside it -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """While the engine has nothing to do nobody else tells the device that it is alive."""
        while not self._closed.wait(IDLE_BEAT_S):
            with self._lock:
                if self._began_s is None and not self._closed.is_set() and not self._scheduler.has_requests():
                    self._run.governor.idle(self._run.load(None))

    def _end_with_parent(self) -> None:
        """VLLM's engine outlives an API server that was killed; its clocks must not stay low for nobody."""
        parent = multiprocessing.parent_process()
        if parent is None:
            return
        wait([parent.sentinel])
        self.close()
        os._exit(1)

    def _alive(self) -> m.Alive:
        with self._lock:
            # In the midst of a batch its joules are not known yet; to read the device would book idle time.
            if self._began_s is None:
                self._energy_j = self._run.energy_j
            return m.Alive(self._energy_j, round(kv_usage(self._scheduler) * self._run.kv_capacity_tokens))

    def _swap(self, run: _Run) -> m.Report:
        with self._lock:
            former, self._run, self._energy_j = self._run, run, 0.0
            return former.end()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                with self._listener.accept() as connection, contextlib.suppress(EOFError, OSError):
                    self._attend(connection)
            except Exception:  # a client that speaks otherwise; the server goes on
                if not self._closed.wait(IDLE_BEAT_S):
                    traceback.print_exc()

    def _attend(self, connection: Connection) -> None:
        """One client, until it goes."""
        setting, device = self._setting, self._device
        connection.send(Hello(setting.name, setting.phase, setting.tp, device.source, device.mode, os.getpid()))
        serving = False
        try:
            while True:
                message = connection.recv()
                match message:
                    case Begin():
                        try:
                            run = _Run(
                                setting,
                                self._scheduler,
                                self._device,
                                message.controller,
                                message.context,
                                message.records,
                            )
                        except Exception:  # told to the client, whose controller it is; the server goes on
                            connection.send(m.Broken(traceback.format_exc()))
                            continue
                        self._swap(run)
                        serving = True
                        connection.send(m.Begun(self._device.source))
                    case m.Go():
                        with self._lock:
                            self._run.go(message.origin_s)
                    case Ask():
                        connection.send(self._alive())
                    case m.EndRun():
                        report = self._swap(self._own_run())
                        serving = False
                        connection.send(report)
        finally:
            if serving:
                self._swap(self._own_run())


def listener(path: Path) -> Listener:
    """On a Unix socket that only this user can open; one that a dead server left behind is replaced.

    Raises:
        LiveError: another governor listens there.
    """
    if path.exists():
        try:
            Client(str(path), "AF_UNIX").close()
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise LiveError(f"{path}: another server's governor has this name")
    former = os.umask(0o177)
    try:
        return Listener(str(path), "AF_UNIX")
    finally:
        os.umask(former)
