"""A run from settings to models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from biscale_gym.training import run as running
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.evaluation import Score
from biscale_gym.training.models import load_model, read_about
from biscale_gym.training.run import Result, begin, load_settings
from biscale_gym.training.settings import TrainingSettings

Make = Callable[..., TrainingSettings]
Trained = Callable[..., Result]


def weights(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "policy.pt", weights_only=True)
    return loaded


def test_a_run_leaves_evaluated_models_that_load(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    result = trained(tiny(), tmp_path / "run")
    assert (result.status, result.steps, result.early) == (0, 512, False)
    for name in ("best", "final"):
        assert {path.suffix for path in (tmp_path / "run" / name).glob("policy.*")} >= {
            ".safetensors",
            ".json",
            ".onnx",
        }
    assert result.final is not None
    assert set(result.final.ratios) == {"max-clock", "biscale"}
    settings, about = read_about(tmp_path / "run" / "final")
    assert settings == tiny()
    assert about["score"] == result.final.values()
    # The three forms of the model say the same.
    env = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", episode_s=3.0)
    observations = np.stack([env.reset(seed=seed)[0] for seed in range(20)])
    model = load_model(tmp_path / "run" / "final")
    actions = model.predict(observations, deterministic=True)[0]
    theirs = PPO.load(tmp_path / "run" / "final" / "model.zip").predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(actions, theirs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    logged = {name for line in lines if line["event"] == "log" for name in line["metrics"]}
    assert {"train/reward", "train/late", "train/value_loss", "validation/attainment"} <= logged
    assert {"validation/energy_over_biscale", "references/smoke/biscale/attainment"} <= logged


def test_the_same_seed_gives_the_same_weights(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    for name, seed, episodes in (("a", 0, 2), ("b", 0, 1), ("c", 1, 2)):
        # How policies are judged does not touch how they learn.
        trained(tiny({"seed": seed, "evaluation.episodes": episodes}), tmp_path / name)
    a, b, c = (weights(tmp_path / name / "final") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def scores(monkeypatch: pytest.MonkeyPatch, given: list[tuple[bool, float, float]]) -> None:
    """Evaluations that find (keeps the SLO, energy, attainment) in turn."""
    coming = iter(given)

    def score(self: Any, model: Any) -> Score:
        keeps, energy, attainment = next(coming)
        return Score(keeps, energy, {"biscale": energy}, attainment, 0.0, {"smoke": {"attainment": attainment}})

    monkeypatch.setattr(running.Evaluator, "score", score)


def test_the_best_model_is_that_of_least_energy_within_the_slo(
    tiny: Make, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(
        monkeypatch, [(False, 0.8, 0.90), (False, 0.7, 0.95), (True, 1.2, 0.99), (False, 0.6, 0.98), (True, 1.1, 0.99)]
    )
    result = trained(tiny({"total_steps": 5 * 128, "evaluation.every_steps": 128}), tmp_path / "run")
    assert result.best is not None
    assert (result.best.energy, result.best_at) == (1.1, 5 * 128)
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    ends = [line["values"] for line in lines if line["event"] == "summary"]
    assert [(end["best_at"], end["best/energy"], end["best/objective"]) for end in ends] == [(5 * 128, 1.1, 1.1)]
    objectives = [line["metrics"]["best/objective"] for line in lines if "best/objective" in line.get("metrics", {})]
    assert objectives == pytest.approx([110.0, 105.0, 1.2, 1.2, 1.1])


def test_early_stop_counts_evaluations_without_a_better_model(
    tiny: Make, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [(True, 1.0, 1.0), (True, 1.1, 1.0), (True, 0.9, 1.0), (True, 1.0, 1.0), (True, 0.95, 1.0)])
    changed = {"total_steps": 100_000, "evaluation.every_steps": 128, "early_stop": {"patience": 2}}
    result = trained(tiny(changed), tmp_path / "run")
    assert (result.status, result.steps, result.best_at, result.early) == (0, 5 * 128, 3 * 128, True)


def test_a_curriculum_moves_the_load(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    trained(tiny({"curriculum": {"load": [0.2, 0.4], "over": 0.5}}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    lows = [line["metrics"]["train/load_low"] for line in lines if "train/load_low" in line.get("metrics", {})]
    assert lows == pytest.approx([0.6, 1.0, 1.0, 1.0])


def test_the_multiplier_is_learnt_and_logged(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    changed = {"constraint": {"penalty": 0.5, "learning_rate": 0.1}, "env.overrides": {"slo.ttft_s": 0.06}}
    trained(tiny(changed), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    found = [line["metrics"]["train/multiplier"] for line in lines if "train/multiplier" in line.get("metrics", {})]
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5])  # far too many are late: most_excess each time


def test_folders(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = trained(tiny(), folder)
    with pytest.raises(TrainingError, match=f"biscale-gym train {folder} goes on with it"):
        begin(tiny(), folder)
    assert load_settings(str(folder)) == (tiny(), folder)
    assert trained(tiny(), folder) == result  # it is done
    with pytest.raises(TrainingError, match="holds no training run"):
        load_settings(str(tmp_path))
    with pytest.raises(TrainingError, match="no trained model there"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"constraint": {}, "algorithm": "qr-dqn"}, "learns from rewards of older multipliers"),
        ({"constraint": {}, "wrappers": [{"EnergyPerRequest": {"budget_j": 100.0}}]}, "both price violations"),
        ({"warm_start": {}, "algorithm": "qr-dqn", "hyperparameters": {}}, "warm_start is for ppo and maskable-ppo"),
        ({"warm_start": {}, "wrappers": ["ClockDeltas"]}, "remove the wrapper ClockDeltas"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changed: dict[str, Any], message: str, tiny: Make, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        trained(tiny(changed), tmp_path / "run")
