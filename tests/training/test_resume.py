"""A run that was interrupted ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from biscale_gym.training import checkpoint
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.run import Result, begin
from biscale_gym.training.settings import TrainingSettings
from tests.envs.every_environment import QUICK_TABLE

Make = Callable[..., TrainingSettings]
Trained = Callable[..., Result]
OFF_POLICY = {"learning_starts": 64, "batch_size": 32, "buffer_size": 400, "train_freq": 4, "gradient_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "ppo-lagrangian": {
        "constraint": {"penalty": 0.5, "limit": 0.02},
        "curriculum": {},
        "wrappers": [{"History": {"k": 2}}],
    },
    "ppo-by-time": {"discount": "time", "env.discount_per_s": 0.8, "env.load": [0.5, 1.0]},
    "recurrent-ppo": {"algorithm": "recurrent-ppo"},
    "maskable-ppo": {
        "algorithm": "maskable-ppo",
        "env_id": "BiScale/Placement-v0",
        "env": {"episode_s": 3.0, "warmup_s": 1.0, "overrides": {"window_s": 1.5}, **QUICK_TABLE},
        "lanes": 2,
        "total_steps": 96,
        "hyperparameters.batch_size": 16,
        "evaluation": {"every_steps": 64, "episodes": 1, "references": ["biscale"]},
    },
    "qr-dqn": {"algorithm": "qr-dqn", "hyperparameters": OFF_POLICY},
    "sac": {"algorithm": "sac", "hyperparameters": OFF_POLICY, "wrappers": ["ContinuousClocks"], "total_steps": 384},
    "tqc-by-time": {
        "algorithm": "tqc",
        "hyperparameters": OFF_POLICY,
        "wrappers": ["ContinuousClocks"],
        "discount": "time",
        "env.discount_per_s": 0.8,
        "total_steps": 384,
    },
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / "policy.pt", weights_only=True)
    return loaded


def assert_same(one: Path, other: Path) -> None:
    """The final and the best model, and how the runs ended."""
    for name in ("final", "best"):
        ours, theirs = weights(one / name), weights(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ends = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for end in ends:
        del end["steps_per_s"], end["steps_per_cpu_s"]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_algorithm_goes_on_exactly(kind: str, tiny: Make, trained: Trained, tmp_path: Path) -> None:
    settings = tiny({"checkpoint_every_s": 0, **KINDS[kind]})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trained(settings, whole)
    older, newest = sorted((whole / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step-")) >= settings.total_steps
    begin(settings, resumed)
    shutil.copytree(older, resumed / "checkpoints" / older.name)
    if (whole / "best").exists():
        shutil.copytree(whole / "best", resumed / "best")  # it may be older than the checkpoint
    trained(settings, resumed)
    assert_same(whole, resumed)
    assert (checkpoint.read(newest).values["run"]["evaluated_at"]) >= 0


def started(*arguments: str) -> subprocess.Popen[str]:
    program = "import sys; from biscale_gym.cli import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    """Until so many checkpoints have been there (two are kept)."""
    seen: set[str] = set()
    deadline_s = time.monotonic() + 120.0
    while len(seen) < count and time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        seen |= {path.name for path in (folder / "checkpoints").glob("step-*")}
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_and_terminate(tmp_path: Path, trained: Trained, tiny: Make) -> None:
    changed = {"checkpoint_every_s": 0, "total_steps": 4096, "evaluation.every_steps": 1024}
    settings = tiny(changed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trained(settings, whole)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))

    first = started("train", str(config), "--out", str(killed))
    wait_for(killed, first, 3)
    first.kill()
    assert first.wait() == -signal.SIGKILL

    second = started("train", str(killed))
    wait_for(killed, second, 4)
    second.send_signal(signal.SIGTERM)
    told = second.communicate()[1]
    assert second.returncode == 128 + signal.SIGTERM
    assert f"to go on: biscale-gym train {killed}" in told

    third = started("train", str(killed))
    told = third.communicate()[1]
    assert third.returncode == 0, told
    assert "going on from step" in told
    assert_same(whole, killed)


def test_what_was_not_written_to_its_end_is_not_looked_at(tiny: Make, trained: Trained, tmp_path: Path) -> None:
    settings = tiny({"checkpoint_every_s": 0, "total_steps": 256})
    trained(settings, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    newest = max(folder.iterdir())
    shutil.copytree(newest, folder / f".partial-{os.getpid()}")
    assert checkpoint.latest(folder) == newest
    (newest / "model.pt").write_bytes(b"torn")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(TrainingError, match=rf"checkpoint {newest} cannot be read .* delete it"):
        trained(settings, tmp_path / "run")
    shutil.rmtree(newest)
    assert trained(settings, tmp_path / "run").steps == 256
    assert not list(folder.glob(".partial-*"))
