from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation import identity
from biscale_gym.evaluation.identity import run_id


@pytest.fixture
def job(make_jobs: Callable[..., list[RunJob]], tmp_path: Path) -> RunJob:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    return make_jobs(("biscale",))[0].model_copy(update={"trace": str(trace)})


def test_the_address_is_the_content_not_the_place(job: RunJob, tmp_path: Path) -> None:
    moved = tmp_path / "moved.csv"
    moved.write_bytes(Path(str(job.trace)).read_bytes())
    assert run_id(job.model_copy(update={"trace": str(moved)})) == run_id(job)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"controller": "distserve"},
        {"split": "train"},
        {"rate_rps": 2.0},
        {"trace": None},
        {"overrides": {"a": 1}},
        {"randomisation": "h100-uncertainty"},
    ],
)
def test_every_part_of_a_job_counts(job: RunJob, change: dict[str, object]) -> None:
    assert run_id(job.model_copy(update=change)) != run_id(job)


def test_another_trace_under_the_same_name_is_another_run(job: RunJob) -> None:
    before = run_id(job)
    Path(str(job.trace)).write_text("arrival_s,prompt_tokens,output_tokens\n0,1,2\n")
    assert run_id(job) != before


def test_a_controller_of_ones_own_is_part_of_the_address(
    job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own_controller.py"
    own.write_text("class Own: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    job = job.model_copy(update={"controller": "own_controller:Own"})
    before = run_id(job)
    own.write_text("class Own: x = 1\n")
    identity._code_digest.cache_clear()
    identity._tree_digest.cache_clear()
    assert run_id(job) != before


def test_presets_that_no_run_reads_leave_the_address(
    job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "presets_dir", lambda: tmp_path / "configs")
    for kind in ("agents", "training"):
        (tmp_path / "configs" / kind).mkdir(parents=True)

    def after(kind: str) -> str:
        (tmp_path / "configs" / kind / "new.yaml").write_text("a: 1\n")
        identity._tree_digest.cache_clear()
        return run_id(job)

    before = run_id(job)
    assert after("training") == before
    assert after("agents") != before
