"""The search forms against naive enumeration of every assignment, on random queues."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents import mpc_search as search

KINDS = [search.WINDOW_ENERGY, search.BUSY_ENERGY, search.MEAN_POWER]


def random_queue(rng, batches, clocks):
    """Latencies falling and energies U-shaped in the clock, deadlines from hopeless to loose."""
    speed = np.sort(rng.uniform(0.3, 1.0, clocks))
    work = rng.uniform(0.02, 0.3, batches)
    latency = work[:, None] / speed[None, :] * rng.uniform(0.97, 1.03, (batches, clocks))
    latency = np.minimum.accumulate(latency, axis=1)
    power = 150 + 550 * speed**2.5
    energy = latency * power * rng.uniform(0.95, 1.05, (batches, clocks))
    fastest, slowest = latency[:, -1].cumsum(), latency[:, 0].cumsum()
    deadline = fastest + rng.uniform(-0.05, 1.1) * (slowest - fastest) + rng.uniform(-0.02, 0.1, batches)
    return latency, energy, deadline


def enumerate_best(latency, energy, deadline, idle_w, kind):
    """Least objective over all n^h assignments; None if no assignment meets the deadlines."""
    h, n = latency.shape
    choices = np.array(list(itertools.product(range(n), repeat=h)))
    rows = np.arange(h)
    feasible = (latency[rows, choices].cumsum(axis=1) <= deadline + search.DEADLINE_TOLERANCE_S).all(axis=1)
    if not feasible.any():
        return None
    busy_s, busy_j = latency[rows, choices].sum(axis=1), energy[rows, choices].sum(axis=1)
    value = {
        search.WINDOW_ENERGY: busy_j - idle_w * busy_s,
        search.BUSY_ENERGY: busy_j,
        search.MEAN_POWER: busy_j / busy_s,
    }[kind]
    return value[feasible].min()


@pytest.mark.parametrize("kind", KINDS)
def test_forms_against_enumeration(kind):
    rng = np.random.default_rng(17 + kind)
    infeasible = 0
    for _ in range(150):
        batches, clocks = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        if batches == 5:
            clocks = min(clocks, 6)
        latency, energy, deadline = random_queue(rng, batches, clocks)
        best = enumerate_best(latency, energy, deadline, 90.0, kind)
        exact, greedy, dynamic = (np.zeros(batches, np.int64) for _ in range(3))
        found = search.exact(latency, energy, deadline, 90.0, kind, exact)
        assert found == (best is not None)
        assert search.greedy(latency, energy, deadline, 90.0, kind, greedy) == found
        found_on_grid = search.dynamic(latency, energy, deadline, 90.0, kind, 0.002, dynamic)
        if best is None:
            infeasible += 1
            assert not found_on_grid
            assert (exact == clocks - 1).all()
            assert (greedy == clocks - 1).all()
            continue
        for choice in (exact, greedy, dynamic):
            assert search.meets_deadlines(latency, deadline, choice)
        assert search.objective(latency, energy, 90.0, kind, exact) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert search.objective(latency, energy, 90.0, kind, greedy) >= best - 1e-9 * abs(best)
        if found_on_grid:
            assert search.objective(latency, energy, 90.0, kind, dynamic) >= best - 1e-9 * abs(best)
    assert 5 < infeasible < 80


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_exact_equals_enumeration_over_seven_clocks(batches):
    rng = np.random.default_rng(40 + batches)
    feasible = 0
    for _ in range(12):
        latency, energy, deadline = random_queue(rng, batches, 7)
        for kind in KINDS:
            best = enumerate_best(latency, energy, deadline, 90.0, kind)
            choice = np.zeros(batches, np.int64)
            assert search.exact(latency, energy, deadline, 90.0, kind, choice) == (best is not None)
            if best is not None:
                feasible += 1
                assert search.meets_deadlines(latency, deadline, choice)
                assert search.objective(latency, energy, 90.0, kind, choice) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert feasible > 10


def test_dynamic_is_found_where_exact_has_the_grid_to_spare():
    rng = np.random.default_rng(3)
    to_spare = 0
    for _ in range(300):
        batches = int(rng.integers(1, 9))
        latency, energy, deadline = random_queue(rng, batches, 7)
        choice = np.zeros(batches, np.int64)
        # Each batch may lose one step to rounding up, and its deadline one to rounding down.
        tightened = deadline - 0.002 * (batches + 1)
        if search.exact(latency, energy, tightened, 90.0, search.WINDOW_ENERGY, choice):
            to_spare += 1
            bound = search.objective(latency, energy, 90.0, search.WINDOW_ENERGY, choice)
            assert search.dynamic(latency, energy, deadline, 90.0, search.WINDOW_ENERGY, 0.002, choice)
            assert search.objective(latency, energy, 90.0, search.WINDOW_ENERGY, choice) <= bound + 1e-9 * abs(bound)
    assert to_spare > 150


def test_restricted_search_stays_in_its_bounds():
    rng = np.random.default_rng(5)
    latency, _, _ = random_queue(rng, 4, 7)
    cost = rng.normal(size=(4, 7))
    low, high = np.array([1, 2, 0, 3]), np.array([3, 2, 6, 4])
    choice = high.copy()
    loose = np.full(4, 1e9)
    value = search.least_sum(latency, cost, loose, low, high, 1e-9, choice)
    expected = [low[j] + int(np.argmin(cost[j, low[j] : high[j] + 1])) for j in range(4)]
    assert choice.tolist() == expected
    assert value == pytest.approx(cost[np.arange(4), expected].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_leaves_a_plateau(kind):
    """A power limit makes the upper clocks one and the same: nothing is gained in the first steps, yet it goes on."""
    rng = np.random.default_rng(6)
    latency, energy, _ = random_queue(rng, 4, 4)
    power = np.array([200.0, 300.0, 450.0, 700.0])
    latency = np.sort(latency, axis=1)[:, ::-1].copy()
    energy = latency * power
    limited = [np.hstack([table, np.repeat(table[:, -1:], 3, axis=1)]) for table in (latency, energy)]
    choice = np.zeros(4, np.int64)
    assert search.greedy(*limited, np.full(4, 1e9), 90.0, kind, choice)
    best = [search.objective(latency, energy, 90.0, kind, np.full(4, c)) for c in range(4)]
    assert search.objective(*limited, 90.0, kind, choice) <= min(best) + 1e-6


def test_full_horizon_is_quick_enough_for_a_decision():
    """The cut tree stays small where the full one has 7^8 leaves: a coarse guard, benchmarks hold the real figure."""
    import time

    rng = np.random.default_rng(9)
    queues = [random_queue(rng, 8, 7) for _ in range(200)]
    choice = np.zeros(8, np.int64)
    for form, limit_s in ((search.greedy, 0.5e-3), (search.exact, 2e-3)):
        form(*queues[0], 90.0, search.WINDOW_ENERGY, choice)
        took = []
        for queue in queues:
            start = time.perf_counter()
            form(*queue, 90.0, search.WINDOW_ENERGY, choice)
            took.append(time.perf_counter() - start)
        print(form.__name__, np.median(took), np.max(took))
        assert np.median(took) < limit_s
