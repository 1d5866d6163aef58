"""The present placement stays while it is nearly as good: on class tables made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from agents.hysteresis import present_counts, stays
from agents.milp import Counts, Room, judge_counts
from agents.placement import plan_counts
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.planning.classes import InstanceClass

# Power is 100, 160 and 205 W for prefill and 100 W for decode, at 10, 20, 20 and 30 requests/s.
TABLE = (
    InstanceClass("prefill", 1, 1, 900, 10.0, 10.0),
    InstanceClass("prefill", 1, 1, 1400, 20.0, 8.0),
    InstanceClass("prefill", 2, 1, 900, 20.0, 10.25),
    InstanceClass("decode", 1, 1, 900, 30.0, 100.0 / 30.0),
)
ROOM = Room(1, 8)


def plan(rate_rps, present=None, keep_within=0.0, unallocated_w=0.0):
    return plan_counts(TABLE, ROOM, rate_rps, 0.0, unallocated_w, present, keep_within)


SLOW = plan(10.0).placement
FAST = plan(20.0).placement


def test_placements_of_the_table():
    assert SLOW.describe() == "1×P TP1@900 + 1×D TP1@900"
    assert FAST.describe() == "1×P TP1@1400 + 1×D TP1@900"


@pytest.mark.parametrize(
    ("rate_rps", "present", "keep_within", "kept"),
    [
        (10.0, FAST, 0.0, False),
        (10.0, FAST, 0.29, False),  # 260 W instead of 200
        (10.0, FAST, 0.31, True),
        (15.0, SLOW, 5.0, False),  # it does not carry the demand
        (20.0, FAST, 0.01, True),
        (10.0, None, 0.3, False),
    ],
)
def test_it_stays_within_the_margin(rate_rps, present, keep_within, kept):
    free = plan(rate_rps)
    chosen = plan(rate_rps, present, keep_within)
    assert chosen.placement == (present if kept else free.placement)
    if kept:
        assert chosen.placement is present
        assert chosen.solution.feasible
        assert chosen.solution.power_w >= free.solution.power_w
        assert chosen.note is None


def test_an_equal_one_stays_only_if_that_is_asked_for():
    other_order = Placement(FAST.instances[::-1])
    assert plan(20.0, other_order).placement == FAST
    assert plan(20.0, other_order, 1e-9).placement == other_order


def test_idle_gpus_count_for_both_if_they_count():
    # Seven and six GPUs are left over at 20 W: 200 + 120 against 260 + 120 W is 19 % more instead of 30 %.
    assert plan(10.0, FAST, 0.2).placement == SLOW
    assert plan(10.0, FAST, 0.2, unallocated_w=20.0).placement == FAST


def test_what_no_class_describes_does_not_stay():
    strange = Placement((*FAST.instances, InstanceSpec("decode", 4, 900)))
    assert present_counts(strange, TABLE) is None
    assert plan(10.0, strange, 9.0).placement == SLOW
    assert present_counts(FAST, TABLE) == (0, 1, 0, 1)


def test_where_nothing_carries_the_demand_the_nearest_is_taken():
    overloaded = plan(500.0, FAST, 9.0)
    assert overloaded.placement == plan(500.0).placement != FAST
    assert "no placement carries" in str(overloaded.note)


def test_the_rule():
    optimum = Counts((1,), 1.2, True, 100.0)
    present = Counts((2,), 1.0, True, 105.0)
    assert stays(present, optimum, 0.05)
    assert not stays(present, optimum, 0.04)
    assert not stays(present, optimum, 0.0)
    assert not stays(dataclasses.replace(present, feasible=False), optimum, 0.05)


def test_given_counts_are_judged_as_chosen_ones():
    chosen = plan(20.0, unallocated_w=7.0)
    judged = judge_counts(
        chosen.solution.counts,
        [row.phase == "prefill" for row in TABLE],
        [row.gpus for row in TABLE],
        [row.rate_rps for row in TABLE],
        [row.power_w for row in TABLE],
        room=ROOM,
        demand_rps=20.0,
        unallocated_w=7.0,
    )
    assert judged == chosen.solution
    assert judged.power_w == pytest.approx(160.0 + 100.0 + 6 * 7.0)
