"""The two tiers joined, on a small cluster with the real engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agents.biscale import BiScale
from agents.milp import Room
from agents.placement import Tier1, grid_columns, measurement_of, plan_counts
from agents.settings import Tier1Settings
from baselines.distserve import DistServe
from baselines.errors import BaselineError
from baselines.max_clock import MaxClock
from baselines.place_only import PlaceOnly
from baselines.static import Static
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import Controller, PlanContext
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import generated_requests
from biscale_gym.metrics import measure
from biscale_gym.planning.classes import Column, InstanceClass, class_table, fitting_degrees
from biscale_gym.profiles import load_profile

QUICK = {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}
GIVEN = {"planner": "given", "instances": [{"phase": "prefill", "tp": 1}, {"phase": "decode", "tp": 1, "count": 2}]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Compiled code stays where it is: only the class tables start empty.
        patch.setattr("biscale_gym.planning.table_cache.cache_root", lambda: tmp_path_factory.getbasetemp() / "tables")
        patch.setattr("biscale_gym.planning.classes.default_workers", lambda: 1)
        yield


@pytest.fixture(scope="module")
def scenario():
    return ScenarioSettings(
        workload="lognormal-poisson",
        rate_rps=12.0,
        duration_s=60.0,
        training_s=60.0,
        window_s=20.0,
        warmup_s=5.0,
        slo={"ttft_s": 0.4, "tpot_s": 0.05},
        cluster={"model": "llama-3.1-8b", "precision": "bf16", "nodes": 1, "gpus_per_node": 8},
        clocks_mhz=(705, 1005, 1410, 1830),
        top_clock_mhz=1980,
    )


@pytest.fixture(scope="module")
def eight_billion(scenario):
    cluster = scenario.cluster
    return load_profile(cluster.hardware, cluster.model, cluster.precision)


@pytest.fixture(scope="module")
def requests(scenario, eight_billion):
    return generated_requests(scenario, eight_billion, "test", 0, None)


@pytest.fixture(scope="module")
def context(scenario, eight_billion, requests):
    return PlanContext(
        scenario, eight_billion, requests.training, requests.mean_rate_rps, clocks_mhz=(705, 1005, 1410, 1830, 1980)
    )


def play(controller, scenario, profile, requests):
    rollout = Rollout(controller, scenario, requests, 0, profile)
    counted = rollout.run()
    ledger = rollout.simulator.requests()
    return rollout, measure(ledger, counted, scenario.slo, scenario.tpot_definition, 0.0).row


@pytest.fixture(scope="module")
def rows(cache, scenario, eight_billion, requests):
    controllers = {
        "distserve": DistServe(**QUICK),
        "place-only": PlaceOnly(**QUICK),
        "biscale": BiScale(tier1=QUICK),
        "floored": BiScale(tier1=QUICK, decode={"variant": "floored"}, prefill={"search": "dp"}),
        "credit": BiScale(tier1=QUICK, decode={"variant": "credit"}),
    }
    return {name: play(one, scenario, eight_billion, requests) for name, one in controllers.items()}


@pytest.mark.parametrize("name", ["distserve", "place-only", "biscale", "floored", "credit"])
def test_slos_are_met(rows, scenario, name):
    row = rows[name][1]
    assert row["ttft_p99_s"] <= scenario.slo.ttft_s
    assert row["tpot_p99_s"] <= scenario.slo.tpot_s


def test_control_saves_energy(rows):
    total = {name: row["prefill_energy_j"] + row["decode_energy_j"] for name, (_, row) in rows.items()}
    assert total["place-only"] < total["distserve"]
    assert total["biscale"] < total["distserve"]


def test_windows_are_planned(rows):
    rollout = rows["biscale"][0]
    assert [at_s for at_s, _ in rollout.placements] == [0.0, 20.0, 40.0]
    clocks = rollout.timeline.arrays(rollout.simulator.lanes)["clock_mhz"]
    assert len(np.unique(clocks[np.isfinite(clocks)])) > 1


def test_distserve_stays_at_the_top(rows):
    rollout = rows["distserve"][0]
    assert len(rollout.placements) == 1
    assert {spec.clock_mhz for spec in rollout.placements[0][1].instances} == {1980}


@pytest.mark.parametrize(
    "build", [lambda: BiScale(tier1=QUICK), lambda: DistServe(**QUICK)], ids=["biscale", "distserve"]
)
def test_planning_leaves_the_run_alone(cache, scenario, eight_billion, requests, build):
    """A plan more, now and then in the midst of a run, and not a bit of the cluster or of the run's end differs."""
    plain, disturbed = (Rollout(build(), scenario, requests, 0, eight_billion) for _ in range(2))
    advance, calls, plans = disturbed.simulator.run, 0, 0

    def advance_and_plan(*arguments):
        nonlocal calls, plans
        decision = advance(*arguments)
        calls += 1
        if calls % 60 == 0:
            before = disturbed.simulator.snapshot()
            disturbed.controller.plan(disturbed._context())
            after = disturbed.simulator.snapshot()
            assert [array.tobytes() for array in before.state] == [array.tobytes() for array in after.state]
            assert before.lanes == after.lanes
            plans += 1
        return decision

    disturbed.simulator.run = advance_and_plan
    counted = [rollout.run().energy for rollout in (plain, disturbed)]
    assert plans > 10
    assert plain.simulator.counts()["finished"] > 300
    for ledgers in (counted, *([getattr(run.simulator, name)() for run in (plain, disturbed)] for name in LEDGERS)):
        for field in dataclasses.fields(ledgers[0]):
            ours, theirs = (np.asarray(getattr(ledger, field.name)) for ledger in ledgers)
            assert ours.tobytes() == theirs.tobytes(), field.name
    assert plain.action_digest() == disturbed.action_digest()


