"""The last seconds of every instance: a ring of samples, read from the engine's state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.cluster.state import ACTIVE, DRAINING, LOADING, PREFILL

QUANTITIES = ("clock_mhz", "queue", "batch", "power_w", "slack_s")
CLOCK_MHZ, QUEUE, BATCH, POWER_W, SLACK_S = range(len(QUANTITIES))
SAMPLES = 1024
"""Of an instance, at most: those closer together than the window's 1024th part fall into one, the last of them."""

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One instance now.

    Attributes:
        name: phase and instance number.
        values: float64[QUANTITIES]: clock in force, requests that wait (for decode those on the way too), requests in
            the batch, power, and the least slack of a request: for prefill the SLO less the time waited, for decode the
            time saved up against the TPOT SLO; NaN without a request.
        target_mhz: the clock last asked for.
    """

    name: str
    values: Samples
    target_mhz: int


def _prefill_slack_s(simulator: Simulator, number: int) -> float:
    state = simulator.state
    inst, req = state.inst[number], state.req
    oldest_s = np.inf
    request = int(inst["batch_head"])
    while request >= 0:
        oldest_s = min(oldest_s, float(req[request]["arrival_s"]))
        request = int(req[request]["next"])
    if inst["queue_head"] >= 0:
        oldest_s = min(oldest_s, float(req[inst["queue_head"]]["arrival_s"]))
    if not np.isfinite(oldest_s):
        return float("nan")
    return float(state.glob[0]["ttft_slo_s"]) - (simulator.now_s - oldest_s)


def _decode_slack_s(simulator: Simulator, number: int) -> float:
    state = simulator.state
    glob, inst = state.glob[0], state.inst[number]
    last = int(inst["run_n"]) - 1
    if last < 0 or not glob["observe_slack"]:
        return float("nan")
    return float(state.slack_s[number, last] + glob["tpot_slo_s"] * inst["iterations"] - glob["now_s"])


def read(simulator: Simulator) -> dict[int, Reading]:
    """Every instance that is there, by its number."""
    state = simulator.state
    found = {}
    count = int(state.glob[0]["instances"])
    for number in np.flatnonzero(np.isin(state.inst["status"][:count], (LOADING, ACTIVE, DRAINING))).tolist():
        inst = state.inst[number]
        prefill = inst["phase"] == PREFILL
        waiting = inst["queue_n"] if prefill else inst["queue_n"] + inst["transit_n"]
        batch = inst["batch_n"] if prefill else inst["run_n"]
        slack_s = _prefill_slack_s(simulator, number) if prefill else _decode_slack_s(simulator, number)
        clock_mhz = simulator.clocks_mhz[int(inst["clock"])]
        values = np.array([clock_mhz, waiting, batch, inst["power_w"], slack_s], dtype=np.float64)
        name = f"{'prefill' if prefill else 'decode'} {number}"
        found[number] = Reading(name, values, simulator.clocks_mhz[int(inst["target"])])
    return found


class Track:
    """The samples of one instance, oldest first.

    Args:
        name: of the instance.
        window_s: how far back.
    """

    def __init__(self, name: str, window_s: float) -> None:
        self.name = name
        self._window_s = window_s
        self._at_s: Samples = np.zeros(SAMPLES)
        self._values: Samples = np.zeros((SAMPLES, len(QUANTITIES)))
        self._count = 0
        self._bin = -1

    def add(self, now_s: float, values: Samples) -> None:
        """Note a sample."""
        own_bin = int(now_s * SAMPLES / self._window_s)
        if own_bin != self._bin:
            self._count += 1
        self._bin = own_bin
        at = (self._count - 1) % SAMPLES
        self._at_s[at], self._values[at] = now_s, values

    def series(self, now_s: float) -> tuple[Samples, Samples]:
        """Seconds before now (float64[n], ascending, from -window) and their samples (float64[n, QUANTITIES])."""
        kept = min(self._count, SAMPLES)
        order = np.arange(self._count - kept, self._count) % SAMPLES
        ages_s = self._at_s[order] - now_s
        inside = ages_s >= -self._window_s
        return ages_s[inside], self._values[order][inside]


class Timeline:
    """The tracks of all instances that were there within the window.

    Args:
        window_s: how far back.
    """

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.now_s = 0.0
        self.tracks: dict[int, Track] = {}

    def clear(self) -> None:
        """A new episode."""
        self.tracks.clear()

    def sample(self, simulator: Simulator) -> None:
        """Note what every instance is doing now. Where time has gone back, by a snapshot, the tracks begin anew."""
        if simulator.now_s < self.now_s:
            self.clear()
        self.now_s = simulator.now_s
        for number, reading in read(simulator).items():
            if number not in self.tracks:
                self.tracks[number] = Track(reading.name, self.window_s)
            self.tracks[number].add(self.now_s, reading.values)
