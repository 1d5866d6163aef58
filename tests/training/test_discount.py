"""Discounts by time, against SB3's own where all steps are alike, and against sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from biscale_gym.training.discount import TimedReplayBuffer, TimedRolloutBuffer

STEPS, LANES = 7, 3
OBSERVATION, ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(3)


class Lanes:
    """What buffers look at."""

    def __init__(self) -> None:
        self.discounts = np.ones(LANES)
        self.ended: list[tuple[int, Any]] = []


class Values:
    """A value function: the sum of the observation."""

    def predict_values(self, observations: torch.Tensor) -> torch.Tensor:
        return observations.sum(dim=1, keepdim=True)


def filled(discounts: np.ndarray, gae_lambda: float) -> tuple[TimedRolloutBuffer, dict[str, Any]]:
    """A buffer with an episode's end in lane 1 at step 3, and what was put into it."""
    draws = np.random.default_rng(0)
    lanes = Lanes()
    buffer = TimedRolloutBuffer(STEPS, OBSERVATION, ACTION, gae_lambda=gae_lambda, gamma=0.5, n_envs=LANES)
    buffer.follow(lanes, Values())  # type: ignore[arg-type]
    rewards, values = draws.normal(size=(2, STEPS, LANES)).astype(np.float32)
    last = draws.uniform(-1, 1, 2).astype(np.float32)
    starts = np.zeros((STEPS, LANES), bool)
    starts[4, 1] = True
    for step in range(STEPS):
        lanes.discounts = discounts[step]
        lanes.ended = [(1, last)] if step == 3 else []
        observation = draws.uniform(-1, 1, (LANES, 2)).astype(np.float32)
        value, logged = torch.as_tensor(values[step]).reshape(-1, 1), torch.zeros(LANES)
        buffer.add(observation, np.zeros((LANES, 1)), rewards[step].copy(), starts[step], value, logged)
    after = torch.as_tensor(draws.normal(size=(LANES, 1)).astype(np.float32))
    buffer.compute_returns_and_advantage(after, np.zeros(LANES, bool))
    return buffer, {"rewards": rewards, "values": values, "starts": starts, "last": float(last.sum()), "after": after}


def test_equal_discounts_are_sb3s_gamma() -> None:
    own, put = filled(np.full((STEPS, LANES), 0.9), 0.8)
    theirs = RolloutBuffer(STEPS, OBSERVATION, ACTION, gae_lambda=0.8, gamma=0.9, n_envs=LANES)
    rewards = put["rewards"].copy()
    rewards[3, 1] += 0.9 * put["last"]  # as SB3 bootstraps
    for step in range(STEPS):
        value = torch.as_tensor(put["values"][step]).reshape(-1, 1)
        theirs.add(
            np.zeros((LANES, 2)), np.zeros((LANES, 1)), rewards[step], put["starts"][step], value, torch.zeros(LANES)
        )
    theirs.compute_returns_and_advantage(put["after"], np.zeros(LANES, bool))
    np.testing.assert_allclose(own.advantages, theirs.advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own.returns, theirs.returns, rtol=1e-5, atol=1e-6)


def test_returns_are_sums_discounted_step_by_step() -> None:
    discounts = np.random.default_rng(1).uniform(0.5, 1.0, (STEPS, LANES))
    own, put = filled(discounts, 1.0)
    for lane, end in ((0, STEPS), (1, 4), (2, STEPS)):
        coming = put["last"] if lane == 1 else float(put["after"][lane])
        for step in reversed(range(end)):
            coming = put["rewards"][step, lane] + discounts[step, lane] * coming
            np.testing.assert_allclose(own.returns[step, lane], coming, rtol=1e-5, atol=1e-6)


def test_samples_of_a_replay_buffer_carry_their_discounts() -> None:
    lanes = Lanes()
    buffer = TimedReplayBuffer(8 * LANES, OBSERVATION, ACTION, n_envs=LANES)
    buffer.follow(lanes, None)  # type: ignore[arg-type]
    for step in range(5):
        lanes.discounts = 0.1 * step + 0.01 * np.arange(LANES)
        observation = np.repeat(np.float32(0.1 * step), 2 * LANES).reshape(LANES, 2)
        dones = np.array([False, step == 2, False])
        buffer.add(observation, observation, np.zeros((LANES, 1)), 0.01 * np.arange(LANES), dones, [{}] * LANES)
    samples = buffer.sample(64)
    assert samples.discounts is not None
    np.testing.assert_allclose(
        samples.discounts.numpy(), samples.observations.numpy()[:, :1] + samples.rewards.numpy(), rtol=1e-6, atol=1e-7
    )
    assert samples.dones.sum() == 0  # ends are truncations
