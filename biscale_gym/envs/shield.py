"""What overrules a clock policy of one instance: a floor under its clocks, and a guard of KV memory.

Compiled, and the same for a policy in service (``mlp.py``) and for one in training (``lanes.py``): a policy that is
trained without the shield that it will have learns to stay clear of limits that the shield keeps for it, and noisy
actions have to stay clearer than the policy's own.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from biscale_gym._jit import inlined
from biscale_gym.cluster import features as f
from biscale_gym.config import Settings
from biscale_gym.envs.encoding import grid_of
from biscale_gym.profiles.kernels import decode_latency, iteration_latency

Vector = NDArray[np.float64]

# Params, right after the encoder's.
KV_HIGH = 0
KV_LOW = 1
HEADROOM = 2
SIZE = 3


class ShieldSettings(Settings):
    """What overrules a clock policy of one instance.

    Attributes:
        kv_high: KV utilisation above which a decode instance is held at the highest clock; None: never.
        kv_low: utilisation below which it is released.
        headroom: the clock is raised to the first that is predicted to keep within this share of the SLO what is at
            hand: a decode instance's next iteration, or, all run at one clock, a prefill instance's projected batches;
            to the highest where none does. None: it is not.
    """

    kv_high: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_low: Annotated[float, Field(ge=0)] = 0.0
    headroom: Annotated[float, Field(gt=0, le=1)] | None = None


NO_SHIELD = ShieldSettings()


def shield_params(shield: ShieldSettings) -> Vector:
    """The shield's settings as the compiled functions read them, float64[SIZE]; to follow the encoder's."""
    return np.array([np.inf if shield.kv_high is None else shield.kv_high, shield.kv_low, shield.headroom or 0.0])


@inlined
def guarded(obs: Vector, params: Vector, before: bool) -> bool:
    """Whether KV memory has been above ``kv_high`` since it was last below ``kv_low``; ``before``: the last answer."""
    grid, n = grid_of(params)
    used, capacity = obs[f.KV_TOKENS], obs[f.KV_CAPACITY_TOKENS]
    if before:
        return bool(used >= params[grid + n + KV_LOW] * capacity)
    return bool(used > params[grid + n + KV_HIGH] * capacity)


@inlined
def _decode_s(obs: Vector, model: Vector, clock: int) -> float:
    """Predicted duration of the next iteration."""
    if obs[f.RECOMPUTE_TOKENS] > 0.0:
        return float(
            iteration_latency(
                model,
                clock,
                obs[f.BATCH],
                obs[f.BATCH_KV_TOKENS],
                obs[f.RECOMPUTE_TOKENS],
                obs[f.RECOMPUTE_SUM_SQ],
            )
        )
    return float(decode_latency(model, clock, obs[f.BATCH], obs[f.BATCH_KV_TOKENS]))


@inlined
def _decode_in_time(obs: Vector, model: Vector, clock: int, headroom: float) -> bool:
    """Whether the next iteration is within the headroom."""
    return bool(_decode_s(obs, model, clock) <= headroom * obs[f.SLO_S])


@inlined
def _prefill_in_time(obs: Vector, model: Vector, clock: int, headroom: float) -> bool:
    """Whether all projected batches, run at one clock, end within the headroom of all their prompts."""
    allowance_s = (1.0 - headroom) * obs[f.SLO_S]
    end_s = 0.0
    for j in range(int(obs[f.BATCHES])):
        entry = f.BATCH_FIRST + f.BATCH_STRIDE * j
        share = obs[f.WORK_LEFT] if j == 0 else 1.0
        end_s += share * float(
            iteration_latency(model, clock, 0.0, 0.0, obs[entry + f.BATCH_TOKENS], obs[entry + f.BATCH_SUM_SQ])
        )
        waited_s = obs[f.NOW_S] - obs[entry + f.BATCH_OLDEST_ARRIVAL_S]
        if obs[f.SLO_S] - waited_s - end_s < allowance_s:
            return False
    return True


@inlined
def _raised(in_time: Any, obs: Vector, params: Vector, model: Vector, clock: int) -> int:
    """``clock``, or the first above it that is in time; the highest if none is."""
    grid, n = grid_of(params)
    headroom = params[grid + n + HEADROOM]
    if headroom == 0.0 or int(obs[f.REASON]) == f.IDLE:
        return clock
    for position in range(n):
        one = int(params[grid + position])
        if one >= clock and in_time(obs, model, one, headroom):
            return one
    return int(params[grid + n - 1])


@inlined
def raised_decode(obs: Vector, params: Vector, model: Vector, clock: int) -> int:
    """``clock``, or the first above it whose next iteration is within the headroom; the highest if none is."""
    return _raised(_decode_in_time, obs, params, model, clock)


@inlined
def raised_prefill(obs: Vector, params: Vector, model: Vector, clock: int) -> int:
    """``clock``, or the first above it that keeps all projected batches in time; the highest if none does."""
    return _raised(_prefill_in_time, obs, params, model, clock)
