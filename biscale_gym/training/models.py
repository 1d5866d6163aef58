"""Trained models on disk: weights without pickle, what made them as JSON, and SB3's own file beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from biscale_gym.config import validate
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings

POLICY, ABOUT, SB3 = "policy.pt", "model.json", "model.zip"


def save_model(folder: Path, model: BaseAlgorithm, settings: TrainingSettings, about: dict[str, Any]) -> None:
    """Write a model: ``policy.pt`` (tensors alone), ``model.json`` (settings, ``about``), ``model.zip`` (SB3's)."""
    partial, old = folder.with_name(f".{folder.name}-partial"), folder.with_name(f".{folder.name}-old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(model.policy.state_dict(), partial / POLICY)
    told = {**about, "settings": settings.model_dump(mode="json")}
    (partial / ABOUT).write_text(json.dumps(told, indent=1), encoding="utf-8")
    model.save(partial / SB3)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_about(folder: Path) -> tuple[TrainingSettings, dict[str, Any]]:
    """(settings of the run, what else its ``model.json`` says).

    Raises:
        TrainingError: the folder holds no model.
        ConfigError: its settings are not this version's.
    """
    try:
        told = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder}: no trained model there ({error})") from error
    return validate(TrainingSettings, told.pop("settings"), str(folder / ABOUT)), told


def load_model(folder: Path) -> BaseAlgorithm:
    """A trained model, with the lanes of one environment per scenario; nothing is unpickled.

    Raises:
        TrainingError: the folder holds no model, or its weights do not fit its settings.
    """
    settings, _ = read_about(folder)
    single = settings.model_copy(
        update={"lanes": len(settings.scenarios), "hyperparameters": _without_batches(settings.hyperparameters)}
    )
    model = make_model(single, make_lanes(single))
    try:
        weights = torch.load(folder / POLICY, weights_only=True, map_location="cpu")
        model.policy.load_state_dict(weights)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"{folder / POLICY}: {error}") from error
    return model


def _without_batches(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """What is about a rollout's size, which a loaded model does not make, left out; and no large buffers."""
    own = {name: value for name, value in hyperparameters.items() if name not in ("n_steps", "batch_size")}
    return {**own, "buffer_size": 1} if "buffer_size" in own else own
