"""The summary of a matrix as tables: in the terminal, in Markdown, and as CSV with every metric.

A saving stands beside the attainment it was bought with; a controller that breaks the SLO is marked and ranks last.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from biscale_gym.evaluation.summary import REFERENCE, Aggregate, Summary, aggregate, quantile

Cell = Callable[[Summary], str]

_USES = ("idle", "switching", "loading", "unallocated")
_SCALES = ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"), (1.0, "J"))


@dataclass(frozen=True)
class Grid:
    """A table before it is set: a title, a header, and rows of text; ``warned`` marks rows that break the SLO."""

    title: str
    header: list[str]
    rows: list[list[str]]
    warned: list[bool]


def grids(summaries: Sequence[Summary]) -> Iterator[Grid]:
    """Per scenario two energy tables and one of latency, then the aggregate where there are seeds enough."""
    for scenario in dict.fromkeys(s.scenario for s in summaries):
        own = [s for s in summaries if s.scenario == scenario]
        yield _energy(own)
        yield _latency(own)
        yield _use(own)
    total = aggregate(summaries)
    if total:
        yield _aggregate(total)


def print_tables(summaries: Sequence[Summary], console: Console) -> None:
    """The tables in the terminal."""
    print_grids(grids(summaries), console)


def print_grids(grids: Iterable[Grid], console: Console) -> None:
    """Any tables in the terminal."""
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(grid.header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row, warned in zip(grid.rows, grid.warned, strict=True):
            table.add_row(*row, style="red" if warned else None)
        console.print(table)


def markdown(summaries: Sequence[Summary]) -> str:
    """The tables in Markdown, each under its title."""
    return grids_markdown(grids(summaries))


def grids_markdown(grids: Iterable[Grid]) -> str:
    """Any tables in Markdown, each under its title."""
    parts = []
    for grid in grids:
        rule = [":--", *["--:"] * (len(grid.header) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (grid.header, rule, *grid.rows)]
        parts.append(f"**{grid.title}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def csv_text(summaries: Sequence[Summary]) -> str:
    """One line per scenario and controller: each metric's mean and 95 % interval, pooled tails, ratios to DistServe."""
    lines = [csv_row(summary) for summary in summaries]
    fields = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_row(summary: Summary) -> dict[str, str | float | int]:
    """A summary as one flat row: see ``csv_text``."""
    flat: dict[str, str | float | int] = {
        "scenario": summary.scenario,
        "controller": summary.controller,
        "trace": summary.trace,
        "split": summary.split,
        "seeds": len(summary.records),
        "breaks_slo": "+".join(summary.breaches),
        "pooled_ttft_p99_s": quantile(summary.ttft_s, 0.99),
        "pooled_tpot_p99_s": quantile(summary.tpot_s, 0.99),
    }
    ratios = {f"{name}_ratio_to_{REFERENCE}": ratio for name, ratio in summary.ratios.items()}
    for name, interval in (summary.metrics | ratios).items():
        flat[name] = interval.value
        if not math.isnan(interval.low):
            flat[f"{name}_low"], flat[f"{name}_high"] = interval.low, interval.high
    return flat


def _energy(own: list[Summary]) -> Grid:
    scale, unit = _unit(own)
    columns: dict[str, Cell] = {}
    for phase in ("prefill", "decode", "total"):
        columns[f"{phase} {unit}"] = _mean(f"{phase}_energy_j", scale, 3)
        if any(s.ratios for s in own):
            columns[f"{phase} Δ"] = _saving(f"{phase}_energy_j")
    columns["P99 within SLO"] = lambda s: f"no: {', '.join(s.breaches)}" if s.breaches else "yes"
    columns["requests within"] = lambda s: f"{100 * s.mean('joint_attainment'):.2f} %"
    against = f", and Δ against {REFERENCE}" if any(s.ratios for s in own) else ""
    return _grid(f"{_title(own)}: energy{against}", own, columns)


