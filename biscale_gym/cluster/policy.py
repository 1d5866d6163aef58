"""Compiled clock policies: the one signature that the engine calls at every decision point.

``function(obs, memory, params, model) -> clock index``

- ``obs`` float64[features.SIZE]: this decision's features (biscale_gym.cluster.features).
- ``memory`` float64[MEMORY_SIZE], or more where the policy asks for it (``PhasePolicy.memory``): private to the
  instance, zero at the start, part of every snapshot. The entries from 16 to 31 are the encoder's of learned policies
  (biscale_gym.envs.encoding); hand-written policies use the lower ones.
- ``params`` float64[:]: the controller's settings.
- ``model`` float64[:]: the compiled profile of the instance's class, as the controller believes it.

The answer is an index into the run's ascending clock list. The engine is compiled once for the function *type* and
cached on disk, so a new policy costs its own compilation only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from biscale_gym._jit import compiled_as

Vector = npt.NDArray[np.float64]

MEMORY_SIZE = 32

_VECTOR = types.float64[::1]
POLICY_SIGNATURE = types.int64(_VECTOR, _VECTOR, _VECTOR, _VECTOR)
POLICY_TYPE = types.FunctionType(POLICY_SIGNATURE)


policy = compiled_as(POLICY_SIGNATURE)
"""Decorator of a policy that creates no array; ``numba.njit(POLICY_SIGNATURE, cache=True)`` serves any other."""


@policy
def hold(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """Keep the clock last asked for."""
    return int(obs[3])
