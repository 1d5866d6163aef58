"""Statistics against hand counts and against processes whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from biscale_gym.traces import Trace, TraceError
from biscale_gym.traces.statistics import (
    index_of_dispersion,
    interarrival_cv,
    quantiles,
    variance_time_curve,
    window_counts,
    window_rates,
)


def test_windows_by_hand() -> None:
    trace = Trace(np.array([0.0, 1.0, 9.0, 10.0, 25.0]), np.array([1, 2, 3, 4, 5]), np.array([10, 20, 30, 40, 50]))
    np.testing.assert_array_equal(window_counts(trace, 10.0), [3, 1])
    rates = window_rates(trace, 10.0)
    np.testing.assert_array_equal(rates.start_s, [0.0, 10.0])
    np.testing.assert_allclose(rates.requests_per_s, [0.3, 0.1])
    np.testing.assert_allclose(rates.prompt_tokens_per_s, [0.6, 0.4])
    np.testing.assert_allclose(rates.output_tokens_per_s, [6.0, 4.0])
    np.testing.assert_allclose(quantiles(trace.prompt_tokens, (0.0, 0.5, 1.0)), [1.0, 3.0, 5.0])


def test_poisson_has_no_dispersion() -> None:
    arrival_s = np.cumsum(np.random.default_rng(0).exponential(0.1, 200_000))
    trace = Trace(arrival_s, np.ones(200_000, dtype=int), np.ones(200_000, dtype=int))
    assert interarrival_cv(trace) == pytest.approx(1.0, abs=0.02)
    assert index_of_dispersion(trace, 5.0) == pytest.approx(1.0, abs=0.06)
    np.testing.assert_allclose(variance_time_curve(trace, (1.0, 4.0)), (10.0, 40.0), rtol=0.06)


def test_regular_arrivals_have_neither() -> None:
    trace = Trace(np.arange(100.0), np.ones(100, dtype=int), np.ones(100, dtype=int))
    assert interarrival_cv(trace) == 0.0
    assert index_of_dispersion(trace, 10.0) == 0.0


def test_too_short_is_named() -> None:
    trace = Trace(np.array([0.0, 5.0]), np.array([1, 1]), np.array([1, 1]), "brief")
    with pytest.raises(TraceError, match=r"'brief' lasts 5 s, which is shorter than one window \(60 s\)"):
        window_rates(trace, 60.0)
    with pytest.raises(TraceError, match="a variance needs two"):
        variance_time_curve(trace, (3.0,))
    with pytest.raises(TraceError, match="too few distinct arrivals"):
        interarrival_cv(trace)
    with pytest.raises(TraceError, match="expected a positive number"):
        window_counts(trace, 0.0)
    late = Trace(np.array([9.0, 9.5]), np.array([1, 1]), np.array([1, 1]))
    with pytest.raises(TraceError, match="has no arrival in its complete windows of 3 s"):
        index_of_dispersion(late, 3.0)
