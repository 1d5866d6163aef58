"""The pictures of a matrix, as PNG and SVG: where the joules go, how latencies are spread, what every instance did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.drawing import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Latencies,
    drawing,
    latency_figure,
    save,
    timeline_figure,
)
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.summary import REFERENCE, Summary
from biscale_gym.evaluation.windows import IDLE, clock_shares, mean_clock_shares, over_seeds, window_arrays

Floats = npt.NDArray[np.float64]

KINDS = ("energy", "latency", "windows", "clocks", "timeline")


def write_plots(
    summaries: Sequence[Summary], store: RecordStore, folder: Path, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Writes the plots of these kinds (of ``KINDS``) for every scenario; returns the files.

    Raises:
        DrawingError: matplotlib is not installed.
        RecordsError: a run's timeline is missing or altered.
    """
    written: list[Path] = []
    with drawing(folder):
        for scenario in dict.fromkeys(summary.scenario for summary in summaries):
            own = [summary for summary in summaries if summary.scenario == scenario]
            stem = scenario_stem(scenario)
            if "energy" in kinds:
                written += save(energy_bars(own), folder / f"{stem}-energy")
            if "latency" in kinds:
                written += save(latency_distributions(own), folder / f"{stem}-latency")
            if not {"windows", "clocks", "timeline"} & set(kinds):
                continue
            arrays = [[store.arrays(record) for record in summary.records] for summary in own]
            if "windows" in kinds:
                written += save(
                    window_figures(own, [list(map(window_arrays, each)) for each in arrays]), folder / f"{stem}-windows"
                )
            if "clocks" in kinds:
                shares = [mean_clock_shares([clock_shares(one) for one in each]) for each in arrays]
                written += save(clock_figure(own, shares), folder / f"{stem}-clocks")
            if "timeline" in kinds:
                for summary, (first, *_) in zip(own, arrays, strict=True):
                    prefix = "timeline_"
                    timeline = {
                        name.removeprefix(prefix): values for name, values in first.items() if name.startswith(prefix)
                    }
                    written += save(timelines(summary, timeline), folder / timeline_stem(summary))
    return written


def scenario_stem(scenario: str) -> str:
    """How the names of a scenario's plots begin."""
    return _short(scenario).replace(" ", "-").replace("/", "_")


def timeline_stem(summary: Summary) -> str:
    """Name of a controller's timeline, without its ending."""
    return f"{scenario_stem(summary.scenario)}-{file_name(summary.controller)}-timeline"


def file_name(controller: str) -> str:
    """A controller's name without what a file name cannot hold (``module:Class``)."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in controller)


def energy_bars(own: Sequence[Summary]) -> Any:
    """Mean joules of one scenario, one bar per controller: left by phase, right by what the GPUs were doing."""
    import matplotlib.pyplot as plt

    scale, unit = (1e6, "MJ") if max(s.mean("total_energy_j") for s in own) >= 1e6 else (1e3, "kJ")
    by_phase = [
        ("prefill GPUs", BLUE, [s.mean("prefill_energy_j") for s in own]),
        ("decode GPUs", ORANGE, [s.mean("decode_energy_j") for s in own]),
        ("unallocated GPUs", GREY, [s.mean("unallocated_energy_j") for s in own]),
    ]
    by_use = [
        ("computing", GREEN, [_computing(s) for s in own]),
        ("idle", SKY, [s.mean("idle_energy_j") for s in own]),
        ("loading weights", PURPLE, [s.mean("loading_energy_j") for s in own]),
        ("while switching clocks", VERMILION, [s.mean("switching_energy_j") for s in own]),
        ("unallocated", GREY, [s.mean("unallocated_energy_j") for s in own]),
    ]
    figure, panels = plt.subplots(1, 2, figsize=(4.6 + 1.5 * len(own), 4.2), sharey=True, layout="constrained")
    against = f"; change of the total against {REFERENCE}" if any(s.ratios for s in own) else ""
    figure.suptitle(f"{_heading(own)}{against}", fontsize=11)
    for panel, title, parts in zip(panels, ("by phase", "by use"), (by_phase, by_use), strict=True):
        _stack(panel, own, [(name, colour, np.array(joules) / scale) for name, colour, joules in parts])
        panel.set_title(title)
    panels[0].set_ylabel(f"GPU energy ({unit})")
    return figure


def _computing(summary: Summary) -> float:
    phases = summary.mean("prefill_energy_j") + summary.mean("decode_energy_j")
    return phases - sum(summary.mean(f"{use}_energy_j") for use in ("idle", "loading", "switching"))


def _stack(panel: Any, own: Sequence[Summary], parts: list[tuple[str, str, Floats]]) -> None:
    base: Floats = np.zeros(len(own))
    for name, colour, joules in parts:
        panel.bar(
            range(len(own)), joules, 0.62, bottom=base, color=colour, label=name, edgecolor="white", linewidth=0.8
        )
        base = base + joules
    for index, (joules, summary) in enumerate(zip(base.tolist(), own, strict=True)):
        ratio = summary.ratios.get("total_energy_j")
        saving = "" if ratio is None or summary.controller == REFERENCE else f"\n{100 * (ratio.value - 1):+.1f} %"
        panel.annotate(
            f"{joules:#.3g}{saving}".replace("-", "−"),
            (index, joules),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
    panel.set_ylim(0, 1.35 * base.max())
    panel.set_xticks(range(len(own)), [f"{s.controller}\n(breaks SLO)" if s.breaches else s.controller for s in own])
    panel.grid(axis="y", color="#E5E5E5")
    panel.tick_params(axis="x", length=0)
    panel.legend(loc="upper center", ncols=2, frameon=False, fontsize=8, handlelength=1.1, columnspacing=1.2)


def latency_distributions(own: Sequence[Summary]) -> Any:
    """Distribution of TTFT and TPOT over the pooled requests, with the SLO marked."""
    slo = own[0].slo
    return latency_figure(
        _heading(own),
        [
            Latencies("TTFT", slo.ttft_s, {summary.controller: summary.ttft_s for summary in own}),
            Latencies("TPOT", slo.tpot_s, {summary.controller: summary.tpot_s for summary in own}),
        ],
    )


def timelines(summary: Summary, timeline: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Clock, queue, batch and power of every instance over the first seed (``drawing.timeline_figure``)."""
    run = f"{summary.controller}, seed {summary.records[0].row['seed']}"
    return timeline_figure(f"{_short(summary.scenario)} on {summary.trace}: {run}", timeline)


