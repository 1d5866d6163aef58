"""Tier 2, prefill: model predictive control of the clock, at every batch boundary and when a prompt arrives inside one.

The engine projects what waits into at most eight batches by its own batching rule; no arrival is forecast. Each batch
gets a clock such that every request's wait plus predicted completion stays within ``headroom`` of the TTFT SLO, at the
least objective (:mod:`agents.mpc_search`); the clock of the first batch is the answer, the rest is planned anew next
time.

Three compiled policies that differ in the search: :func:`greedy`, :func:`exact`, :func:`dynamic`. Whatever the form,
the answer is the top clock where nothing is feasible, and until the next boundary once an observed latency has
exceeded its prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from agents import mpc_search as search
from agents.params import SETTINGS, grid_clock, grid_size, policy_params
from agents.settings import PrefillMPCSettings
from biscale_gym.cluster import features
from biscale_gym.cluster.policy import POLICY_SIGNATURE
from biscale_gym.profiles.kernels import idle_power_w, iteration_cost

Vector = NDArray[np.float64]

HEADROOM = SETTINGS + 0
HORIZON = SETTINGS + 1
OBJECTIVE = SETTINGS + 2
GUARD_MARGIN = SETTINGS + 3
IDLE_CLOCK = SETTINGS + 4
SWITCH_TIME_S = SETTINGS + 5
GRID_STEP_S = SETTINGS + 6

GUARDED = 0
"""Memory entry: 1 while the misprediction guard holds the top clock."""


def mpc_params(settings: PrefillMPCSettings, grid: Sequence[int], clocks_mhz: Sequence[int]) -> Vector:
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
            settings.horizon_batches,
            search.OBJECTIVES[settings.objective],
            settings.guard_margin,
            idle,
            settings.switch_time_s,
            settings.grid_step_s,
        ],
    )


@njit(cache=True)
def misprediction(obs: Vector, memory: Vector, margin: float) -> bool:
    """Whether the guard holds the top clock: from an overrun or a late batch until the first boundary without one."""
    reason = int(obs[features.REASON])
    predicted_s = obs[features.LAST_PREDICTED_S]
    if reason == features.OVERRUN:
        memory[GUARDED] = 1.0
    elif reason == features.BOUNDARY:
        late = predicted_s > 0.0 and obs[features.LAST_OBSERVED_S] > predicted_s * (1.0 + margin)
        memory[GUARDED] = 1.0 if late else 0.0
    return bool(memory[GUARDED] > 0.0)


@njit(cache=True)
def _first_batch_after_switch(
    latency: search.Matrix, energy: search.Matrix, clock: int, held_s: float, held_j: float, params: Vector
) -> None:
    """Charge batch 0 the expected switching time: until a new clock lands, the clock in force does the work."""
    switch_s = params[SWITCH_TIME_S]
    for position in range(latency.shape[1]):
        if grid_clock(params, position) == clock:
            continue
        if held_s <= switch_s:
            latency[0, position] = held_s
            energy[0, position] = held_j
        else:
            done = switch_s / held_s
            latency[0, position] = switch_s + (1.0 - done) * latency[0, position]
            energy[0, position] = done * held_j + (1.0 - done) * energy[0, position]


@njit(cache=True)
def decide(obs: Vector, memory: Vector, params: Vector, model: Vector, form: int) -> int:
    """One decision of the prefill controller.

    Args:
        obs: features of the decision.
        memory: the instance's memory; entry ``GUARDED`` is used.
        params: settings vector of :func:`mpc_params`.
        model: compiled profile to predict with.
        form: ``search.GREEDY``, ``search.EXACT`` or ``search.DYNAMIC``.

    Returns:
        Index of the chosen clock in the run's list.
    """
    if int(obs[features.REASON]) == features.IDLE:
        return int(params[IDLE_CLOCK])
    n = grid_size(params, int(obs[features.CLOCK_COUNT]))
    top = grid_clock(params, n - 1)
    if misprediction(obs, memory, params[GUARD_MARGIN]):
        return top
    h = min(int(obs[features.BATCHES]), int(params[HORIZON]))
    if h == 0:
        return int(obs[features.TARGET])
    latency = np.empty((h, n))
    energy = np.empty((h, n))
    deadline = np.empty(h)
    for j in range(h):
        entry = features.BATCH_FIRST + features.BATCH_STRIDE * j
        tokens = obs[entry + features.BATCH_TOKENS]
        sum_sq = obs[entry + features.BATCH_SUM_SQ]
        waited_s = obs[features.NOW_S] - obs[entry + features.BATCH_OLDEST_ARRIVAL_S]
        deadline[j] = params[HEADROOM] * obs[features.SLO_S] - waited_s
        left = obs[features.WORK_LEFT] if j == 0 else 1.0
        for position in range(n):
            duration_s, power_w = iteration_cost(model, grid_clock(params, position), 0.0, 0.0, tokens, sum_sq)
            latency[j, position] = left * duration_s
            energy[j, position] = left * duration_s * power_w
        if j == 0 and params[SWITCH_TIME_S] > 0.0:
            clock = int(obs[features.CLOCK])
            held_s, held_w = iteration_cost(model, clock, 0.0, 0.0, tokens, sum_sq)
            _first_batch_after_switch(latency, energy, clock, left * held_s, left * held_s * held_w, params)
    idle_w = idle_power_w(model, int(params[IDLE_CLOCK]))
    kind = int(params[OBJECTIVE])
    choice = np.empty(h, np.int64)
    if form == search.GREEDY:
        feasible = search.greedy(latency, energy, deadline, idle_w, kind, choice)
    elif form == search.EXACT:
        feasible = search.exact(latency, energy, deadline, idle_w, kind, choice)
    else:
        feasible = search.dynamic(latency, energy, deadline, idle_w, kind, params[GRID_STEP_S], choice)
    return grid_clock(params, choice[0]) if feasible else top


@njit(POLICY_SIGNATURE, cache=True)
def greedy(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The paper's stepwise search."""
    return decide(obs, memory, params, model, search.GREEDY)


@njit(POLICY_SIGNATURE, cache=True)
def exact(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """Branch and bound over every assignment."""
    return decide(obs, memory, params, model, search.EXACT)


@njit(POLICY_SIGNATURE, cache=True)
def dynamic(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """Dynamic programme on a time grid."""
    return decide(obs, memory, params, model, search.DYNAMIC)


FORMS: dict[str, Any] = {"greedy": greedy, "exact": exact, "dp": dynamic}
