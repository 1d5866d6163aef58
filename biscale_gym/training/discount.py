"""Discounting by time instead of by step: buffers that take each step's own discount from the lanes.

A step of ``BiScale/Prefill-v0`` or ``Decode-v0`` is as long as a batch, or a wait. With ``discount_per_s`` the return
is r1 + d1 r2 + d1 d2 r3 + ..., with d the steps' ``info["discount"]``, as for semi-Markov decision processes (Bradtke
and Duff, "Reinforcement learning methods for continuous-time Markov decision problems", NIPS 1994).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from biscale_gym.training.environments import LanesVecEnv


class TimedRolloutBuffer(RolloutBuffer):
    """GAE with a discount per step; bootstraps ended lanes itself, with the discount of their last step."""

    _lanes: LanesVecEnv
    _policy: Any

    def follow(self, lanes: LanesVecEnv, policy: Any) -> None:
        """Take discounts and ended lanes from ``lanes`` and values of last observations from ``policy``."""
        self._lanes, self._policy = lanes, policy

    def reset(self) -> None:
        """Forget the rollout."""
        self.discounts = np.ones((self.buffer_size, self.n_envs), dtype=np.float32)
        self._ended: list[tuple[int, int, Any]] = []
        super().reset()

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add a step of all lanes, which they have just made."""
        self.discounts[self.pos] = self._lanes.discounts
        self._ended += [(self.pos, lane, observation) for lane, observation in self._lanes.ended]
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: Any) -> None:
        """As SB3's, with a discount per step (Schulman et al., "High-dimensional continuous control", eq. 16)."""
        if self._ended:
            observations = torch.as_tensor(np.stack([observation for _, _, observation in self._ended]))
            with torch.no_grad():
                values = self._policy.predict_values(observations.to(self.device)).cpu().numpy().flatten()
            for (step, lane, _), value in zip(self._ended, values, strict=True):
                self.rewards[step, lane] += self.discounts[step, lane] * value
        following = np.concatenate([self.values[1:], last_values.clone().cpu().numpy().reshape(1, -1)])
        going_on = 1.0 - np.concatenate([self.episode_starts[1:], np.asarray(dones, np.float32).reshape(1, -1)])
        weights = self.discounts * going_on
        deltas = self.rewards + weights * following - self.values
        advantage = np.zeros(self.n_envs, dtype=np.float32)
        for step in reversed(range(self.buffer_size)):
            advantage = deltas[step] + weights[step] * self.gae_lambda * advantage
            self.advantages[step] = advantage
        self.returns = self.advantages + self.values


class TimedReplayBuffer(ReplayBuffer):
    """A replay buffer whose samples have their own discounts, which SB3's off-policy algorithms take before gamma."""

    _lanes: LanesVecEnv

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.discounts = np.ones((self.buffer_size, self.n_envs), dtype=np.float32)

    def follow(self, lanes: LanesVecEnv, policy: Any) -> None:
        """Take discounts from ``lanes``."""
        self._lanes = lanes

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add a step of all lanes, which they have just made; nothing in it is terminal, as nothing ever is."""
        at = self.pos
        self.discounts[at] = self._lanes.discounts
        super().add(*args, **kwargs)
        self.timeouts[at] = self.dones[at]

    def _get_samples(self, batch_inds: Any, env: Any = None) -> ReplayBufferSamples:
        lanes = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))  # noqa: NPY002 - SB3's generator
        data = (
            self.observations[batch_inds, lanes],
            self.actions[batch_inds, lanes],
            self.next_observations[batch_inds, lanes],
            (self.dones[batch_inds, lanes] * (1.0 - self.timeouts[batch_inds, lanes])).reshape(-1, 1),
            self.rewards[batch_inds, lanes].reshape(-1, 1),
            self.discounts[batch_inds, lanes].reshape(-1, 1),
        )
        obs, actions, following, dones, rewards, discounts = map(self.to_torch, data)
        return ReplayBufferSamples(obs, actions, following, dones, rewards, discounts=discounts)
