"""scripts/reproduce_paper.py: the arithmetic on rows written by hand, the JSON, and going on after an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from biscale_gym.control.rollout import RunJob, RunOutcome
from biscale_gym.evaluation.faults import EvaluationError
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.summary import summarise

from evaluation import fakes  # isort: skip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("reproduce_paper")


def with_joules(job: RunJob, prefill_j: list[float], decode_j: list[float], **windows: list[float]) -> RunOutcome:
    """A fake run with these joules in its two windows."""
    outcome = fakes.outcome_of(job)
    outcome.row.update(prefill_energy_j=sum(prefill_j), decode_energy_j=sum(decode_j))
    changed = {"prefill_energy_j": prefill_j, "decode_energy_j": decode_j, **windows}
    outcome.windows.update({name: np.array(values) for name, values in changed.items()})
    return outcome


def results_of(script: ModuleType, store: RecordStore, outcomes: list[tuple[RunJob, RunOutcome]]) -> Any:
    for number, (job, outcome) in enumerate(outcomes):
        store.append(*record_of(f"id{number}", job, outcome))
    return script.Results(summarise(list(store.load().values()), store), store)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "out")


def test_savings_range_over_loads_and_over_windows(script: ModuleType, store: RecordStore) -> None:
    job = script.SHIPPED.job
    joules = {  # scenario, seed: joules of DistServe, placement only, BiScale in two windows
        ("controlled-10", 0): ([50.0, 50.0], [40.0, 40.0], [30.0, 30.0]),
        ("controlled-55", 0): ([50.0, 150.0], [50.0, 90.0], [60.0, 60.0]),
        ("paper-67", 0): ([100.0, 200.0], [80.0, 150.0], [60.0, 100.0]),
        ("paper-67", 1): ([100.0, 200.0], [60.0, 150.0], [50.0, 80.0]),
    }
    outcomes = [
        (run := job(role, scenario, seed), with_joules(run, each, [2.0 * j for j in each]))
        for (scenario, seed), figures in joules.items()
        for role, each in zip(script.ROLES, figures, strict=True)
    ]
    told = {
        (row["condition"], row["controller"], row["phase"]): (row["saving_low"], row["saving_high"])
        for row in script.savings(results_of(script, store, outcomes))
    }
    assert told == {
        ("controlled", "place-only", "prefill"): pytest.approx((0.2, 0.3)),
        ("controlled", "biscale", "prefill"): pytest.approx((0.4, 0.4)),
        ("production-67", "place-only", "prefill"): pytest.approx((0.25, 0.3)),
        ("production-67", "biscale", "prefill"): pytest.approx((0.45, 0.55)),
        ("production-67", "place-only", "decode"): pytest.approx((0.25, 0.3)),
        ("production-67", "biscale", "decode"): pytest.approx((0.45, 0.55)),
    }


def test_a_condition_that_did_not_run_is_left_out(script: ModuleType, store: RecordStore) -> None:
    runs = [script.SHIPPED.job(role, "controlled-10", 0) for role in script.ROLES]
    rows = script.savings(results_of(script, store, [(run, fakes.outcome_of(run)) for run in runs]))
    assert {row["condition"] for row in rows} == {"controlled"}
    runs = [script.SHIPPED.job(role, "paper-67", 0) for role in script.ROLES[1:]]
    rows = script.savings(results_of(script, RecordStore(store.folder / "b"), [(r, fakes.outcome_of(r)) for r in runs]))
    assert rows == []


def test_what_biscale_breaks_and_the_top_clock_keeps_is_found(script: ModuleType, store: RecordStore) -> None:
    own, held = (script.SHIPPED.job(role, "paper-67", 0) for role in ("biscale", "max-clock"))
    late = {"ttft_p99_s": [0.4, 0.7], "ttft_attainment": [1.0, 0.98], "tpot_p99_s": [0.2, 0.05]}
    held_late = {"tpot_p99_s": [0.15, 0.05]}
    outcomes = [
        (own, with_joules(own, [1.0, 1.0], [1.0, 1.0], **late)),
        (held, with_joules(held, [2.0, 2.0], [2.0, 2.0], **held_late)),
    ]
    check = script.kept(results_of(script, store, outcomes), "paper-67")
    assert (check.runs, check.windows, check.biscale_runs, check.biscale_windows) == (1, 2, 0, 2)
    assert check.run_faults == ()
    assert check.window_faults == ("paper-67 seed 0 window 1: P99 TTFT 700.0 ms of 600, 98.00 % within",)


def test_the_check_insists_on_the_same_placements(script: ModuleType, store: RecordStore) -> None:
    own, held = (script.SHIPPED.job(role, "paper-67", 0) for role in ("biscale", "max-clock"))
    other = fakes.outcome_of(held)
    other.provenance["placements"] = [[0.0, "2×P TP2@1980 + 2×D TP4@1980"]]
    results = results_of(script, store, [(own, fakes.outcome_of(own)), (held, other)])
    with pytest.raises(EvaluationError, match="not at the same placements"):
        script.kept(results, "paper-67")


def test_every_run_is_asked_for_once(script: ModuleType) -> None:
    plain = script.jobs_for(["paper-67"], [], 2)
    assert [(job.controller, job.seed) for job in plain] == [
        (role, seed) for seed in (0, 1) for role in (*script.ROLES, "max-clock")
    ]
    (against_tp2,) = script.chosen_switches("tp2-prefill")
    more = script.jobs_for(["paper-67"], [against_tp2], 1)
    assert [job.controller_name for job in more if job.scenario == "paper-67"] == [
        "distserve", "place-only", "biscale", "max-clock planner=place-only", "distserve prefill_degrees=[2]"
    ]  # fmt: skip


def test_switches_are_named(script: ModuleType) -> None:
    assert script.chosen_switches("none") == []
    assert len(script.chosen_switches("all")) == len({switch.name for switch in script.SWITCHES})
    assert [switch.name for switch in script.chosen_switches("oracle, bf16")] == ["oracle", "bf16"]
    with pytest.raises(EvaluationError, match="no switch 'bf61'; did you mean 'bf16'"):
        script.chosen_switches("bf61")


def test_gpus_are_read_off_a_placement(script: ModuleType) -> None:
    assert script.gpus_by_kind("3×P TP2@1110 + 1×P TP4@930 + 2×D TP4@750") == {
        "P TP2@1110": 6, "P TP4@930": 4, "D TP4@750": 8
    }  # fmt: skip


_PROGRAM = """
import sys
from pathlib import Path
import reproduce_paper as script
from tests.evaluation.fakes import {runner} as runner

