"""The closed form: latency and power of an iteration at any clock, and the clock at which the board limit holds.

The equations are those of docs/model-card.md; their constants are read from the header of the compiled profile. The
clock-dependent terms are evaluated once per clock of the list and kept in its row, so that an iteration at a listed
clock needs two powers only.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from biscale_gym._jit import INDEX, compiled, inlined
from biscale_gym.profiles import layout as at

Vector = NDArray[np.float64]

_POWER_TOLERANCE_W = 1e-4
_MAX_STEPS = 60
_SLOPE_STEP_GHZ = 1e-4


@inlined
def power(x: float, y: float) -> float:
    """x^y of a positive x, twice as fast as libm's pow and right to a few units in the last place."""
    return float(np.exp(y * np.log(x)))


@inlined
def clock_terms(model: Vector, ghz: float) -> tuple[float, float, float, float, float, float]:
    """Clock-dependent terms of the closed form at any clock.

    Returns:
        ``(fixed_s, token_s, memory_p, compute_p, square_s, kv_token_s)``: seconds per iteration and per token, the
        weights' time to the power p, the dense products' time for one token to the power p, seconds per squared token
        and per KV token.
    """
    # Powers of the clock are exponentials of one logarithm; ``slow`` is that of 1/r(f).
    log_ghz = np.log(ghz)
    knee = np.exp(model[at.KNEE_POWER] * (model[at.LOG_KNEE_GHZ] - log_ghz))
    slow = np.log1p(knee) / model[at.KNEE_POWER] - model[at.KNEE_SCALE]
    inverse_r = np.exp(slow)
    p = model[at.NORM]
    tensor_ghz, log_tensor_ghz = ghz, log_ghz
    if ghz > model[at.TENSOR_LIMIT_GHZ]:
        tensor_ghz, log_tensor_ghz = model[at.TENSOR_LIMIT_GHZ], model[at.LOG_TENSOR_LIMIT_GHZ]
    fixed_s = (
        model[at.HOST_S]
        + model[at.REDUCE_S] * (model[at.REDUCE_FLAT] + model[at.REDUCE_GHZ] / ghz)
        + model[at.LAUNCH_S] * (model[at.LAUNCH_FLAT] + model[at.LAUNCH_GHZ] / ghz)
    )
    token_s = model[at.REDUCE_S_PER_TOKEN] + model[at.ELEMENTWISE_S] * inverse_r
    memory_p = np.exp(p * (model[at.LOG_WEIGHT_S] + slow))
    compute_p = np.exp(p * (model[at.LOG_COMPUTE_S_GHZ] - log_tensor_ghz))
    return fixed_s, token_s, memory_p, compute_p, model[at.ATTENTION_S_GHZ] / tensor_ghz, model[at.KV_S] * inverse_r


@inlined
def voltage(model: Vector, ghz: float) -> float:
    """Core voltage relative to the top clock's."""
    return float(max(model[at.VOLTAGE_FLOOR], 1.0 - model[at.VOLTAGE_SLOPE] * (model[at.HIGHEST_GHZ] - ghz)))


@inlined
def idle_at(model: Vector, ghz: float) -> float:
    """Idle power per GPU [W] of the closed form at any clock."""
    low, high = model[at.LOWEST_GHZ], model[at.HIGHEST_GHZ]
    v, v_low = voltage(model, ghz), voltage(model, low)
    share = (ghz * v * v - low * v_low * v_low) / (high - low * v_low * v_low)
    return float(model[at.IDLE_W] + model[at.IDLE_SPAN_W] * share)


