"""The settings vector of a compiled policy: which clocks it may choose, then its own settings.

``params[0]`` is the number of allowed clocks n, ``params[1..n]`` their indices in the run's ascending clock list,
ascending; policy settings start at ``SETTINGS``. ``params[0] == 0`` allows every clock of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from agents.errors import AgentError

GRID_COUNT = 0
GRID_FIRST = 1
SETTINGS = 16
MAX_GRID = SETTINGS - GRID_FIRST

FloatVector = NDArray[np.float64]


def policy_params(grid: Sequence[int], clock_count: int, settings: Sequence[float]) -> FloatVector:
    """The settings vector for a grid of clock indices.

    Args:
        grid: indices into the run's clock list, in any order.
        clock_count: length of the run's clock list.
        settings: the policy's own settings, in the order that its module defines.

    Raises:
        AgentError: the grid is empty, repeats a clock, leaves the list, or is too long to be written down without
            being the whole list.
    """
    indices = sorted(grid)
    if not indices:
        raise AgentError("a policy needs at least one allowed clock, found none")
    if len(set(indices)) != len(indices):
        raise AgentError(f"the clock grid repeats a clock: indices {indices}")
    if indices[0] < 0 or indices[-1] >= clock_count:
        raise AgentError(
            f"the clock grid {indices} leaves the run's list of {clock_count} clocks (0 to {clock_count - 1})"
        )
    whole_list = len(indices) == clock_count
    if len(indices) > MAX_GRID and not whole_list:
        raise AgentError(
            f"a grid of {len(indices)} clocks is too long: at most {MAX_GRID}, or exactly all {clock_count} of the run"
        )
    params = np.zeros(SETTINGS + len(settings))
    if len(indices) <= MAX_GRID:
        params[GRID_COUNT] = len(indices)
        params[GRID_FIRST : GRID_FIRST + len(indices)] = indices
    params[SETTINGS:] = settings
    return params


@njit(cache=True, inline="always")
def grid_size(params: FloatVector, clock_count: int) -> int:
    """Number of allowed clocks."""
    count = int(params[GRID_COUNT])
    return count if count > 0 else clock_count


@njit(cache=True, inline="always")
def grid_clock(params: FloatVector, position: int) -> int:
    """Index, in the run's clock list, of the allowed clock at a position of the ascending grid."""
    if params[GRID_COUNT] > 0.0:
        return int(params[GRID_FIRST + position])
    return position
