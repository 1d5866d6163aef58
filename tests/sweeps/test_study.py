from __future__ import annotations

import csv
import fcntl
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from biscale_gym.config import ConfigError, validate
from biscale_gym.sweeps.settings import SweepError, SweepSettings
from biscale_gym.sweeps.study import Trial, run_study

RANGES = {
    "hyperparameters.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
    "lanes": {"min": 8, "max": 64},
    "net_arch": {"values": [[64, 64], [128]]},
    "total_steps": {"value": 1000},
}


def sweep(parameters: Mapping[str, Any] = RANGES, **changes: Any) -> SweepSettings:
    values = {
        "name": "some",
        "command": ["${program}", "train", "smoke", "--set", "${args_no_hyphens}"],
        "metric": {"name": "best/objective", "goal": "minimize"},
        "parameters": dict(parameters),
        **changes,
    }
    return validate(SweepSettings, values, "sweep.yaml")


def bowl(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
    """Least at a learning rate of 0.01 with the small network."""
    assert preset == "smoke"
    rate = abs(settings["hyperparameters.learning_rate"] - 0.01)
    return {"best/objective": rate + len(settings["net_arch"]) * 0.01 + settings["lanes"] * 1e-6, "best/attainment": 1}


def told(found: list[Trial]) -> list[tuple[int, dict[str, Any], float | None]]:
    return [(one.number, one.settings, one.value) for one in sorted(found, key=lambda one: one.number)]


def silent(message: str) -> None:
    pass


def test_trials_are_ranked_and_tabled(tmp_path: Path) -> None:
    found = run_study(sweep(run_cap=6), bowl, tmp_path / "one", say=silent)
    assert sorted(one.number for one in found) == list(range(6))
    assert [one.value for one in found] == sorted(one.value for one in found if one.value is not None)
    assert {tuple(one.settings["net_arch"]) for one in found} == {(64, 64), (128,)}
    assert all(one.settings["total_steps"] == 1000 and 8 <= one.settings["lanes"] <= 64 for one in found)
    with (tmp_path / "one" / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["trial"]) for row in rows] == [one.number for one in found]
    assert float(rows[0]["best/objective"]) == found[0].value
    assert rows[0]["best/attainment"] == "1.0"
    (other,) = run_study(sweep(run_cap=1), bowl, tmp_path / "other seed", seed=1, say=silent)
    assert other.settings not in [one.settings for one in found]


ONE_RANGE = {"hyperparameters.learning_rate": RANGES["hyperparameters.learning_rate"]}


def decades_off(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
    return {"best/objective": abs(math.log10(settings["hyperparameters.learning_rate"]) + 2.0)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any], float | None]]:
    return told(run_study(sweep(ONE_RANGE, run_cap=26), decades_off, tmp_path_factory.mktemp("whole"), say=silent))


def test_tpe_learns_from_its_trials(whole: list[tuple[int, dict[str, Any], float | None]]) -> None:
    values = [value for _, _, value in whole if value is not None]
    assert statistics.median(values[18:]) < 0.5 * statistics.median(values[:10])


