from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import RecordStore, arrays_digest
from biscale_gym.evaluation.summary import Summary, aggregate, summarise
from biscale_gym.evaluation.tables import csv_text, markdown, print_tables

from .fakes import SAVINGS, outcome_of

Make = Callable[..., list[RunJob]]


def summaries_of(jobs: list[RunJob], store: RecordStore) -> list[Summary]:
    for index, job in enumerate(jobs):
        store.append(*record_of(f"id{index}", job, outcome_of(job)))
    return summarise(list(store.load().values()), store)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_slo_ranks_before_energy(make_jobs: Make, store: RecordStore, seeds: int) -> None:
    summaries = summaries_of(make_jobs(("reckless", "distserve", "place-only", "biscale"), seeds), store)
    assert [s.controller for s in summaries] == ["biscale", "place-only", "distserve", "reckless"]
    assert summaries[-1].breaches == ("TTFT",)
    assert summaries[-1].mean("total_energy_j") < summaries[0].mean("total_energy_j")


def test_ratios_compare_the_same_seed(make_jobs: Make, store: RecordStore) -> None:
    summaries = summaries_of(make_jobs(("distserve", "biscale"), 3), store)
    for metric in ("prefill_energy_j", "decode_energy_j", "total_energy_j"):
        ratio = summaries[0].ratios[metric]
        assert ratio.value == pytest.approx(SAVINGS["biscale"], rel=1e-12)
        assert ratio.high - ratio.low == pytest.approx(0.0, abs=1e-12)


def test_tails_are_pooled_over_seeds(make_jobs: Make, store: RecordStore) -> None:
    jobs = make_jobs(("distserve",), 3)
    (summary,) = summaries_of(jobs, store)
    pooled = np.concatenate([outcome_of(job).ttft_s for job in jobs])
    np.testing.assert_array_equal(summary.ttft_s, np.sort(pooled))


def test_nothing_served_breaks_the_slo(make_jobs: Make, store: RecordStore) -> None:
    (job,) = make_jobs(("distserve",))
    record, arrays = record_of("none", job, outcome_of(job))
    empty = {**arrays, "ttft_s": np.zeros(0), "tpot_s": np.zeros(0)}
    store.append(replace(record, arrays_digest=arrays_digest(empty)), empty)
    (summary,) = summarise(list(store.load().values()), store)
    assert summary.breaches == ("TTFT",)
    assert "nan" in markdown([summary])


def test_without_distserve_there_is_no_ratio(make_jobs: Make, store: RecordStore) -> None:
    summaries = summaries_of(make_jobs(("place-only", "biscale"), 2), store)
    assert all(not summary.ratios for summary in summaries)
    assert " Δ |" not in markdown(summaries)
    assert aggregate(summaries) == []


def test_the_markdown_marks_who_breaks_the_slo(make_jobs: Make, store: RecordStore) -> None:
    text = markdown(summaries_of(make_jobs(("distserve", "reckless", "biscale")), store))
    assert "| reckless ✗ |" in text
    row = next(line for line in text.splitlines() if line.startswith("| biscale |"))
    assert "−35.0 %" in row
    assert "| yes |" in row
    assert text.count("| no: TTFT |") == 1
    widths = {line.count("|") for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1


def test_several_seeds_give_intervals_and_an_aggregate(make_jobs: Make, store: RecordStore) -> None:
    summaries = summaries_of(make_jobs(("distserve", "biscale"), 4), store)
    assert " ± " in markdown(summaries)
    (total,) = aggregate(summaries)
    assert total.controller == "biscale"
    assert total.ratio.value == pytest.approx(0.65)
    assert total.improvement == 1.0
    assert "All scenarios and seeds" in markdown(summaries)


def test_the_csv_holds_every_metric(make_jobs: Make, store: RecordStore) -> None:
    jobs = make_jobs(("distserve", "biscale"), 2)
    lines = list(csv.DictReader(io.StringIO(csv_text(summaries_of(jobs, store)))))
    assert [line["controller"] for line in lines] == ["biscale", "distserve"]
    row = outcome_of(jobs[0]).row
    assert set(row) - {"seed"} <= set(lines[0])
    mean = np.mean([float(outcome_of(job).row["ttft_p99_s"]) for job in jobs if job.controller == "biscale"])
    assert float(lines[0]["ttft_p99_s"]) == pytest.approx(mean, rel=1e-15)
    assert float(lines[0]["total_energy_j_ratio_to_distserve"]) == pytest.approx(0.65)


def test_the_terminal_shows_what_the_markdown_shows(make_jobs: Make, store: RecordStore) -> None:
    summaries = summaries_of(make_jobs(("distserve", "biscale")), store)
    console = Console(file=io.StringIO(), width=220)
    print_tables(summaries, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for cell in ("−35.0 %", "J/output token", "requests within"):
        assert cell in shown
