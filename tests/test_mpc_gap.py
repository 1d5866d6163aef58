"""scripts/mpc_gap.py on few queues: nothing beats ``exact``, and the window counts what the page says."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from agents import mpc_search as search
from biscale_gym.profiles import load_profile

LIMIT_S = 0.57


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("mpc_gap")


@pytest.fixture(scope="module")
def queues(script: ModuleType):
    clocks = (750, 1110, 1470, 1830)
    model = load_profile("h100-sxm5", "llama-3.3-70b", "fp8").compile(2, clocks, 1)
    rng = np.random.default_rng(4)
    costs = script.Costs(model, len(clocks), 1024)
    return [script.random_queue(rng, np.arange(50, 1500), costs, LIMIT_S) for _ in range(60)]


def test_queues_are_what_the_page_says(queues) -> None:
    assert max(queue.deadline_s.size for queue in queues) > 3
    for queue in queues:
        assert (np.diff(queue.deadline_s) >= 0).all(), "later batches hold later arrivals"
        assert 0.4 * LIMIT_S <= queue.deadline_s[0] <= LIMIT_S
        assert (np.diff(queue.latency_s, axis=1) <= 0).all()


def test_gaps_are_never_negative(script: ModuleType, queues) -> None:
    results = script.gaps_and_times(queues, 90.0)
    assert set(results) == {"greedy", "dp", "exact"}
    for gap, us, missed in results.values():
        assert (gap >= -1e-12).all()
        assert us.size == len(queues)
        assert (us > 0).all()
        assert 0 <= missed < len(queues)
    assert not results["exact"][0].any()
    assert results["exact"][2] == results["greedy"][2] == 0


def test_the_window_counts_idle_energy_after_the_batches(script: ModuleType, queues) -> None:
    queue = queues[0]
    lowest = np.zeros(queue.deadline_s.size, np.int64)
    assert script.window_j(queue, 90.0, lowest) == pytest.approx(queue.energy_j[:, 0].sum())
    top = lowest + queue.latency_s.shape[1] - 1
    spare_s = queue.latency_s[:, 0].sum() - queue.latency_s[:, -1].sum()
    assert script.window_j(queue, 90.0, top) == pytest.approx(queue.energy_j[:, -1].sum() + 90.0 * spare_s)
    assert search.objective(queue.latency_s, queue.energy_j, 90.0, search.WINDOW_ENERGY, top) == pytest.approx(
        script.window_j(queue, 90.0, top) - 90.0 * queue.latency_s[:, 0].sum()
    )


def test_json_on_standard_output_is_only_json(script: ModuleType, queues, capsys) -> None:
    script.main(scenario="smoke", queues=40, tp=(2,), json_file="-")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert set(found) == {"mpc_gap", "mpc_median_ms"}
    assert "40 queues" in captured.err


def test_figures_are_over_all_queues(script: ModuleType, queues) -> None:
    halves = [script.gaps_and_times(half, 90.0) for half in (queues[:10], queues[10:])]
    whole = script.gaps_and_times(queues, 90.0)
    found = script.figures(halves)
    assert found["mpc_gap"] == {name: pytest.approx(whole[name][0].mean()) for name in ("greedy", "dp")}
    us = np.concatenate([half["dp"][1] for half in halves])
    assert found["mpc_median_ms"]["dp"] == pytest.approx(np.median(us) / 1e3)
