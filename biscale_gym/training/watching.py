"""An episode watched while an agent plays it: what every instance did, and when its requests were served."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.rendering.timeline import BATCH, CLOCK_MHZ, QUEUE, read
from biscale_gym.training.errors import TrainingError

SAMPLES = 900
"""Of an episode, at most."""
_SHOWN = {"clock_mhz": CLOCK_MHZ, "queue": QUEUE, "batch": BATCH}


class Watch:
    """The first episode that it is shown; others are not looked at."""

    def __init__(self) -> None:
        self._simulator: Simulator | None = None
        self._episode: Episode | None = None
        self._every_s = 0.0
        self._times_s: list[float] = []
        self._samples: list[dict[int, NDArray[np.float64]]] = []
        self._energy_j: list[NDArray[np.float64]] = []
        self._names: dict[int, str] = {}

    def look(self, simulator: Simulator, episode: Episode) -> None:
        """Sample every instance, unless the last sample is too near; once before each step is often enough."""
        if self._simulator is None:
            self._simulator, self._episode = simulator, episode
            self._every_s = (episode.end_s - episode.warmup_s) / SAMPLES
        if simulator is not self._simulator:
            return
        if self._times_s and simulator.now_s < self._times_s[-1] + self._every_s:
            return
        found = read(simulator)
        for number, reading in found.items():
            self._names.setdefault(number, f"{reading.name} TP{int(simulator.state.inst[number]['tp'])}")
        self._times_s.append(simulator.now_s)
        self._samples.append({number: reading.values for number, reading in found.items()})
        self._energy_j.append(simulator.instances().energy_j.sum(axis=1))

    def requests(self) -> RequestLedger:
        """The requests of the episode's counted part.

        Raises:
            TrainingError: nothing was shown.
        """
        if self._simulator is None or self._episode is None:
            raise TrainingError("no episode was watched")
        return self._simulator.requests().arrived(self._episode.warmup_s, self._episode.end_s)

    def timeline(self) -> dict[str, NDArray[Any]]:
        """The samples as ``drawing.timeline_figure`` takes them; times from the end of the warm-up.

        Power is the mean from one sample to the next: at a decision a batch is about to start, and what an instance
        draws in that moment says nothing of the batch. The last sample ends the last mean and is not shown.
        """
        assert self._episode is not None
        numbers = sorted(self._names)
        shown = np.full((len(_SHOWN) + 1, len(self._samples) - 1, len(numbers)), np.nan)
        for at, sample in enumerate(self._samples[:-1]):
            lasts_s = self._times_s[at + 1] - self._times_s[at]
            for column, number in enumerate(numbers):
                if number in sample:
                    spent_j = self._energy_j[at + 1][number] - self._energy_j[at][number]
                    shown[:, at, column] = [*sample[number][list(_SHOWN.values())], spent_j / lasts_s]
        return {
            "time_s": np.array(self._times_s[:-1]) - self._episode.warmup_s,
            **dict(zip((*_SHOWN, "power_w"), shown, strict=True)),
            "label": np.array([self._names[number] for number in numbers]),
        }
