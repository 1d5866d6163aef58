"""Steps of several decisions, and observations of several steps."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers.native import native

ADDED = (
    "energy_j",
    "prefill_energy_j",
    "decode_energy_j",
    "unallocated_energy_j",
    "violations",
    "cost",
    "completed",
    "dt_s",
)
"""Terms of ``info`` that add up over decisions."""


def at_least_one(name: str, value: int) -> int:
    """``value``.

    Raises:
        EnvironmentUsageError: it is no whole number from 1 up.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise EnvironmentUsageError(f"{name} is {value!r}, expected a whole number from 1 up")
    return int(value)


def stacked_space(space: spaces.Space[Any], k: int) -> spaces.Box:
    """The space of k observations of ``space`` one after another.

    Raises:
        EnvironmentUsageError: it is no flat Box.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise EnvironmentUsageError(f"History stacks flat observations, not {space}")
    return spaces.Box(np.tile(space.low, k), np.tile(space.high, k), dtype=space.dtype.type)


class FrameSkip(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Each action answers n decisions, or as many as the episode still has.

    The reward is r1 + d1 r2 + d1 d2 r3 + ..., with d the steps' ``info["discount"]``: the plain sum where
    ``discount_per_s`` is 1. In ``info``, ``ADDED`` terms are sums, ``discount`` is the product, all else the last's.

    Args:
        env: to wrap.
        n: decisions per step.

    Raises:
        EnvironmentUsageError: n is below 1, or no environment of clocks.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], n: int) -> None:
        RecordConstructorArgs.__init__(self, n=n)
        super().__init__(env)
        native(env, type(self).__name__)
        self.n = at_least_one("FrameSkip: n", n)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Up to n steps."""
        total, discount = 0.0, 1.0
        sums: dict[str, float] = {}
        for _ in range(self.n):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += discount * float(reward)
            discount *= info.get("discount", 1.0)
            for name in ADDED:
                if name in info:
                    sums[name] = sums.get(name, 0.0) + info[name]
            if terminated or truncated:
                break
        info = {**info, **sums, "discount": discount}
        return observation, total, terminated, truncated, info


class History(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The last k observations one after another, oldest first; before the k-th, the episode's first one is repeated.

    Args:
        env: to wrap.
        k: how many.

    Raises:
        EnvironmentUsageError: k is below 1, or observations are not flat.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], k: int) -> None:
        RecordConstructorArgs.__init__(self, k=k)
        super().__init__(env)
        self.k = at_least_one("History: k", k)
        self.observation_space = stacked_space(env.observation_space, self.k)
        assert env.observation_space.shape is not None
        self._rows: NDArray[Any] = np.zeros((self.k, *env.observation_space.shape), self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._rows[:] = observation
        return self._rows.flatten(), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and put the new observation last."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._rows[:-1] = self._rows[1:]
        self._rows[-1] = observation
        return self._rows.flatten(), reward, terminated, truncated, info
