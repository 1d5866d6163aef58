"""Tier 2, decode: at every iteration the lowest clock whose predicted duration fits the TPOT SLO.

Three compiled policies. For the first two the predicted time between tokens stands in for TPOT, conservatively: no
slack is saved up from quick iterations.

- :func:`paper` scans the clocks upward and takes the first that fits.
- :func:`floored` never goes below the clock of least energy per token at the present batch (power times duration has
  a minimum inside the clock range), and changes its clock at most once per a number of iterations and a span of time.
- :func:`credit` lets iterations last longer where the requests of the batch have saved up slack, and asks for shorter
  ones where they lag behind, under the same limit on changes.

All go to the top clock where nothing fits, after an iteration that took longer than predicted, and while KV memory is
nearly full: slower decoding grows the batch, a full memory makes admission wait, and that wait is in TPOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.params import SETTINGS, grid_clock, grid_size, policy_params
from agents.settings import DecodeSlackSettings
from biscale_gym._jit import compiled_as, inlined
from biscale_gym.cluster import features
from biscale_gym.cluster.policy import POLICY_SIGNATURE
from biscale_gym.profiles.kernels import decode_latency, iteration_cost, iteration_latency

Vector = NDArray[np.float64]

HEADROOM = SETTINGS + 0
GUARD_MARGIN = SETTINGS + 1
KV_HIGH = SETTINGS + 2
KV_LOW = SETTINGS + 3
IDLE_CLOCK = SETTINGS + 4
MONOTONE = SETTINGS + 5
CHANGE_ITERATIONS = SETTINGS + 6
CHANGE_INTERVAL_S = SETTINGS + 7

SWITCHES_PER_CHANGE = 10
"""Changes of ``floored`` and ``credit`` are at least this many expected switching times apart."""

SPENT_OVER_CHANGES = 4
"""``credit`` spends its slack over so many times the least interval of two changes: 40 iterations by default, about as
long ago as the youngest quarter of a batch joined where outputs have 200 tokens."""

KV_GUARDED = 0
"""Memory entry: 1 from the KV utilisation's rise above KV_HIGH until its fall below KV_LOW."""
LAST_POSITION = 1
"""Memory entry: grid position of the last scan's answer."""
CHANGED = 2
"""Memory entry: 1 once the policy has changed the clock; the next two entries are valid then."""
CHANGED_AT_S = 3
CHANGED_AT_ITERATION = 4


def slack_params(settings: DecodeSlackSettings, grid: Sequence[int], clocks_mhz: Sequence[int]) -> Vector:
    """The compiled policies' settings vector.

    Args:
        settings: the controller's settings.
        grid: indices of the clocks it may choose.
        clocks_mhz: the run's ascending clock list; the idle clock becomes the nearest of it.
    """
    idle = int(np.argmin(np.abs(np.asarray(clocks_mhz) - settings.idle_clock_mhz)))
    return policy_params(
        grid,
        len(clocks_mhz),
        [
            settings.headroom,
            settings.guard_margin,
            settings.kv_high,
            settings.kv_low,
            idle,
            float(settings.latency_falls_with_clock),
            settings.change_every_iterations,
            SWITCHES_PER_CHANGE * settings.switch_time_s,
        ],
    )


@inlined
def _duration_s(obs: Vector, model: Vector, clock: int) -> float:
    """Predicted duration of the iteration about to start."""
    if obs[features.RECOMPUTE_TOKENS] > 0.0:
        return float(
            iteration_latency(
                model,
                clock,
                obs[features.BATCH],
                obs[features.BATCH_KV_TOKENS],
                obs[features.RECOMPUTE_TOKENS],
                obs[features.RECOMPUTE_SUM_SQ],
            )
        )
    return float(decode_latency(model, clock, obs[features.BATCH], obs[features.BATCH_KV_TOKENS]))


@inlined
def first_feasible(obs: Vector, memory: Vector, params: Vector, model: Vector, n: int, limit_s: float) -> int:
    """Grid position of the lowest clock whose predicted duration is within ``limit_s``, or n.

    With ``MONOTONE`` the last answer is tried first: it stands if it fits and its lower neighbour does not, which
    gives the upward scan's answer for one or two evaluations.
    """
    start = 0
    if params[MONOTONE] > 0.0:
        guess = min(int(memory[LAST_POSITION]), n - 1)
        if guess > 0 and _duration_s(obs, model, grid_clock(params, guess - 1)) > limit_s:
            start = guess
    for position in range(start, n):
        if _duration_s(obs, model, grid_clock(params, position)) <= limit_s:
            memory[LAST_POSITION] = position
            return position
    memory[LAST_POSITION] = n - 1
    return n


@inlined
def _must_jump(obs: Vector, memory: Vector, params: Vector) -> bool:
    """Whether a guard demands the top clock, feasibility aside."""
    used, capacity = obs[features.KV_TOKENS], obs[features.KV_CAPACITY_TOKENS]
    if memory[KV_GUARDED] > 0.0:
        if used < params[KV_LOW] * capacity:
            memory[KV_GUARDED] = 0.0
    elif used > params[KV_HIGH] * capacity:
        memory[KV_GUARDED] = 1.0
    if memory[KV_GUARDED] > 0.0:
        return True
    predicted_s = obs[features.LAST_PREDICTED_S]
    late = predicted_s > 0.0 and obs[features.LAST_OBSERVED_S] > predicted_s * (1.0 + params[GUARD_MARGIN])
    return bool(late or int(obs[features.REASON]) == features.OVERRUN)


