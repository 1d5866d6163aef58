"""Worker processes seen from their parent: started, spoken to, watched over, replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from biscale_gym.cluster.placement import Phase
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live import messages as m
from biscale_gym.live import worker
from biscale_gym.live.errors import LiveError
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import Setup, setups_of
from biscale_gym.live.status import BLOCK_BYTES, Status, clear_status, read_status
from biscale_gym.live.vllm_adapter.options import environment, preload

STOP_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Died:
    """In place of a message: a worker is dead.

    Attributes:
        why: for people.
    """

    why: str


_PORTS = range(20_000, 32_000)
"""Below those that systems hand out to whoever asks for any port: of these, one that is free now may be a connection's
by the time that a worker has loaded its model and listens."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now, and that nobody is given unasked.

    Raises:
        LiveError: none is found.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LiveError(f"no free port of 127.0.0.1 among 100 from {_PORTS.start} to {_PORTS.stop - 1}")


def starved_s(pid: int) -> float:
    """How long a process's main thread has waited for a core in its life (Linux's schedstat); 0 where nobody knows."""
    try:
        _, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0.0
    return 1e-9 * int(waited_ns)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _forkserver() -> Any:
    return multiprocessing.get_context("forkserver")


class WorkerProcess:
    """One worker; after its death a new process takes its place on ``restart``.

    Attributes:
        setup: what it is, with a block of memory for its status.
        up: whether its engine is ready.
        serving: whether it takes requests.
        kv_used_tokens: as it said last.
        kv_capacity_tokens: of its engine, once it is up.
        block_tokens: of a KV block, likewise.
        source: whether its device's numbers are measured or modelled, once it serves.
        mode: whether its device sets clocks or observes only, likewise.
        restarts: how often it was replaced in this run.
    """

    def __init__(self, setup: Setup) -> None:
        block = _forkserver().RawArray("B", BLOCK_BYTES)
        self.setup = replace(setup, block=block)
        self._status = Status()
        self.kv_used_tokens = self.kv_capacity_tokens = self.block_tokens = 0
        self.source, self.mode = "", ""
        self.restarts = -1
        self.restart()

    def restart(self) -> None:
        """Start a process; it is ``up`` once it has said so."""
        self.restarts += 1
        self.up = self.serving = False
        self._setting_up = True
        self.setup = replace(self.setup, port=free_port())
        clear_status(self.setup.block)
        self._status = Status()
        context = _forkserver()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.main, args=(self.setup, theirs), daemon=True)
        with _environment(environment(self.setup)):
            self._process.start()
        theirs.close()
        self._hear()
        # A worker that hangs does not empty its pipe; who speaks to it must not hang with it.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=_post, args=(self._connection, self._outbox), daemon=True).start()

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._process.pid)

    @property
    def status(self) -> Status:
        """What it last showed in a watched run."""
        found = read_status(self.setup.block)
        if found is not None:
            self._status = found
        return self._status

    @property
    def connection(self) -> Connection:
        """Readable when it has said something, or is dead."""
        return self._connection  # type: ignore[no-any-return]

    def send(self, message: object) -> None:
        """Say something; returns at once."""
        if isinstance(message, m.Run):
            self._setting_up, self.serving = True, False  # compiling a clock policy takes its time
        self._outbox.put(message)

    def receive(self) -> Iterator[object]:
        """What it has said, ``Died`` at the end if it is dead."""
        try:
            while self._connection.poll():
                message = self._connection.recv()
                self._hear()
                match message:
                    case m.Ready():
                        self.up, self._setting_up = True, False
                        self.kv_capacity_tokens = message.kv_capacity_tokens
                        self.block_tokens = message.block_tokens
                    case m.Begun():
                        self.serving, self._setting_up = True, False
                        self.source, self.mode = message.source, message.mode
                    case m.Alive():
                        self.kv_used_tokens = message.kv_used_tokens
                    case m.Broken():
                        yield Died(f"{self.setup.name} broke down:\n{message.traceback}")
                        return
                yield message
        except (EOFError, OSError):
            self._process.join(STOP_LIMIT_S)
            yield Died(f"{self.setup.name} ended with status {self._process.exitcode}")

    def _hear(self) -> None:
        self._heard_s, self._starved_s = time.monotonic(), starved_s(self.pid)

    def silent_too_long(self) -> str | None:
        """Why it must be taken for dead, if it must.

        Time in which it could have run and got no core does not count: on a crowded machine it is slow, not hung.
        """
        limits = self.setup.settings
        limit_s = limits.start_limit_s if self._setting_up else limits.hung_s
        silent_s = time.monotonic() - self._heard_s
        if silent_s <= limit_s or silent_s - (starved_s(self.pid) - self._starved_s) <= limit_s:
            return None
        return f"{self.setup.name} has said nothing for {silent_s:.1f} s"

    def kill(self) -> None:
        """End it at once."""
        self.up = self.serving = False
        self._outbox.put(None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with the processes of an engine on several GPUs
        self._process.kill()
        self._process.join()
        self._connection.close()

    def await_end(self) -> None:
        """It was told to stop; kill it if it does not, or is still starting."""
        limit_s = time.monotonic() + (STOP_LIMIT_S if self.up else 0.0)
        with contextlib.suppress(EOFError, OSError):
            while time.monotonic() < limit_s and self._process.is_alive():
                if self._connection.poll(0.05):
                    self._connection.recv()  # what nobody has heard may fill its pipe, and it would never end
        self.kill()


def _post(connection: Connection, outbox: queue.SimpleQueue[object]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while (message := outbox.get()) is not None:
            connection.send(message)


class Pool:
    """The workers of a scenario's placement.

    Args:
        scenario: its placement says which workers there are, its batching rules how they batch.
        settings: of workers.
        folder: for the model that they run.

    Attributes:
        dimensions: of that model.

    Raises:
        ConfigError: the placement takes more GPUs than there are.
        LiveError: vLLM is not installed, or a worker does not come up.
    """

    def __init__(self, scenario: ScenarioSettings, settings: LiveSettings, folder: Path) -> None:
        setups = setups_of(scenario, settings, folder)
        self.settings = settings
        self.dimensions = settings.dimensions(scenario.cluster)
        _forkserver().set_forkserver_preload([*preload(settings), worker.__name__])
        self.workers = [WorkerProcess(setup) for setup in setups]
        self._told = False
        self._await_all()

    def _await_all(self) -> None:
        try:
            while not all(each.up for each in self.workers):
                for _, message in self.messages(1.0):
                    if isinstance(message, Died):
                        raise LiveError(message.why)
        except BaseException:
            self.close()
            raise

    def of(self, phase: Phase) -> list[WorkerProcess]:
        """A phase's workers that take requests."""
        return [each for each in self.workers if each.setup.phase == phase and each.serving]

    def messages(self, timeout_s: float) -> Iterator[tuple[WorkerProcess, object]]:
        """What the workers say, ``Died`` of the dead and the hung; waits at most so long for the first.

        Raises:
            LiveError: a worker refuses its run: another controller has its cards, they have no such clocks, …
        """
        ready = wait([each.connection for each in self.workers], timeout_s)
        for each in self.workers:
            if each.connection in ready:
                for message in each.receive():
                    if isinstance(message, m.Begun):
                        self._tell(message.notice)
                    if isinstance(message, m.Refused):
                        raise LiveError(f"{each.setup.name}: {message.why}")
                    yield each, message
            elif (why := each.silent_too_long()) is not None:
                yield each, Died(why)

    def _tell(self, notice: str) -> None:
        """On standard error; what holds of one worker's cards holds of all, so once."""
        if notice and not self._told:
            self._told = True
            print(f"biscale-gym: {notice}", file=sys.stderr)

    def replace(self, dead: WorkerProcess, why: str) -> None:
        """Put a new process in the place of a dead one.

        Raises:
            LiveError: it has died too often; ``why`` is in the message.
        """
        dead.kill()
        if dead.restarts >= self.settings.restarts:
            raise LiveError(f"{dead.setup.name} was replaced {dead.restarts} times, and died again: {why}")
        dead.restart()

    def close(self) -> None:
        """End all workers."""
        for each in self.workers:
            each.send(m.Stop())
        for each in self.workers:
            each.await_end()
        self.workers.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock_mode(workers: Iterable[WorkerProcess]) -> str:
    """Of a run: ``observe-only`` where any worker's device sets no clocks."""
    return "observe-only" if any(worker.mode == "observe-only" for worker in workers) else "control"


def all_sources(reports: Sequence[m.Report]) -> dict[str, int]:
    """Prompt tokens of several workers by source."""
    totals: dict[str, int] = {}
    for report in reports:
        for source, count in report.prompt_tokens.items():
            totals[source] = totals.get(source, 0) + count
    return totals