def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(
    whole: list[tuple[int, dict[str, Any], float | None]], tmp_path: Path
) -> None:
    seen: list[tuple[dict[str, Any], Path]] = []

    def interrupted(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
        seen.append((settings, folder))
        if len(seen) == 11:
            raise KeyboardInterrupt
        return decades_off(preset, settings, folder, project)

    with pytest.raises(KeyboardInterrupt):
        run_study(sweep(ONE_RANGE, run_cap=12), interrupted, tmp_path, say=silent)
    for _ in range(2):
        assert told(run_study(sweep(ONE_RANGE, run_cap=12), interrupted, tmp_path, say=silent)) == whole[:12]
        assert len(seen) == 13
    assert seen[10] == seen[11]


def test_trials_are_counted_on(tmp_path: Path) -> None:
    assert len(run_study(sweep(), bowl, tmp_path, count=2, say=silent)) == 2
    assert len(run_study(sweep(), bowl, tmp_path, count=1, say=silent)) == 3
    assert len(run_study(sweep(run_cap=4), bowl, tmp_path, count=9, say=silent)) == 4
    with pytest.raises(SweepError, match=r"Give --agent N, or run_cap"):
        run_study(sweep(), bowl, tmp_path, say=silent)


def test_a_grid_is_run_once_through(tmp_path: Path) -> None:
    parameters = {"seed": {"values": [0, 1]}, "net_arch": {"values": [[64], [64, 64], None]}}
    grid = sweep(parameters, method="grid")
    seen = []

    def note(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
        seen.append((settings["seed"], settings["net_arch"]))
        return {"best/objective": float(len(seen))}

    run_study(grid, note, tmp_path, count=2, say=silent)
    run_study(grid, note, tmp_path, say=silent)
    assert seen == [(0, [64]), (0, [64, 64]), (0, None), (1, [64]), (1, [64, 64]), (1, None)]


def test_a_goal_may_be_to_maximise(tmp_path: Path) -> None:
    most = sweep(run_cap=4, method="random", metric={"name": "best/objective", "goal": "maximize"})
    values = [one.value for one in run_study(most, bowl, tmp_path, say=silent)]
    assert values == sorted((one for one in values if one is not None), reverse=True)


def test_a_failed_trial_is_left_behind_but_not_three_in_a_row(tmp_path: Path) -> None:
    calls = []

    def sometimes(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("a bug")
        return {"best/objective": float("nan") if len(calls) == 3 else 1.0}

    messages: list[str] = []
    found = run_study(sweep(run_cap=4), sometimes, tmp_path / "some", say=messages.append)
    assert [one.value for one in found] == [1.0, 1.0, None, None]
    assert "trial 1 failed: ZeroDivisionError: a bug" in messages
    assert "trial 2 failed: best/objective is nan" in messages

    def never(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
        raise ZeroDivisionError("a bug")

    with pytest.raises(SweepError, match="3 trials in a row failed"):
        run_study(sweep(run_cap=9), never, tmp_path / "none", say=silent)


def test_a_fault_of_the_input_ends_the_sweep(tmp_path: Path) -> None:
    def refuse(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
        raise ConfigError("unknown key; did you mean 'lanes'?")

    with pytest.raises(ConfigError, match="did you mean 'lanes'"):
        run_study(sweep(run_cap=9), refuse, tmp_path / "key", say=silent)
    wrong = sweep(run_cap=9, metric={"name": "best/objectiv"})
    with pytest.raises(SweepError, match=r"no figure 'best/objectiv' to optimise; did you mean 'best/objective'"):
        run_study(wrong, bowl, tmp_path / "metric", say=silent)
    with pytest.raises(SweepError, match="early_terminate: only W&B"):
        run_study(sweep(run_cap=9, early_terminate={"type": "hyperband"}), bowl, tmp_path / "rule", say=silent)


def test_a_folder_is_one_sweeps_and_one_processs(tmp_path: Path) -> None:
    run_study(sweep(run_cap=1), bowl, tmp_path, say=silent)
    with pytest.raises(SweepError, match="holds another sweep"):
        run_study(sweep(run_cap=2), bowl, tmp_path, seed=1, say=silent)
    with pytest.raises(SweepError, match="holds another sweep"):
        run_study(sweep(run_cap=2, method="random"), bowl, tmp_path, say=silent)
    with (tmp_path / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SweepError, match="another process runs this sweep"):
            run_study(sweep(run_cap=2), bowl, tmp_path, say=silent)


def test_what_a_trial_returned_lies_in_its_folder(tmp_path: Path) -> None:
    (one,) = run_study(sweep(run_cap=1), bowl, tmp_path, say=silent)
    assert json.loads((tmp_path / "trial-0000" / "trial.json").read_text()) == one.figures
