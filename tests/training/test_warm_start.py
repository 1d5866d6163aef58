"""Behaviour cloning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from biscale_gym.envs.policies import ControllerPolicy
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.settings import TrainingSettings, WarmStartSettings
from biscale_gym.training.warm_start import Rollout, clone, rollout
from tests.envs.every_environment import QUICK_TABLE

Make = Callable[..., TrainingSettings]
PLACEMENT = {
    "algorithm": "maskable-ppo",
    "env_id": "BiScale/Placement-v0",
    "env": {"episode_s": 3.0, "warmup_s": 1.0, "overrides": {"window_s": 1.5}, **QUICK_TABLE},
    "lanes": 2,
    "hyperparameters": {"n_steps": 16, "batch_size": 16},
}


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({"env.overrides": {"slo.ttft_s": 0.12}}, 4000),
        ({"env_id": "BiScale/Decode-v0", "env.overrides": {"slo.tpot_s": 0.022}}, 4000),
        ({"env_id": "BiScale/Cluster-v0", "env.overrides": {"slo.ttft_s": 0.2, "slo.tpot_s": 0.022}}, 2000),
        (PLACEMENT, 64),
    ],
    ids=["prefill", "decode", "cluster", "placement"],
)
def test_a_clone_decides_as_its_teacher(changed: dict[str, Any], steps: int, tiny: Make) -> None:
    warm = {"steps": steps, "epochs": 300 if steps < 100 else 40, "batch_size": steps // 16, "learning_rate": 3e-3}
    settings = tiny({**changed, "net_arch": [32], "warm_start": warm})
    assert settings.warm_start is not None
    lanes = make_lanes(settings)
    lanes.seed(0)
    decisions = rollout(settings, lanes, settings.warm_start, 0.99).actions.ravel()
    commonest = np.unique(decisions, return_counts=True)[1].max() / decisions.size
    told = clone(settings, make_model(settings, lanes), lanes)
    assert commonest < 0.95  # always the same answer would not do
    assert 1.0 - told["agreement"] < 0.5 * (1.0 - commonest)


def test_continuous_actions_are_the_controllers_clocks(tiny: Make) -> None:
    settings = tiny({"wrappers": ["ContinuousClocks"]})
    lanes, bare = make_lanes(settings), make_lanes(tiny())
    teacher = ControllerPolicy("biscale", bare.parts[0])
    lanes.seed(0)
    bare.seed(0)
    played = rollout(settings, lanes, WarmStartSettings(steps=8 * 50), 0.99)
    observations = bare.reset()
    for step in range(50):
        np.testing.assert_array_equal(played.observations[step], observations)
        observations, rewards, *_ = bare.step(teacher.predict(observations)[0])
        np.testing.assert_array_equal(played.rewards[step], rewards)


def test_returns_go_on_behind_ends_at_the_mean() -> None:
    rewards = np.array([[1.0], [2.0], [4.0], [1.0]], np.float32)
    ended = np.array([[False], [True], [False], [False]])
    zeros = np.zeros((4, 1), np.float32)
    played = Rollout(zeros[..., None], zeros, None, rewards, np.full((4, 1), 0.5, np.float32), ended)
    beyond = 2.0 / 0.5
    last = 1.0 + 0.5 * beyond
    expected = [1.0 + 0.5 * (2.0 + 0.5 * beyond), 2.0 + 0.5 * beyond, 4.0 + 0.5 * last, last]
    np.testing.assert_allclose(played.returns()[:, 0], expected)
