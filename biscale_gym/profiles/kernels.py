"""What one iteration costs, compiled: every function here reads one flat float64 vector, the *compiled profile*.

A compiled profile describes one TP group of one model on one hardware over an ascending list of clocks: its parts are
in layout.py. Nothing else is needed to evaluate it and nothing in it changes.

Decode is linear in the KV tokens ``K`` within a segment, in latency and in joules above the clock's base power::

    t = A + C*K        P = base + (N0 + NK*K) / t

so a look-up of four neighbouring numbers answers exactly, and the board limit binds just where
``N0 + NK*K > (limit - base)*t``. Only then is the closed form solved for the effective clock.

Counts (batch, tokens, sums of squares) are passed as whole-valued float64, clocks as indices into the vector's list,
and answers are seconds and watts per GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from biscale_gym._jit import INDEX, compiled, inlined
from biscale_gym.profiles import layout as at
from biscale_gym.profiles.closed_form import at_clock, limited

Vector = NDArray[np.float64]


@inlined
def _decode_entry(model: Vector, clock: int, batch: float, kv_tokens: float) -> int:
    """Position of the decode entry in the vector."""
    slot = batch
    if model[at.KV_SEGMENTS] > 1.0:
        segment = min(np.floor(kv_tokens / model[at.KV_STEP]), model[at.KV_SEGMENTS] - 1.0)
        slot += segment * (model[at.MAX_BATCH] + 1.0)
    # Float arithmetic with one conversion at the end: this is the engine's innermost address.
    return (int(model[at.DECODE] + slot * model[at.BATCH_STRIDE]) + clock * at.ENTRY) & INDEX


@inlined
def _look_up(model: Vector, clock: int, batch: float, kv_tokens: float) -> tuple[float, float]:
    """Latency [s] of a decode iteration within the table, and joules above the base power."""
    entry = _decode_entry(model, clock, batch, kv_tokens)
    latency_s = model[entry + at.A] + model[entry + at.C] * kv_tokens
    return latency_s, model[entry + at.N0] + model[entry + at.NK] * kv_tokens


@inlined
def _continued(model: Vector, clock: int, batch: float, kv_tokens: float) -> tuple[float, float]:
    """As ``_look_up``, the last two rows continued beyond the table."""
    last = min(batch, model[at.MAX_BATCH])
    latency_s, work_j = _look_up(model, clock, last, kv_tokens)
    if batch > last:
        before_s, before_j = _look_up(model, clock, last - 1.0, kv_tokens)
        latency_s += (latency_s - before_s) * (batch - last)
        work_j += (work_j - before_j) * (batch - last)
    return latency_s, work_j


@inlined
def _cell(model: Vector, first: int, count: int, value: float) -> tuple[int, float]:
    """Cell of ascending knots that holds ``value`` (the outermost reach on), and the share of the cell before it."""
    low, high = 0, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if model[first + middle] <= value:
            low = middle
        else:
            high = middle
    start = model[first + low]
    return low, (value - start) / (model[first + low + 1] - start)


@inlined
def _prefill_from_grid(model: Vector, clock: int, prefill_tokens: float, sum_len_sq: float) -> tuple[float, float]:
    """Latency [s] and joules per GPU of a prefill batch, bilinear in its tokens and their mean length ``S2 / m``."""
    rows, columns = int(model[at.PREFILL_TOKEN_KNOTS]), int(model[at.PREFILL_LENGTH_KNOTS])
    first = int(model[at.PREFILL])
    i, x = _cell(model, first, rows, prefill_tokens)
    j, y = _cell(model, first + rows, columns, sum_len_sq / prefill_tokens)
    near = first + rows + columns + 2 * ((clock * rows + i) * columns + j)
    far = near + 2 * columns
    latency_s = (1.0 - x) * ((1.0 - y) * model[near] + y * model[near + 2]) + x * (
        (1.0 - y) * model[far] + y * model[far + 2]
    )
    joules = (1.0 - x) * ((1.0 - y) * model[near + 1] + y * model[near + 3]) + x * (
        (1.0 - y) * model[far + 1] + y * model[far + 3]
    )
    return latency_s, joules


@inlined
def _sum_of_parts(
    model: Vector, clock: int, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> tuple[float, float]:
    """Latency [s] and power [W] where the form knows no mixed iterations: prefill part, then decode part."""
    row = (at.HEADER + clock * at.ROW) & INDEX
    latency_s, joules = 0.0, 0.0
    if prefill_tokens > 0.0 and model[at.KIND] == at.TABULATED:
        latency_s, joules = _prefill_from_grid(model, clock, prefill_tokens, sum_len_sq)
    elif prefill_tokens > 0.0:
        latency_s = (
            model[row + at.FIXED_S] + model[row + at.TOKEN_S] * prefill_tokens + model[row + at.SQUARE_S] * sum_len_sq
        )
        joules = latency_s * model[row + at.BUSY_W]
    if batch > 0.0:
        decode_s, work_j = _continued(model, clock, batch, kv_tokens)
        latency_s += decode_s
        joules += decode_s * model[row + at.BASE_W] + work_j
    return latency_s, joules / latency_s


@compiled
def _general(
    model: Vector, clock: int, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> tuple[float, float]:
    """Latency [s] and power [W] of any iteration, without the short cut."""
    if model[at.KIND] != at.PARAMETRIC:
        return _sum_of_parts(model, clock, batch, kv_tokens, prefill_tokens, sum_len_sq)
    log_tokens = np.log(batch + prefill_tokens)
    tokens_p = np.exp(model[at.NORM] * log_tokens)
    latency_s, base_w, work_j = at_clock(model, clock, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p)
    power_w = base_w + work_j / latency_s
    if power_w > model[at.LIMIT_W]:
        return limited(model, batch, kv_tokens, prefill_tokens, sum_len_sq, log_tokens, tokens_p)[1], model[at.LIMIT_W]
    return latency_s, power_w


@compiled
def prefill_terms(model: Vector, prefill_tokens: float) -> tuple[float, float]:
    """What the costs of a prefill batch have in common at all clocks, for ``prefill_cost_with``."""
    if model[at.KIND] != at.PARAMETRIC:
        return 0.0, 0.0
    log_tokens = np.log(prefill_tokens)
    return log_tokens, np.exp(model[at.NORM] * log_tokens)


@compiled
def prefill_cost_with(
    model: Vector,
    clock: int,
    prefill_tokens: float,
    sum_len_sq: float,
    log_tokens: float,
    tokens_p: float,
    limited_s: float,
) -> tuple[float, float, float]:
    """``iteration_cost`` of a prefill batch at one of several clocks, without what they have in common.

    Args:
        model: compiled profile.
        clock: index into its clocks.
        prefill_tokens: prompt tokens of the batch.
        sum_len_sq: sum of their squared lengths.
        log_tokens: of ``prefill_terms``.
        tokens_p: of ``prefill_terms``.
        limited_s: latency where the board limit binds, which is that of every clock where it does; 0: not yet known.

    Returns:
        Latency [s], power per GPU [W], and ``limited_s`` for the next clock.
    """
    if model[at.KIND] != at.PARAMETRIC:
        latency_s, power_w = _sum_of_parts(model, clock, 0.0, 0.0, prefill_tokens, sum_len_sq)
        return latency_s, power_w, limited_s
    latency_s, base_w, work_j = at_clock(model, clock, 0.0, 0.0, prefill_tokens, sum_len_sq, tokens_p)
    power_w = base_w + work_j / latency_s
    if power_w <= model[at.LIMIT_W]:
        return latency_s, power_w, limited_s
    if limited_s == 0.0:
        limited_s = limited(model, 0.0, 0.0, prefill_tokens, sum_len_sq, log_tokens, tokens_p)[1]
    return limited_s, model[at.LIMIT_W], limited_s


@compiled
def decode_cost(model: Vector, clock: int, batch: float, kv_tokens: float) -> tuple[float, float]:
    """Latency [s] and power per GPU [W] of a decode iteration of ``batch`` sequences holding ``kv_tokens`` in total."""
    if batch <= model[at.MAX_BATCH]:
        latency_s, work_j = _look_up(model, clock, batch, kv_tokens)
        row = (at.HEADER + clock * at.ROW) & INDEX
        if work_j <= model[row + at.HEADROOM_W] * latency_s:
            return latency_s, model[row + at.BASE_W] + work_j / latency_s
    return _general(model, clock, batch, kv_tokens, 0.0, 0.0)


@compiled
def decode_latency(model: Vector, clock: int, batch: float, kv_tokens: float) -> float:
    """Latency [s] of a decode iteration; as ``decode_cost`` without the power."""
    if batch <= model[at.MAX_BATCH]:
        latency_s, work_j = _look_up(model, clock, batch, kv_tokens)
        if work_j <= model[at.HEADER + clock * at.ROW + at.HEADROOM_W] * latency_s:
            return latency_s
    return _general(model, clock, batch, kv_tokens, 0.0, 0.0)[0]


@compiled
def iteration_cost(
    model: Vector, clock: int, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> tuple[float, float]:
    """Latency [s] and power per GPU [W] of any iteration.

    Args:
        model: compiled profile.
        clock: index into its clocks.
        batch: decode sequences in the iteration.
        kv_tokens: their KV tokens in total.
        prefill_tokens: prompt tokens in the iteration.
        sum_len_sq: sum of their squared lengths (end**2 - start**2 for chunks).
    """
    if prefill_tokens <= 0.0 and batch <= model[at.MAX_BATCH]:
        latency_s, work_j = _look_up(model, clock, batch, kv_tokens)
        row = (at.HEADER + clock * at.ROW) & INDEX
        if work_j <= model[row + at.HEADROOM_W] * latency_s:
            return latency_s, model[row + at.BASE_W] + work_j / latency_s
    return _general(model, clock, batch, kv_tokens, prefill_tokens, sum_len_sq)


@compiled
def iteration_latency(
    model: Vector, clock: int, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> float:
    """Latency [s] of any iteration."""
    if prefill_tokens <= 0.0 and batch <= model[at.MAX_BATCH]:
        latency_s, work_j = _look_up(model, clock, batch, kv_tokens)
        if work_j <= model[at.HEADER + clock * at.ROW + at.HEADROOM_W] * latency_s:
            return latency_s
    return _general(model, clock, batch, kv_tokens, prefill_tokens, sum_len_sq)[0]


@compiled
def effective_clock_mhz(
    model: Vector, clock: int, batch: float, kv_tokens: float, prefill_tokens: float, sum_len_sq: float
) -> float:
    """Clock the card really runs at [MHz]: the locked one, or less where the board limit binds."""
    ghz = model[at.HEADER + clock * at.ROW + at.GHZ]
    if model[at.KIND] == at.PARAMETRIC:
        log_tokens = np.log(batch + prefill_tokens)
        tokens_p = np.exp(model[at.NORM] * log_tokens)
        latency_s, base_w, work_j = at_clock(model, clock, batch, kv_tokens, prefill_tokens, sum_len_sq, tokens_p)
        if base_w + work_j / latency_s > model[at.LIMIT_W]:
            ghz = limited(model, batch, kv_tokens, prefill_tokens, sum_len_sq, log_tokens, tokens_p)[0]
    return float(1000.0 * ghz)


@inlined
def idle_power_w(model: Vector, clock: int) -> float:
    """Power per GPU [W] while nothing is computed."""
    return float(model[at.HEADER + clock * at.ROW + at.IDLE])


@compiled
def clock_count(model: Vector) -> int:
    """Number of clocks in the profile's list."""
    return int(model[at.CLOCKS])
