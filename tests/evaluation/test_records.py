from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.evaluation.faults import RecordsError
from biscale_gym.evaluation.records import Record, RecordStore, arrays_digest, find_records

ARRAYS = {"ttft_s": np.array([0.1, 0.2]), "tpot_s": np.array([0.01])}


def record(name: str, energy_j: float = 1.5) -> Record:
    return Record(
        id=name,
        job={"scenario": "s", "controller": "c", "seed": 0},
        row={"scenario": "s", "total_energy_j": energy_j, "tpot_p99_s": math.nan},
        action_digest="a",
        arrays_digest=arrays_digest(ARRAYS),
        provenance={"config": {}},
        fingerprint={"cpu": "x"},
    )


def test_what_is_written_is_read_back_nan_included(store: RecordStore) -> None:
    assert store.append(record("one", 1.0 / 3.0), ARRAYS)
    read = store.load()["one"]
    assert read.row["total_energy_j"] == 1.0 / 3.0
    assert math.isnan(float(read.row["tpot_p99_s"]))
    np.testing.assert_array_equal(store.arrays(read)["ttft_s"], ARRAYS["ttft_s"])


def test_lines_are_strict_json(store: RecordStore) -> None:
    store.append(record("one"), ARRAYS)

    def reject(token: str) -> None:
        raise AssertionError(token)

    assert json.loads(store.path.read_text(), parse_constant=reject)["row"]["tpot_p99_s"] is None


def test_a_run_is_recorded_once(store: RecordStore) -> None:
    assert store.append(record("one"), ARRAYS)
    assert not store.append(record("one"), ARRAYS)
    assert store.path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_dropped_then_removed(store: RecordStore, cut: int) -> None:
    store.append(record("one"), ARRAYS)
    store.append(record("two"), ARRAYS)
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    with pytest.warns(UserWarning, match=r"records\.jsonl:2: dropped a torn last line"):
        assert list(store.load()) == ["one"]
    store.append(record("three"), ARRAYS)
    assert list(store.load()) == ["one", "three"]


def test_an_altered_line_is_an_error_that_names_it(store: RecordStore) -> None:
    store.append(record("one"), ARRAYS)
    store.append(record("two", 2.5), ARRAYS)
    store.path.write_text(store.path.read_text().replace('"total_energy_j":2.5', '"total_energy_j":2.4'))
    with pytest.raises(RecordsError, match=r"records\.jsonl:2: record two was altered"):
        store.load()
    with pytest.raises(RecordsError, match="was altered"):
        store.append(record("three"), ARRAYS)


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", "not json", '{"sha256": "0", "row": 1}'])
def test_a_line_that_is_no_record_is_an_error(store: RecordStore, line: str) -> None:
    store.append(record("one"), ARRAYS)
    store.path.write_text(store.path.read_text() + line + "\n")
    with pytest.raises(RecordsError, match=r"records\.jsonl:2: not a run record"):
        store.load()


def test_altered_or_missing_arrays_are_an_error(store: RecordStore) -> None:
    store.append(record("one"), ARRAYS)
    kept = store.load()["one"]
    np.savez(store.folder / "arrays" / "one.npz", ttft_s=np.zeros(2), tpot_s=np.zeros(1))
    with pytest.raises(RecordsError, match="was altered"):
        store.arrays(kept)
    (store.folder / "arrays" / "one.npz").write_bytes(b"half")
    with pytest.raises(RecordsError, match="cannot be read"):
        store.arrays(kept)
    (store.folder / "arrays" / "one.npz").unlink()
    assert not store.has_arrays(kept)


def test_a_disk_that_fills_in_the_middle_of_a_line_loses_nothing(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(record("one"), ARRAYS)
    before = store.path.read_bytes()
    write = os.write

    calls = []

    def fill(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:50])

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(RecordsError, match="the disk is full; every record already written is kept"):
        store.append(record("two"), ARRAYS)
    monkeypatch.undo()
    assert len(calls) == 2
    assert store.path.read_bytes() == before
    assert store.append(record("two"), ARRAYS)


def _append_under_a_size_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    with pytest.raises(RecordsError, match="the disk is full"):
        RecordStore(folder).append(record("two"), ARRAYS)


def test_a_file_that_may_not_grow_is_one_clear_error(store: RecordStore) -> None:
    store.append(record("one"), ARRAYS)
    before = store.path.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=_append_under_a_size_limit, args=(store.folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.path.read_bytes() == before
    assert not list(store.folder.rglob("*.partial"))


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="cannot be written"):
        RecordStore(tmp_path / "file").append(record("one"), ARRAYS)


def _append_many(folder: Path, who: str) -> None:
    store = RecordStore(folder)
    for index in range(20):
        store.append(record(f"{who}{index}"), ARRAYS)
        store.append(record(f"both{index}"), ARRAYS)


def test_processes_append_to_one_folder_side_by_side(store: RecordStore) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(store.folder, who)) for who in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(store.load()) == 60
    assert store.path.read_bytes().count(b"\n") == 60


def test_records_are_found_by_the_start_of_their_id(store: RecordStore) -> None:
    store.append(record("abc"), ARRAYS)
    store.append(record("abd"), ARRAYS)
    assert [one.id for one in find_records(store.folder, "ab")] == ["abc", "abd"]
    assert [one.id for one in find_records(store.path, "abd")] == ["abd"]
    with pytest.raises(RecordsError, match="did you mean 'abd'"):
        find_records(store.folder, "abx")
    with pytest.raises(RecordsError, match="no such file"):
        find_records(store.folder / "elsewhere", None)