if __name__ == "__main__":
    switches, out = script.chosen_switches("oracle"), Path(sys.argv[1])
    sys.exit(script.reproduce(script.QUICK, switches, 2, out, 2, {plots}, "-", runner))
"""


def start(tmp_path: Path, out: Path, runner: str = "run", plots: bool = False) -> subprocess.Popen[str]:
    program = tmp_path / f"{runner}.py"
    program.write_text(_PROGRAM.format(runner=runner, plots=plots))
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(program), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_reproduction_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start(tmp_path, out, "run_slowly")
    store, deadline = RecordStore(out), time.monotonic() + 60.0
    while len(store.load()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=20)
    first = store.load()
    assert 3 <= len(first) < 28
    process = start(tmp_path, out, plots=True)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    told = json.loads(stdout)
    assert set(told) == {"rows", "savings"}
    assert len(told["rows"]) == 3 * 2 * 4 + 2 * 2
    assert {row["record"] for row in told["rows"]} >= set(first)
    keys = ["condition", "controller", "phase", "saving_low", "saving_high", "paper_low", "paper_high"]
    assert [list(row) for row in told["savings"]] == [keys] * 6
    for row in told["savings"]:
        assert row["saving_low"] == pytest.approx(1.0 - fakes.SAVINGS[row["controller"]])
    report = (out / "report.md").read_text()
    for title in ("Beside the paper", "Every load", "Switches", "paper-67: by window", "working at each clock"):
        assert title in report
    names = {path.name for path in (out / "plots").iterdir()}
    assert {"controlled-energy.png", "paper-67-windows.svg", "paper-67-clocks.png", "paper-67-placements.png"} <= names


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "reproduce_paper.py"), *arguments, "--out", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    status, message = call("--quick", "--switches", "orcale")
    assert status == 2
    assert message.startswith("error: no switch 'orcale'; did you mean 'oracle'?")
    assert call("--quick", "--seeds", "0") == (2, "error: --seeds 0: at least 1 is needed\n")
