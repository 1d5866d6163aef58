"""A W&B run that can neither stop nor slow the run it tells of.

Calls go into a bounded queue; a thread writes them as lines of JSON to a process (``wandb_process``), the only place
where wandb is imported. When the queue is full, calls are dropped and counted. Whatever happens to that process, to
wandb's own service or to the network, the caller sees one warning. At the end the process has a limited time, then
it is killed; what it has on disk can still be uploaded by ``wandb sync``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROCESS = Path(__file__).with_name("wandb_process.py")
_SHORTEST_WAIT_S = 0.01
_ALL = "run.jsonl has them all"


@dataclass(frozen=True)
class Limits:
    """How much W&B may take."""

    queue_calls: int = 4096
    """Calls waiting to be written; one more is dropped."""
    start_s: float = 30.0
    """For a server to answer; after that the run is an offline one."""
    finish_s: float = 120.0
    """From the end of the run to the end of its W&B run."""


def new_run(project: str) -> tuple[str, str]:
    """Project and id of a new W&B run; under a W&B agent those that it has chosen."""
    run_id = secrets.token_hex(4)
    if "WANDB_SWEEP_ID" not in os.environ:
        return project, run_id
    return os.environ.get("WANDB_PROJECT", project), os.environ.get("WANDB_RUN_ID", run_id)


class WandbRun:
    """One W&B run, fed from here and living elsewhere (``tracking.Sink``)."""

    def __init__(self, folder: Path, about: Mapping[str, Any], limits: Limits) -> None:
        """Starts the process; ``about`` holds the arguments of ``wandb_process.Held.start`` that are not below."""
        self.dropped = 0
        """Calls that found the queue full, or the process gone."""
        self.unreachable = False
        """Whether, at the end, there was a key but no server that took the run."""
        self._limits = limits
        self._queue: queue.Queue[str | None] = queue.Queue(limits.queue_calls)
        self._gone = threading.Event()
        self._warned: set[str] = set()
        # Files, not pipes: nobody has to read them for the process to go on, or to wait for its children to close them.
        self._reports = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (until close)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # A session of its own: an interrupt from the keyboard is for the run, which then ends this process itself.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROCESS)],
            stdin=subprocess.PIPE,
            stdout=self._reports,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        here = {"folder": str(folder.resolve()), "watched_pid": os.getpid()}
        self._put("start", **about, **here, start_s=limits.start_s, finish_s=limits.finish_s)
        self._feeder = threading.Thread(target=self._feed, name="wandb-feeder", daemon=True)
        self._feeder.start()

    @property
    def process_id(self) -> int:
        """Of the process that holds wandb."""
        return self._process.pid

    def config(self, values: Mapping[str, Any]) -> None:
        """Updates the run's config."""
        self._put("config", values=values)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs figures with ``global_step``."""
        self._put("log", metrics=metrics, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Logs a ``wandb.Table``."""
        self._put("table", name=name, columns=columns, rows=rows, step=step)

    def figure(self, name: str, path: Path, step: int | None) -> None:
        """Logs a ``wandb.Image``."""
        self._put("figure", name=name, path=str(path.resolve()), step=step)

    def artifact(self, path: Path, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """Logs a ``wandb.Artifact`` of one file or folder."""
        self._put("artifact", path=str(path.resolve()), kind=kind, name=name, metadata=metadata)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Updates the run's summary."""
        self._put("summary", values=values)

    def close(self, exit_status: int) -> None:
        """Waits for the process, within the limit; says what went wrong and how an offline run is uploaded."""
        latest = time.monotonic() + self._limits.finish_s
        try:
            self._queue.put(_line("close", exit_status=exit_status), timeout=self._limits.finish_s)
            self._queue.put(None, timeout=_left(latest))
            complete = self._process.wait(_left(latest)) == 0
            if not complete:
                self._warn_gone()
        except (queue.Full, subprocess.TimeoutExpired):
            complete = False
            self._warn(f"not finished within {self._limits.finish_s:g} s; it was stopped")
        finally:
            self._end()
        if self.dropped:
            self._warn(f"{self.dropped} calls were dropped; {_ALL}")
        self._tell_where(complete)

    def _put(self, call: str, **arguments: Any) -> None:
        if self._gone.is_set():
            self.dropped += 1
            self._warn_gone()
            return
        try:
            self._queue.put_nowait(_line(call, **arguments))
        except queue.Full:
            self.dropped += 1
            self._warn("it does not keep up; calls are dropped")

    def _feed(self) -> None:
        """On a thread of its own: a process that hangs leaves it waiting at the pipe, and nobody else."""
        stream = self._process.stdin
        assert stream is not None
        try:
            while (line := self._queue.get()) is not None:
                stream.write(line)
                if self._queue.empty():
                    stream.flush()
            stream.close()
        except OSError:
            self._gone.set()
            while self._queue.get() is not None:
                self.dropped += 1

    def _end(self) -> None:
        """Kills what is left of the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _warn_gone(self) -> None:
        self._errors.flush()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self._warn(f"{said[-1] if said else 'its process ended'}; the run goes on without it", "gone")

    def _warn(self, message: str, about: str = "") -> None:
        """Warns once of each kind of trouble."""
        if (about or message) not in self._warned:
            self._warned.add(about or message)
            warnings.warn(f"W&B: {message}", stacklevel=5)

    def _tell_where(self, complete: bool) -> None:
        """One line for whoever started the run: where it is seen, or how it gets there."""
        self._reports.seek(0)
        report, end = (json.loads(self._reports.readline() or "{}") for _ in range(2))
        if end.get("refused"):
            self._warn(f"{end['refused']} calls were refused, the first by {end['first'][0]}; {_ALL}")
        self.unreachable = not complete or report.get("unreachable", False)
        if report.get("url"):
            print(f"W&B: {report['url']}", file=sys.stderr)
        if report.get("folder") and not (report.get("url") and complete):
            why = f" is offline ({report['why']})" if report["why"] else ""
            upload = f"wandb sync {shlex.quote(report['folder'])}"
            print(f"W&B: the run{why or ' is not complete there'}; upload it with: {upload}", file=sys.stderr)


def _line(call: str, **arguments: Any) -> str:
    return json.dumps({"call": call, **arguments}, default=str) + "\n"


def _left(latest: float) -> float:
    return max(latest - time.monotonic(), _SHORTEST_WAIT_S)
