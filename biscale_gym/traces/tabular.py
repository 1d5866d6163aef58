"""Comma-separated trace files, parsed in blocks of lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_gym.config import nearest
from biscale_gym.traces.rows import Columns, RowCollector
from biscale_gym.traces.timestamps import WIDTH, parse_stamps
from biscale_gym.traces.trace import Floats, Trace, TraceError

BLOCK_LINES = 250_000

OWN_COLUMNS: Columns = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Layout:
    """One comma-separated format, recognised by its columns; other columns are ignored.

    Attributes:
        name: of the format.
        columns: arrival, prompt length, output length.
        wall_clock: the arrival is a date and time, not seconds.
        rebase: time is counted from the first request.
    """

    name: str
    columns: Columns
    wall_clock: bool = False
    rebase: bool = True


LAYOUTS = (
    Layout("csv", OWN_COLUMNS, rebase=False),
    Layout("azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), wall_clock=True),
    Layout("burstgpt", ("Timestamp", "Request tokens", "Response tokens")),
)


def detect_layout(path: Path, header: str, wanted: str | None = None) -> Layout:
    """The layout whose columns the header line holds, or the one asked for.

    Raises:
        TraceError: a column is missing; the nearest one present is named.
    """
    present = split_fields(header)
    choices = [layout for layout in LAYOUTS if wanted in (None, layout.name)]
    for layout in choices:
        if set(layout.columns) <= set(present):
            return layout
    closest = max(choices, key=lambda layout: len(set(layout.columns) & set(present)))
    missing = next(column for column in closest.columns if column not in present)
    known = "; ".join(f"{layout.name}: {', '.join(layout.columns)}" for layout in choices)
    raise TraceError(f"{path}:1: no column {missing!r}; {nearest(missing, present)} (expected {known})")


def split_fields(line: str) -> list[str]:
    """The fields of a line; none of the formats quotes."""
    return [field.strip() for field in line.rstrip("\r\n").split(",")]


def read_table(path: Path, name: str, wanted: str | None, *, skip_bad: bool) -> Trace:
    """Read a comma-separated trace.

    Raises:
        TraceError: unknown columns, a broken row (unless skipped), or no sound row.
    """
    with path.open(encoding="utf-8-sig", newline=None) as handle:
        header = handle.readline()
        layout = detect_layout(path, header, wanted)
        fields = split_fields(header)
        places = tuple(fields.index(column) for column in layout.columns)
        rows = RowCollector(path, layout.columns, skip_bad=skip_bad, rebase=layout.rebase)
        seconds = _WallClock() if layout.wall_clock else _plain_seconds
        first_line = 2
        pending_blanks = 0
        while lines := list(islice(handle, BLOCK_LINES)):
            # Blank lines are forgiven at the end of the file and nowhere else.
            block = [*["\n"] * pending_blanks, *lines]
            pending_blanks = 0
            while block and not block[-1].strip():
                block.pop()
                pending_blanks += 1
            if block:
                _add_block(rows, first_line, block, places, len(fields), seconds)
            first_line += len(block)
    return rows.trace(name)


def _add_block(
    rows: RowCollector,
    first_line: int,
    lines: list[str],
    places: tuple[int, ...],
    width: int,
    seconds: Callable[[NDArray[np.bytes_]], Floats],
) -> None:
    unparsed: dict[int, str] = {}
    try:
        if any(line.count(",") != width - 1 for line in lines):
            raise ValueError("a line with too few or too many fields")
        table = np.loadtxt(
            lines,
            delimiter=",",
            usecols=places,
            dtype=[("arrival", f"S{WIDTH}"), ("prompt", "f8"), ("output", "f8")],
            comments=None,
            ndmin=1,
        )
        stamps, prompt_tokens, output_tokens = table["arrival"], table["prompt"], table["output"]
    except ValueError:
        stamps, prompt_tokens, output_tokens, unparsed = _parse_line_by_line(lines, places, width)
    rows.add(first_line, seconds(np.char.strip(stamps)), prompt_tokens, output_tokens, unparsed)


def _parse_line_by_line(
    lines: list[str], places: tuple[int, ...], width: int
) -> tuple[NDArray[np.bytes_], Floats, Floats, dict[int, str]]:
    """The slow way, taken for a block with a broken line, which it finds."""
    stamps = np.zeros(len(lines), dtype=f"S{WIDTH}")
    lengths = np.full((2, len(lines)), np.nan)
    unparsed: dict[int, str] = {}
    for index, line in enumerate(lines):
        fields = split_fields(line)
        if len(fields) != width:
            unparsed[index] = f"{len(fields)} columns, expected {width}"
            continue
        arrival, *tokens = (fields[place] for place in places)
        try:
            lengths[:, index] = [float(token) for token in tokens]
            stamps[index] = arrival.encode("ascii")
        except ValueError:
            unparsed[index] = f"not numbers: {line.strip()[:80]!r}"
    return stamps, lengths[0], lengths[1], unparsed


def _plain_seconds(stamps: NDArray[np.bytes_]) -> Floats:
    try:
        return stamps.astype(np.float64)
    except ValueError:
        return np.array([_number(stamp) for stamp in stamps], dtype=np.float64)


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


class _WallClock:
    """Seconds since the first stamp seen: float64 since 1970 would round away the last decimals."""

    def __init__(self) -> None:
        self._origin_ns: int | None = None

    def __call__(self, stamps: NDArray[np.bytes_]) -> Floats:
        nanoseconds = parse_stamps(stamps)
        missing = nanoseconds == np.iinfo(np.int64).min
        if self._origin_ns is None and not missing.all():
            self._origin_ns = int(nanoseconds[~missing][0])
        elapsed_s: Floats = (nanoseconds - (self._origin_ns or 0)) / 1e9
        elapsed_s[missing] = np.nan
        return elapsed_s