@inlined
def base_and_work(
    model: Vector, ghz: float, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> tuple[float, float]:
    """Power drawn whatever the iteration does [W], and joules per GPU of its bytes and operations, limit ignored."""
    w = prefill_tokens / (prefill_tokens + model[at.PREFILL_TOKENS_HALF])
    # Dense prefill runs at the tensor cores' own clock: voltage and clock power follow it in the measure w.
    core_ghz = ghz - w * max(0.0, ghz - model[at.TENSOR_LIMIT_GHZ])
    v = voltage(model, core_ghz)
    v2 = v * v
    k = 1.0 + model[at.PREFILL_EXTRA] * w
    tokens = batch + prefill_tokens
    base_w = idle_at(model, core_ghz) + k * model[at.CLOCK_W_PER_GHZ] * core_ghz * v2
    moved_j = model[at.WEIGHT_J] + model[at.TOKEN_J] * tokens + model[at.KV_J] * kv_tokens
    computed_j = model[at.LINEAR_J] * tokens + model[at.ATTENTION_J] * sum_len_sq + model[at.HEAD_J] * max(batch, 1.0)
    return base_w, k * (moved_j + v2 * computed_j)


@inlined
def _at_ghz(
    model: Vector,
    ghz: float,
    batch: float,
    kv_tokens: float,
    prefill_tokens: float,
    sum_len_sq: float,
    tokens_p: float,
) -> tuple[float, float]:
    """As ``closed_form``, given ``tokens_p``: the number of all tokens to the power p."""
    fixed_s, token_s, memory_p, compute_p, square_s, kv_token_s = clock_terms(model, ghz)
    latency_s = (
        fixed_s
        + model[at.HOST_S_PER_SEQUENCE] * batch
        + token_s * (batch + prefill_tokens)
        + power(memory_p + compute_p * tokens_p, 1.0 / model[at.NORM])
        + square_s * sum_len_sq
        + kv_token_s * kv_tokens
    )
    base_w, work_j = base_and_work(model, ghz, batch, kv_tokens, prefill_tokens, sum_len_sq)
    return latency_s, base_w + work_j / latency_s


@inlined
def closed_form(
    model: Vector, ghz: float, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> tuple[float, float]:
    """Latency [s] and power per GPU [W] at any clock, board limit ignored. Parametric profiles only."""
    tokens_p = power(batch + prefill_tokens, model[at.NORM])
    return _at_ghz(model, ghz, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p)


@compiled
def _bisected(
    model: Vector,
    batch: float,
    kv_tokens: float,
    prefill_tokens: float,
    sum_len_sq: float,
    tokens_p: float,
    low: float,
    high: float,
) -> tuple[float, float]:
    """As ``_root``, by halving a bracket: safe and slow."""
    ghz, latency_s = high, 0.0
    for _ in range(_MAX_STEPS):
        ghz = 0.5 * (low + high)
        latency_s, power_w = _at_ghz(model, ghz, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p)
        if power_w > model[at.LIMIT_W]:
            high = ghz
        else:
            low = ghz
    return ghz, latency_s


@inlined
def _root(
    model: Vector,
    batch: float,
    kv_tokens: float,
    prefill_tokens: float,
    sum_len_sq: float,
    tokens_p: float,
    ghz: float,
    w_per_ghz: float,
    latency_per_ghz: float,
) -> tuple[float, float]:
    """Clock [GHz] at which power is the board limit, and the latency [s] there.

    Starts at ``ghz`` with the slopes of power and, relatively, of latency; goes on by secant steps within a bracket,
    one that falls out of it becomes a bisection. The last step is not evaluated: latency is carried along its slope.
    At the tensor cores' own clock power has a kink, which secants from its far side approach by a hair at a time: a
    search that is not over after many steps ends by bisections.
    """
    low, high = model[at.LOWEST_GHZ], model[at.HIGHEST_GHZ]
    before, power_before_w, latency_before_s = ghz, 0.0, 0.0
    latency_s = 0.0
    for step in range(_MAX_STEPS):
        latency_s, power_w = _at_ghz(model, ghz, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p)
        if power_w > model[at.LIMIT_W]:
            high = ghz
        else:
            low = ghz
        if step == 0:
            s_per_ghz = latency_per_ghz * latency_s
        else:
            w_per_ghz = (power_w - power_before_w) / (ghz - before)
            s_per_ghz = (latency_s - latency_before_s) / (ghz - before)
        following = ghz + (model[at.LIMIT_W] - power_w) / w_per_ghz
        if not low < following < high:
            following = 0.5 * (low + high)
        elif abs(power_w - model[at.LIMIT_W]) <= _POWER_TOLERANCE_W:
            return following, latency_s + s_per_ghz * (following - ghz)
        if following == ghz:
            return ghz, latency_s
        before, power_before_w, latency_before_s, ghz = ghz, power_w, latency_s, following
    return _bisected(model, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p, low, high)


@inlined
def limited(
    model: Vector,
    batch: float,
    kv_tokens: float,
    prefill_tokens: float,
    sum_len_sq: float,
    log_tokens: float,
    tokens_p: float,
) -> tuple[float, float]:
    """Effective clock [GHz] and latency [s] where the board limit holds power at exactly its value.

    Power rises with the clock, so the root is unique; neither start nor bracket depends on the locked clock, which
    makes the answer the same bits for every lock above it. The start is that of one prompt of as many tokens, by cubic
    interpolation: near enough for the first step to be the last.
    """
    knot = (at.LIMIT_KNOTS_PER_OCTAVE / np.log(2.0)) * log_tokens
    below = min(max(int(knot), 1), at.LIMIT_KNOTS - 3)
    x = min(knot - below, 2.0)
    a = -x * (x - 1.0) * (x - 2.0) / 6.0
    b = (x + 1.0) * (x - 1.0) * (x - 2.0) / 2.0
    c = -(x + 1.0) * x * (x - 2.0) / 2.0
    d = (x + 1.0) * x * (x - 1.0) / 6.0
    i = (int(model[at.LIMIT_START]) + (below - 1) * at.LIMIT_ENTRY) & INDEX
    j, k, m = i + at.LIMIT_ENTRY, i + 2 * at.LIMIT_ENTRY, i + 3 * at.LIMIT_ENTRY
    ghz = a * model[i] + b * model[j] + c * model[k] + d * model[m]
    slope = at.LIMIT_W_PER_GHZ
    w_per_ghz = a * model[i + slope] + b * model[j + slope] + c * model[k + slope] + d * model[m + slope]
    slope = at.LIMIT_LATENCY_PER_GHZ
    latency_per_ghz = a * model[i + slope] + b * model[j + slope] + c * model[k + slope] + d * model[m + slope]
    ghz = min(max(ghz, model[at.LOWEST_GHZ]), model[at.HIGHEST_GHZ])
    return _root(model, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p, ghz, w_per_ghz, latency_per_ghz)


@inlined
def at_clock(
    model: Vector,
    clock: int,
    batch: float,
    kv_tokens: float,
    prefill_tokens: float,
    sum_len_sq: float,
    tokens_p: float,
) -> tuple[float, float, float]:
    """Latency [s] of the parametric form at a clock of the list, with base power and work, board limit ignored."""
    row = (at.HEADER + clock * at.ROW) & INDEX
    latency_s = (
        model[row + at.FIXED_S]
        + model[at.HOST_S_PER_SEQUENCE] * batch
        + model[row + at.TOKEN_S] * (batch + prefill_tokens)
        + power(model[row + at.MEMORY_P] + model[row + at.COMPUTE_P] * tokens_p, 1.0 / model[at.NORM])
        + model[row + at.SQUARE_S] * sum_len_sq
        + model[row + at.KV_TOKEN_S] * kv_tokens
    )
    base_w, work_j = base_and_work(model, model[row + at.GHZ], batch, kv_tokens, prefill_tokens, sum_len_sq)
    return latency_s, base_w, work_j


@njit(cache=True, error_model="numpy")
def fill_parametric(model: Vector) -> None:
    """Fill clock rows, decode table and search starts of a parametric vector whose header and clocks (GHz) are set."""
    table = int(model[at.DECODE])
    clocks = int(model[at.CLOCKS])
    tokens_p = np.arange(int(model[at.MAX_BATCH]) + 1, dtype=np.float64) ** model[at.NORM]
    for clock in range(clocks):
        row = (at.HEADER + clock * at.ROW) & INDEX
        ghz = model[row + at.GHZ]
        fixed_s, token_s, memory_p, compute_p, square_s, kv_token_s = clock_terms(model, ghz)
        base_w = base_and_work(model, ghz, 0.0, 0.0, 0.0, 0.0)[0]
        model[row + at.IDLE] = idle_at(model, ghz)
        model[row + at.BASE_W] = base_w
        model[row + at.HEADROOM_W] = model[at.LIMIT_W] - base_w
        model[row + at.FIXED_S] = fixed_s
        model[row + at.TOKEN_S] = token_s
        model[row + at.MEMORY_P] = memory_p
        model[row + at.COMPUTE_P] = compute_p
        model[row + at.SQUARE_S] = square_s
        model[row + at.KV_TOKEN_S] = kv_token_s
        for b in range(int(model[at.MAX_BATCH]) + 1):
            entry = table + (b * clocks + clock) * at.ENTRY
            dense_s = power(memory_p + compute_p * tokens_p[b], 1.0 / model[at.NORM])
            model[entry + at.A] = fixed_s + (model[at.HOST_S_PER_SEQUENCE] + token_s) * b + dense_s
            model[entry + at.C] = kv_token_s
            model[entry + at.N0] = base_and_work(model, ghz, float(b), 0.0, 0.0, 0.0)[1]
            model[entry + at.NK] = model[at.KV_J]
    low, high = model[at.LOWEST_GHZ], model[at.HIGHEST_GHZ]
    for j in range(at.LIMIT_KNOTS):
        tokens = 2.0 ** (j / at.LIMIT_KNOTS_PER_OCTAVE)
        ghz = high
        if closed_form(model, high, 0.0, 0.0, tokens, tokens * tokens)[1] > model[at.LIMIT_W]:
            tokens_p = power(tokens, model[at.NORM])
            start, w_per_ghz = 0.5 * (low + high), model[at.LIMIT_W] / high
            ghz = _root(model, 0.0, 0.0, tokens, tokens * tokens, tokens_p, start, w_per_ghz, 0.0)[0]
        near, far = max(low, ghz - _SLOPE_STEP_GHZ), min(high, ghz + _SLOPE_STEP_GHZ)
        near_s, near_w = closed_form(model, near, 0.0, 0.0, tokens, tokens * tokens)
        far_s, far_w = closed_form(model, far, 0.0, 0.0, tokens, tokens * tokens)
        entry = int(model[at.LIMIT_START]) + j * at.LIMIT_ENTRY
        model[entry + at.LIMIT_GHZ] = ghz
        model[entry + at.LIMIT_W_PER_GHZ] = (far_w - near_w) / (far - near)
        model[entry + at.LIMIT_LATENCY_PER_GHZ] = (far_s / near_s - 1.0) / (far - near)
