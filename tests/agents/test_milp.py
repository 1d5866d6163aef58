"""The integer programme against enumeration of all counts, on random class tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents.errors import AgentError
from agents.milp import Room, choose_counts
from biscale_gym.cluster.placement import InstanceSpec, Placement, layout


def random_table(rng):
    classes = int(rng.integers(2, 6))
    is_prefill = rng.random(classes) < 0.5
    is_prefill[:2] = True, False
    size = rng.choice([1, 2, 4, 8], classes)
    rate = size * rng.uniform(1.0, 4.0, classes) * (rng.random(classes) < 0.9)
    rate[:2] = size[:2] * rng.uniform(1.0, 4.0, 2)
    power = size * rng.uniform(150.0, 700.0, classes)
    return is_prefill, size, rate, power


def fits(counts, size, room):
    """Largest first onto the emptiest node that holds it."""
    free = [room.gpus_per_node] * room.nodes
    for group in sorted((g for g, n in zip(size, counts, strict=True) for _ in range(n)), reverse=True):
        node = next((i for i, left in enumerate(free) if left >= group), None)
        if node is None:
            return False
        free[node] -= group
    return True


def enumerate_counts(is_prefill, size, rate, power, room, demand, unallocated_w):
    """(feasible, least objective, greatest coverage) by trying every combination of counts."""
    ranges = [range(room.gpus // s + 1) if r > 0 else range(1) for s, r in zip(size, rate, strict=True)]
    counts = np.array(list(itertools.product(*ranges)))
    counts = counts[(counts @ size <= room.gpus) & (counts @ is_prefill >= 1) & (counts @ ~is_prefill >= 1)]
    counts = counts[[fits(row, size, room) for row in counts]]
    if not len(counts):
        return None
    capacity = np.minimum(counts @ (rate * is_prefill), counts @ (rate * ~is_prefill))
    value = counts @ power + unallocated_w * (room.gpus - counts @ size)
    enough = capacity >= demand * (1 - 1e-9)
    return enough.any(), value[enough].min() if enough.any() else None, capacity.max() / demand


@pytest.mark.parametrize("unallocated_w", [0.0, 80.0])
def test_equals_enumeration(unallocated_w):
    rng = np.random.default_rng(23)
    infeasible = 0
    for _ in range(200):
        is_prefill, size, rate, power = random_table(rng)
        room = Room(int(rng.integers(1, 4)), int(rng.choice([2, 3, 4, 6, 8])))
        if room.gpus > 12:
            room = Room(2, 6)
        demand = float(rng.uniform(1.0, 14.0))
        options = {"room": room, "demand_rps": demand, "unallocated_w": unallocated_w}
        expected = enumerate_counts(is_prefill, size, rate, power, room, demand, unallocated_w)
        if expected is None:
            with pytest.raises(AgentError, match="GPUs"):
                choose_counts(is_prefill, size, size, rate, power, **options)
            continue
        found = choose_counts(is_prefill, size, size, rate, power, **options)
        feasible, least, coverage = expected
        assert found.feasible == feasible
        assert fits(found.counts, size, room)
        if feasible:
            assert found.power_w == pytest.approx(least, rel=1e-6)
            assert found.coverage >= 1 - 1e-8
        else:
            infeasible += 1
            assert found.coverage == pytest.approx(coverage, rel=1e-5)
    assert 20 < infeasible < 180


def grid_table(rng):
    """Classes as tier 1 has them: two phases, TP 1 to 8, seven clocks; rates and joules as noisy as they come."""
    size = np.tile(np.repeat([1, 2, 4, 8], 7), 2)
    clock = np.tile(np.linspace(0.4, 1.0, 7), 8)
    is_prefill = np.arange(size.size) < size.size // 2
    rate = size ** rng.uniform(0.9, 1.15) * clock ** rng.uniform(0.5, 1.0) * rng.uniform(0.8, 1.2, size.size)
    rate *= rng.choice([0.0, 1.0], size.size, p=[0.1, 0.9])
    power = size * (100.0 + 500.0 * clock**2.5) * rng.uniform(0.9, 1.1, size.size)
    return is_prefill, size, rate * rng.uniform(1.0, 6.0), power


@pytest.mark.parametrize("gpus", [8, 16, 32])
@pytest.mark.parametrize("unallocated_w", [0.0, 70.0])
def test_fronts_equal_the_solver(gpus, unallocated_w, monkeypatch):
    rng = np.random.default_rng(gpus)
    carried = 0
    for _ in range(12):
        is_prefill, size, rate, power = grid_table(rng)
        demand = float(rng.uniform(0.05, 0.7) * (rate / size).max() * gpus)
        options = {"room": Room(gpus // 8, 8), "demand_rps": demand, "unallocated_w": unallocated_w}
        found = []
        for few_gpus in (32, 0):
            monkeypatch.setattr("agents.milp.FEW_GPUS", few_gpus)
            found.append(choose_counts(is_prefill, size, size, rate, power, **options))
        fronts, solver = found
        assert np.dot(fronts.counts, size) <= gpus
        assert fronts.feasible == solver.feasible
        assert fronts.power_w == pytest.approx(solver.power_w, rel=1e-6)
        if fronts.feasible:
            carried += 1
            assert fronts.coverage >= 1 - 1e-8
        else:
            assert fronts.coverage == pytest.approx(solver.coverage, rel=1e-5)
    assert 3 < carried < 12


def test_nodes_that_are_no_whole_places_are_left_to_the_solver():
    """Six GPUs hold one TP4 instance, so two nodes hold two; twelve GPUs in one node would hold three."""
    table = ([True, False, False], [2, 4, 2], [2, 4, 2], [9.0, 9.0, 2.0], [300.0, 300.0, 300.0])
    assert choose_counts(*table, room=Room(2, 6), demand_rps=9.0).counts == (1, 1, 0)
    found = choose_counts(*table, room=Room(2, 6), demand_rps=20.0)
    assert not found.feasible
    assert fits(found.counts, [2, 4, 2], Room(2, 6))


def test_counts_with_pipelines_can_be_laid_out():
    """Lanes of a pipeline may lie on different nodes, a TP group may not."""
    counts = choose_counts(
        [True, False], [4, 2], [8, 6], [1.0, 9.0], [1.0, 1.0], room=Room(4, 6), demand_rps=9.0
    ).counts
    specs = [InstanceSpec("prefill", 4, 1980, pp=2)] * counts[0] + [InstanceSpec("decode", 2, 1980, pp=3)] * counts[1]
    assert counts[0] == 2
    assert len(layout(Placement(tuple(specs)), 4, 6)) == 2 * counts[0] + 3 * counts[1]


def test_counting_unallocated_power_can_change_the_choice():
    """A larger instance draws more, but leaves fewer GPUs idling."""
    sizes = [1, 1, 2]
    table = ([True, False, False], sizes, sizes, [5.0, 5.0, 5.0], [300.0, 300.0, 350.0])
    room = Room(1, 3)
    assert choose_counts(*table, room=room, demand_rps=4.0).counts == (1, 1, 0)
    assert choose_counts(*table, room=room, demand_rps=4.0, unallocated_w=100.0).counts == (1, 0, 1)


def test_a_phase_without_capacity_is_an_error():
    with pytest.raises(AgentError, match="no decode class"):
        choose_counts([True, False], [1, 1], [1, 1], [3.0, 0.0], [300.0, 300.0], room=Room(1, 4), demand_rps=1.0)


def test_no_demand_still_places_one_of_each():
    found = choose_counts([True, False], [1, 1], [1, 1], [3.0, 3.0], [300.0, 300.0], room=Room(1, 4), demand_rps=0.0)
    assert found.counts == (1, 1)
