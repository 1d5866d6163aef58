"""Properties of thinning, cutting, joining, rescaling and truncating."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from biscale_gym.traces import (
    Trace,
    TraceError,
    require_duration,
    scale_rate,
    slice_time,
    split_by_time,
    superpose,
    thin,
    truncate_to_context,
)
from biscale_gym.traces.statistics import index_of_dispersion


def poisson(requests: int, rate_rps: float = 2.0, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1.0 / rate_rps, requests))
    # Distinct prompt lengths identify the requests.
    return Trace(arrival_s, np.arange(1, requests + 1), rng.integers(1, 500, requests), "p")


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    arrival_s = np.sort(draw(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=40)))
    n = arrival_s.size
    prompt_tokens = draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n))
    output_tokens = draw(st.lists(st.integers(1, 1_000), min_size=n, max_size=n))
    return Trace(arrival_s, np.array(prompt_tokens), np.array(output_tokens))


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_thinned_sets_are_nested(a: float, b: float, seed: int) -> None:
    trace = poisson(300)
    few, many = (set(thin(trace, fraction, seed).prompt_tokens.tolist()) for fraction in sorted((a, b)))
    assert few <= many


def test_thinning_keeps_all_at_one_and_about_its_share() -> None:
    trace = poisson(20_000)
    assert thin(trace, 1.0, 3).hash == trace.hash
    assert len(thin(trace, 0.3, 3)) == pytest.approx(6_000, rel=0.05)


@given(st.lists(any_trace(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_superposition_conserves(traces: list[Trace]) -> None:
    joined = superpose(traces)
    assert len(joined) == sum(map(len, traces))
    for field in ("arrival_s", "prompt_tokens", "output_tokens"):
        parts = np.concatenate([getattr(trace, field) for trace in traces])
        np.testing.assert_array_equal(np.sort(getattr(joined, field)), np.sort(parts))


@given(any_trace(), st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_split_partitions(trace: Trace, first: float) -> None:
    try:
        parts = split_by_time(trace, (first, 1.0 - first))
    except TraceError:
        reject()  # a part without a request
    assert sum(map(len, parts)) == len(trace)
    np.testing.assert_array_equal(np.concatenate([part.prompt_tokens for part in parts]), trace.prompt_tokens)
    np.testing.assert_allclose(parts[0].arrival_s, trace.arrival_s[: len(parts[0])])
    np.testing.assert_allclose(
        parts[1].arrival_s + first * trace.duration_s, trace.arrival_s[len(parts[0]) :], atol=1e-9
    )


def test_slice_counts_from_its_start() -> None:
    trace = poisson(1_000)
    middle = slice_time(trace, 100.0, 200.0)
    inside = (trace.arrival_s >= 100.0) & (trace.arrival_s < 200.0)
    np.testing.assert_array_equal(middle.prompt_tokens, trace.prompt_tokens[inside])
    np.testing.assert_allclose(middle.arrival_s, trace.arrival_s[inside] - 100.0)


@pytest.mark.parametrize("rate_rps", [0.5, 2.0, 3.0, 7.3])
def test_scaled_rate(rate_rps: float) -> None:
    trace = poisson(20_000)
    scaled = scale_rate(trace, rate_rps, seed=1)
    assert scaled.rate_rps == pytest.approx(rate_rps, rel=0.03)
    assert scaled.duration_s == pytest.approx(trace.duration_s, rel=0.01)
    assert scale_rate(trace, rate_rps, seed=1).hash == scaled.hash
    assert index_of_dispersion(scaled, 1.0) == pytest.approx(1.0, abs=0.1)


def test_scaling_up_keeps_slow_swings() -> None:
    rng = np.random.default_rng(0)
    busy = np.repeat([0.0, 6_000.0, 12_000.0], 4_000) + rng.uniform(0.0, 3_000.0, 12_000)
    trace = Trace(np.sort(busy), np.ones(12_000, dtype=int), np.ones(12_000, dtype=int))
    scaled = scale_rate(trace, 3.0 * trace.rate_rps, seed=0)
    assert index_of_dispersion(scaled, 300.0) == pytest.approx(3.0 * index_of_dispersion(trace, 300.0), rel=0.2)


@given(any_trace(), st.integers(2, 12_000))
@settings(max_examples=60, deadline=None)
def test_truncated_requests_fit(trace: Trace, context_tokens: int) -> None:
    cut = truncate_to_context(trace, context_tokens)
    assert np.all(cut.prompt_tokens + cut.output_tokens <= context_tokens)
    fits = trace.prompt_tokens + trace.output_tokens <= context_tokens
    np.testing.assert_array_equal(cut.prompt_tokens[fits], trace.prompt_tokens[fits])
    np.testing.assert_array_equal(cut.output_tokens[fits], trace.output_tokens[fits])


def test_misuse_is_named() -> None:
    trace = poisson(10)
    single = Trace(np.array([0.0]), np.array([1]), np.array([1]), "single")
    with pytest.raises(TraceError, match=r"fraction is 0.0, expected a number in \(0, 1\]"):
        thin(trace, 0.0, 0)
    with pytest.raises(TraceError, match="leaves none of the 1 requests"):
        thin(single, 1e-9, 0)
    with pytest.raises(TraceError, match="expected 0 <= start < end"):
        slice_time(trace, 3.0, 3.0)
    with pytest.raises(TraceError, match="has no request from 1000 s to 2000 s"):
        slice_time(trace, 1_000.0, 2_000.0)
    with pytest.raises(TraceError, match="sum to 1"):
        split_by_time(trace, (0.5, 0.4))
    with pytest.raises(TraceError, match="part 0 of 3 of 'single' would be empty"):
        split_by_time(single)
    with pytest.raises(TraceError, match="no trace given"):
        superpose([])
    with pytest.raises(TraceError, match="rate_rps is nan"):
        scale_rate(trace, float("nan"), 0)
    with pytest.raises(TraceError, match="'single' has no arrival rate"):
        scale_rate(single, 2.0, 0)
    with pytest.raises(TraceError, match="expected at least 2"):
        truncate_to_context(trace, 1)
    with pytest.raises(TraceError, match=r"'single' lasts 0 s, which is shorter than the warm-up \(30 s\)"):
        require_duration(single, 30.0, "the warm-up")
