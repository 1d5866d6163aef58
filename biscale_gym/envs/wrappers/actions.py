"""Other ways of saying a clock: as a number in [-1, 1], or as a step up or down."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers.native import Native, native, with_own_observations

Numbers = NDArray[Any]


def continuous_space(told: Native) -> spaces.Box:
    """[-1, 1] per slot."""
    return spaces.Box(-1.0, 1.0, (told.slots,), np.float32)


def nearest_index(clocks_mhz: NDArray[np.float64], mhz: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the clock nearest to each of ``mhz``; half-way between two, the lower."""
    return np.asarray(np.searchsorted(0.5 * (clocks_mhz[1:] + clocks_mhz[:-1]), mhz, side="left"), dtype=np.int64)


def nearest_clocks(told: Native, numbers: Numbers) -> NDArray[np.int64]:
    """Index of the nearest clock to lowest + (number + 1) / 2 x (highest - lowest), in MHz; between two, the lower.

    Raises:
        EnvironmentUsageError: a number is NaN.
    """
    wanted = np.asarray(numbers, dtype=np.float64)
    if np.isnan(wanted).any():
        raise EnvironmentUsageError(f"action {numbers} holds NaN, expected numbers from -1 to 1")
    clocks = told.clocks_mhz
    mhz = clocks[0] + 0.5 * (wanted + 1.0) * (clocks[-1] - clocks[0])
    return nearest_index(clocks, mhz)


def delta_space(told: Native) -> spaces.Space[Any]:
    """Down, stay, up: per slot."""
    return spaces.MultiDiscrete(np.full(told.slots, 3)) if told.per_slot else spaces.Discrete(3)


def stepped_clocks(told: Native, observations: Numbers, steps: Numbers) -> NDArray[np.int64]:
    """Index of the clock one below (0), at (1) or one above (2) the one last asked for, saturating at the ends.

    Where that is no clock of the grid: the next lower, the nearest and the next higher one.

    Args:
        told: of the environment.
        observations: float32[..., size], the last ones.
        steps: int[..., S], each 0, 1 or 2.

    Raises:
        EnvironmentUsageError: another number.
    """
    steps = np.asarray(steps)
    wrong = (steps < 0) | (steps > 2)
    if wrong.any():
        raise EnvironmentUsageError(f"action {steps[wrong][0]} is no step; valid: 0 (down), 1 (stay), 2 (up)")
    clocks, mhz = told.clocks_mhz, told.targets_mhz(observations)
    lower = np.searchsorted(clocks, mhz, side="left") - 1
    higher = np.searchsorted(clocks, mhz, side="right")
    chosen = np.select([steps == 0, steps == 1], [lower, nearest_index(clocks, mhz)], higher)
    return np.clip(chosen, 0, len(clocks) - 1).astype(np.int64)


class ContinuousClocks(gymnasium.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """Clocks as numbers in [-1, 1], one per slot, for SAC, TD3 and TQC: the nearest clock by MHz is taken.

    Numbers beyond the range mean its ends.

    Raises:
        EnvironmentUsageError: no environment of clocks; in ``step``, a number that is NaN.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._native = native(env, type(self).__name__)
        self.action_space = continuous_space(self._native)

    def action(self, action: Any) -> Any:
        """From float[S] to the environment's own action."""
        clocks = nearest_clocks(self._native, action)
        return clocks if self._native.per_slot else int(clocks.reshape(-1)[0])


class ClockDeltas(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """One clock of the grid down (0), stay (1) or one up (2), from the clock last asked for; saturates at the ends.

    Raises:
        EnvironmentUsageError: no environment of clocks, or observations changed below; in ``step``, another number.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._native = with_own_observations(env, env.observation_space, type(self).__name__)
        self.action_space = delta_space(self._native)
        self._last: Numbers = np.zeros(self._native.size, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._last, info = self.env.reset(seed=seed, options=options)
        return self._last.copy(), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with int (or int[S]): 0, 1 or 2."""
        steps = np.asarray(action).reshape(self._native.slots)
        clocks = stepped_clocks(self._native, self._last, steps)
        taken = clocks if self._native.per_slot else int(clocks[0])
        self._last, reward, terminated, truncated, info = self.env.step(taken)
        return self._last.copy(), reward, terminated, truncated, info
