"""scripts/beyond_paper.py: what its studies run, and what its tables read off the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tyro

from biscale_gym.control.controllers import PlanContext, make_controller
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.evaluation.identity import run_id
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.statistics import Interval
from biscale_gym.profiles import SwitchingSettings
from biscale_gym.traces import Trace


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("beyond_paper")


# -- what is run -------------------------------------------------------------------------------------------------------


def one_request() -> Trace:
    return Trace(np.array([0.0]), np.array([10]), np.array([10]))


def studies(script: ModuleType, folder: Path):
    return {
        "replacement": script.replacement(),
        "switching": script.switching(),
        "precision": script.precision(),
        "tight": script.tight(),
        "traces": script.traces(folder),
    }


def test_every_case_can_be_named_built_and_compared(script: ModuleType, tmp_path: Path) -> None:
    for study in studies(script, tmp_path).values():
        names = [(case.setting, case.label) for case in study.cases]
        assert len(names) == len(set(names))
        for case in study.cases:
            assert (case.against or case.setting, "distserve") in names
            assert len(case.jobs(3)) == 3
            load_scenario(case.scenario, case.overrides)
            make_controller(case.controller, case.settings)


def test_recorded_traces_are_run_once_and_only_where_they_are(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = script.traces(tmp_path).cases
    assert "biscale-gym trace fetch azure-2023-conv --folder" in capsys.readouterr().err
    (tmp_path / "AzureLLMInferenceTrace_conv.csv").touch()
    known = {(case.setting, case.label) for case in without}
    added = [case for case in script.traces(tmp_path).cases if (case.setting, case.label) not in known]
    assert [len(case.jobs(5)) for case in added] == [1, 1, 1]
    assert "azure-2023-conv" not in capsys.readouterr().err


@pytest.mark.parametrize(("median_ms", "tp"), [(0.0, 2), (4.5, 2), (100.0, 4)])
def test_the_time_that_controllers_are_told_is_the_mean_of_a_job(script: ModuleType, median_ms: float, tp: int) -> None:
    call = script.call_settings(median_ms)
    draws_s = SwitchingSettings(**call).draw_s(np.random.default_rng(0), 40_000 * tp).reshape(-1, tp)
    mean_s = draws_s.sum(axis=1).mean() + 1e-3 * call["settle_ms"]
    assert script.expected_job_s(call, tp) == pytest.approx(mean_s, rel=0.01, abs=1e-12)
    assert (mean_s == 0) == (median_ms == 0)


def test_half_a_biscale_decides_one_phase(script: ModuleType) -> None:
    scenario = load_scenario("smoke")
    clocks_mhz = (*scenario.clocks_mhz, scenario.top_clock_mhz)
    context = PlanContext(scenario, scenario.cluster.profile(), one_request(), 1.0, clocks_mhz=clocks_mhz)
    both = make_controller("biscale", {}).policies(context)
    for name, decided in (("PrefillClocks", (True, False)), ("DecodeClocks", (False, True))):
        policies = make_controller(f"beyond_paper:{name}", {}).policies(context)
        assert tuple(policy is not None for policy in policies) == decided
        for policy, whole in zip(policies, both, strict=True):
            assert policy is None or policy.function is whole.function


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_change_of_clocks_is_no_change_of_instances(script: ModuleType) -> None:
    placements = [
        [0.0, "2×P TP2@930 + 1×D TP4@1110"],
        [300.0, "1×P TP2@930 + 1×P TP2@1110 + 1×D TP4@750"],
        [600.0, "3×P TP2@930 + 1×D TP4@750"],
        [900.0, "3×P TP2@930 + 2×D TP2@750"],
    ]
    assert script.changes_s(SimpleNamespace(provenance={"placements": placements})) == [600.0, 900.0]
    assert script.outages(SimpleNamespace(provenance={"placements": placements})) == 1, "decode, at 900 s"
    assert script.instances(placements[1][1]) == {("P", "2"): 2, ("D", "4"): 1}


def case(script: ModuleType, setting: str, label: str, prefill_mhz: int, against: str = "", **overrides: object):
    settings = {
        "planner": "given",
        "instances": [{"phase": phase, "tp": 2, "count": 2} for phase in ("prefill", "decode")],
        "prefill_clock_mhz": prefill_mhz,
    }
    return script.Case(setting, label, "static", "smoke", overrides, settings, against=against)


@pytest.fixture(scope="module")
def table(script: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """Three cases over two seeds, really run: rows by (setting, label), and their records."""
    store = RecordStore(tmp_path_factory.mktemp("beyond"))
    cases = [
        case(script, "a", "distserve", 1980),
        case(script, "a", "place-only", 1410),
        case(script, "b", "biscale", 930, against="a"),
        case(script, "c", "biscale", 930, against="a", **{"slo.ttft_s": 0.001}),
        case(script, "d", "never run", 750, against="a"),
    ]
    for one in cases[:-1]:
        for job in one.jobs(2):
            record, arrays = record_of(run_id(job), job, run(job))
            store.append(record, arrays)
    records = {script.name_of(RunJob.model_validate(record.job)): record for record in store.load().values()}
    rows = script.rows_of(cases, 2, records, store)
    return {(row.case.setting, row.case.label): row for row in rows}


def joules(row, metric: str = "total_energy_j") -> np.ndarray:
    return np.array([float(record.row[metric]) for record in row.summary.records])


def test_savings_are_taken_seed_by_seed(table) -> None:
    base, held, ours = table["a", "distserve"], table["a", "place-only"], table["b", "biscale"]
    for metric, ratio in ours.ratios.items():
        assert ratio.value == pytest.approx(np.mean(joules(ours, metric) / joules(base, metric)))
        assert ratio.low < ratio.value < ratio.high or metric == "decode_energy_j"
    assert ours.tier2.value == pytest.approx(np.mean(joules(ours) / joules(held)))
    assert held.tier2 is None
    assert base.ratios == {}
    assert ours.ratios["prefill_energy_j"].value < held.ratios["prefill_energy_j"].value < 1


def test_a_case_without_all_its_runs_has_no_row(table) -> None:
    assert ("d", "never run") not in table


def test_a_broken_slo_is_marked(script: ModuleType, table) -> None:
    assert script.seeds_within(table["b", "biscale"]) == "2 of 2"
    assert script.seeds_within(table["c", "biscale"]) == "0 of 2"
    controller = script.COMMON_COLUMNS["controller"]
    assert controller(table["b", "biscale"]) == "biscale"
    assert controller(table["c", "biscale"]) == "biscale ✗"


def test_misses_are_split_at_the_changes(script: ModuleType, table, monkeypatch: pytest.MonkeyPatch) -> None:
    row = table["c", "biscale"]
    assert script.missed_after_changes(row) == "–, 100.00 %"
    monkeypatch.setattr(script, "changes_s", lambda record: [20.0])
    monkeypatch.setattr(script, "AFTER_S", 10.0)
    assert script.missed_after_changes(row) == "100.00 %, 100.00 %"
    late = [
        (script.arrivals_s(record), row.store.arrays(record)["ttft_s"] > 0.05)
        for record in table["b", "biscale"].summary.records
    ]
    near, other = (
        np.concatenate([miss[((at >= 20) & (at < 30)) == wanted] for at, miss in late]) for wanted in (True, False)
    )
    told = script.missed_after_changes(
        SimpleNamespace(
            summary=SimpleNamespace(slo=SimpleNamespace(ttft_s=0.05, tpot_s=9.0), records=row.summary.records),
            store=row.store,
        )
    )
    assert told == f"{100 * near.mean():.2f} %, {100 * other.mean():.2f} %"
    assert 0 < other.mean() < 1


def test_the_usual_placement_leaves_out_clocks(script: ModuleType, table) -> None:
    assert script.usual_placement(table["b", "biscale"]) == "2×P TP2 + 2×D TP2"


def test_figures_carry_their_intervals(script: ModuleType) -> None:
    nothing = float("nan")
    assert script.percent(Interval(0.55, 0.53, 0.57)) == "−45.0 ± 2.0 %"
    assert script.percent(Interval(1.02, nothing, nothing)) == "+2.0 %"
    assert script.percent(None) == "–"
    assert script.megajoules(Interval(7e6, 6.9e6, 7.1e6)) == "7.000 ± 0.100"


def test_rows_for_programs_hold_no_nan(script: ModuleType, table) -> None:
    row = script.as_json("tight", table["b", "biscale"], {"setting": "b"})
    json.dumps(row, allow_nan=False)
    assert row["metrics"]["total_energy_j"][0] == pytest.approx(joules(table["b", "biscale"]).mean())
    assert math.isfinite(row["ttft_p99_s"])


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "name a study: replacement"), (("tight", "--seeds", "0"), "--seeds 0: at least 1 is needed")],
)
def test_wrong_arguments_are_named(script: ModuleType, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        tyro.cli(script.main, args=list(arguments))


def test_an_unknown_study_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(script.main, args=["tigth"])
    assert "tight" in capsys.readouterr().err


def test_rates_are_those_that_their_scenarios_state(script: ModuleType) -> None:
    assert script.PRECISIONS["fp8"][1] == load_scenario("paper-67").rate_rps


@pytest.mark.parametrize("name", ["code", "agentic", "diurnal"])
def test_a_scenario_states_the_command_of_its_rate(
    name: str, load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, derive = load_scenario(name), load_script("derive_rates")
    words = scenario.rate_from.split()
    assert words[:2] == ["python", "scripts/derive_rates.py"]
    seen = []
    monkeypatch.setattr(derive, "judge", lambda *job: seen.append(job) or derive.Kept(job[2], 0, 0, 16, "", True))
    tyro.cli(derive.main, args=words[2:])
    rates = [job[2] for job in seen]
    assert {job[0] for job in seen} == {name}
    share = [0.67 * rate for rate in np.arange(min(rates), max(rates) + 0.01, 0.25)]
    assert min(abs(scenario.rate_rps - one) for one in share) < 0.006
