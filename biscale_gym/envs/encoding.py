"""From a decision's features to the observation that a learned policy sees; compiled, for environments and controllers.

The observation is a function of what every clock policy is handed: the engine's features, the instance's memory, the
policy's params and the compiled profile. So a policy trained in an environment sees the same numbers when it later runs
as a compiled controller in a comparison. Layout: ``layout.py``.

Memory entries from ``FIRST`` on are the encoder's. Controllers of this project use the lower ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from biscale_gym._jit import compiled, inlined
from biscale_gym.cluster import features as f
from biscale_gym.envs import layout
from biscale_gym.profiles.elementary import natural_log
from biscale_gym.profiles.kernels import iteration_cost, iteration_latency, prefill_cost_with, prefill_terms

Vector = NDArray[np.float64]
Row = NDArray[np.float32]
Keeps = tuple[float, float, float, float]

# Params of the encoder.
RUN_CLOCKS = 0
"""How many clocks the run's list has; as many MHz follow. Then how many the grid has, and as many indices."""

# Memory of the encoder.
FIRST = 16
BEGUN = FIRST
AT_S = FIRST + 1
ARRIVALS_1S = FIRST + 2
ARRIVALS_10S = FIRST + 3
ARRIVALS_60S = FIRST + 4
COMPLETIONS_10S = FIRST + 5
COMPLETIONS_60S = FIRST + 6
LATE_60S = FIRST + 7
ROUTED = FIRST + 8
COMPLETED = FIRST + 9
LATE = FIRST + 10
IDLE_SINCE_S = FIRST + 11

# Observation entries (layout.py); the last ones depend on the number of clocks.
COMMON = 19
WORK_LEFT, BATCHES, TOKENS = COMMON, COMMON + 1, COMMON + 2
SLACK = TOKENS + f.HORIZON
PREFILL_CLOCKS = SLACK + f.HORIZON
BATCH, CONTEXT, RECOMPUTE, DECODE_SLACK = COMMON, COMMON + 1, COMMON + 2, COMMON + 3
DECODE_CLOCKS = DECODE_SLACK + 5

_LN_65537 = math.log(65537.0)
_LN_1025 = math.log(1025.0)
_LN_101 = math.log(101.0)
_COUNTED = 1024
_LOG_REQUESTS = np.array([math.log(1.0 + count) / _LN_1025 for count in range(_COUNTED)], np.float32)
MHZ = 2000.0
TOKENS_UNIT = 8192.0


def encoder_params(clocks_mhz: Sequence[int], grid: Sequence[int]) -> Vector:
    """The encoder's settings.

    Args:
        clocks_mhz: the run's ascending clock list.
        grid: indices into it of the clocks that the policy chooses from, ascending.

    Returns:
        float64[2 + clocks + grid].
    """
    return np.array([len(clocks_mhz), *clocks_mhz, len(grid), *grid], dtype=np.float64)


@inlined
def grid_of(params: Vector) -> tuple[int, int]:
    """(position of the grid's first index in params, clocks of the grid)."""
    at = 1 + int(params[RUN_CLOCKS])
    return at + 1, int(params[at])


@inlined
def clipped(value: float, low: float, high: float) -> np.float32:
    """Within [low, high]; NaN becomes low."""
    if not value > low:
        return np.float32(low)
    return np.float32(min(value, high))


@inlined
def _mean_rate(mean: float, count: float, elapsed_s: float, keep: float) -> float:
    """Exponential mean of a rate after ``count`` events, evenly spread over ``elapsed_s``."""
    return keep * mean + (1.0 - keep) * count / elapsed_s


NO_KEEPS = (-1.0, 0.0, 0.0, 0.0)


@inlined
def keeps(elapsed_s: float, known: Keeps) -> Keeps:
    """(``elapsed_s``, what a mean over 1, 10 and 60 s keeps of its value in that time); ``known`` if it is of that."""
    if elapsed_s == known[0]:
        return known
    return elapsed_s, math.exp(-elapsed_s), math.exp(elapsed_s * -0.1), math.exp(elapsed_s * (-1.0 / 60.0))