@inlined
def _least_energy(obs: Vector, params: Vector, model: Vector, n: int) -> int:
    """Grid position of least energy per token at the present batch; the lowest of equals."""
    best = 0
    best_j = np.inf
    for position in range(n):
        duration_s, power_w = iteration_cost(
            model,
            grid_clock(params, position),
            obs[features.BATCH],
            obs[features.BATCH_KV_TOKENS],
            obs[features.RECOMPUTE_TOKENS],
            obs[features.RECOMPUTE_SUM_SQ],
        )
        if duration_s * power_w < best_j:
            best_j = duration_s * power_w
            best = position
    return best


@compiled_as(POLICY_SIGNATURE)
def paper(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The lowest clock that fits, asked anew at every iteration."""
    if int(obs[features.REASON]) == features.IDLE:
        return int(params[IDLE_CLOCK])
    n = grid_size(params, int(obs[features.CLOCK_COUNT]))
    if _must_jump(obs, memory, params):
        return int(grid_clock(params, n - 1))
    limit_s = params[HEADROOM] * obs[features.SLO_S]
    return int(grid_clock(params, min(first_feasible(obs, memory, params, model, n, limit_s), n - 1)))


@inlined
def _note_change(obs: Vector, memory: Vector, clock: int) -> int:
    """The answer; if it changes the clock asked for, remembered as the last change."""
    if clock != int(obs[features.TARGET]):
        memory[CHANGED] = 1.0
        memory[CHANGED_AT_S] = obs[features.NOW_S]
        memory[CHANGED_AT_ITERATION] = obs[features.ITERATION]
    return clock


@inlined
def _too_soon(obs: Vector, memory: Vector, params: Vector) -> bool:
    """Whether the last change is fewer iterations or less time ago than two changes must be apart."""
    return bool(
        memory[CHANGED] > 0.0
        and (
            obs[features.ITERATION] - memory[CHANGED_AT_ITERATION] < params[CHANGE_ITERATIONS]
            or obs[features.NOW_S] - memory[CHANGED_AT_S] < params[CHANGE_INTERVAL_S]
        )
    )


@compiled_as(POLICY_SIGNATURE)
def floored(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The lowest clock that fits, but no lower than the energy-optimal one, with a limited rate of changes.

    Between changes the present clock is kept as long as the SLO itself holds, headroom aside; past that the top clock
    is asked for, which no limit delays.
    """
    if int(obs[features.REASON]) == features.IDLE:
        return int(params[IDLE_CLOCK])
    n = grid_size(params, int(obs[features.CLOCK_COUNT]))
    top = grid_clock(params, n - 1)
    if _must_jump(obs, memory, params):
        return int(_note_change(obs, memory, top))
    if _too_soon(obs, memory, params):
        target = int(obs[features.TARGET])
        holds = _duration_s(obs, model, target) <= obs[features.SLO_S]
        return target if holds else int(_note_change(obs, memory, top))
    feasible = first_feasible(obs, memory, params, model, n, params[HEADROOM] * obs[features.SLO_S])
    if feasible >= n - 1:
        return int(_note_change(obs, memory, top))
    position = max(feasible, _least_energy(obs, params, model, n))
    return int(_note_change(obs, memory, grid_clock(params, position)))


@inlined
def _spendable_s(obs: Vector, params: Vector) -> float:
    """Accumulated slack that three quarters of the batch have; if negative, what they lack.

    Slower iterations grow the batch, so there is nothing to spend while memory is not plentiful.
    """
    slack_s = obs[features.SLACK_P25_S]
    if slack_s > 0.0 and obs[features.KV_TOKENS] >= params[KV_LOW] * obs[features.KV_CAPACITY_TOKENS]:
        return 0.0
    return float(slack_s)


@compiled_as(POLICY_SIGNATURE)
def credit(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The lowest clock that the batch's accumulated slack can pay for.

    An iteration may last the headroom's share of the SLO plus the slack, spread over the iterations of
    ``SPENT_OVER_CHANGES`` changes, but at most as much above the SLO as the headroom's share is below it. Requests that
    joined last are left out of the slack: they have earned nothing yet, and have their waits to make good. Between
    changes the present clock is kept while the SLO holds, or while an iteration at it leaves slack; past that the top
    clock is asked for, which no limit delays.
    """
    if int(obs[features.REASON]) == features.IDLE:
        return int(params[IDLE_CLOCK])
    n = grid_size(params, int(obs[features.CLOCK_COUNT]))
    top = grid_clock(params, n - 1)
    if _must_jump(obs, memory, params):
        return int(_note_change(obs, memory, top))
    slo_s = obs[features.SLO_S]
    slack_s = _spendable_s(obs, params)
    if _too_soon(obs, memory, params):
        target = int(obs[features.TARGET])
        holds = _duration_s(obs, model, target) <= slo_s + max(0.0, slack_s)
        return target if holds else int(_note_change(obs, memory, top))
    iterations = SPENT_OVER_CHANGES * max(1.0, max(params[CHANGE_ITERATIONS], params[CHANGE_INTERVAL_S] / slo_s))
    limit_s = min(params[HEADROOM] * slo_s + slack_s / iterations, (2.0 - params[HEADROOM]) * slo_s)
    position = min(first_feasible(obs, memory, params, model, n, limit_s), n - 1)
    return int(_note_change(obs, memory, grid_clock(params, position)))


VARIANTS: dict[str, Any] = {"paper": paper, "floored": floored, "credit": credit}
