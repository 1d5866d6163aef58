"""The Trace itself: what it accepts, what it refuses, its rate and its hash."""

from __future__ import annotations

import numpy as np
import pytest

from biscale_gym.traces import Trace, TraceError


def test_rate_is_gaps_over_span() -> None:
    trace = Trace(np.array([1.0, 2.0, 5.0]), np.array([1, 2, 3]), np.array([4, 5, 6]))
    assert len(trace) == 3
    assert trace.duration_s == 5.0
    assert trace.rate_rps == pytest.approx(2.0 / 4.0)


def test_one_request_is_a_trace_without_a_rate() -> None:
    trace = Trace(np.array([0.0]), np.array([10]), np.array([2]), "single")
    assert trace.duration_s == 0.0
    with pytest.raises(TraceError, match="'single' has no arrival rate: it has one request"):
        _ = trace.rate_rps


def test_simultaneous_requests_have_no_rate() -> None:
    trace = Trace(np.zeros(3), np.ones(3, dtype=int), np.ones(3, dtype=int))
    with pytest.raises(TraceError, match="all 3 requests arrive at the same instant"):
        _ = trace.rate_rps


@pytest.mark.parametrize(
    ("arrival_s", "prompt_tokens", "output_tokens", "message"),
    [
        ([], [], [], "is empty"),
        ([0.0, np.nan], [1, 1], [1, 1], "request 1: arrival_s is nan"),
        ([0.0, np.inf], [1, 1], [1, 1], "request 1: arrival_s is inf"),
        ([-1.0, 0.0], [1, 1], [1, 1], "request 0: arrival_s is -1.0"),
        ([0.0, 2.0, 1.0], [1, 1, 1], [1, 1, 1], "request 2: arrival_s is 1.0, expected not before"),
        ([0.0, 1.0], [1, 0], [1, 1], "request 1: prompt_tokens is 0, expected a whole number of at least 1"),
        ([0.0, 1.0], [1, 1], [-3, 1], "request 0: output_tokens is -3"),
        ([0.0, 1.0], [1.5, 1.0], [1, 1], "request 0: prompt_tokens is 1.5"),
        ([0.0, 1.0], [np.nan, 1.0], [1, 1], "request 0: prompt_tokens is nan"),
        ([0.0, 1.0], [1], [1, 1], r"prompt_tokens has shape \(1,\)"),
    ],
)
def test_bad_requests_are_named(
    arrival_s: list[float], prompt_tokens: list[float], output_tokens: list[float], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        Trace(np.array(arrival_s), np.array(prompt_tokens), np.array(output_tokens))


def test_hash_is_of_content() -> None:
    def make(prompt: int, name: str) -> Trace:
        return Trace(np.array([0.0, 1.0]), np.array([prompt, 2]), np.array([1, 1]), name)

    assert make(5, "a").hash == make(5, "b").hash
    assert make(5, "a").hash != make(6, "a").hash
    assert len(make(5, "a").hash) == 64


def test_arrays_are_its_own_and_read_only() -> None:
    given = np.array([0.0, 1.0])
    trace = Trace(given, np.array([1, 2]), np.array([1, 1]))
    given[0] = 0.5
    assert trace.arrival_s[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_s[0] = 0.5


@pytest.mark.parametrize(("first", "last", "origin_s"), [(0, 4, 0.0), (1, 3, 0.5), (2, 3, 0.0)])
def test_a_slice_is_the_trace_of_its_requests(first: int, last: int, origin_s: float) -> None:
    trace = Trace(np.array([0.0, 0.5, 2.0, 2.0]), np.array([5, 6, 7, 8]), np.array([1, 2, 3, 4]), skipped_rows=3)
    assert trace.hash  # kept, and not to be taken along
    part = trace.take(slice(first, last), "part", origin_s=origin_s)
    checked = Trace(
        trace.arrival_s[first:last] - origin_s, trace.prompt_tokens[first:last], trace.output_tokens[first:last]
    )
    assert part.hash == checked.hash
    assert (part.name, part.skipped_rows, len(part)) == ("part", 3, last - first)
    with pytest.raises(ValueError, match="read-only"):
        part.arrival_s[0] = 1.0


def test_a_slice_is_refused_what_a_trace_is() -> None:
    trace = Trace(np.array([0.0, 0.5]), np.array([5, 6]), np.array([1, 2]))
    with pytest.raises(TraceError, match="empty"):
        trace.take(slice(2, 2), "none")
    with pytest.raises(TraceError, match="a finite time >= 0"):
        trace.take(slice(0, 2), "before", origin_s=0.25)
    with pytest.raises(TraceError, match="sort the trace"):
        trace.take(slice(None, None, -1), "backwards")
