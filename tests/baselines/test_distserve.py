"""DistServe's search and replication, on tables written down."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from baselines import distserve
from baselines.distserve import DistServe, DistServePP, best_per_gpu, replicate, replicate_units, units_on_nodes
from baselines.errors import BaselineError
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import load_scenario
from biscale_gym.planning import classes
from biscale_gym.planning.classes import Column, InstanceClass
from biscale_gym.planning.probing import UnitOutcome
from biscale_gym.planning.units import MeasuredUnit
from biscale_gym.profiles import load_profile
from biscale_gym.traces import Trace


def row(phase, tp, rate_rps, pp=1):
    return InstanceClass(phase, tp, pp, 1980, rate_rps, 100.0)


TABLE = (
    row("prefill", 2, 20.0),
    row("prefill", 4, 44.0),
    row("prefill", 8, 80.0),
    row("decode", 2, 0.0),
    row("decode", 4, 30.0),
    row("decode", 4, 68.0, pp=2),
)
CLUSTER = ClusterSettings(nodes=2, gpus_per_node=8)


def test_best_is_per_gpu_and_the_smaller_of_equals():
    assert best_per_gpu(TABLE[:3]) == TABLE[1]
    assert best_per_gpu([row("prefill", 4, 40.0), row("prefill", 2, 20.0)]).tp == 2


@pytest.mark.parametrize(("rate_rps", "prefill", "decode"), [(10.0, 1, 1), (44.0, 1, 1), (60.0, 2, 1), (68.0, 2, 1)])
def test_replication_is_the_ceiling(rate_rps, prefill, decode):
    placement, share = replicate(TABLE, CLUSTER, rate_rps)
    assert share == 1.0
    assert len(placement.of("prefill")) == prefill == math.ceil(rate_rps / 44.0)
    assert len(placement.of("decode")) == decode
    assert {(spec.tp, spec.pp) for spec in placement.of("decode")} == {(4, 2)}
    assert {spec.clock_mhz for spec in placement.instances} == {1980}
    assert {spec.weight for spec in placement.instances} == {1.0}


def test_beyond_the_cluster_the_nearest_is_taken():
    """Enumerated by hand: 8 GPUs each way carry 68 in decode and 88 in prefill; nothing carries more in both."""
    placement, share = replicate(TABLE, CLUSTER, 100.0)
    assert share == pytest.approx(0.68)
    assert placement.gpus <= 16
    capacity = sum(68.0 if spec.pp == 2 else 30.0 for spec in placement.of("decode"))
    assert capacity == pytest.approx(68.0)


def test_a_phase_without_goodput_is_an_error():
    with pytest.raises(BaselineError, match="no decode configuration"):
        replicate([TABLE[0], TABLE[3]], CLUSTER, 1.0)


def test_a_cluster_too_small_is_an_error():
    with pytest.raises(BaselineError, match="do not hold"):
        replicate([TABLE[1], TABLE[4]], ClusterSettings(nodes=1, gpus_per_node=4), 1.0)


COLUMNS = [Column(phase, tp, pp, (1980,)) for phase in ("prefill", "decode") for tp in (2, 4, 8) for pp in (1, 2)]


def measured(rates: dict[tuple[int, int], float]) -> list[MeasuredUnit]:
    """Units of COLUMNS; per instance a phase and TP carry what ``rates`` says, two stages a little less than twice."""
    stages = {1: 1.0, 2: 1.9}
    return [
        MeasuredUnit(
            unit,
            stages[unit.pp] * min(unit.prefills * rates[0, unit.prefill.tp], unit.decodes * rates[1, unit.decode.tp]),
        )
        for unit in units_on_nodes(COLUMNS, CLUSTER)
    ]


def test_units_are_all_that_fit_on_a_node():
    expected = {
        (pp, p, a, d, b)
        for pp, p, d in itertools.product((1, 2), (2, 4, 8), (2, 4, 8))
        for a, b in itertools.product(range(1, 9), repeat=2)
        if a * p + b * d <= 8
    }
    found = units_on_nodes(COLUMNS, CLUSTER)
    assert {(u.pp, u.prefill.tp, u.prefills, u.decode.tp, u.decodes) for u in found} == expected
    assert len(found) == len(expected)
    assert {u.pp for u in units_on_nodes(COLUMNS, ClusterSettings(nodes=1, gpus_per_node=8))} == {1}


@pytest.mark.parametrize("seed", range(20))
def test_the_unit_and_its_replicas_are_the_best_by_enumeration(seed):
    rng = np.random.default_rng(seed)
    rates = {(phase, tp): float(tp * rng.uniform(3.0, 9.0)) for phase in (0, 1) for tp in (2, 4, 8)}
    table = measured(rates)
    demand_rps = float(rng.uniform(5.0, 150.0))
    placement, share = replicate_units(table, CLUSTER, demand_rps)
    greatest = max(one.rate_rps / one.unit.gpus for one in table)
    fewest = min(one.unit.gpus for one in table if one.rate_rps / one.unit.gpus >= greatest * (1.0 - 1e-12))
    chosen = {(spec.phase, spec.tp, spec.pp) for spec in placement.instances}
    # Rounding aside, several units may be best.
    (best,) = (
        one
        for one in table
        if one.rate_rps / one.unit.gpus >= greatest * (1.0 - 1e-12)
        and one.unit.gpus == fewest
        and {(spec.phase, spec.tp, spec.pp) for spec in one.unit.instances} == chosen
    )
    fits = [
        n
        for n in range(1, 17)
        if best.unit.pp * best.unit.gpus_per_node * math.ceil(n / (8 // best.unit.gpus_per_node)) <= 16
        and math.ceil(n / (8 // best.unit.gpus_per_node)) * best.unit.pp <= 2
    ]
    enough = [n for n in fits if n * best.rate_rps >= demand_rps]
    count = min(enough, default=max(fits))
    assert share == pytest.approx(min(1.0, count * best.rate_rps / demand_rps))
    assert len(placement.of("prefill")) == count * best.unit.prefills
    assert len(placement.of("decode")) == count * best.unit.decodes
    assert {(spec.tp, spec.pp) for spec in placement.of("decode")} == {(best.unit.decode.tp, best.unit.pp)}


def test_no_unit_within_the_slo_is_an_error():
    with pytest.raises(BaselineError, match="share a node of 8 GPUs"):
        replicate_units(
            [MeasuredUnit(one.unit, 0.0) for one in measured(dict.fromkeys(itertools.product((0, 1), (2, 4, 8)), 1.0))],
            CLUSTER,
            1.0,
        )


def context(profile: Any = None) -> PlanContext:
    scenario = load_scenario("paper-67")
    rng = np.random.default_rng(5)
    count = 3000
    training = Trace(np.cumsum(rng.exponential(0.05, count)), rng.integers(50, 900, count), rng.integers(2, 200, count))
    return PlanContext(
        scenario=scenario,
        profile=profile or load_profile("h100-sxm5", "llama-3.3-70b", "fp8"),
        training=training,
        mean_rate_rps=20.0,
        clocks_mhz=(1980,),
    )


SMALL = {"requests_per_probe": 300, "warmup_s": 1.0, "rate_tolerance": 0.1}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(tmp_path))
    monkeypatch.setattr(classes, "default_workers", lambda: 1)


def test_apart_a_joint_share_is_split_between_the_phases(monkeypatch):
    asked = {}

    def table(measurement, columns):
        asked["quantile"] = measurement.quantile
        return TABLE, ()

    monkeypatch.setattr(distserve, "usable_table", table)
    monkeypatch.setattr(distserve, "simulate_load", lambda *_: UnitOutcome(0.1, 0.05, 0.934))
    planner = DistServe(quantile=0.9, attainment="joint")
    planner.plan(context())
    assert asked["quantile"] == pytest.approx(0.95)
    assert planner.notes == [
        "window 0: 93.4% of the training requests keep both SLOs at 20.00 requests/s, 90.0% were asked for"
    ]
    planner = DistServe(quantile=0.9)
    planner.plan(context())
    assert asked["quantile"] == 0.9
    assert planner.notes == []


@pytest.mark.parametrize("affinity", ["high", "low"])
def test_a_joint_plan_keeps_its_share(affinity, cache):
    """The whole planner, simulated: what was planned keeps both SLOs for the share asked for."""
    planner = DistServe(quantile=0.9, attainment="joint", node_affinity=affinity, **SMALL)
    placement = planner.plan(context())
    (note,) = planner.notes
    assert float(note.split("window 0: ")[1].split("%")[0]) >= 90.0
    assert placement.of("prefill")
    assert placement.of("decode")


def test_a_unit_carries_less_jointly_than_separately(cache):
    rates = {
        attainment: [
            one.rate_rps
            for one in DistServe(attainment=attainment, quantile=0.9, node_affinity="low", **SMALL).units(context())
        ]
        for attainment in ("separate", "joint")
    }
    joint, separate = np.array(rates["joint"]), np.array(rates["separate"])
    assert len(joint) == len(separate) > 5
    assert (joint <= separate * 1.001).all()
    assert joint.max() > 0.0


def test_an_unknown_notion_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="attainment"):
        DistServe(attainment="both")


def test_the_variant_searches_stages():
    assert {(c.tp, c.pp) for c in DistServePP().columns(context())} > {
        (c.tp, 1) for c in DistServe().columns(context())
    }
