"""``biscale-gym train``."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from biscale_gym import cli
from biscale_gym.config import load_preset
from biscale_gym.training.commands import trial
from biscale_gym.training.run import load_settings, read_result
from biscale_gym.training.settings import TrainingSettings

Make = Callable[..., TrainingSettings]


@pytest.fixture
def config(tiny: Make, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    return path


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *arguments])
    return int(left.value.code or 0)


def test_a_run_and_its_messages(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(str(config), "--set", "total_steps=256", "seed=3", "--set", "early_stop.patience=9") == 0
    settings, folder = load_settings("results/train/tiny-3")
    assert (settings.total_steps, settings.seed) == (256, 3)
    assert settings.early_stop is not None
    assert settings.early_stop.patience == 9
    assert folder is not None
    result = read_result(folder)
    assert result.best is not None
    told = capsys.readouterr().err
    assert "of biscale; within the SLO" in told
    assert "the best so far" in told
    assert status_of(str(config), "--set", "seed=3") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert status_of(str(folder), "--set", "seed=3") == 2
    assert "goes on as it began" in capsys.readouterr().err
    assert status_of(str(folder)) == 0
    assert "this run is done" in capsys.readouterr().err
    assert status_of("smoky") == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_hyperparameters_from_a_file_of_the_zoo(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo = tmp_path / "ppo.yml"
    zoo.write_text(
        "BiScale/Prefill-v0:\n  n_envs: 4\n  n_timesteps: !!float 128\n  policy: MlpPolicy\n  n_steps: 16\n"
        '  batch_size: 64\n  policy_kwargs: "dict(net_arch=[8, 8], activation_fn=nn.ReLU)"\n'
    )
    script = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(config), "--conf-file", str(zoo), "--out", "zoo"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 0
    settings, _ = load_settings("zoo")
    assert (settings.lanes, settings.total_steps, settings.net_arch, settings.activation) == (4, 128, (8, 8), "relu")
    assert settings.hyperparameters == {"n_steps": 16, "batch_size": 64}


def test_a_trial_of_a_search_goes_on_with_what_it_finds(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    figures = trial(str(config), {"total_steps": 256, "hyperparameters.gamma": 0.9}, folder)
    assert load_settings(str(folder))[0].hyperparameters["gamma"] == 0.9
    best = read_result(folder).best
    assert best is not None
    assert (figures["best/energy"], figures["best/objective"]) == (best.energy, best.objective)
    assert trial(str(config), {"total_steps": 256}, folder) == figures


def test_the_smoke_preset_is_small() -> None:
    settings = load_preset(TrainingSettings, "training", "smoke")
    assert settings.total_steps <= 250_000
    assert settings.evaluation.references[-1] == "biscale"
