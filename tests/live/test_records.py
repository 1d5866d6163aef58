"""Records: round trip, bounded buffer, full disk, cut-off files."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.live.errors import LiveError
from biscale_gym.live.records import IterationRecord, RecordStream, as_iterations, read_records


def record(number: int, batch: int = 4, prefill_tokens: int = 0) -> IterationRecord:
    return IterationRecord(
        0.25 * number,
        batch,
        100 * batch,
        prefill_tokens,
        0.5,
        3,
        900,
        930,
        1410,
        0.01,
        0.02,
        0.03,
        1.5,
        1e-4,
        "modelled",
    )


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    stream = RecordStream(tmp_path / "records.csv", flush_s=0.01)
    for number in range(1000):
        stream.put(record(number))
    stream.close()
    stream.close()
    assert (stream.written, stream.dropped, stream.fault) == (1000, 0, None)
    read = read_records(stream.path)
    assert len(read) == 1000
    assert IterationRecord(*read[7].tolist()) == record(7)


def test_what_the_buffer_does_not_hold_is_counted(tmp_path: Path) -> None:
    stream = RecordStream(tmp_path / "records.csv", capacity=10, flush_s=60.0)
    for number in range(25):
        stream.put(record(number))
    stream.close()
    assert (stream.written, stream.dropped) == (10, 15)
    assert len(read_records(stream.path)) == 10


def test_a_full_disk_ends_the_file_not_the_serving(capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    stream = RecordStream(full, flush_s=0.01)
    for number in range(100):
        stream.put(record(number))
    stream.close()
    assert (stream.written, stream.dropped) == (0, 100)
    assert stream.fault is not None
    assert stream.fault.errno == errno.ENOSPC
    assert capsys.readouterr().err.count("No space left on device; serving goes on without records") == 1


def test_a_file_that_cannot_be_opened_does_not_end_the_serving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = RecordStream(tmp_path / "none" / "records.csv", flush_s=0.01)
    stream.put(record(0))
    stream.close()
    assert (stream.written, stream.dropped) == (0, 1)
    assert "No such file or directory; serving goes on without records" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "end_s,batch,kv_to"])
def test_a_disk_that_was_full_from_the_start_leaves_no_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "records.csv"
    path.write_text(text)
    assert len(read_records(path)) == 0


def test_putting_never_waits_for_the_disk(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    stream = RecordStream(pipe, capacity=5_000, flush_s=0.001)  # a pipe that nobody empties: writing blocks at 64 KiB
    done = threading.Event()

    def put_many() -> None:
        for number in range(20_000):
            stream.put(record(number))
        done.set()

    threading.Thread(target=put_many, daemon=True).start()
    assert done.wait(60.0)
    assert stream.dropped > 0
    os.set_blocking(reader, True)
    drained = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 1 << 20), b"")], daemon=True)
    drained.start()
    stream.close()
    drained.join(60.0)
    os.close(reader)
    assert stream.written + stream.dropped == 20_000


def test_a_cut_off_last_line_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    stream = RecordStream(tmp_path / "records.csv")
    for number in range(5):
        stream.put(record(number))
    stream.close()
    whole = stream.path.read_text()
    stream.path.write_text(whole[:-20])
    assert len(read_records(stream.path)) == 4
    stream.path.write_text(whole.replace("0.25,4", "0.25,four"))
    with pytest.raises(LiveError, match=r"records\.csv:3: not a record: '0\.25,four"):
        read_records(stream.path)
    stream.path.write_text("a,b\n1,2\n")
    with pytest.raises(LiveError, match="not a file of records"):
        read_records(stream.path)


def test_records_are_profiled_iterations(tmp_path: Path) -> None:
    stream = RecordStream(tmp_path / "records.csv")
    for each in (
        record(0),
        record(1, 0, 512),
        record(2, 0, 0),
        record(3, 4, 128),
    ):  # the last: empty, mixed
        stream.put(each)
    stream.close()
    iterations = as_iterations(read_records(stream.path), tp=2)
    assert iterations.batch.tolist() == [4.0, 0.0]
    assert iterations.prefill_tokens.tolist() == [0.0, 512.0]
    np.testing.assert_allclose(iterations.latency_ms, 20.0)
    np.testing.assert_allclose(iterations.power_w_per_gpu, 1.5 / 0.02 / 2)