@inlined
def follow(memory: Vector, now_s: float, routed: float, completed: float, late: float, known: Keeps) -> Keeps:
    """Bring the memory's rates up to now, from an instance's counts so far; returns the ``keeps`` of the time since."""
    if memory[BEGUN] == 0.0:
        memory[BEGUN] = 1.0
        memory[IDLE_SINCE_S] = now_s
        # What was served unobserved, as a plain mean; a second more makes the first requests no burst.
        seconds = now_s + 1.0
        memory[ARRIVALS_1S] = memory[ARRIVALS_10S] = memory[ARRIVALS_60S] = routed / seconds
        memory[COMPLETIONS_10S] = memory[COMPLETIONS_60S] = completed / seconds
        memory[LATE_60S] = late / seconds
    elif now_s > memory[AT_S]:
        known = keeps(now_s - memory[AT_S], known)
        elapsed_s, keep_1, keep_10, keep_60 = known
        arrivals = routed - memory[ROUTED]
        completions = completed - memory[COMPLETED]
        memory[ARRIVALS_1S] = _mean_rate(memory[ARRIVALS_1S], arrivals, elapsed_s, keep_1)
        memory[ARRIVALS_10S] = _mean_rate(memory[ARRIVALS_10S], arrivals, elapsed_s, keep_10)
        memory[ARRIVALS_60S] = _mean_rate(memory[ARRIVALS_60S], arrivals, elapsed_s, keep_60)
        memory[COMPLETIONS_10S] = _mean_rate(memory[COMPLETIONS_10S], completions, elapsed_s, keep_10)
        memory[COMPLETIONS_60S] = _mean_rate(memory[COMPLETIONS_60S], completions, elapsed_s, keep_60)
        memory[LATE_60S] = _mean_rate(memory[LATE_60S], late - memory[LATE], elapsed_s, keep_60)
    else:
        return known
    memory[AT_S], memory[ROUTED], memory[COMPLETED], memory[LATE] = now_s, routed, completed, late
    return known


@inlined
def late_share(memory: Vector) -> np.float32:
    """Share of the requests completed lately that broke the SLO; 0 where none was."""
    if memory[COMPLETIONS_60S] <= 0.0:
        return np.float32(0.0)
    return clipped(memory[LATE_60S] / memory[COMPLETIONS_60S], 0.0, 1.0)


@inlined
def log_rate(rate_per_s: float) -> np.float32:
    """ln(1 + rate) / ln 101."""
    return clipped(natural_log(1.0 + rate_per_s) / _LN_101, 0.0, 2.0)


@inlined
def log_requests(count: float) -> np.float32:
    """ln(1 + count) / ln 1025, of a whole number."""
    if count < _COUNTED:  # mostly: the logarithm is spared
        return np.float32(_LOG_REQUESTS[int(count)])
    return clipped(natural_log(1.0 + count) / _LN_1025, 0.0, 2.0)


@inlined
def log_tokens(count: float) -> np.float32:
    """ln(1 + count) / ln 65537."""
    if count == 0.0:  # mostly: the logarithm is spared
        return np.float32(0.0)
    return clipped(natural_log(1.0 + count) / _LN_65537, 0.0, 2.0)


@inlined
def _encode_common(obs: Vector, memory: Vector, params: Vector, slo_unit_s: float, out: Row) -> None:
    follow(memory, obs[f.NOW_S], obs[f.ROUTED], obs[f.COMPLETED], obs[f.LATE], NO_KEEPS)
    reason = int(obs[f.REASON])
    for code in range(4):
        out[code] = np.float32(reason == code)
    out[4] = clipped(params[1 + int(obs[f.CLOCK])] / MHZ, 0.0, 1.5)
    out[5] = clipped(params[1 + int(obs[f.TARGET])] / MHZ, 0.0, 1.5)
    out[6] = np.float32(obs[f.SWITCH_PENDING])
    out[7] = clipped(obs[f.TP] / 8.0, 0.0, 1.0)
    out[8] = clipped(obs[f.SLO_S] / slo_unit_s, 0.0, 8.0)
    out[9] = clipped(obs[f.KV_TOKENS] / obs[f.KV_CAPACITY_TOKENS], 0.0, 1.0)
    out[10] = log_requests(obs[f.QUEUE_REQUESTS])
    out[11] = log_tokens(obs[f.QUEUE_TOKENS])
    out[12] = log_rate(memory[ARRIVALS_1S])
    out[13] = log_rate(memory[ARRIVALS_10S])
    out[14] = log_rate(memory[ARRIVALS_60S])
    out[15] = log_rate(memory[COMPLETIONS_10S])
    out[16] = late_share(memory)
    out[17] = np.float32(0.0)
    if obs[f.LAST_PREDICTED_S] > 0.0:
        out[17] = clipped(obs[f.LAST_OBSERVED_S] / obs[f.LAST_PREDICTED_S] - 1.0, -1.0, 1.0)
    if reason == f.IDLE:
        memory[IDLE_SINCE_S] = obs[f.NOW_S]
    out[18] = np.float32(0.0)
    if reason == f.BOUNDARY and memory[IDLE_SINCE_S] >= 0.0:
        out[18] = clipped(obs[f.NOW_S] - memory[IDLE_SINCE_S], 0.0, 4.0)
        memory[IDLE_SINCE_S] = -1.0


