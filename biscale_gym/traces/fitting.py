"""A look-alike of a trace, in figures: quantile tables of its lengths, its rate's swings by time scale."""

from __future__ import annotations

import numpy as np
import yaml
from scipy.optimize import nnls
from scipy.stats import spearmanr

from biscale_gym.traces.settings import Band, Lengths, ModulatedArrivals, QuantileLengths, WorkloadSettings
from biscale_gym.traces.statistics import variance_time_curve
from biscale_gym.traces.trace import Floats, Ints, Trace, TraceError

QUANTILES = 201
SMOOTHING = 0.3

_FEWEST_WINDOWS = 5
_BANDS_PER_OCTAVE = 2


def fit_workload(trace: Trace, description: str, source: str, *, shortest_s: float = 1.0) -> WorkloadSettings:
    """Settings whose generated traces resemble ``trace``, with modulated arrivals.

    Args:
        trace: at least some hundreds of requests.
        description: what the workload is.
        source: where the trace is from, and its licence.
        shortest_s: time scale below which arrivals are taken as Poisson.

    Raises:
        TraceError: the trace is too short to fit (it must last ``_FEWEST_WINDOWS`` x 4 of the shortest windows).
    """
    correlation = float(spearmanr(trace.prompt_tokens, trace.output_tokens).statistic)
    return WorkloadSettings(
        name=trace.name,
        description=description,
        source=source,
        native_rate_rps=float(f"{trace.rate_rps:.4g}"),
        arrivals=ModulatedArrivals(kind="modulated", bands=fit_bands(trace, shortest_s)),
        lengths=Lengths(
            prompt_tokens=quantile_table(trace.prompt_tokens),
            output_tokens=quantile_table(trace.output_tokens),
            rank_correlation=0.0 if np.isnan(correlation) else round(correlation, 4),
        ),
    )


def quantile_table(tokens: Ints, points: int = QUANTILES) -> QuantileLengths:
    """Sample quantiles at equal steps of probability, from the least to the greatest length."""
    table = np.quantile(tokens, np.linspace(0.0, 1.0, points))
    return QuantileLengths(kind="quantiles", tokens=tuple(float(f"{value:.6g}") for value in table))


def fit_bands(trace: Trace, shortest_s: float = 1.0) -> tuple[Band, ...]:
    """Relative variance of the rate by period, half an octave apart, from the variance-time curve.

    A sinusoid of period P and variance v (relative to the mean rate) adds (rate w)^2 v sinc^2(w / P) to the variance of
    the counts over windows w, Poisson arrivals add rate w: linear in v. Non-negative least squares of the relative
    error, with a small penalty on curvature over neighbouring bands so that no single period stands out.

    Raises:
        TraceError: the trace is too short.
    """
    longest_s = trace.duration_s / _FEWEST_WINDOWS
    if longest_s < 4.0 * shortest_s:
        raise TraceError(f"trace {trace.name!r} lasts {trace.duration_s:g} s: too short to fit from {shortest_s:g} s")
    windows_s = np.geomspace(shortest_s, longest_s, 40)
    octaves = np.log2(trace.duration_s / (2.0 * shortest_s))
    periods_s = trace.duration_s / 2.0 ** np.arange(0.0, octaves, 1.0 / _BANDS_PER_OCTAVE)
    observed = variance_time_curve(trace, windows_s)
    mean = trace.rate_rps * windows_s
    per_band: Floats = mean[:, None] ** 2 * np.sinc(windows_s[:, None] / periods_s[None, :]) ** 2
    curvature = np.diff(np.eye(periods_s.size), n=2, axis=0) * SMOOTHING
    matrix = np.vstack([per_band / observed[:, None], curvature])
    target = np.concatenate([(observed - mean) / observed, np.zeros(curvature.shape[0])])
    variances, _ = nnls(matrix, target)
    return tuple(
        Band(period_s=float(f"{period:.4g}"), relative_variance=float(f"{variance:.3g}"))
        for period, variance in zip(periods_s, variances, strict=True)
        if variance > 1e-6
    )


def as_yaml(workload: WorkloadSettings) -> str:
    """The preset's YAML text, tables on wrapped lines."""
    values = workload.model_dump(mode="json", exclude_none=True, exclude={"name"})
    return yaml.safe_dump(values, sort_keys=False, width=120, default_flow_style=None)
