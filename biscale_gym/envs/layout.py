"""What every entry of an instance's observation is: name, unit, scale and range, in order.

The tables of the documentation and the observation spaces are made from this list, and the compiled encoder writes by
its offsets (``encoding.py``): one place says what index means what.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.features import HORIZON
from biscale_gym.cluster.placement import Phase

VERSION = 1
"""Of the layout: a policy trained on another one is refused."""


@dataclass(frozen=True)
class Entry:
    """One named stretch of an observation.

    Attributes:
        name: as in the documentation.
        meaning: what it is, with the unit before scaling and the scale.
        low, high: what it is clipped to.
        size: how many numbers.
    """

    name: str
    meaning: str
    low: float
    high: float
    size: int = 1


def _common() -> list[Entry]:
    return [
        Entry("boundary", "1 if a batch is about to start", 0.0, 1.0),
        Entry("arrival", "1 if a prompt joined the queue while a batch runs", 0.0, 1.0),
        Entry("overrun", "1 if the running iteration lasts longer than predicted", 0.0, 1.0),
        Entry("idle", "1 if there is nothing to run", 0.0, 1.0),
        Entry("clock", "clock in force [MHz] / 2000", 0.0, 1.5),
        Entry("target", "clock last asked for [MHz] / 2000", 0.0, 1.5),
        Entry("switching", "1 while the clock last asked for is not yet in force", 0.0, 1.0),
        Entry("gpus", "GPUs of the instance / 8", 0.0, 1.0),
        Entry("slo", "the phase's SLO: TTFT [s], or TPOT [0.1 s]", 0.0, 8.0),
        Entry("kv", "KV tokens held / KV capacity", 0.0, 1.0),
        Entry("waiting_requests", "ln(1 + requests that wait) / ln 1025", 0.0, 2.0),
        Entry("waiting_tokens", "ln(1 + tokens that wait) / ln 65537", 0.0, 2.0),
        Entry("arrivals_1s", "ln(1 + arrivals/s, exponential mean over 1 s) / ln 101", 0.0, 2.0),
        Entry("arrivals_10s", "the same over 10 s", 0.0, 2.0),
        Entry("arrivals_60s", "the same over 60 s", 0.0, 2.0),
        Entry("completions_10s", "the same for requests whose phase is over, over 10 s", 0.0, 2.0),
        Entry("late_60s", "share of completed requests that broke the SLO, exponential mean over 60 s", 0.0, 1.0),
        Entry("surprise", "duration of the last iteration / its prediction - 1", -1.0, 1.0),
        Entry("idle_gap", "how long the instance had nothing to run before this batch [s]", 0.0, 4.0),
    ]


def entries(phase: Phase, clocks: int) -> list[Entry]:
    """The observation of one instance, in order; the last stretches hold one number per clock of the grid."""
    if phase == "prefill":
        return [
            *_common(),
            Entry("work_left", "share of batch 0 still to do", 0.0, 1.0),
            Entry("batches", f"projected batches / {HORIZON}", 0.0, 1.0),
            Entry("tokens", "tokens of each projected batch / 8192; 0 beyond the last", 0.0, 4.0, HORIZON),
            Entry("slack", "(SLO - time waited by its oldest prompt) / SLO; 1 beyond the last", -4.0, 1.0, HORIZON),
            Entry("latency", "predicted duration of the rest of batch 0 / SLO, per clock", 0.0, 4.0, clocks),
            Entry("energy", "predicted joules of batch 0 / those at the highest clock, per clock", 0.0, 4.0, clocks),
            Entry(
                "margin",
                "least (slack - predicted end) / SLO over all projected batches, were all run at this clock, per clock",
                -4.0,
                1.0,
                clocks,
            ),
        ]
    return [
        *_common(),
        Entry("batch", "ln(1 + requests that decode) / ln 1025", 0.0, 2.0),
        Entry("context", "KV tokens per decoding request / 8192", 0.0, 4.0),
        Entry("recompute", "tokens of preempted requests that this iteration computes anew / 8192", 0.0, 4.0),
        Entry("slack", "least, 1, 5, 25 and 50 % quantile of the batch's saved-up TPOT slack [10 SLO]", -4.0, 4.0, 5),
        Entry("latency", "predicted duration of this iteration / SLO, per clock", 0.0, 4.0, clocks),
        Entry("energy", "predicted joules of this iteration / those at the highest clock, per clock", 0.0, 4.0, clocks),
    ]


def size(phase: Phase, clocks: int) -> int:
    """Length of the observation."""
    return sum(entry.size for entry in entries(phase, clocks))


def bounds(phase: Phase, clocks: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest value of every number: two float32[size]."""
    listed = entries(phase, clocks)
    low = np.concatenate([np.full(entry.size, entry.low) for entry in listed])
    high = np.concatenate([np.full(entry.size, entry.high) for entry in listed])
    return low.astype(np.float32), high.astype(np.float32)


def numbered(entries: list[Entry]) -> list[str]:
    """A name for every number of some entries, e.g. ``tokens[3]``."""
    return [
        entry.name if entry.size == 1 else f"{entry.name}[{number}]"
        for entry in entries
        for number in range(entry.size)
    ]


def names(phase: Phase, clocks: int) -> list[str]:
    """A name for every number of an instance's observation."""
    return numbered(entries(phase, clocks))
