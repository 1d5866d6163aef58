"""Rows read from a trace file, checked as they come: a broken one is an error with its place, or is counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_gym.traces.trace import MOST_TOKENS, Floats, Ints, Trace, TraceError

Columns = tuple[str, str, str]
"""A format's own names of arrival, prompt length and output length."""


class RowCollector:
    """Takes blocks of parsed rows in file order and hands back a Trace.

    A row is broken if it could not be parsed, has no finite time, comes before an earlier row, or has a length that is
    not a whole number of at least 1.
    """

    def __init__(
        self, path: Path, columns: Columns, *, skip_bad: bool, rebase: bool = True, line_word: str = ""
    ) -> None:
        """Collect from ``path``.

        Args:
            path: named in errors.
            columns: named in errors.
            skip_bad: count broken rows instead of refusing them.
            rebase: count time from the first request; otherwise times are taken as they are and must not be negative.
            line_word: goes before the number of a row where a file has no lines.
        """
        self._path = path
        self._columns = columns
        self._skip_bad = skip_bad
        self._line_word = line_word
        self._blocks: list[tuple[Floats, Ints, Ints]] = []
        self._rebase = rebase
        self._latest_s = -np.inf if rebase else 0.0
        self.skipped_rows = 0

    def add(
        self,
        first_line: int,
        arrival_s: Floats,
        prompt_tokens: Floats,
        output_tokens: Floats,
        unparsed: Mapping[int, str] | None = None,
    ) -> None:
        """Check one block of rows, the first of which stands on ``first_line``.

        Args:
            first_line: number of the first row's line in the file, from 1.
            arrival_s: float64[n]; NaN where there is no time.
            prompt_tokens: float64[n].
            output_tokens: float64[n].
            unparsed: why a row could not be parsed, by its index in the block.

        Raises:
            TraceError: a row is broken and broken rows are not skipped.
        """
        good = np.isfinite(arrival_s) & _whole(prompt_tokens) & _whole(output_tokens)
        if unparsed:
            good[list(unparsed)] = False
        # The latest time over sound rows only: a broken row must not make its sound successors look unsorted.
        latest = np.maximum.accumulate(np.concatenate(([self._latest_s], np.where(good, arrival_s, -np.inf))))
        sound = good & (arrival_s >= latest[:-1])
        if not sound.all():
            if not self._skip_bad:
                first = int(np.argmin(sound))
                reason = (unparsed or {}).get(first) or self._reason(
                    (arrival_s[first], prompt_tokens[first], output_tokens[first]), latest[first]
                )
                raise TraceError(f"{self._path}:{self._line_word}{first_line + first}: {reason}")
            self.skipped_rows += int(sound.size - np.count_nonzero(sound))
        self._latest_s = float(latest[-1])
        if sound.any():
            self._blocks.append(
                (arrival_s[sound], prompt_tokens[sound].astype(np.int64), output_tokens[sound].astype(np.int64))
            )

    def _reason(self, row: tuple[float, float, float], latest_s: float) -> str:
        arrival_s, *lengths = row
        if not np.isfinite(arrival_s):
            return f"{self._columns[0]} is not a time ({arrival_s})"
        for column, tokens in zip(self._columns[1:], lengths, strict=True):
            if not _whole(np.array([tokens]))[0]:
                return f"{column} is {tokens:g}, expected a whole number of at least 1"
        if arrival_s < 0.0 and not self._rebase:
            return f"{self._columns[0]} is {arrival_s:g}, expected a time >= 0"
        return (
            f"{self._columns[0]} goes back by {latest_s - arrival_s:.9g} s: "
            "the rows are not sorted by time (sort the file first)"
        )

    def trace(self, name: str) -> Trace:
        """Everything collected.

        Raises:
            TraceError: no sound row.
        """
        if not self._blocks:
            broken = f"; all {self.skipped_rows} rows are broken" if self.skipped_rows else ""
            raise TraceError(f"{self._path}: no request in it{broken}")
        arrival_s, prompt_tokens, output_tokens = (np.concatenate(parts) for parts in zip(*self._blocks, strict=True))
        if self._rebase:
            arrival_s = arrival_s - arrival_s[0]
        return Trace(arrival_s, prompt_tokens, output_tokens, name, self.skipped_rows)


def _whole(values: Floats) -> NDArray[np.bool_]:
    # NaN compares false; infinity fails the upper bound.
    whole: NDArray[np.bool_] = (values >= 1.0) & (values <= MOST_TOKENS) & (values == np.floor(values))
    return whole
