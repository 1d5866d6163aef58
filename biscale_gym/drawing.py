"""Pictures that several parts of the package draw: how latencies are spread, and what every instance did when.

Colours are Okabe and Ito's (readable with every common colour blindness) and perceptually uniform maps. matplotlib is
imported only when a picture is asked for, and draws without a display.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
GREY = "#9A9A9A"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_WIDEST_IN_SLO = 3.0
_LABELLED_ROWS = 16
_COLUMNS = 180
_LEAST_CLOCK = 0.3
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
_METRICS = {"TTFT": "time to first token", "TPOT": "time per output token"}
_QUANTITIES = (
    ("clock_mhz", "SM clock (MHz)", "viridis"),
    ("queue", "waiting (requests)", "magma_r"),
    ("batch", "batch (requests)", "cividis"),
    ("power_w", "power (W per instance)", "inferno"),
)


class DrawingError(ValueError):
    """A picture that cannot be drawn: matplotlib is not installed."""


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Sets matplotlib up for figures in ``folder``, which is made.

    Raises:
        DrawingError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise DrawingError("plots need matplotlib: pip install 'biscale-gym[plots]', or --no-plots") from error
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class Latencies:
    """One panel of a picture of latencies.

    Attributes:
        name: TTFT or TPOT.
        slo_s: the target.
        curves: of each controller, latencies in ascending order, s.
    """

    name: str
    slo_s: float
    curves: Mapping[str, Floats]


def latency_figure(title: str, panels: Sequence[Latencies]) -> Any:
    """How latencies are spread over served requests, on a scale that opens the tail, with the SLO marked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for panel, latencies in zip(axes[0], panels, strict=True):
        _distribution(panel, latencies)
    axes[0][0].set_ylabel("share of served requests at or below")
    return figure


def _distribution(panel: Any, latencies: Latencies) -> None:
    top = 1e-4
    slo_ms = 1e3 * latencies.slo_s
    right = 1.3 * slo_ms
    for index, name in enumerate(sorted(latencies.curves)):
        values = 1e3 * latencies.curves[name]
        if not len(values):
            continue
        beyond = 1.0 - (np.arange(len(values)) + 0.5) / len(values)
        p99, p999 = (float(np.quantile(values, share)) for share in (0.99, 0.999))
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        panel.plot(values, beyond, color=colour, linestyle=dash, linewidth=1.7, label=f"{name}: P99 {p99:.0f} ms")
        panel.plot([p99], [0.01], marker="o", color=colour, markersize=5.5, markeredgecolor="white", zorder=4)
        right = max(right, min(1.25 * p999, _WIDEST_IN_SLO * slo_ms))
    panel.axvline(slo_ms, color=VERMILION, linewidth=1.4)
    panel.axvspan(slo_ms, right, color=VERMILION, alpha=0.07, linewidth=0)
    panel.annotate(
        f"SLO {slo_ms:g} ms",
        (slo_ms, 1.01),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="center",
        fontsize=8.5,
        color=VERMILION,
    )
    panel.axhline(0.01, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    panel.set_yscale("log")
    panel.set_ylim(1.0, top)
    panel.set_yticks(
        [1.0, 0.5, 0.1, 0.05, 0.01, 1e-3, top], ["0 %", "50 %", "90 %", "95 %", "99 %", "99.9 %", "99.99 %"]
    )
    panel.minorticks_off()
    panel.set_xlim(0, right)
    panel.set_xlabel(f"{_METRICS[latencies.name]}, {latencies.name} (ms)")
    panel.grid(color="#E8E8E8")
    panel.legend(loc="lower right", fontsize=8.5, framealpha=0.92, edgecolor="none", handlelength=3)


def timeline_figure(
    title: str, timeline: Mapping[str, npt.NDArray[Any]], phases: Sequence[str] = ("prefill", "decode")
) -> Any:
    """Clock, queue, batch and power of every instance over time: a row per instance, a column per phase.

    Args:
        title: the width of a column of samples is added.
        timeline: ``time_s`` float64[T], ``clock_mhz``, ``queue``, ``batch``, ``power_w`` [T, I] (NaN while an instance
            is not there), and ``label`` str[I], whose labels begin with the phase.
        phases: to be shown.
    """
    import matplotlib.pyplot as plt

    labels = [str(label) for label in timeline["label"]]
    members = [[i for i, label in enumerate(labels) if label.startswith(phase)] for phase in phases]
    edges_s, starts = _bins(np.asarray(timeline["time_s"], dtype=np.float64))
    height = 1.1 + len(_QUANTITIES) * (0.55 + 0.17 * min(_LABELLED_ROWS, max(map(len, members))))
    figure, panels = plt.subplots(
        len(_QUANTITIES),
        len(phases),
        figsize=(6.25 * len(phases), height),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(f"{title}; means of samples over {edges_s[1] - edges_s[0]:.3g} s", fontsize=11)
    for row, (key, name, colours) in enumerate(_QUANTITIES):
        values = _means(np.asarray(timeline[key], dtype=np.float64), starts)
        for column, instances in enumerate(members):
            panel = panels[row][column]
            panel.set_title(f"{phases[column]}: {name}", loc="left", fontsize=9)
            if not instances:
                panel.text(0.5, 0.5, "no instance", transform=panel.transAxes, ha="center", va="center", color=GREY)
                continue
            top = np.nanmax(values if key == "clock_mhz" else values[:, instances])
            _heat(panel, figure, edges_s, values[:, instances], colours, _LEAST_CLOCK * top * (key == "clock_mhz"), top)
            shown = range(0, len(instances), math.ceil(len(instances) / _LABELLED_ROWS))
            panel.set_yticks(shown, [labels[instances[i]] for i in shown], fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("time (s)")
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
