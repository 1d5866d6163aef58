from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.records import RecordStore


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("rate_rps: 1.0\n")
    return str(path)


@pytest.fixture
def make_jobs(scenario: str) -> Callable[..., list[RunJob]]:
    def make(controllers: tuple[str, ...] = ("distserve", "biscale"), seeds: int = 1, **overrides: Any) -> list[RunJob]:
        return [
            RunJob(scenario=scenario, controller=controller, seed=seed, overrides=overrides)
            for seed in range(seeds)
            for controller in controllers
        ]

    return make


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "out")
