from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from biscale_gym.control.rollout import RunJob, RunOutcome
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import Record, RecordStore
from biscale_gym.evaluation.validate import validate_record

from .fakes import outcome_of


@pytest.fixture
def kept(make_jobs: Callable[..., list[RunJob]]) -> Record:
    (job,) = make_jobs(("biscale",))
    return record_of("id", job, outcome_of(job))[0]


def nudged(relative: float) -> Callable[[RunJob], RunOutcome]:
    def runner(job: RunJob) -> RunOutcome:
        outcome = outcome_of(job)
        energy_j = float(outcome.row["total_energy_j"]) * (1.0 + relative)
        return replace(outcome, row={**outcome.row, "total_energy_j": energy_j})

    return runner


def test_the_same_run_holds_exactly(kept: Record) -> None:
    verdict = validate_record(kept, outcome_of)
    assert verdict.holds
    assert verdict.exact
    assert not verdict.warnings


def test_settings_in_any_order_hold(store: RecordStore, make_jobs: Callable[..., list[RunJob]]) -> None:
    (job,) = make_jobs(("biscale",), b=1, a=2)
    job = RunJob.model_validate(job.model_dump() | {"controller_settings": {"tier1": {"b": 1, "a": 2}, "preset": "x"}})
    record, arrays = record_of("id", job, outcome_of(job))
    store.append(record, arrays)
    verdict = validate_record(store.load()["id"], outcome_of)
    assert verdict.holds, verdict.differences


def test_any_difference_is_named_where_the_fingerprint_matches(kept: Record) -> None:
    verdict = validate_record(kept, nudged(1e-15))
    assert [line.partition(":")[0] for line in verdict.differences] == ["total_energy_j"]


def test_another_processor_is_compared_to_rounding_with_a_warning(kept: Record) -> None:
    elsewhere = replace(kept, fingerprint={**kept.fingerprint, "cpu": "another"}, arrays_digest="other")
    near, far = validate_record(elsewhere, nudged(5e-10)), validate_record(elsewhere, nudged(5e-9))
    assert near.holds
    assert not far.holds
    assert "another processor or compiler (cpu: another ->" in near.warnings[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"action_digest": "x"}, "actions"),
        ({"arrays_digest": "x"}, "latencies or timeline"),
        ({"provenance": {"config_hash": "x", "trace_hash": "beef"}}, "config_hash"),
        ({"provenance": {"config_hash": "c0ffee", "trace_hash": "x"}}, "trace_hash"),
        ({"provenance": {"config_hash": "c0ffee", "trace_hash": "beef", "profile_hash": "x"}}, "profile_hash"),
    ],
)
def test_actions_arrays_configuration_hardware_and_trace_are_compared(
    kept: Record, change: dict[str, object], named: str
) -> None:
    verdict = validate_record(replace(kept, **change), outcome_of)  # type: ignore[arg-type]
    assert [line.partition(":")[0] for line in verdict.differences] == [named]


def test_another_revision_is_a_warning_only(kept: Record) -> None:
    verdict = validate_record(replace(kept, fingerprint={**kept.fingerprint, "git_revision": "0" * 40}), outcome_of)
    assert verdict.holds
    assert "recorded at revision 000" in verdict.warnings[0]
