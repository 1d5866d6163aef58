"""The pictures of a matrix, as PNG and SVG: where the joules go, how latencies are spread, what every instance did.

Colours are Okabe and Ito's (readable with every common colour blindness) and perceptually uniform maps. matplotlib is
imported only when a plot is asked for, and draws without a display.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.evaluation.faults import EvaluationError
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.summary import REFERENCE, Summary, quantile
from biscale_gym.evaluation.windows import IDLE, clock_shares, mean_clock_shares, over_seeds, window_arrays

Floats = npt.NDArray[np.float64]

_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY, _YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
_GREY = "#9A9A9A"
_WIDEST_IN_SLO = 3.0
_LABELLED_ROWS = 16
_COLUMNS = 180
_LEAST_CLOCK = 0.3
COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _YELLOW, "#000000")
_DASHES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
KINDS = ("energy", "latency", "windows", "clocks", "timeline")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "biscale-gym",
}


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Sets matplotlib up for figures in ``folder``, which is made.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EvaluationError("plots need matplotlib: pip install 'biscale-gym[plots]', or --no-plots") from error
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        yield


def write_plots(
    summaries: Sequence[Summary], store: RecordStore, folder: Path, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Writes the plots of these kinds (of ``KINDS``) for every scenario; returns the files.

    Raises:
        EvaluationError: matplotlib is not installed.
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
        ("prefill GPUs", _BLUE, [s.mean("prefill_energy_j") for s in own]),
        ("decode GPUs", _ORANGE, [s.mean("decode_energy_j") for s in own]),
        ("unallocated GPUs", _GREY, [s.mean("unallocated_energy_j") for s in own]),
    ]
    by_use = [
        ("computing", _GREEN, [_computing(s) for s in own]),
        ("idle", _SKY, [s.mean("idle_energy_j") for s in own]),
        ("loading weights", _PURPLE, [s.mean("loading_energy_j") for s in own]),
        ("while switching clocks", _VERMILION, [s.mean("switching_energy_j") for s in own]),
        ("unallocated", _GREY, [s.mean("unallocated_energy_j") for s in own]),
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
    """Distribution of TTFT and TPOT over the pooled requests, on a scale that opens the tail, with the SLO marked."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.4), sharey=True, layout="constrained")
    figure.suptitle(_heading(own), fontsize=11)
    slo = own[0].slo
    for panel, name, target_s in ((panels[0], "TTFT", slo.ttft_s), (panels[1], "TPOT", slo.tpot_s)):
        _distribution(panel, own, name, 1e3 * target_s)
    panels[0].set_ylabel("share of served requests at or below")
    return figure