LEDGERS = ("requests", "instances")
PLACED = {
    "paper-67": (("prefill", 2, 930, 4), ("decode", 2, 930, 3)),
    "paper-85": (("prefill", 4, 1110, 2), ("decode", 2, 1290, 4)),
    "tight": (("prefill", 4, 1110, 2), ("decode", 2, 1110, 4)),
}


class Placed(BiScale):
    """BiScale's clocks on a stated placement."""

    def __init__(self, instances, **changes):
        super().__init__(**changes)
        self.placement = Placement(
            tuple(InstanceSpec(phase, tp, clock) for phase, tp, clock, n in instances for _ in range(n))
        )

    def plan(self, context):
        return self.placement


@pytest.mark.parametrize("name", list(PLACED))
def test_credit_keeps_what_the_papers_rule_keeps(name):
    """On placements like those that tier 1 finds for these scenarios; what it saves is little, docs/controllers.md."""
    scenario = load_scenario(name, {"duration_s": 600.0})
    cluster = scenario.cluster
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    requests = generated_requests(scenario, profile, "test", 0, None)
    rows = {}
    for variant in ("paper", "credit"):
        rows[variant] = play(Placed(PLACED[name], decode={"variant": variant}), scenario, profile, requests)[1]
    paper, credit = rows["paper"], rows["credit"]
    assert paper["tpot_p99_s"] <= scenario.slo.tpot_s
    assert credit["tpot_p99_s"] <= scenario.slo.tpot_s
    assert credit["tpot_p99_s"] != paper["tpot_p99_s"], "the load leaves nothing to decide"
    assert credit["decode_energy_j"] == pytest.approx(paper["decode_energy_j"], rel=0.02)


def test_planning_is_reproducible(cache, context):
    tables = [Tier1(Tier1Settings(**QUICK)).table(context) for _ in range(2)]
    assert tables[0] == tables[1]
    assert {row.phase for row in tables[0]} == {"prefill", "decode"}


