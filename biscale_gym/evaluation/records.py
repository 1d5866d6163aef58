"""Run records: one line of JSON per finished run, append-only, each line sealed by its own hash.

A folder holds ``records.jsonl`` and, per record, ``arrays/<id>.npz`` with the latencies and the timeline that tables
and plots read. Several processes may append to one folder: a lock on the file orders them. A line is complete when it
ends with a newline, so a process that died in the middle of one leaves a torn tail that readers drop and the next
append removes. A complete line whose hash does not fit was altered, and is an error.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.config import nearest
from biscale_gym.evaluation.faults import RecordsError

Arrays = Mapping[str, npt.NDArray[Any]]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Record:
    """One finished run and all that is needed to run it again and compare."""

    id: str
    """Content address of the run (``identity.run_id``)."""
    job: dict[str, Any]
    """The ``RunJob``, as JSON values."""
    row: dict[str, float | int | str]
    """Every metric of the run; the name carries the unit."""
    action_digest: str
    """Digest of every clock and placement the controller chose, in order."""
    arrays_digest: str
    """Digest of the latencies and the timeline kept beside the record."""
    provenance: dict[str, Any]
    """Resolved configuration and its hash, trace name and hash."""
    fingerprint: dict[str, Any]
    """Processor, package versions and git revision (``fingerprint.fingerprint``)."""

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{self.row['scenario']} {self.row['controller']} seed {self.row['seed']}"


class RecordStore:
    """The records of one folder, made when the first record is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "records.jsonl"

    def load(self) -> dict[str, Record]:
        """Every record by its id; a torn last line is dropped with a warning.

        Raises:
            RecordsError: a complete line is no record or its hash does not fit, or the file cannot be read.
        """
        return read_records(self.path)

    def append(self, record: Record, arrays: Arrays) -> bool:
        """Writes the record and its arrays, unless the id is there already; what was written before is never touched.

        Returns:
            False if another process had recorded the same run.

        Raises:
            RecordsError: the disk is full or the folder cannot be written; the file ends with its last whole record.
        """
        line = _seal(record)
        with _disk_faults(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_arrays(record.id, arrays)
            with self._locked() as descriptor:
                content = self.path.read_bytes()
                end = content.rfind(b"\n") + 1
                if record.id in _parse(content[:end], self.path):
                    return False
                os.ftruncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                try:
                    _write_all(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
        return True

    def has_arrays(self, record: Record) -> bool:
        """Whether the record's latencies and timeline are there; a run without them is worth repeating."""
        return self._arrays_path(record.id).is_file()

    def arrays(self, record: Record) -> dict[str, npt.NDArray[Any]]:
        """The latencies and the timeline of a run.

        Raises:
            RecordsError: the file is missing, or not the one that was recorded.
        """
        path = self._arrays_path(record.id)
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except Exception as error:  # numpy reports a damaged archive by whatever its reader stumbled over
            raise RecordsError(f"{path}: cannot be read ({error}); delete it and run the comparison again") from error
        if arrays_digest(arrays) != record.arrays_digest:
            raise RecordsError(f"{path}: was altered after it was recorded; delete it and run the comparison again")
        return arrays

    def _arrays_path(self, record_id: str) -> Path:
        return self.folder / "arrays" / f"{record_id}.npz"

    def _write_arrays(self, record_id: str, arrays: Arrays) -> None:
        path = self._arrays_path(record_id)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                np.savez_compressed(stream, allow_pickle=False, **dict(arrays))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def read_records(path: Path) -> dict[str, Record]:
    """Every record of a file by its id, in order; a file that does not exist holds none.

    Raises:
        RecordsError: a complete line is no record or its hash does not fit, or the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            content = stream.read()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(content, path)


def find_records(place: Path, start_of_id: str | None) -> list[Record]:
    """The records of a file, or of the folder that holds it, whose id starts so.

    Raises:
        RecordsError: there is no such file or no such record, or the file is damaged.
    """
    path = place / "records.jsonl" if place.is_dir() else place
    if not path.is_file():
        raise RecordsError(f"{path}: no such file of records")
    records = read_records(path)
    found = [record for name, record in records.items() if name.startswith(start_of_id or "")]
    if not found:
        asked = (
            "no record" if start_of_id is None else f"no record {start_of_id!r}; {nearest(start_of_id, list(records))}"
        )
        raise RecordsError(f"{path}: {asked}")
    return found


def _parse(content: bytes, path: Path) -> dict[str, Record]:
    *lines, tail = content.split(b"\n")
    if tail:
        warnings.warn(f"{path}:{len(lines) + 1}: dropped a torn last line ({len(tail)} bytes)", stacklevel=3)
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        record = _unseal(line, f"{path}:{number}")
        records.setdefault(record.id, record)
    return records


def replace_file(path: Path, text: str) -> None:
    """Writes a whole file at once: readers see the old one or the new one.

    Raises:
        RecordsError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def arrays_digest(arrays: Arrays) -> str:
    """First 16 hex digits of the SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def without_nan(row: Mapping[str, float | int | str]) -> dict[str, float | int | str | None]:
    """A row for JSON, which knows no NaN: a metric of nothing (a P99 of no request) is null."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _seal(record: Record) -> bytes:
    values = {**asdict(record), "row": without_nan(record.row)}
    seal = hashlib.sha256(_canonical(values).encode()).hexdigest()
    return f"{_canonical({**values, 'sha256': seal})}\n".encode()


def _unseal(line: bytes, place: str) -> Record:
    advice = "delete that line to run it again"
    try:
        values = json.loads(line)
        seal = values.pop("sha256")
        row = {name: math.nan if value is None else value for name, value in values["row"].items()}
        record = Record(**{**values, "row": row})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordsError(f"{place}: not a run record ({error}); {advice}") from error
    if hashlib.sha256(_canonical(values).encode()).hexdigest() != seal:
        raise RecordsError(
            f"{place}: record {record.id} was altered after it was written: its hash does not fit; {advice}"
        )
    return record


def _write_all(descriptor: int, content: bytes) -> None:
    """One ``os.write`` in the ordinary case, so that an interrupt falls before or after the line, not into it."""
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise RecordsError(
                f"{path}: the disk is full; every record already written is kept, run the same command again"
            ) from error
        raise RecordsError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
