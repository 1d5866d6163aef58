"""From one trace to another: thinned, cut, joined, rescaled, truncated.

Rates are rescaled by choosing or adding requests, never by stretching time, so that the time structure of a trace
(bursts, slow swings) stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from biscale_gym.traces.trace import Trace, TraceError

SPLIT_FRACTIONS = (0.6, 0.2, 0.2)
"""Train, validation, test: the shares of time that a recorded trace is cut into."""

SHIFT_S = 60.0
"""Copies that raise a rate are shifted by less than this, so that demand slower than it is kept."""


def thin(trace: Trace, fraction: float, seed: int) -> Trace:
    """Keep request i iff u_i < ``fraction``, with u drawn from ``seed`` alone.

    With one seed the kept sets are nested: what survives 0.3 survives 0.5 (common random numbers).

    Raises:
        TraceError: ``fraction`` is not in (0, 1], or nothing is left.
    """
    if not 0.0 < fraction <= 1.0:
        raise TraceError(f"thin: fraction is {fraction}, expected a number in (0, 1]")
    kept = np.random.default_rng(seed).random(len(trace)) < fraction
    if not kept.any():
        raise TraceError(f"thin: a fraction of {fraction:g} leaves none of the {len(trace)} requests of {trace.name!r}")
    return trace.take(kept, f"{trace.name}*{fraction:g}")


def slice_time(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests that arrive in [start_s, end_s), their times counted from ``start_s``.

    Raises:
        TraceError: the bounds are not 0 <= start_s < end_s, or no request arrives between them.
    """
    if not 0.0 <= start_s < end_s:
        raise TraceError(f"slice_time: bounds are {start_s} s to {end_s} s, expected 0 <= start < end")
    first, last = np.searchsorted(trace.arrival_s, (start_s, end_s), side="left")
    if first == last:
        raise TraceError(
            f"trace {trace.name!r} has no request from {start_s:g} s to {end_s:g} s: it lasts {trace.duration_s:g} s"
        )
    return trace.take(slice(first, last), f"{trace.name}[{start_s:g}s:{end_s:g}s]", origin_s=start_s)


def split_by_time(trace: Trace, fractions: Sequence[float] = SPLIT_FRACTIONS) -> tuple[Trace, ...]:
    """Consecutive parts that each last their fraction of the trace; every request is in exactly one.

    Raises:
        TraceError: the fractions are not positive or do not sum to 1, or a part would be empty.
    """
    if not fractions or min(fractions) <= 0.0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise TraceError(f"split_by_time: fractions are {tuple(fractions)}, expected positive numbers that sum to 1")
    edges = np.concatenate(([0.0], np.cumsum(fractions))) * trace.duration_s
    # The last arrival lies on the last edge, and belongs to the last part.
    edges[-1] = np.nextafter(trace.duration_s, np.inf)
    parts = []
    for number, (start_s, end_s) in enumerate(pairwise(edges)):
        first, last = np.searchsorted(trace.arrival_s, (start_s, end_s), side="left")
        if first == last:
            raise TraceError(
                f"split_by_time: part {number} of {len(fractions)} of {trace.name!r} would be empty "
                f"({len(trace)} requests over {trace.duration_s:g} s)"
            )
        name = f"{trace.name}[{number + 1}/{len(fractions)}]"
        parts.append(trace.take(slice(first, last), name, origin_s=float(start_s)))
    return tuple(parts)


def superpose(traces: Sequence[Trace], name: str | None = None) -> Trace:
    """All requests of all traces on one time axis; ties keep the order in which the traces are given.

    Raises:
        TraceError: no trace is given.
    """
    if not traces:
        raise TraceError("superpose: no trace given")
    arrival_s = np.concatenate([trace.arrival_s for trace in traces])
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        arrival_s[order],
        np.concatenate([trace.prompt_tokens for trace in traces])[order],
        np.concatenate([trace.output_tokens for trace in traces])[order],
        name or "+".join(trace.name for trace in traces),
        sum(trace.skipped_rows for trace in traces),
    )


def scale_rate(trace: Trace, rate_rps: float, seed: int, shift_s: float = SHIFT_S) -> Trace:
    """The trace at another mean rate (in expectation): thinned, or joined with shifted copies of itself.

    A copy is moved by a time drawn from [0, shift_s) and wraps round at the end. Swings slower than
    ``shift_s`` therefore keep their relative size, as they would with more users of the same habits; what is faster is
    smoothed as in a sum of independent sources. The last copy is thinned to the fraction that is missing.

    Raises:
        TraceError: ``rate_rps`` is not positive and finite, or the trace has no rate (see ``Trace.rate_rps``).
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0.0):
        raise TraceError(f"scale_rate: rate_rps is {rate_rps}, expected a positive number")
    factor = rate_rps / trace.rate_rps
    name = f"{trace.name}@{rate_rps:g}rps"
    if factor <= 1.0:
        thinned = thin(trace, factor, seed)
        return Trace(thinned.arrival_s, thinned.prompt_tokens, thinned.output_tokens, name, trace.skipped_rows)
    rng = np.random.default_rng(seed)
    # One mean gap more than the last arrival: the seam of a wrapped copy is then an ordinary gap.
    period_s = trace.duration_s + 1.0 / trace.rate_rps
    parts = [trace]
    missing = factor - 1.0
    while missing > 0.0:
        moved_s = np.mod(trace.arrival_s + rng.uniform(0.0, shift_s), period_s)
        kept = rng.random(len(trace)) < missing
        if kept.any():
            order = np.argsort(moved_s[kept], kind="stable")
            indices = np.flatnonzero(kept)[order]
            parts.append(Trace(moved_s[indices], trace.prompt_tokens[indices], trace.output_tokens[indices]))
        missing -= 1.0
    return superpose(parts, name)


def truncate_to_context(trace: Trace, context_tokens: int) -> Trace:
    """Shorten what a model could not hold: first the prompt to ``context_tokens`` - 1, then the output to what is left.

    Raises:
        TraceError: ``context_tokens`` < 2: no room for a prompt and an output token.
    """
    if context_tokens < 2:
        raise TraceError(f"truncate_to_context: context_tokens is {context_tokens}, expected at least 2")
    prompt_tokens = np.minimum(trace.prompt_tokens, context_tokens - 1)
    output_tokens = np.minimum(trace.output_tokens, context_tokens - prompt_tokens)
    return Trace(trace.arrival_s, prompt_tokens, output_tokens, trace.name, trace.skipped_rows)


def require_duration(trace: Trace, minimum_s: float, purpose: str) -> None:
    """Refuse a trace that ends before ``minimum_s``.

    Raises:
        TraceError: the last arrival comes before ``minimum_s``; the message names ``purpose``.
    """
    if trace.duration_s < minimum_s:
        raise TraceError(
            f"trace {trace.name!r} lasts {trace.duration_s:g} s, which is shorter than {purpose} ({minimum_s:g} s)"
        )
