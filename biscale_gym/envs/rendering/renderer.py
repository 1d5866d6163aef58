"""What an environment's render modes do, for one instance or for many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import nearest
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.rendering.figure import TimelineFigure
from biscale_gym.envs.rendering.timeline import BATCH, CLOCK_MHZ, POWER_W, QUEUE, SLACK_S, Timeline, read
from biscale_gym.envs.rendering.window import Window

WINDOW_S = 30.0
"""How far back pictures look."""


def status(simulator: Simulator) -> str:
    """What every instance is doing now, a line each."""
    lines = []
    for reading in read(simulator).values():
        values = reading.values
        clock = f"{values[CLOCK_MHZ]:.0f}"
        if reading.target_mhz != values[CLOCK_MHZ]:
            clock += f" -> {reading.target_mhz}"
        slack = "-" if np.isnan(values[SLACK_S]) else f"{values[SLACK_S]:+.3f} s"
        lines.append(
            f"{simulator.now_s:.3f} s  {reading.name}: {clock} MHz, {values[QUEUE]:.0f} waiting, "
            f"{values[BATCH]:.0f} in the batch, {values[POWER_W]:.0f} W, slack {slack}"
        )
    return "\n".join(lines)


class Renderer:
    """Follows the episodes of an environment and draws them.

    Args:
        mode: one of ``metadata["render_modes"]``.
        metadata: of the environment, with ``render_fps``.

    Raises:
        EnvironmentUsageError: no such mode.
        DependencyNotInstalled: what draws is missing; the message names the extra.
    """

    def __init__(self, mode: str, metadata: Mapping[str, Any]) -> None:
        modes = list(metadata["render_modes"])
        if mode not in modes:
            raise EnvironmentUsageError(f"no render_mode {mode!r}; {nearest(str(mode), modes)}")
        self._timeline = Timeline(WINDOW_S)
        self._figure = None if mode == "ansi" else TimelineFigure(self._timeline)
        self._window = Window(metadata["render_fps"]) if mode == "human" else None

    def begin(self, simulator: Simulator) -> None:
        """An episode has begun."""
        self._timeline.clear()
        if self._figure is not None:
            self._figure.clear()
        self.sample(simulator)

    def sample(self, simulator: Simulator) -> None:
        """A step is done; a window shows it at once."""
        if self._figure is not None:
            self._timeline.sample(simulator)
        if self._window is not None:
            self._show(simulator)

    def render(self, simulator: Simulator) -> NDArray[np.uint8] | str | None:
        """A frame (uint8[height, width, 3]), lines of text, or None: it is in the window."""
        if self._figure is None:
            return status(simulator)
        if self._window is not None:
            self._show(simulator)
            return None
        return self._figure.draw(self._title(simulator))

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            self._window.close()

    def _show(self, simulator: Simulator) -> None:
        assert self._figure is not None
        assert self._window is not None
        self._window.show(self._figure.draw(self._title(simulator)))

    def _title(self, simulator: Simulator) -> str:
        ledger = simulator.instances()
        energy_kj = 1e-3 * (float(ledger.energy_j.sum()) + ledger.unallocated_j)
        counts = simulator.counts()
        done = f"{counts['finished']} of {counts['arrived']} requests done"
        return f"{simulator.now_s:.2f} s, {energy_kj:.1f} kJ since the start, {done}"
