"""Placement by load curves: against all placements and shares of small cases, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.errors import AgentError
from agents.load_placement import LoadPlan, instance_costs, plan_load
from biscale_gym.cluster.placement import PHASES, InstanceSpec, Placement
from biscale_gym.planning.curves import LoadCurve, LoadPoint

PRICE_J, IDLE_W = 300.0, 72.0


def both(load_rps: float) -> Any:
    """The same load for both phases."""
    return dict.fromkeys(PHASES, load_rps)


START_MHZ: Any = {"prefill": 1830, "decode": 1830}


def curve(phase: Any, tp: int, fixed_w: float, each_j: float, most_rps: float) -> LoadCurve:
    """An instance that draws a fixed part and so much per request, and fails all beyond a rate."""
    rates = (0.1, 0.8 * most_rps, most_rps, 1.1 * most_rps)
    return LoadCurve(
        phase,
        tp,
        tuple(
            LoadPoint(rate, fixed_w + each_j * rate, missed)
            for rate, missed in zip(rates, (0.0, 0.0, 0.05, 1.0), strict=True)
        ),
    )


@st.composite
def curve_sets(draw: st.DrawFn) -> list[LoadCurve]:
    return [
        curve(
            phase,
            tp,
            draw(st.floats(20.0, 500.0)),
            draw(st.floats(1.0, 50.0)),
            draw(st.floats(2.0, 20.0)) * tp / 2.0,
        )
        for phase in PHASES
        for tp in (1, 2, 4)
    ]


def splits(parts: int, whole: int) -> Iterator[tuple[int, ...]]:
    """Ways to share ``whole`` among ``parts``, each at least 1, the order mattering."""
    if parts == 1:
        yield (whole,)
        return
    for first in range(1, whole - parts + 2):
        for rest in splits(parts - 1, whole - first):
            yield (first, *rest)


def cheapest_w(curves: list[LoadCurve], phase: str, gpus: int, rate_rps: float, shares: int, error: float) -> float:
    """By trying everything on exactly ``gpus`` GPUs."""
    costs = {c.tp: instance_costs(c, rate_rps, shares, PRICE_J, error) for c in curves if c.phase == phase}
    best = np.inf
    for count in range(1, gpus + 1):
        for degrees in combinations_with_replacement(sorted(costs), count):
            if sum(degrees) == gpus and count <= shares:
                for split in splits(count, shares):
                    best = min(best, sum(costs[tp][share - 1] for tp, share in zip(degrees, split, strict=True)))
    return float(best)


@settings(deadline=None, max_examples=25)
@given(
    curves=curve_sets(), prefill=st.floats(1.0, 30.0), decode=st.floats(1.0, 30.0), error=st.sampled_from([0.0, 0.15])
)
def test_it_is_the_cheapest_of_all(curves: list[LoadCurve], prefill: float, decode: float, error: float) -> None:
    loads: Any = {"prefill": prefill, "decode": decode}
    gpus, shares = 6, 4
    plan = plan_load(curves, gpus, loads, PRICE_J, IDLE_W, shares, forecast_error=error)
    each = [[cheapest_w(curves, phase, g, loads[phase], shares, error) for g in range(1, gpus)] for phase in PHASES]
    brute_w = min(
        each[0][p - 1] + each[1][d - 1] + IDLE_W * (gpus - p - d)
        for p in range(1, gpus)
        for d in range(1, gpus - p + 1)
    )
    assert plan.cost_w == pytest.approx(brute_w)
    placement = plan.placement(START_MHZ)
    assert placement.gpus <= gpus
    for phase in PHASES:
        assert sum(spec.weight for spec in placement.of(phase)) == shares


def two_curves() -> list[LoadCurve]:
    return [
        curve("prefill", 2, 160.0, 20.0, 20.0),
        curve("decode", 2, 400.0, 10.0, 20.0),
        curve("decode", 4, 700.0, 8.0, 40.0),
    ]


def counts(plan: LoadPlan, phase: Any) -> list[int]:
    return sorted(one.tp for one in plan.instances[phase])


def test_present_instances_stay_while_they_are_nearly_as_cheap() -> None:
    curves = two_curves()
    present = Placement((InstanceSpec("prefill", 2, 1830), *[InstanceSpec("decode", 2, 1830)] * 2))
    free = plan_load(curves, 16, both(15.0), PRICE_J, IDLE_W)
    assert counts(free, "decode") == [2]
    excess = (
        plan_load(curves, 16, both(15.0), PRICE_J, IDLE_W, present=present, keep_within=10.0).cost_w / free.cost_w - 1.0
    )
    assert excess > 0.0
    kept = plan_load(curves, 16, both(15.0), PRICE_J, IDLE_W, present=present, keep_within=1.01 * excess)
    changed = plan_load(curves, 16, both(15.0), PRICE_J, IDLE_W, present=present, keep_within=0.99 * excess)
    assert counts(kept, "decode") == [2, 2]
    assert sum(one.share for one in kept.instances["decode"]) == 24
    assert counts(changed, "decode") == [2]


def test_an_uncertain_forecast_buys_room() -> None:
    curves = two_curves()
    certain = plan_load(curves, 16, both(15.5), 3000.0, IDLE_W)
    uncertain = plan_load(curves, 16, both(15.5), 3000.0, IDLE_W, forecast_error=0.15)
    assert counts(certain, "decode") == [2]
    assert sum(counts(uncertain, "decode")) > 2


def test_an_overload_takes_what_carries_most_and_says_so() -> None:
    curves = two_curves()
    assert plan_load(curves, 16, both(60.0), PRICE_J, IDLE_W).carries
    overload = plan_load(curves, 8, both(200.0), PRICE_J, IDLE_W)
    assert not overload.carries
    assert overload.placement(START_MHZ).gpus == 8


def test_a_cluster_too_small_is_refused() -> None:
    with pytest.raises(AgentError, match="does not fit on 3 GPUs"):
        plan_load(two_curves(), 3, both(1.0), PRICE_J, IDLE_W)
    with pytest.raises(AgentError, match="no decode instance"):
        plan_load(two_curves()[:1], 4, both(1.0), PRICE_J, IDLE_W)
