from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from biscale_gym.config import ConfigError
from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.faults import EvaluationError
from biscale_gym.evaluation.matrix import MatrixResult, fault_messages, jobs_of, run_matrix
from biscale_gym.evaluation.records import RecordStore

from .fakes import run

Make = Callable[..., list[RunJob]]


def play(jobs: list[RunJob], store: RecordStore, workers: int = 2) -> MatrixResult:
    return run_matrix(jobs, store, workers, run, Console(file=io.StringIO()))


def test_every_run_is_recorded_in_the_order_of_the_jobs(make_jobs: Make, store: RecordStore) -> None:
    jobs = make_jobs(("distserve", "place-only", "biscale"), seeds=2)
    result = play(jobs, store)
    assert [(r.row["controller"], r.row["seed"]) for r in result.records] == [(j.controller, j.seed) for j in jobs]
    assert {row["record"] for row in result.rows()} == set(store.load())


def test_recorded_work_is_not_run_again(make_jobs: Make, store: RecordStore, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    first = play(make_jobs(mark_in=str(marks)), store)
    again = play(make_jobs(mark_in=str(marks)), store)
    assert again.records == first.records
    assert len(list(marks.iterdir())) == 2
    (store.folder / "arrays" / f"{first.records[0].id}.npz").unlink()
    play(make_jobs(mark_in=str(marks)), store)
    assert len(list(marks.iterdir())) == 3
    store.arrays(first.records[0])


def test_an_edited_scenario_is_run_again(make_jobs: Make, store: RecordStore, scenario: str) -> None:
    play(make_jobs(), store)
    Path(scenario).write_text("rate_rps: 2.0\n")
    play(make_jobs(), store)
    assert len(store.load()) == 4


def test_a_failing_run_is_reported_and_the_others_go_on(make_jobs: Make, store: RecordStore) -> None:
    jobs = make_jobs(("distserve", "place-only", "biscale"), seeds=2, fail="place-only")
    result = play(jobs, store)
    assert len(result.records) == 4
    (message,) = fault_messages(result.faults)
    assert message.startswith("no such clock 123; nearest 135 [")
    assert "place-only seed 0" in message
    assert "place-only seed 1" in message
    assert all(fault.by_user for _, fault in result.faults)


def test_a_fault_of_the_code_keeps_its_traceback(make_jobs: Make, store: RecordStore) -> None:
    result = play(make_jobs(**{"break": "biscale"}), store)
    ((_, fault),) = result.faults
    assert not fault.by_user
    assert fault.message == "ZeroDivisionError: a bug"
    assert "Traceback" in fault.detail


def test_a_worker_that_dies_costs_its_own_run_only(make_jobs: Make, store: RecordStore) -> None:
    jobs = make_jobs(("biscale", "distserve", "place-only"), seeds=2, die="biscale")
    result = play(jobs, store)
    assert {record.row["controller"] for record in result.records} == {"distserve", "place-only"}
    assert [fault.message for _, fault in result.faults] == ["its process died (exit code 9); out of memory?"] * 2


def test_bad_requests_are_refused_before_anything_runs(make_jobs: Make, store: RecordStore) -> None:
    with pytest.raises(EvaluationError, match="at least 1"):
        play(make_jobs(), store, workers=0)
    with pytest.raises(EvaluationError, match="no scenario 'paper-76'"):
        play([RunJob(scenario="paper-76", controller="biscale", seed=0)], store)
    with pytest.raises(EvaluationError, match="cannot be read"):
        play([job.model_copy(update={"trace": "missing.csv"}) for job in make_jobs()], store)
    with pytest.raises(EvaluationError, match="given twice"):
        jobs_of(["s"], ["a", "b", "a"], 1, None, None, "test")
    with pytest.raises(EvaluationError, match="no controller"):
        jobs_of(["s"], [], 1, None, None, "test")
    with pytest.raises(EvaluationError, match="--seeds 0"):
        jobs_of(["s"], ["a"], 0, None, None, "test")
    with pytest.raises(ConfigError, match="no randomisation preset 'h100'"):
        jobs_of(["s"], ["a"], 1, None, None, "test", randomisation="h100")
    assert not store.folder.exists()


_PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import run_matrix
from biscale_gym.evaluation.records import RecordStore
from tests.evaluation.fakes import run

if __name__ == "__main__":
    overrides = eval(sys.argv[3])
    jobs = [RunJob(scenario=sys.argv[1], controller=c, seed=s, overrides=overrides)
            for s in range(4) for c in ("distserve", "biscale")]
    result = run_matrix(jobs, RecordStore(Path(sys.argv[2])), 2, run, Console(stderr=True))
    print(result.interrupted, len(result.records), len(result.faults))
"""


def start(tmp_path: Path, scenario: str, folder: Path, overrides: dict[str, object]) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(program), scenario, str(folder), repr(overrides)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_interrupt_leaves_the_finished_records(tmp_path: Path, scenario: str, store: RecordStore) -> None:
    child = tmp_path / "child"
    process = start(tmp_path, scenario, store.folder, {"hang": "biscale", "child_in": str(child)})
    deadline = time.monotonic() + 60.0
    while not (store.load() and child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    interrupted, records, faults = out.split()
    assert (interrupted, faults) == ("True", "0"), err
    assert int(records) == len(store.load()) >= 1
    assert not is_running(int(child.read_text())), "what a worker had started outlives it"


def test_two_comparisons_in_one_folder_write_each_run_once(tmp_path: Path, scenario: str, store: RecordStore) -> None:
    processes = [start(tmp_path, scenario, store.folder, {"pause_s": 0.1}) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out.split() for out, _ in outputs] == [["False", "8", "0"]] * 2, outputs
    assert len(store.load()) == 8
    assert store.path.read_bytes().count(b"\n") == 8