def _use(own: list[Summary]) -> Grid:
    scale, unit = _unit(own)
    columns = {f"{use} {unit}": _mean(f"{use}_energy_j", scale, 3) for use in _USES}
    columns |= {
        "J/prompt token": _mean("prefill_j_per_token", 1.0, 4),
        "J/output token": _mean("decode_j_per_token", 1.0, 4),
        "GPUs used": _mean("gpus_used", 1.0, 2),
    }
    title = f"{_title(own)}: where it goes (idle, switching and loading are part of prefill and decode)"
    return _grid(title, own, columns)


def _latency(own: list[Summary]) -> Grid:
    slo = own[0].slo
    columns: dict[str, Cell] = {
        "TTFT P50 / P90 / P99 ms": lambda s: _tails([quantile(s.ttft_s, q) for q in (0.5, 0.9, 0.99)]),
        "TPOT P50 / P90 / P99 ms": lambda s: _tails([quantile(s.tpot_s, q) for q in (0.5, 0.9, 0.99)]),
        "TTFT within": lambda s: f"{100 * s.mean('ttft_attainment'):.2f} %",
        "TPOT within": lambda s: f"{100 * s.mean('tpot_attainment'):.2f} %",
        "requests": lambda s: f"{s.mean('requests_arrived'):.0f}",
        "rejected": lambda s: f"{s.mean('requests_rejected'):.0f}",
    }
    title = f"{_title(own)}: latency (SLO: P99 TTFT {1e3 * slo.ttft_s:g} ms, P99 TPOT {1e3 * slo.tpot_s:g} ms)"
    return _grid(title, own, columns)


def _aggregate(total: Sequence[Aggregate]) -> Grid:
    columns: dict[str, Callable[[Aggregate], str]] = {
        "controller": lambda one: _marked(one.controller, one.breaks_slo),
        "interquartile mean": lambda one: _percent(one.ratio.value),
        "95 % interval": lambda one: f"{_percent(one.ratio.low)} … {_percent(one.ratio.high)}",
        f"P(less than {REFERENCE})": lambda one: f"{one.improvement:.2f}",
        "SLO": lambda one: "broken" if one.breaks_slo else "kept",
    }
    rows = [[cell(one) for cell in columns.values()] for one in total]
    title = f"All scenarios and seeds: total energy against {REFERENCE}"
    return Grid(title, list(columns), rows, [one.breaks_slo for one in total])


def _grid(title: str, own: list[Summary], columns: dict[str, Cell]) -> Grid:
    rows = [
        [_marked(summary.controller, bool(summary.breaches)), *(cell(summary) for cell in columns.values())]
        for summary in own
    ]
    return Grid(title, ["controller", *columns], rows, [bool(summary.breaches) for summary in own])


def _unit(own: list[Summary]) -> tuple[float, str]:
    most_j = max(summary.mean("total_energy_j") for summary in own)
    return next((scale, unit) for scale, unit in _SCALES if scale == 1.0 or most_j >= scale)


def _title(own: list[Summary]) -> str:
    first = own[0]
    seeds = max(len(s.records) for s in own)
    return f"{first.scenario}, trace {first.trace}, split {first.split}, {seeds} seed{'s' * (seeds > 1)}"


def _marked(controller: str, breaks_slo: bool) -> str:
    return f"{controller} ✗" if breaks_slo else controller


def _mean(metric: str, scale: float, decimals: int) -> Cell:
    def cell(summary: Summary) -> str:
        interval = summary.metrics[metric]
        half = "" if math.isnan(interval.low) else f" ± {(interval.high - interval.value) / scale:.{decimals}f}"
        return f"{interval.value / scale:.{decimals}f}{half}"

    return cell


def _saving(metric: str) -> Cell:
    def cell(summary: Summary) -> str:
        ratio = summary.ratios.get(metric)
        if ratio is None or summary.controller == REFERENCE:
            return "–"
        half = "" if math.isnan(ratio.low) else f" ± {100 * (ratio.high - ratio.value):.1f}"
        return _percent(ratio.value).replace(" %", f"{half} %")

    return cell


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def _tails(seconds: list[float]) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in seconds)
