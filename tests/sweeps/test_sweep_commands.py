from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from biscale_gym.sweeps import commands
from biscale_gym.sweeps.commands import find_function, sweep_from
from biscale_gym.sweeps.settings import SweepError

SWEEP = {
    "name": "some",
    "command": ["${program}", "train", "smoke", "--wandb", "--set", "${args_no_hyphens}"],
    "metric": {"name": "best/objective", "goal": "minimize"},
    "method": "grid",
    "parameters": {"hyperparameters.learning_rate": {"values": ["lin_1e-3", 1e-4]}, "net_arch": {"values": [[64, 64]]}},
}
CALLS: list[str] = []


def trial(preset: str, settings: dict[str, Any], folder: Path, project: str | None) -> Mapping[str, float]:
    assert project == "testbed"
    CALLS.append(folder.name)
    if settings["hyperparameters.learning_rate"] == "interrupt":
        raise KeyboardInterrupt
    return {"best/objective": float(settings["hyperparameters.learning_rate"] == 1e-4)}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_GROUP", "some")
    CALLS.clear()
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    return path


def test_without_a_login_optuna_runs_the_sweep(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sweep_from(str(config), None, False, out, 0, "testbed", f"{__name__}:trial") == 0
    said = capsys.readouterr()
    assert "no W&B login: Optuna runs the sweep here" in said.err
    assert "biscale-gym train smoke --set hyperparameters.learning_rate=lin_1e-3 'net_arch=[64, 64]'" in said.out
    assert f"every trial: {out / 'trials.csv'}" in said.out
    assert CALLS == ["trial-0000", "trial-0001"]


def test_with_a_login_wandb_runs_it_unless_asked_otherwise(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int | None]] = []

    def at_wandb(sweep: Any, project: str, count: int | None) -> int:
        asked.append((sweep.name, project, count))
        return 7

    monkeypatch.setattr(commands, "logged_in", lambda: True)
    monkeypatch.setattr(commands, "run_at_wandb", at_wandb)
    assert sweep_from(str(config), 3, False, None, 0, "testbed") == 7
    assert asked == [("some", "testbed", 3)]
    assert sweep_from(str(config), 1, True, tmp_path / "out", 0, "testbed", f"{__name__}:trial") == 0
    assert len(asked) == 1
    assert CALLS == ["trial-0000"]


def test_an_interrupted_sweep_says_how_to_go_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"hyperparameters.learning_rate": {"values": ["interrupt"]}}
    config.write_text(yaml.safe_dump({**SWEEP, "parameters": parameters}))
    assert sweep_from(str(config), None, True, tmp_path / "out", 0, "testbed", f"{__name__}:trial") == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no.such.module:trial", f"{__name__}:none", __name__, f"{__name__}:SWEEP"])
def test_a_function_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(SweepError, match="function"):
        find_function(name)
