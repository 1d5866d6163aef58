"""The trace: when requests arrive and how long their prompts and outputs are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

MOST_TOKENS = 2**53
"""Largest length taken: beyond it a float64 read from a file is no longer a whole number for sure."""


class TraceError(ValueError):
    """A trace, trace file, workload or download that cannot be used; the message names the place."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival; the arrays are read-only.

    Attributes:
        arrival_s: float64[n], seconds from the start of the trace, >= 0, ascending (ties allowed).
        prompt_tokens: int64[n], >= 1.
        output_tokens: int64[n], >= 1; the first output token comes from prefill.
        name: where the trace is from, for people; not part of ``hash``.
        skipped_rows: broken rows that the reader left out on request.

    Raises:
        TraceError: no request, arrays of different lengths, NaN or negative times, unsorted times, or a length that is
            not a whole number of at least 1. The first offending request is named by its index from 0.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    name: str = "trace"
    skipped_rows: int = 0

    def __post_init__(self) -> None:
        """Check every request and freeze the arrays."""
        arrival = np.array(self.arrival_s, dtype=np.float64)
        if arrival.ndim != 1:
            raise TraceError(f"trace {self.name!r}: arrival_s has {arrival.ndim} dimensions, expected 1")
        if arrival.size == 0:
            raise TraceError(f"trace {self.name!r} is empty: it needs at least one request")
        _refuse(~(np.isfinite(arrival) & (arrival >= 0.0)), arrival, self.name, "arrival_s", "a finite time >= 0")
        descending = np.zeros(arrival.size, dtype=np.bool_)
        descending[1:] = np.diff(arrival) < 0.0
        _refuse(descending, arrival, self.name, "arrival_s", "not before the request ahead of it (sort the trace)")
        object.__setattr__(self, "arrival_s", _frozen(arrival))
        for field in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, field, _frozen(_lengths(getattr(self, field), arrival.size, self.name, field)))

    def __len__(self) -> int:
        """Number of requests."""
        return int(self.arrival_s.size)

    @property
    def duration_s(self) -> float:
        """Time of the last arrival."""
        return float(self.arrival_s[-1])

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate: (n - 1) gaps over the time from the first to the last arrival.

        Raises:
            TraceError: one request, or all at one instant: there is no gap to measure a rate by.
        """
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        if span_s <= 0.0:
            what = "it has one request" if len(self) == 1 else f"all {len(self)} requests arrive at the same instant"
            raise TraceError(f"trace {self.name!r} has no arrival rate: {what}")
        return (len(self) - 1) / span_s

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of the number of requests and the three arrays (little-endian); the name is not in it."""
        digest = hashlib.sha256(len(self).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.arrival_s, dtype="<f8").tobytes())
        digest.update(np.ascontiguousarray(self.prompt_tokens, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.output_tokens, dtype="<i8").tobytes())
        return digest.hexdigest()

    def take(self, chosen: NDArray[np.bool_] | Ints | slice, name: str, *, origin_s: float = 0.0) -> Trace:
        """The chosen requests (a mask, ascending indices or a slice), their times counted from ``origin_s``.

        Raises:
            TraceError: nothing is chosen.
        """
        arrival_s = self.arrival_s[chosen] - origin_s
        prompt_tokens, output_tokens = self.prompt_tokens[chosen], self.output_tokens[chosen]
        if not isinstance(chosen, slice) or arrival_s.size == 0 or arrival_s[0] < 0.0 or (chosen.step or 1) < 0:
            return Trace(arrival_s, prompt_tokens, output_tokens, name, self.skipped_rows)
        # What follows each other here has been checked and is frozen.
        taken = object.__new__(Trace)
        taken.__dict__.update(
            arrival_s=_frozen(arrival_s),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            name=name,
            skipped_rows=self.skipped_rows,
        )
        return taken


def _frozen(values: NDArray[np.generic]) -> NDArray[np.generic]:
    values.flags.writeable = False
    return values


def _lengths(values: ArrayLike, count: int, name: str, field: str) -> Ints:
    given = np.asarray(values)
    if given.shape != (count,):
        raise TraceError(f"trace {name!r}: {field} has shape {given.shape}, expected ({count},) as arrival_s has")
    number = given if np.issubdtype(given.dtype, np.integer) else given.astype(np.float64)
    good = (number >= 1) & (number <= MOST_TOKENS)
    if number is not given:
        good &= np.isfinite(number) & (number == np.floor(number))
    _refuse(~good, given, name, field, "a whole number of at least 1")
    return given.astype(np.int64)


def _refuse(bad: NDArray[np.bool_], values: NDArray[np.generic], name: str, field: str, expected: str) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise TraceError(f"trace {name!r}, request {first}: {field} is {values[first]}, expected {expected}")
