"""Mooncake's JSON lines: one request a line, stamped at the start of a bin of about three seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from biscale_gym.traces.rows import Columns, RowCollector
from biscale_gym.traces.trace import Floats, Trace

MOONCAKE_COLUMNS: Columns = ("timestamp", "input_length", "output_length")

COARSEST_CLOCK_S = 0.5
"""Stamps that are typically further apart than this, and shared, are taken as bins rather than as times."""

_SPREAD_SEED = 20250221  # any constant: reading a file twice must give the same arrivals


def read_mooncake(path: Path, name: str, *, skip_bad: bool) -> Trace:
    """Read a Mooncake trace (``timestamp`` in ms, ``input_length``, ``output_length``; ``hash_ids`` are not kept).

    Raises:
        TraceError: a broken line (unless skipped), or no sound one.
    """
    rows = RowCollector(path, MOONCAKE_COLUMNS, skip_bad=skip_bad)
    with path.open(encoding="utf-8-sig") as handle:
        lines = handle.read().rstrip().split("\n")
    values = np.full((3, len(lines)), np.nan)
    unparsed: dict[int, str] = {}
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
            values[:, index] = [float(record[column]) for column in MOONCAKE_COLUMNS]
        except KeyError as error:
            unparsed[index] = f"key {error} is missing"
        except (ValueError, TypeError):
            unparsed[index] = f"not a JSON object with numbers {', '.join(MOONCAKE_COLUMNS)}: {line.strip()[:60]!r}"
    rows.add(1, values[0] / 1e3, values[1], values[2], unparsed)
    trace = rows.trace(name)
    spread_s = spread_bins(trace.arrival_s)
    return Trace(spread_s - spread_s[0], trace.prompt_tokens, trace.output_tokens, name, trace.skipped_rows)


def spread_bins(arrival_s: Floats) -> Floats:
    """Arrivals spread over the bins that their stamps stand for, or as they are if the stamps are not bins.

    Within a bin the times are those of a Poisson process given their number (sorted uniform draws from a constant
    seed), dealt out in file order; evenly spaced ones would make the arrivals more regular than any real stream.

    Args:
        arrival_s: float64[n], ascending.

    Returns:
        float64[n], ascending; a request stays within its bin, which ends at the next stamp in use but lasts no longer
        than the typical bin.
    """
    stamps_s, bin_of = np.unique(arrival_s, return_inverse=True)
    if stamps_s.size < 2:
        return arrival_s
    gaps_s = np.diff(stamps_s)
    typical_s = float(np.median(gaps_s))
    if typical_s < COARSEST_CLOCK_S or stamps_s.size == arrival_s.size:
        return arrival_s
    width_s = np.minimum(np.append(gaps_s, typical_s), typical_s)
    draws = np.random.default_rng(_SPREAD_SEED).random(arrival_s.size)
    in_bin_order = np.lexsort((draws, bin_of))
    spread: Floats = stamps_s[bin_of] + width_s[bin_of] * draws[in_bin_order]
    return spread