def _distribution(panel: Any, own: Sequence[Summary], name: str, slo_ms: float) -> None:
    top = 1e-4
    right = 1.3 * slo_ms
    for index, summary in enumerate(sorted(own, key=lambda s: s.controller)):
        values = 1e3 * (summary.ttft_s if name == "TTFT" else summary.tpot_s)
        if not len(values):
            continue
        beyond = 1.0 - (np.arange(len(values)) + 0.5) / len(values)
        p99 = quantile(values, 0.99)
        colour, dash = COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
        panel.plot(
            values, beyond, color=colour, linestyle=dash, linewidth=1.7, label=f"{summary.controller}: P99 {p99:.0f} ms"
        )
        panel.plot([p99], [0.01], marker="o", color=colour, markersize=5.5, markeredgecolor="white", zorder=4)
        right = max(right, min(1.25 * quantile(values, 0.999), _WIDEST_IN_SLO * slo_ms))
    panel.axvline(slo_ms, color=_VERMILION, linewidth=1.4)
    panel.axvspan(slo_ms, right, color=_VERMILION, alpha=0.07, linewidth=0)
    panel.annotate(
        f"SLO {slo_ms:g} ms",
        (slo_ms, 1.01),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="center",
        fontsize=8.5,
        color=_VERMILION,
    )
    panel.axhline(0.01, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    panel.set_yscale("log")
    panel.set_ylim(1.0, top)
    panel.set_yticks(
        [1.0, 0.5, 0.1, 0.05, 0.01, 1e-3, top], ["0 %", "50 %", "90 %", "95 %", "99 %", "99.9 %", "99.99 %"]
    )
    panel.minorticks_off()
    panel.set_xlim(0, right)
    panel.set_xlabel(f"{'time to first token' if name == 'TTFT' else 'time per output token'}, {name} (ms)")
    panel.grid(color="#E8E8E8")
    panel.legend(loc="lower right", fontsize=8.5, framealpha=0.92, edgecolor="none", handlelength=3)


def timelines(summary: Summary, timeline: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Clock, queue, batch and power of every instance over the first seed: a row per instance, a column per phase.

    ``timeline`` holds ``time_s`` float64[T], ``clock_mhz``, ``queue``, ``batch``, ``power_w`` [T, I] (NaN while an
    instance is not there), and ``label`` str[I], whose labels begin with the phase.
    """
    import matplotlib.pyplot as plt

    labels = [str(label) for label in timeline["label"]]
    phases = [[i for i, label in enumerate(labels) if label.startswith(phase)] for phase in ("prefill", "decode")]
    edges_s, starts = _bins(np.asarray(timeline["time_s"], dtype=np.float64))
    quantities = (
        ("clock_mhz", "SM clock (MHz)", "viridis"),
        ("queue", "waiting (requests)", "magma_r"),
        ("batch", "batch (requests)", "cividis"),
        ("power_w", "power (W per instance)", "inferno"),
    )
    height = 1.1 + len(quantities) * (0.55 + 0.17 * min(_LABELLED_ROWS, max(map(len, phases))))
    figure, panels = plt.subplots(
        len(quantities), 2, figsize=(12.5, height), sharex=True, squeeze=False, layout="constrained"
    )
    run = f"{summary.controller}, seed {summary.records[0].row['seed']}"
    width_s = edges_s[1] - edges_s[0]
    title = f"{_short(summary.scenario)} on {summary.trace}: {run}; means of samples over {width_s:.3g} s"
    figure.suptitle(title, fontsize=11)
    for row, (key, name, colours) in enumerate(quantities):
        values = _means(np.asarray(timeline[key], dtype=np.float64), starts)
        for column, instances in enumerate(phases):
            panel = panels[row][column]
            panel.set_title(f"{('prefill', 'decode')[column]}: {name}", loc="left", fontsize=9)
            if not instances:
                panel.text(0.5, 0.5, "no instance", transform=panel.transAxes, ha="center", va="center", color=_GREY)
                continue
            top = np.nanmax(values if key == "clock_mhz" else values[:, instances])
            _heat(panel, figure, edges_s, values[:, instances], colours, _LEAST_CLOCK * top * (key == "clock_mhz"), top)
            shown = range(0, len(instances), math.ceil(len(instances) / _LABELLED_ROWS))
            panel.set_yticks(shown, [labels[instances[i]] for i in shown], fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("time (s)")
    return figure


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
                linestyle=_DASHES[index % len(_DASHES)],
                marker="o",
                markersize=4,
                capsize=3,
                label=summary.controller,
            )
        if target_s is not None:
            panel.axhline(scale * target_s, color=_VERMILION, linewidth=1.4)
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
            colour, name = (_GREY, "no work") if clock == IDLE else (colours[clock], f"{clock} MHz")
            panel.bar(range(len(own)), height, 0.62, bottom=base, color=colour, edgecolor="white", label=name)
            base = base + height
        panel.set_title(f"{phase} GPUs")
        panel.set_xticks(range(len(own)), [summary.controller for summary in own])
        panel.tick_params(axis="x", length=0)
    panels[0].set_ylabel("share of GPU time (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return figure


def _bins(time_s: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Columns wide enough to be seen: their edges, seconds, float64[B + 1], and the first sample of each, int64[B]."""
    starts = np.arange(0, len(time_s), math.ceil(len(time_s) / _COLUMNS), dtype=np.int64)
    step_s = float(time_s[-1] - time_s[-2]) if len(time_s) > 1 else 1.0
    return np.append(time_s[starts], time_s[-1] + step_s), starts


def _means(values: Floats, starts: npt.NDArray[np.int64]) -> Floats:
    """Means of the samples [T, I] in each column, [B, I]; NaN where the instance was never there."""
    there = ~np.isnan(values)
    count = np.add.reduceat(there.astype(np.float64), starts, axis=0)
    total = np.add.reduceat(np.where(there, values, 0.0), starts, axis=0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _heat(panel: Any, figure: Any, edges_s: Floats, values: Floats, colours: str, low: float, high: float) -> None:
    rows = np.arange(values.shape[1] + 1) - 0.5
    shown = panel.pcolormesh(
        edges_s, rows, np.ma.masked_invalid(values.T), cmap=colours, vmin=low, vmax=high or 1.0, rasterized=True
    )
    panel.invert_yaxis()
    panel.tick_params(length=2)
    bar = figure.colorbar(shown, ax=panel, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _heading(own: Sequence[Summary]) -> str:
    first = own[0]
    seeds = max(len(s.records) for s in own)
    return f"{_short(first.scenario)} on {first.trace}, {seeds} seed{'s' * (seeds > 1)}"


def save(figure: Any, stem: Path) -> list[Path]:
    """Writes a figure as PNG and SVG and closes it."""
    import matplotlib.pyplot as plt

    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg")]
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # laid out once for both files
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _short(scenario: str) -> str:
    """A scenario's name without the folder and ending of a file."""
    name, *replaced = scenario.split(" ")
    return " ".join([Path(name).stem, *replaced])
