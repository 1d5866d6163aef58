"""The time lines as a picture: one matplotlib figure, whose axes are drawn once and whose lines are drawn per frame."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray

from biscale_gym.envs.rendering.timeline import BATCH, CLOCK_MHZ, POWER_W, QUEUE, SLACK_S, Timeline

Frame = NDArray[np.uint8]

WIDTH, HEIGHT, DPI = 800, 640, 80
_PANELS = (
    (CLOCK_MHZ, "clock [MHz]", 1000.0),
    (QUEUE, "waiting", 5.0),
    (BATCH, "batch", 5.0),
    (POWER_W, "power [W]", 500.0),
    (SLACK_S, "slack [s]", 0.1),
)
"""Quantity, label, where the scale ends at first."""
# Okabe and Ito's, readable with every common colour blindness; dashes where there are more instances than colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))
_IN_LEGEND = 16


def _rounded(value: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below ``value`` (at least 1e-3)."""
    size = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(step * size for step in (1.0, 2.0, 5.0, 10.0) if step * size >= value - 1e-12)


class TimelineFigure:
    """Draws a timeline.

    Args:
        timeline: what to draw.

    Raises:
        DependencyNotInstalled: matplotlib is missing.
    """

    def __init__(self, timeline: Timeline) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DependencyNotInstalled(
                "pictures are drawn by matplotlib, which is not installed: pip install 'biscale-gym[render]'"
            ) from error
        self._timeline = timeline
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self._canvas: Any = FigureCanvasAgg(figure)
        self._axes: Any = figure.subplots(len(_PANELS), 1, sharex=True)
        figure.subplots_adjust(left=0.09, right=0.82, top=0.95, bottom=0.07, hspace=0.18)
        for axes, (quantity, label, _) in zip(self._axes, _PANELS, strict=True):
            axes.set_ylabel(label)
            axes.set_xlim(-timeline.window_s, 0.0)
            axes.grid(True, color="#e0e0e0", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if quantity == SLACK_S:
                axes.axhline(0.0, color="#808080", linewidth=0.8)
        self._axes[-1].set_xlabel("seconds before now")
        self._title = figure.text(0.09, 0.97, "", fontsize=10, animated=True)
        self._lines: dict[int, list[Any]] = {}
        self._background: Any = None
        self.clear()

    def clear(self) -> None:
        """A new episode: no lines, and the scales as they were at first."""
        for lines in self._lines.values():
            for line in lines:
                line.remove()
        self._lines.clear()
        for axes, (quantity, _, top) in zip(self._axes, _PANELS, strict=True):
            axes.set_ylim(-top if quantity == SLACK_S else 0.0, top)
        self._background = None

    def draw(self, title: str) -> Frame:
        """The timeline up to now: uint8[HEIGHT, WIDTH, 3]."""
        self._update()
        if self._background is None:
            self._draw_background()
        self._canvas.restore_region(self._background)
        self._title.set_text(title)
        self._canvas.figure.draw_artist(self._title)
        for lines in self._lines.values():
            for axes, line in zip(self._axes, lines, strict=True):
                axes.draw_artist(line)
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def _draw_background(self) -> None:
        """Everything but what is drawn per frame."""
        names = {self._timeline.tracks[number].name: lines[0] for number, lines in self._lines.items()}
        shown = list(names)[:_IN_LEGEND]
        self._axes[0].legend(
            [names[name] for name in shown], shown, loc="upper left", bbox_to_anchor=(1.01, 1.05), frameon=False
        )
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._canvas.figure.bbox)

    def _update(self) -> None:
        timeline = self._timeline
        for number, track in timeline.tracks.items():
            if number not in self._lines:
                style = len(self._lines)
                colour, dash = _COLOURS[style % len(_COLOURS)], _DASHES[style // len(_COLOURS) % len(_DASHES)]
                self._lines[number] = [
                    axes.plot([], [], color=colour, linestyle=dash, drawstyle="steps-post", animated=True)[0]
                    for axes in self._axes
                ]
                self._background = None
            ages_s, values = track.series(timeline.now_s)
            for axes, (quantity, _, _), line in zip(self._axes, _PANELS, self._lines[number], strict=True):
                line.set_data(ages_s, values[:, quantity])
                self._make_room(axes, values[:, quantity])

    def _make_room(self, axes: Any, values: NDArray[np.float64]) -> None:
        """Widen an axis where values leave it; within an episode it never shrinks, so that frames can be compared."""
        known = values[np.isfinite(values)]
        if known.size == 0:
            return
        low, high = axes.get_ylim()
        top, bottom = float(known.max()), float(known.min())
        if top > high:
            axes.set_ylim(top=_rounded(top))
            self._background = None
        if bottom < low:
            axes.set_ylim(bottom=-_rounded(-bottom))
            self._background = None
