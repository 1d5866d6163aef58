"""A few processes that take one job at a time.

Unlike the standard pools, a dead worker costs only its own job and names it, and an interrupt ends the workers at once.
Workers are started by a fork server that has the runner's module loaded, so none pays for its imports. Each leads a
process group of its own: the terminal's interrupt reaches the parent alone, which ends the groups. A worker whose
parent is gone leaves when its run is done.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Generic, TypeVar

from biscale_gym.evaluation.faults import Fault

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

_GRACE_S = 5.0


@dataclass
class _Worker(Generic[JobT]):
    process: ForkServerProcess
    connection: Connection
    job: JobT


class Workers(Generic[JobT, ResultT]):
    """Runs ``runner`` over jobs in ``count`` processes; use as a context manager.

    ``runner`` is a module-level function, jobs and results are picklable. ``on_start`` is told of each job handed out.
    """

    def __init__(self, runner: Callable[[JobT], ResultT], count: int, on_start: Callable[[JobT], None]) -> None:
        self._runner = runner
        self._count = count
        self._on_start = on_start
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([runner.__module__])
        self._busy: list[_Worker[JobT]] = []

    def __enter__(self) -> Workers[JobT, ResultT]:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._busy:
            _end_group(worker.process)
        for worker in self._busy:
            worker.process.join(_GRACE_S)
            if worker.process.is_alive():
                worker.process.kill()
        self._busy.clear()

    def run(self, jobs: Iterable[JobT]) -> Iterator[tuple[JobT, ResultT | Fault]]:
        """Each job with its result or its fault, as they finish; a job is taken only when a worker is free."""
        waiting = iter(jobs)
        for job in itertools.islice(waiting, self._count):
            self._start(job)
        while self._busy:
            ready = wait([worker.connection for worker in self._busy])
            for worker in [worker for worker in self._busy if worker.connection in ready]:
                job, answer = worker.job, self._answer(worker)
                self._go_on(worker, waiting, alive=worker.process.is_alive())
                yield job, answer

    def _start(self, job: JobT) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._runner), daemon=False)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, job)
        self._busy.append(worker)
        self._hand(worker, job)

    def _hand(self, worker: _Worker[JobT], job: JobT) -> None:
        worker.job = job
        self._on_start(job)
        with suppress(ConnectionError):  # a worker that is dead already is noticed when its answer is awaited
            worker.connection.send(job)

    def _go_on(self, worker: _Worker[JobT], waiting: Iterator[JobT], alive: bool) -> None:
        for job in waiting:
            if alive:
                self._hand(worker, job)
            else:
                self._busy.remove(worker)
                self._start(job)
            return
        self._busy.remove(worker)
        worker.connection.close()
        worker.process.join(_GRACE_S)

    def _answer(self, worker: _Worker[JobT]) -> ResultT | Fault:
        try:
            answer: ResultT | Fault = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(_GRACE_S)
            return Fault(f"its process died (exit code {worker.process.exitcode}); out of memory?", by_user=False)
        return answer


def _end_group(process: ForkServerProcess) -> None:
    """Ends a worker and what it has started itself (a planner may measure in processes of its own)."""
    process.terminate()
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _serve(connection: Connection, runner: Callable[[JobT], ResultT]) -> None:
    os.setpgid(0, 0)
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: ResultT | Fault = runner(job)
        except Exception as error:
            answer = Fault.of(error)
        connection.send(answer)
