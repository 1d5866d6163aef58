"""A run that takes a second: the smoke scenario, short episodes, few steps."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from biscale_gym.config import replaced, validate
from biscale_gym.training.run import Result, begin, train
from biscale_gym.training.settings import TrainingSettings

TINY: dict[str, Any] = {
    "env_id": "BiScale/Prefill-v0",
    "scenarios": ["smoke"],
    "env": {"episode_s": 3.0, "warmup_s": 1.0},
    "algorithm": "ppo",
    "hyperparameters": {"n_steps": 16, "batch_size": 64, "n_epochs": 2},
    "net_arch": [16],
    "lanes": 8,
    "total_steps": 512,
    "evaluation": {"every_steps": 256, "episodes": 2, "episode_s": 5.0},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As runs do; more threads than cores are many times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., TrainingSettings]:
    """Settings of a tiny run; dotted keyword pairs replace some."""

    def make(changed: dict[str, Any] | None = None) -> TrainingSettings:
        return validate(TrainingSettings, replaced(TINY, changed or {}, "the tiny run"), "the tiny run")

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(file=StringIO(), width=200)


@pytest.fixture
def trained(quiet: Console) -> Callable[..., Result]:
    """Train in a folder."""

    def run(settings: TrainingSettings, folder: Path, **more: Any) -> Result:
        if not folder.exists():
            begin(settings, folder)
        return train(settings, folder, quiet, **more)

    return run