@compiled
def encode_prefill(obs: Vector, memory: Vector, params: Vector, model: Vector, out: Row) -> None:
    """Write a prefill decision's observation.

    Args:
        obs: float64[features.SIZE].
        memory: float64[policy.MEMORY_SIZE]; the entries from FIRST on are read and written.
        params: float64[any] that begins with ``encoder_params``.
        model: compiled profile, as the policy believes it.
        out: float32[layout.size("prefill", clocks)].
    """
    slo_s = obs[f.SLO_S]
    _encode_common(obs, memory, params, 1.0, out)
    batches = int(obs[f.BATCHES])
    out[WORK_LEFT] = clipped(obs[f.WORK_LEFT], 0.0, 1.0)
    out[BATCHES] = np.float32(batches / f.HORIZON)
    for j in range(f.HORIZON):
        entry = f.BATCH_FIRST + f.BATCH_STRIDE * j
        if j < batches:
            waited_s = obs[f.NOW_S] - obs[entry + f.BATCH_OLDEST_ARRIVAL_S]
            out[TOKENS + j] = clipped(obs[entry + f.BATCH_TOKENS] / TOKENS_UNIT, 0.0, 4.0)
            out[SLACK + j] = clipped((slo_s - waited_s) / slo_s, -4.0, 1.0)
        else:
            out[TOKENS + j] = np.float32(0.0)
            out[SLACK + j] = np.float32(1.0)
    grid, n = grid_of(params)
    latency, energy, margin = PREFILL_CLOCKS, PREFILL_CLOCKS + n, PREFILL_CLOCKS + 2 * n
    if batches == 0:
        for k in range(n):
            out[latency + k] = np.float32(0.0)
            out[energy + k] = np.float32(1.0)
            out[margin + k] = np.float32(1.0)
        return
    tokens, sum_sq = obs[f.BATCH_FIRST + f.BATCH_TOKENS], obs[f.BATCH_FIRST + f.BATCH_SUM_SQ]
    log_tokens, tokens_p = prefill_terms(model, tokens)
    limited_s = 0.0
    highest_j = 0.0
    for k in range(n - 1, -1, -1):
        clock = int(params[grid + k])
        duration_s, power_w, limited_s = prefill_cost_with(
            model, clock, tokens, sum_sq, log_tokens, tokens_p, limited_s
        )
        if k == n - 1:
            highest_j = duration_s * power_w
        end_s = obs[f.WORK_LEFT] * duration_s
        out[latency + k] = clipped(end_s / slo_s, 0.0, 4.0)
        out[energy + k] = clipped(duration_s * power_w / highest_j, 0.0, 4.0)
        least_s = slo_s - (obs[f.NOW_S] - obs[f.BATCH_FIRST + f.BATCH_OLDEST_ARRIVAL_S]) - end_s
        for j in range(1, batches):
            entry = f.BATCH_FIRST + f.BATCH_STRIDE * j
            end_s += iteration_latency(model, clock, 0.0, 0.0, obs[entry + f.BATCH_TOKENS], obs[entry + f.BATCH_SUM_SQ])
            waited_s = obs[f.NOW_S] - obs[entry + f.BATCH_OLDEST_ARRIVAL_S]
            least_s = min(least_s, slo_s - waited_s - end_s)
        out[margin + k] = clipped(least_s / slo_s, -4.0, 1.0)


@compiled
def encode_decode(obs: Vector, memory: Vector, params: Vector, model: Vector, out: Row) -> None:
    """Write a decode decision's observation; the features must hold the batch's slack (``PhasePolicy.slack``).

    Args:
        obs: float64[features.SIZE].
        memory: float64[policy.MEMORY_SIZE]; the entries from FIRST on are read and written.
        params: float64[any] that begins with ``encoder_params``.
        model: compiled profile, as the policy believes it.
        out: float32[layout.size("decode", clocks)].
    """
    slo_s = obs[f.SLO_S]
    _encode_common(obs, memory, params, 0.1, out)
    idle = int(obs[f.REASON]) == f.IDLE
    batch = 0.0 if idle else obs[f.BATCH]
    kv_tokens = 0.0 if idle else obs[f.BATCH_KV_TOKENS]
    recompute = 0.0 if idle else obs[f.RECOMPUTE_TOKENS]
    out[BATCH] = log_requests(batch)
    out[CONTEXT] = clipped(kv_tokens / max(1.0, batch) / TOKENS_UNIT, 0.0, 4.0)
    out[RECOMPUTE] = clipped(recompute / TOKENS_UNIT, 0.0, 4.0)
    for rank in range(5):
        slack_s = 0.0 if idle else obs[f.SLACK_LEAST_S + rank]
        out[DECODE_SLACK + rank] = clipped(slack_s / (10.0 * slo_s), -4.0, 4.0)
    grid, n = grid_of(params)
    latency, energy = DECODE_CLOCKS, DECODE_CLOCKS + n
    highest_j = 0.0
    for k in range(n - 1, -1, -1):
        out[latency + k] = np.float32(0.0)
        out[energy + k] = np.float32(1.0)
        if batch + recompute == 0.0:
            continue
        duration_s, power_w = iteration_cost(
            model, int(params[grid + k]), batch, kv_tokens, recompute, obs[f.RECOMPUTE_SUM_SQ]
        )
        if k == n - 1:
            highest_j = duration_s * power_w
        out[latency + k] = clipped(duration_s / slo_s, 0.0, 4.0)
        out[energy + k] = clipped(duration_s * power_w / highest_j, 0.0, 4.0)


assert layout.size("prefill", 0) == PREFILL_CLOCKS
assert layout.size("decode", 0) == DECODE_CLOCKS