@pytest.mark.slow
def test_processes_measure_the_same(cache, context, tmp_path, monkeypatch):
    measurement = measurement_of(context, Tier1Settings(**QUICK))
    columns = [Column("prefill", 1, 1, (1005, 1980)), Column("prefill", 2, 1, (1005, 1980))]
    alone = class_table(measurement, columns, workers=1)
    monkeypatch.setattr("biscale_gym.planning.table_cache.cache_root", lambda: tmp_path)
    assert class_table(measurement, columns, workers=2) == alone


def test_columns_fit_memory(context):
    assert {column.tp for column in grid_columns(context)} == {1, 2, 4, 8}
    seventy = load_profile("h100-sxm5", "llama-3.3-70b", "bf16")
    assert 1 not in fitting_degrees(seventy, "decode", 8)
    assert 2 not in fitting_degrees(seventy, "decode", 8)
    assert fitting_degrees(seventy, "decode", 4) == (4,)


TABLE = (
    InstanceClass("prefill", 2, 1, 1005, 10.0, 30.0),
    InstanceClass("prefill", 4, 1, 1410, 25.0, 40.0),
    InstanceClass("decode", 4, 1, 1005, 12.0, 30.0),
    InstanceClass("decode", 4, 1, 1980, 20.0, 50.0),
)


def test_plan_weights_are_rates_and_order_is_fixed():
    plan = plan_counts(TABLE, Room(2, 8), 20.0, 0.05)
    assert plan.note is None
    assert plan.demand_rps == pytest.approx(21.0)
    assert [spec.phase for spec in plan.placement.instances] == sorted(
        (spec.phase for spec in plan.placement.instances), reverse=True
    )
    rates = {(row.phase, row.tp, row.clock_mhz): row.rate_rps for row in TABLE}
    for spec in plan.placement.instances:
        assert spec.weight == rates[spec.phase, spec.tp, spec.clock_mhz]


def test_an_infeasible_window_is_said(context, monkeypatch):
    tier1 = Tier1(Tier1Settings())
    monkeypatch.setattr(tier1, "table", lambda _: TABLE)
    overloaded = dataclasses.replace(context, history_rps=(5.0, 500.0))
    placement = tier1.plan(overloaded)
    assert placement.gpus <= 8
    assert len(tier1.notes) == 1
    assert tier1.notes[0].startswith("window 2: no placement carries 525.00 requests/s")


@pytest.mark.parametrize("kind", [BiScale, PlaceOnly, DistServe, MaxClock, Static])
def test_controllers_keep_the_protocol(kind):
    assert isinstance(kind(), Controller)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BiScale(decode={"varian": "paper"}), "variant"),
        (lambda: BiScale(preset="biscal"), "biscale"),
        (lambda: BiScale(decode={"kv_low": 0.9}), "kv_low"),
        (lambda: PlaceOnly(margn=0.1), "margin"),
        (lambda: BiScale(tier1={"forcast": "peak"}), "did you mean 'forecast'"),
        (lambda: BiScale(tier1={"forecast": "peek"}), "'peak'"),
        (lambda: PlaceOnly(keep_witin=0.1), "did you mean 'keep_within'"),
        (lambda: PlaceOnly(ewma_weight=0.0), "ewma_weight"),
        (lambda: DistServe(node_afinity="low"), "node_affinity"),
        (lambda: MaxClock(planner="biscale"), "planner"),
    ],
)
def test_wrong_settings_name_the_right_ones(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_given_placements(context):
    placement = MaxClock(**GIVEN).plan(context)
    assert placement.describe() == "1×P TP1@1980 + 2×D TP1@1980"
    placement = Static(**GIVEN, prefill_clock_mhz=1005).plan(context)
    assert placement.describe() == "1×P TP1@1005 + 2×D TP1@1830"
    with pytest.raises(BaselineError, match="nearest is 1005"):
        Static(**GIVEN, decode_clock_mhz=1000).plan(context)
    with pytest.raises(BaselineError, match="instances"):
        MaxClock(planner="given")