def window_figures(own: Sequence[Summary], windows: Sequence[Sequence[Mapping[str, Floats]]]) -> Any:
    """Joules per token and P99 of every window of one scenario, a line per controller, with intervals over the seeds.

    ``windows``: per summary and record the figures of ``windows.window_arrays``.
    """
    import matplotlib.pyplot as plt

    slo = own[0].slo
    quantities = (
        ("prefill_j_per_token", "prefill: joules per prompt token", 1.0, None),
        ("decode_j_per_token", "decode: joules per output token", 1.0, None),
        ("ttft_p99_s", "P99 TTFT (ms)", 1e3, slo.ttft_s),
        ("tpot_p99_s", "P99 TPOT (ms)", 1e3, slo.tpot_s),
    )
    figure, panels = plt.subplots(2, 2, figsize=(10.4, 6.4), sharex=True, layout="constrained")
    figure.suptitle(f"{_heading(own)}: by window", fontsize=11)
    for panel, (metric, title, scale, target_s) in zip(panels.flat, quantities, strict=True):
        for index, (summary, each) in enumerate(sorted(zip(own, windows, strict=True), key=lambda s: s[0].controller)):
            middles_s = (each[0]["start_s"] + each[0]["end_s"]) / 2.0
            intervals = over_seeds(each, metric)
            panel.errorbar(
                middles_s,
                [scale * one.value for one in intervals],
                [scale * float(np.nan_to_num(one.high - one.value)) for one in intervals],
                color=COLOURS[index % len(COLOURS)],
                linestyle=DASHES[index % len(DASHES)],
                marker="o",
                markersize=4,
                capsize=3,
                label=summary.controller,
            )
        if target_s is not None:
            panel.axhline(scale * target_s, color=VERMILION, linewidth=1.4)
        panel.set_title(title)
        panel.set_ylim(bottom=0.0)
        panel.grid(color="#E8E8E8")
    for panel in panels[1]:
        panel.set_xlabel("time (s)")
    panels[0][1].legend(frameon=False)
    return figure


def clock_figure(own: Sequence[Summary], shares: Sequence[Mapping[str, Mapping[int, float]]]) -> Any:
    """Share of each phase's GPU time working at each clock, and without work: a bar per controller, a panel per phase.

    ``shares``: per summary what ``windows.mean_clock_shares`` gives.
    """
    import matplotlib.pyplot as plt

    clocks = sorted({clock for each in shares for phase in each.values() for clock in phase} - {IDLE})
    colours: dict[int, Any] = dict(
        zip(clocks, plt.get_cmap("viridis")(np.linspace(0.0, 1.0, len(clocks))), strict=True)
    )
    figure, panels = plt.subplots(1, 2, figsize=(5.6 + 1.2 * len(own), 4.0), sharey=True, layout="constrained")
    figure.suptitle(f"{_heading(own)}: clocks", fontsize=11)
    for panel, phase in zip(panels, ("prefill", "decode"), strict=True):
        base: Floats = np.zeros(len(own))
        for clock in (*clocks, IDLE):
            height = np.array([100.0 * each[phase].get(clock, 0.0) for each in shares])
            colour, name = (GREY, "no work") if clock == IDLE else (colours[clock], f"{clock} MHz")
            panel.bar(range(len(own)), height, 0.62, bottom=base, color=colour, edgecolor="white", label=name)
            base = base + height
        panel.set_title(f"{phase} GPUs")
        panel.set_xticks(range(len(own)), [summary.controller for summary in own])
        panel.tick_params(axis="x", length=0)
    panels[0].set_ylabel("share of GPU time (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return figure


def _heading(own: Sequence[Summary]) -> str:
    first = own[0]
    seeds = max(len(s.records) for s in own)
    return f"{_short(first.scenario)} on {first.trace}, {seeds} seed{'s' * (seeds > 1)}"


def _short(scenario: str) -> str:
    """A scenario's name without the folder and ending of a file."""
    name, *replaced = scenario.split(" ")
    return " ".join([Path(name).stem, *replaced])
