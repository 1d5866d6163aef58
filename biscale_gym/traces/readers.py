"""Reading and writing trace files: one call for every format, recognised by what the file holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from biscale_gym.config import nearest
from biscale_gym.traces.mooncake import read_mooncake
from biscale_gym.traces.rows import RowCollector
from biscale_gym.traces.tabular import LAYOUTS, OWN_COLUMNS, read_table
from biscale_gym.traces.trace import Trace, TraceError

FORMATS = (*(layout.name for layout in LAYOUTS), "mooncake", "parquet")

_WRITE_ROWS = 200_000


def read_trace(path: str | Path, format: str | None = None, *, skip_bad: bool = False) -> Trace:
    """Read a trace; the format is recognised from the file's beginning unless ``format`` names one of ``FORMATS``.

    Args:
        path: the file; its stem becomes the trace's name.
        format: read the file as this format.
        skip_bad: leave broken rows out and count them in ``Trace.skipped_rows``.

    Raises:
        TraceError: no such file, an unknown format or column, a broken row (named by file and line), or no request.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise TraceError(f"no trace format {format!r}; {nearest(format, list(FORMATS))}")
    try:
        with path.open("rb") as handle:
            beginning = handle.read(4096)
        if not beginning.strip():
            raise TraceError(f"{path}: the file is empty")
        if format == "parquet" or (format is None and beginning[:4] == b"PAR1"):
            return _read_parquet(path, path.stem, skip_bad=skip_bad)
        if format == "mooncake" or (format is None and beginning.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{"):
            return read_mooncake(path, path.stem, skip_bad=skip_bad)
        return read_table(path, path.stem, format, skip_bad=skip_bad)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write ``arrival_s,prompt_tokens,output_tokens`` as Parquet (suffix ``.parquet``) or CSV (``.csv``).

    Reading it back gives the same hash. The file appears under its name when it is complete.

    Raises:
        TraceError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    writers: dict[str, Callable[[Trace, Path], None]] = {".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise TraceError(f"{path}: no format to write with suffix {path.suffix!r}; {nearest(path.suffix, [*writers])}")
    unfinished = path.with_name(path.name + ".tmp")
    try:
        writers[path.suffix](trace, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise TraceError(f"{path}: cannot be written ({error.strerror or error})") from error


def _write_csv(trace: Trace, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        handle.write(",".join(OWN_COLUMNS) + "\n")
        for start in range(0, len(trace), _WRITE_ROWS):
            part = slice(start, start + _WRITE_ROWS)
            # repr of a float is the shortest text that reads back as the same float
            rows = zip(
                trace.arrival_s[part].tolist(),
                trace.prompt_tokens[part].tolist(),
                trace.output_tokens[part].tolist(),
                strict=True,
            )
            handle.writelines(f"{arrival!r},{prompt},{output}\n" for arrival, prompt, output in rows)


def _write_parquet(trace: Trace, path: Path) -> None:
    pyarrow, parquet = _pyarrow(path)
    columns = dict(zip(OWN_COLUMNS, (trace.arrival_s, trace.prompt_tokens, trace.output_tokens), strict=True))
    parquet.write_table(pyarrow.table(columns), path)


def _read_parquet(path: Path, name: str, *, skip_bad: bool) -> Trace:
    pyarrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise TraceError(f"{path}: not a readable Parquet file ({error})") from error
    for column in OWN_COLUMNS:
        if column not in table.column_names:
            raise TraceError(f"{path}: no column {column!r}; {nearest(column, table.column_names)}")
    try:
        arrival_s, prompt_tokens, output_tokens = (
            table.column(column).cast("float64").to_numpy(zero_copy_only=False) for column in OWN_COLUMNS
        )
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise TraceError(f"{path}: columns {', '.join(OWN_COLUMNS)} must be numbers ({error})") from error
    rows = RowCollector(path, OWN_COLUMNS, skip_bad=skip_bad, rebase=False, line_word="row ")
    rows.add(1, np.asarray(arrival_s), np.asarray(prompt_tokens), np.asarray(output_tokens))
    return rows.trace(name)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TraceError(
            f"{path}: Parquet needs pyarrow: pip install 'biscale-gym[parquet]' (CSV needs nothing)"
        ) from error
    return pyarrow, pyarrow.parquet
