"""scripts/tune_biscale.py: what it proposes, what it takes, and the preset that it writes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agents.biscale import BiScale
from agents.settings import BiScaleSettings
from biscale_gym.config import load_preset
from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.faults import EvaluationError
from biscale_gym.evaluation.matrix import Runner
from biscale_gym.evaluation.records import RecordStore
from tests.evaluation import fakes


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tune_biscale")


def trial(script: ModuleType, number: int, ratio: float, attainment: tuple[float, float]):
    return script.Trial(number, {}, np.full((2, 3), 7e6 * ratio), np.repeat([attainment], 3, axis=0).T)


def test_the_first_trial_is_biscale_as_it_is_and_all_are_valid(script: ModuleType) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate(number: int, settings: dict[str, Any]):
        seen.append(settings)
        return trial(script, number, 1.0 - 0.01 * number, (0.99, 0.99))

    script.search(evaluate, 12, 0)
    assert BiScale(**seen[0]).settings == BiScale().settings
    assert len({str(settings) for settings in seen}) == 13
    for settings in seen:
        whole = BiScale(**settings).settings
        assert whole.tier1.headroom == BiScaleSettings().tier1.headroom, "class tables would be measured anew"
        assert whole.tier1.forecast != "oracle"


def test_proposals_depend_on_the_seed_and_the_trials_only(script: ModuleType) -> None:
    def proposals(seed: int) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []

        def evaluate(number: int, settings: dict[str, Any]):
            seen.append(settings)
            return trial(script, number, settings["prefill"]["headroom"], (0.99, 0.99))

        script.search(evaluate, 14, seed)
        return seen

    first = proposals(0)
    assert proposals(0) == first
    assert proposals(1) != first


def test_the_winner_takes_least_among_those_that_keep_the_attainment(script: ModuleType) -> None:
    base = trial(script, 0, 1.0, (0.99, 0.98))
    cheap_but_late = trial(script, 1, 0.8, (0.999, 0.979))
    winner = trial(script, 2, 0.95, (0.99, 0.98))
    dearer = trial(script, 3, 0.97, (1.0, 1.0))
    assert script.best_of([base, cheap_but_late, dearer, winner]) is winner
    assert script.best_of([base, cheap_but_late]) is base
    assert cheap_but_late.shortfall(base) == pytest.approx(0.001)
    assert cheap_but_late.value(base) > base.value(base) == 1.0 > winner.value(base) == pytest.approx(0.95)


def test_trials_are_run_on_the_validation_split_and_recorded(script: ModuleType, tmp_path: Path) -> None:
    def evaluate(runner: Runner):
        make = script.evaluator(("smoke", "tight"), 2, RecordStore(tmp_path), 1, runner, Console(file=io.StringIO()))
        return make(4, settings)

    settings = {"decode": {"headroom": 0.9}}
    found = evaluate(fakes.run)
    job = RunJob(scenario="tight", controller="biscale", seed=1)
    assert found.energy_j[1, 1] == fakes.outcome_of(job).row["total_energy_j"]
    assert found.attainment[1, 1] == fakes.outcome_of(job).row["joint_attainment"]
    assert found.energy_j.shape == (2, 2)
    np.testing.assert_array_equal(evaluate(fakes.refuse).energy_j, found.energy_j, "nothing is run twice")
    records = RecordStore(tmp_path).load().values()
    assert {record.job["split"] for record in records} == {"validation"}
    assert [record.job["controller_settings"] for record in records] == [settings] * 4


def test_a_failed_run_ends_the_search(script: ModuleType, tmp_path: Path) -> None:
    evaluate = script.evaluator(("smoke",), 1, RecordStore(tmp_path), 1, fakes.refuse, Console(file=io.StringIO()))
    with pytest.raises(EvaluationError, match="lengths must be positive"):
        evaluate(0, {})


def test_the_preset_is_whole_and_says_how_it_was_found(script: ModuleType, tmp_path: Path) -> None:
    base = trial(script, 0, 1.0, (0.99, 0.98))
    best = replace(trial(script, 1, 0.95, (0.99, 0.98)), settings={"decode": {"headroom": 0.9, "kv_low": 0.6}})
    told = script.account([base, best], ("smoke", "tight"), "python scripts/tune_biscale.py --trials 1")
    path = tmp_path / "tuned.yaml"
    path.write_text(script.preset(best, told))
    settings = load_preset(BiScaleSettings, "agents", str(path))
    assert settings == BiScale(decode={"headroom": 0.9, "kv_low": 0.6}).settings
    assert BiScale(preset=str(path)).settings == settings
    head = path.read_text()
    assert "# Budget: 2 trials (0 is the defaults) x 2 scenarios x 3 traffic seeds = 12 runs, 3 simulated hours" in head
    assert "Trial 1: -5.00 % total energy" in head
    assert "smoke: -5.00 %, within both SLOs 99.000 % (defaults 99.000 %)" in head
