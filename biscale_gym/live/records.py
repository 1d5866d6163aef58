"""Iterations on record: one CSV file per worker, written by a thread beside the engine.

The worker only appends to a bounded buffer; what does not fit is counted, not waited for. A disk that is full, or
fails, ends the file, not the serving: later records are counted as dropped and ``fault`` says why.
"""

from __future__ import annotations

import csv
import sys
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple, TextIO, get_type_hints

import numpy as np
import numpy.typing as npt

from biscale_gym.live.devices import Source
from biscale_gym.live.errors import LiveError
from biscale_gym.profiles.iterations import Iterations


class IterationRecord(NamedTuple):
    """One iteration of one worker.

    Attributes:
        end_s: its end, from the start of the run.
        batch, kv_tokens, prefill_tokens, sum_len_sq: what it computed, as in ``devices.Work``.
        queue_requests: requests behind it.
        kv_used_tokens: KV tokens taken on the instance.
        target_mhz: clock asked for before it ran.
        clock_mhz: clock in force at its end.
        computed_s: what the engine took for it.
        duration_s: the same with an emulated clock's stretching.
        predicted_s: what the policy's profile said.
        energy_j: of all GPUs of the instance.
        control_s: time that observing, deciding and recording took from the engine.
        source: whether clock and energy were measured or modelled.
    """

    end_s: float
    batch: int
    kv_tokens: int
    prefill_tokens: int
    sum_len_sq: float
    queue_requests: int
    kv_used_tokens: int
    target_mhz: int
    clock_mhz: int
    computed_s: float
    duration_s: float
    predicted_s: float
    energy_j: float
    control_s: float
    source: Source


COLUMNS = IterationRecord._fields
_FORMATS = [
    "U16" if name == "source" else ("i8" if kind is int else "f8")
    for name, kind in get_type_hints(IterationRecord).items()
]
DTYPE = np.dtype(list(zip(COLUMNS, _FORMATS, strict=True)))
_LINE = ",".join("%s" if form == "U16" else "%d" if form == "i8" else "%.9g" for form in _FORMATS) + "\n"


class RecordStream:
    """A file of records.

    Args:
        path: the CSV file; replaced.
        capacity: records that wait for the disk at most.
        flush_s: period of writing.

    Attributes:
        written, dropped: records so far.
        fault: why there is no file, or why it ended early.
    """

    def __init__(self, path: Path, capacity: int = 16_384, flush_s: float = 0.5) -> None:
        self.path = path
        self.written = self.dropped = 0
        self.fault: OSError | None = None
        self._capacity, self._flush_s = capacity, flush_s
        self._waiting: deque[IterationRecord] = deque()
        self._ending = threading.Event()
        self._file: TextIO | None = None
        try:
            self._file = path.open("w", encoding="ascii")
        except OSError as error:
            self._fail(error)
        self._write([",".join(COLUMNS) + "\n"])
        self._thread = threading.Thread(target=self._run, name=f"records {path.name}", daemon=True)
        self._thread.start()

    def put(self, record: IterationRecord) -> None:
        """Take a record; never waits."""
        if len(self._waiting) >= self._capacity:
            self.dropped += 1
        else:
            self._waiting.append(record)

    def close(self) -> None:
        """Write what waits, and end; further calls do nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._thread.join()
        self._write([])
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self.fault = self.fault or error

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(self._flush_s)
            count = len(self._waiting)
            lines = [_LINE % self._waiting.popleft() for _ in range(count)]
            if self._write(lines):
                self.written += count
            else:
                self.dropped += count

    def _write(self, lines: list[str]) -> bool:
        if self.fault is None and self._file is not None:
            try:
                self._file.writelines(lines)
                self._file.flush()
            except OSError as error:
                self._fail(error)
        return self.fault is None

    def _fail(self, error: OSError) -> None:
        self.fault = error
        print(f"biscale-gym: {self.path}: {error.strerror}; serving goes on without records", file=sys.stderr)


def read_records(path: Path) -> npt.NDArray[np.void]:
    """A file's records, DTYPE[n]; a last line that was cut off (kill, full disk) is left out, be it the first one.

    Raises:
        LiveError: not a file of records, or a broken line in its midst.
        OSError: it cannot be read.
    """
    with path.open(newline="", encoding="ascii") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines and ",".join(COLUMNS).startswith(text):
        return np.zeros(0, DTYPE)
    rows = list(csv.reader(lines))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise LiveError(f"{path}: not a file of records; expected the columns {', '.join(COLUMNS)}")
    try:
        return np.array([tuple(row) for row in rows[1:]], dtype=DTYPE)
    except (ValueError, TypeError):
        bad = next(n for n, row in enumerate(rows) if len(row) != len(COLUMNS) or (n and not _numeric(row)))
        raise LiveError(f"{path}:{bad + 1}: not a record: {lines[bad]!r}") from None


def _numeric(row: list[str]) -> bool:
    try:
        for cell, form in zip(row, _FORMATS, strict=True):
            if form != "U16":
                float(cell)
    except ValueError:
        return False
    return True


def as_iterations(records: npt.NDArray[np.void], tp: int) -> Iterations:
    """Recorded iterations as profiled ones, for ``profiles.fitted``: those of one phase alone that computed something.

    Args:
        records: DTYPE[n].
        tp: GPUs of the instance.
    """
    decode, prefill = records["batch"] > 0, records["prefill_tokens"] > 0
    own = records[(decode != prefill) & (records["duration_s"] > 0)]
    return Iterations(
        tp=np.full(len(own), float(tp)),
        clock_mhz=own["clock_mhz"].astype(float),
        batch=own["batch"].astype(float),
        kv_tokens=np.where(own["batch"] > 0, own["kv_tokens"], 0).astype(float),
        prefill_tokens=own["prefill_tokens"].astype(float),
        sum_len_sq=own["sum_len_sq"],
        latency_ms=1e3 * own["duration_s"],
        power_w_per_gpu=own["energy_j"] / own["duration_s"] / tp,
    )
