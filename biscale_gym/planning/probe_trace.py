"""The traces that measure a class: the training trace at another mean rate, long enough for a 99th percentile.

Rates are set by thinning, or by superposing shifted copies, never by stretching time: bursts survive. The same seed
everywhere makes the kept requests nested between rates and common to all classes, so that classes are compared on the
same demand.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from biscale_gym.traces.operations import scale_rate
from biscale_gym.traces.trace import Trace

WINDOWS = 4
"""Stretches of the training trace that a probe uses when the whole would be longer than it needs."""

SPARE = 3.0
"""A probe uses the whole training trace until it would hold this many times the requests that it must."""

SHORTEST_S = 120.0
"""But a probe never uses less of the training trace than this: bursts take time."""


def stretches(trace: Trace, seconds: float) -> Trace:
    """``WINDOWS`` evenly spaced stretches of the trace, ``seconds`` together, joined; all of it if it is no longer."""
    if seconds >= trace.duration_s:
        return trace
    length_s = seconds / WINDOWS
    starts = (np.arange(WINDOWS) + 0.5) * trace.duration_s / WINDOWS - 0.5 * length_s
    parts = []
    for number, start in enumerate(starts):
        first, last = np.searchsorted(trace.arrival_s, (start, start + length_s))
        if last > first:
            chosen = np.arange(first, last, dtype=np.int64)
            parts.append((number, trace.take(chosen, trace.name, origin_s=float(start))))
    if not parts:
        return trace
    return Trace(
        np.concatenate([part.arrival_s + number * length_s for number, part in parts]),
        np.concatenate([part.prompt_tokens for _, part in parts]),
        np.concatenate([part.output_tokens for _, part in parts]),
        trace.name,
    )


def probe_trace(training: Trace, rate_rps: float, requests: int, seed: int) -> Trace:
    """The training demand at a mean rate of ``rate_rps``, with about ``requests`` requests or more.

    Args:
        training: never the trace that is evaluated.
        rate_rps: mean rate of the result.
        requests: least number of requests, in expectation; a short trace is gone through several times, thinned
            differently.
        seed: of thinning and shifts.
    """
    native_rps = training.rate_rps
    source = stretches(training, max(SPARE * requests / rate_rps, SHORTEST_S))
    # The stretches keep their place in the trace's slow swings: what is scaled is the mean over the whole.
    factor = rate_rps / native_rps
    repeats = max(1, math.ceil(requests / (factor * len(source))))
    name = f"{training.name} at {rate_rps:.3g}/s"
    # Shifted copies wrap round after this time, too.
    period_s = source.duration_s + 1.0 / source.rate_rps
    if factor > 1.0:
        parts = [scale_rate(source, factor * source.rate_rps, seed + number) for number in range(repeats)]
        return _in_turn(parts, period_s, name)
    marks = (np.random.default_rng(seed + number).random(len(source)) for number in range(repeats))
    kept = [np.flatnonzero(mark < factor) for mark in marks]
    chosen = np.concatenate(kept)
    passes = np.repeat(np.arange(repeats), [len(indices) for indices in kept])
    return Trace(
        source.arrival_s[chosen] + period_s * passes, source.prompt_tokens[chosen], source.output_tokens[chosen], name
    )


def _in_turn(parts: list[Trace], period_s: float, name: str) -> Trace:
    """Traces one after another, each with its origin ``period_s`` after the last one's."""
    return Trace(
        np.concatenate([part.arrival_s + number * period_s for number, part in enumerate(parts)]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
        name,
    )


def delayed(trace: Trace, delay_s: NDArray[np.float64]) -> Trace:
    """Every request later by its own delay, in the new order of arrival."""
    arrival_s = trace.arrival_s + delay_s
    order = np.argsort(arrival_s, kind="stable")
    return Trace(arrival_s[order], trace.prompt_tokens[order], trace.output_tokens[order], trace.name)
