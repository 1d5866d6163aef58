"""What every entry of the placement environment's observation is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from biscale_gym.envs.layout import Entry

VERSION = 1
"""Of the layout: a policy trained on another one is refused."""

PAST_WINDOWS = 3
PEAKS_S = (10.0, 60.0)
MOST_INSTANCES = 16


def placement_entries(classes: int) -> list[Entry]:
    """The observation, in order; ``classes`` is the number of classes."""
    rate = "ln(1 + requests/s) / ln 1001"
    return [
        Entry("slo", "TTFT SLO [s], TPOT SLO [0.1 s]", 0.0, 8.0, 2),
        Entry("window", "window to be placed / windows of the episode", 0.0, 1.0),
        Entry("estimate", f"the operator's estimate of the mean rate: {rate}", 0.0, 2.0),
        Entry("past_rates", f"mean rate of the last {PAST_WINDOWS} windows, latest first, 0 before: {rate}", 0.0, 2.0,
              PAST_WINDOWS),
        Entry("past_peaks", f"busiest 10 s and 60 s of the last window: {rate}", 0.0, 2.0, len(PEAKS_S)),
        Entry("gpus_left", "GPUs that no instance has yet / GPUs of the cluster", 0.0, 1.0),
        Entry("capacity", f"greatest rate of the prefill and of the decode instances so far: {rate}", 0.0, 2.0, 2),
        Entry("count", f"instances of each class so far / {MOST_INSTANCES}", 0.0, 1.0, classes),
        Entry("previous", f"instances of each class in the present placement / {MOST_INSTANCES}", 0.0, 1.0, classes),
        Entry("class_gpus", "GPUs of an instance of each class / 8", 0.0, 2.0, classes),
        Entry("class_rate", f"R_c, greatest rate of an instance within the SLO: {rate}", 0.0, 2.0, classes),
        Entry("class_energy", "E_c, joules per request at that rate / 200", 0.0, 8.0, classes),
    ]  # fmt: skip


def log_rate(rate_rps: Any) -> Any:
    """ln(1 + rate) / ln 1001."""
    return np.log1p(rate_rps) / math.log(1001.0)
