"""What ``biscale-gym trace fetch|describe|generate|fit`` do, as plain functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from biscale_gym.traces.catalogue import catalogue, fetch
from biscale_gym.traces.generators import generate, load_workload
from biscale_gym.traces.readers import read_trace, write_trace
from biscale_gym.traces.statistics import index_of_dispersion, interarrival_cv, quantiles, window_rates
from biscale_gym.traces.trace import Trace, TraceError

Style = Literal["text", "markdown"]

DISPERSION_WINDOWS_S = (1.0, 10.0, 60.0, 300.0)

_RATE_WINDOW_S = 60.0
_SHARES = (0.5, 0.9, 0.99, 1.0)


def describe(trace: Trace, style: Style = "text") -> str:
    """A table of what the trace holds; what it is too short for is a dash or left out."""
    rows = [
        ("name", trace.name),
        ("requests", f"{len(trace):,}"),
        ("skipped rows", f"{trace.skipped_rows:,}"),
        ("duration", f"{trace.duration_s:,.1f} s"),
        ("mean rate", _or_dash(lambda: f"{trace.rate_rps:.4g} requests/s")),
        ("inter-arrival CV", _or_dash(lambda: f"{interarrival_cv(trace):.3f}")),
    ]
    try:
        per_s = window_rates(trace, _RATE_WINDOW_S).requests_per_s
        rows.append((f"rate over {_RATE_WINDOW_S:g} s, least to most", f"{per_s.min():.4g} to {per_s.max():.4g}"))
    except TraceError:
        pass
    for window_s in DISPERSION_WINDOWS_S:
        try:
            rows.append((f"index of dispersion, {window_s:g} s", f"{index_of_dispersion(trace, window_s):.2f}"))
        except TraceError:
            break
    for what, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        p50, p90, p99, most = quantiles(tokens, _SHARES)
        figures = f"mean {tokens.mean():,.1f}, P50 {p50:,.0f}, P90 {p90:,.0f}, P99 {p99:,.0f}, most {most:,.0f}"
        rows.append((f"{what} tokens", figures))
    rows.append(("hash", trace.hash))
    return _table(rows, style)


def describe_file(path: Path, format: str | None = None, *, skip_bad: bool = False, style: Style = "text") -> str:
    """``describe`` of a trace file."""
    return describe(read_trace(path, format, skip_bad=skip_bad), style)


def generate_file(workload: str, rate_rps: float | None, duration_s: float, seed: int, output: Path) -> Trace:
    """Generate a trace of a workload preset and write it; without a rate, at the workload's native one.

    Raises:
        TraceError: no rate given and none native, or see ``generate`` and ``write_trace``.
    """
    settings = load_workload(workload)
    rate = settings.native_rate_rps if rate_rps is None else rate_rps
    if rate is None:
        raise TraceError(f"workload {workload!r} has no native rate: state one in requests/s")
    trace = generate(settings, rate, duration_s, seed)
    write_trace(trace, output)
    return trace


def fetch_file(name: str, folder: Path, base_url: str | None = None) -> Path:
    """Download a published trace, with progress on the terminal (stderr)."""
    drawn = -1

    def draw(have: int, total: int | None) -> None:
        nonlocal drawn
        step = have // (1 << 20) if total is None else 100 * have // total
        if step == drawn or not sys.stderr.isatty():
            return
        drawn = step
        share = "" if total is None else f" of {total / 1e6:,.1f} MB ({step} %)"
        last = have == total
        print(f"\r{have / 1e6:,.1f} MB{share}", end="\n" if last else "", file=sys.stderr, flush=True)

    return fetch(name, folder, base_url, report=lambda line: print(line, file=sys.stderr), progress=draw)


def list_published(style: Style = "text") -> str:
    """A table of the catalogue: name, licence, description."""
    return _table([(name, f"{entry.licence}; {entry.description}") for name, entry in catalogue().items()], style)


def fit_file(path: Path, description: str, source: str, *, shortest_s: float = 1.0, skip_bad: bool = False) -> str:
    """YAML text of a look-alike of a trace file, for ``configs/workloads/`` or a file of your own."""
    # scipy's optimisers take longer to import than all else here.
    from biscale_gym.traces.fitting import as_yaml, fit_workload

    trace = read_trace(path, skip_bad=skip_bad)
    return as_yaml(fit_workload(trace, description, source, shortest_s=shortest_s))


def _or_dash(value: Callable[[], str]) -> str:
    try:
        return value()
    except TraceError:
        return "-"


def _table(rows: list[tuple[str, str]], style: Style) -> str:
    if style == "markdown":
        return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {value}" for what, value in rows)
