"""Figures by window and clocks, against arrays written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.summary import Slo, summarise
from biscale_gym.evaluation.windows import (
    IDLE,
    broken,
    clock_shares,
    mean_clock_shares,
    over_seeds,
    placements_by_window,
    window_arrays,
    window_grids,
)

from .fakes import SAVINGS, outcome_of

Make = Callable[..., list[RunJob]]
NAN = float("nan")


def test_means_are_taken_window_by_window() -> None:
    first, second = over_seeds([{"x": np.array([1.0, 5.0])}, {"x": np.array([3.0, 5.0])}], "x")
    assert (first.value, second.value) == (2.0, 5.0)
    assert first.high - first.value == pytest.approx(12.706, abs=1e-3)  # t(1) = 12.706, s/√2 = 1
    assert (second.low, second.high) == (5.0, 5.0)


def test_a_window_is_broken_by_its_tail_or_by_what_is_never_served() -> None:
    windows = {
        "ttft_p99_s": np.array([0.6, 0.601, 0.2, NAN]),
        "tpot_p99_s": np.array([0.05, 0.05, 0.05, NAN]),
        "ttft_attainment": np.array([0.99, 0.991, 0.98, 0.0]),
        "tpot_attainment": np.array([1.0, 1.0, 1.0, 0.0]),
    }
    told = broken(windows, Slo(ttft_s=0.6, tpot_s=0.1))
    assert told.tolist() == [[False, False], [True, False], [True, False], [True, True]]


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """Four samples, the first before the warm-up's end; a TP4 decode instance comes after the second."""
    return {
        "window_start_s": np.array([1.0, 3.0]),
        "timeline_time_s": np.array([0.0, 1.0, 2.0, 3.0]),
        "timeline_clock_mhz": np.array(
            [[750.0, 930.0, NAN], [930.0, 930.0, NAN], [930.0, 750.0, 1830.0], [1110.0, 750.0, 1830.0]]
        ),
        "timeline_batch": np.array([[1.0, 1.0, NAN], [1.0, 1.0, NAN], [0.0, 1.0, 2.0], [3.0, 0.0, 5.0]]),
        "timeline_label": np.array(["prefill 0 TP2", "decode 1 TP2", "decode 2 TP4"]),
        **changes,
    }


def test_clock_shares_count_gpus_that_are_there_and_work() -> None:
    shares = clock_shares(arrays())
    assert shares["prefill"] == pytest.approx({IDLE: 1 / 3, 930: 1 / 3, 1110: 1 / 3})
    assert shares["decode"] == pytest.approx({IDLE: 2 / 14, 750: 2 / 14, 930: 2 / 14, 1830: 8 / 14})


def test_shares_are_averaged_over_runs_that_may_lack_a_clock() -> None:
    one = {"prefill": {IDLE: 0.5, 930: 0.5}, "decode": {750: 1.0}}
    other = {"prefill": {1110: 1.0}, "decode": {750: 1.0}}
    assert mean_clock_shares([one, other]) == {"prefill": {IDLE: 0.25, 930: 0.25, 1110: 0.5}, "decode": {750: 1.0}}


def test_the_table_has_every_window_under_every_controller(make_jobs: Make, store: RecordStore) -> None:
    for index, job in enumerate(make_jobs(("distserve", "reckless"), seeds=2)):
        store.append(*record_of(f"id{index}", job, outcome_of(job)))
    summaries = summarise(list(store.load().values()), store)
    (grid,) = window_grids(summaries, store)
    told = [(row[0], row[1], row[-2]) for row in grid.rows]
    assert told == [
        ("30–900", "distserve", "0 of 2"),
        ("30–900", "reckless", "0 of 2"),
        ("900–1800", "distserve", "0 of 2"),
        ("900–1800", "reckless", "2 of 2"),
    ]
    assert grid.warned == [False, False, False, True]
    assert grid.rows[1][2] == f"{2.0 * SAVINGS['reckless']:.4f} ± 0.0000"
    assert {row[-1] for row in grid.rows} == {"3×P TP2@1110 + 2×D TP4@930"}
    record = summaries[0].records[0]
    assert placements_by_window(record, 2) == ["3×P TP2@1110 + 2×D TP4@930"] * 2
    assert set(window_arrays(store.arrays(record))) == set(outcome_of(make_jobs()[0]).windows)
