"""What is measured on a trace: rates over windows, quantiles, and how bursty the arrivals are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.traces.trace import Floats, Ints, Trace, TraceError


@dataclass(frozen=True)
class WindowRates:
    """Mean rates over consecutive windows of equal length, each float64[windows].

    The windows are complete: what arrives after the last full one is left out.
    """

    window_s: float
    start_s: Floats
    requests_per_s: Floats
    prompt_tokens_per_s: Floats
    output_tokens_per_s: Floats


def window_rates(trace: Trace, window_s: float) -> WindowRates:
    """Request and token rates over windows of ``window_s`` from time 0 on.

    Raises:
        TraceError: the trace is shorter than one window, or ``window_s`` is not positive.
    """
    window, windows = _windows(trace, window_s)
    inside = window < windows
    window = window[inside]

    def rate(weights: Ints | None) -> Floats:
        chosen = None if weights is None else weights[inside].astype(np.float64)
        return np.bincount(window, weights=chosen, minlength=windows).astype(np.float64) / window_s

    return WindowRates(
        window_s,
        np.arange(windows, dtype=np.float64) * window_s,
        rate(None),
        rate(trace.prompt_tokens),
        rate(trace.output_tokens),
    )


def window_counts(trace: Trace, window_s: float) -> Ints:
    """int64[windows]: arrivals in each complete window of ``window_s`` from time 0 on.

    Raises:
        TraceError: the trace is shorter than one window, or ``window_s`` is not positive.
    """
    window, windows = _windows(trace, window_s)
    return np.bincount(window[window < windows], minlength=windows).astype(np.int64)


def _windows(trace: Trace, window_s: float) -> tuple[Ints, int]:
    """Number of each request's window, and how many windows are complete."""
    if not window_s > 0.0:
        raise TraceError(f"a window lasts {window_s} s, expected a positive number")
    windows = int(trace.duration_s / window_s)
    if windows == 0:
        raise TraceError(
            f"trace {trace.name!r} lasts {trace.duration_s:g} s, which is shorter than one window ({window_s:g} s)"
        )
    return np.floor(trace.arrival_s / window_s).astype(np.int64), windows


def interarrival_cv(trace: Trace) -> float:
    """Coefficient of variation of the gaps between arrivals: 1 for Poisson, more where they come in bursts.

    Raises:
        TraceError: fewer than three requests, or all at one instant.
    """
    gaps_s = np.diff(trace.arrival_s)
    if gaps_s.size < 2 or gaps_s.mean() <= 0.0:
        raise TraceError(f"trace {trace.name!r} has too few distinct arrivals for an inter-arrival CV (it needs 3)")
    return float(gaps_s.std() / gaps_s.mean())


def variance_time_curve(trace: Trace, windows_s: Sequence[float] | NDArray[np.float64]) -> Floats:
    """float64[len(windows_s)]: variance of the number of arrivals per window, over disjoint windows of each length.

    Poisson arrivals give rate x window; see Cox and Lewis, The Statistical Analysis of Series of Events (1966), 4.5.

    Raises:
        TraceError: a window fits into the trace fewer than twice.
    """
    variances = []
    for window_s in windows_s:
        counts = window_counts(trace, float(window_s))
        if counts.size < 2:
            raise TraceError(f"trace {trace.name!r} holds one window of {window_s:g} s: a variance needs two")
        variances.append(float(counts.var()))
    return np.array(variances)


def index_of_dispersion(trace: Trace, window_s: float) -> float:
    """Variance over mean of the number of arrivals per window: 1 for Poisson at every window length.

    Raises:
        TraceError: the window fits into the trace fewer than twice, or no request arrives in a complete window.
    """
    variance = variance_time_curve(trace, (window_s,))[0]
    mean = window_counts(trace, window_s).mean()
    if mean == 0.0:
        raise TraceError(f"trace {trace.name!r} has no arrival in its complete windows of {window_s:g} s")
    return float(variance / mean)


def quantiles(values: Ints | Floats, probabilities: Sequence[float]) -> Floats:
    """float64[len(probabilities)]: linearly interpolated sample quantiles."""
    return np.quantile(values, probabilities).astype(np.float64)
