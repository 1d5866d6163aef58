"""What lies between client and workers: the overhead in TTFT, and the way from prefill to decode."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biscale_gym.calibration.lines import rising_line
from biscale_gym.profiles.profile import ProfileError
from biscale_gym.profiles.settings import TransferSettings

COLUMNS = ("prompt_tokens", "ttft_ms", "prefill_ms", "handover_ms")
LEAST = 4
"""Requests that a line is put through."""


@dataclass(frozen=True)
class Between:
    """Medians over requests that were alone in the system.

    Attributes:
        requests: so many.
        overhead_ms: of TTFT beside the prompt's batches: client, pipes, scheduling.
        launch_ms: from a prefill batch's end to the first decode iteration, of a prompt without tokens.
        ms_per_token: what a prompt token adds to that.
    """

    requests: int
    overhead_ms: float
    launch_ms: float
    ms_per_token: float

    def transfer(self, kv_bytes_per_token: int, gpu_pairs: int, host_ms: float) -> TransferSettings:
        """As a transfer preset.

        Args:
            kv_bytes_per_token: of the model.
            gpu_pairs: the smaller TP degree of both sides, which the cluster model multiplies the bandwidth by.
            host_ms: what the first decode iteration of the profile counts as its host part: it lies before the batch.
        """
        gb_per_s = kv_bytes_per_token / (1e6 * self.ms_per_token) / gpu_pairs if self.ms_per_token > 0 else None
        return TransferSettings(
            launch_latency_s=1e-3 * max(0.0, self.launch_ms - host_ms),
            stage_latency_s=0.0,
            rdma_gb_per_s=gb_per_s,
            nvlink_gb_per_s=gb_per_s,
        )


def read_handovers(path: Path) -> Between:
    """The medians of a file that ``biscale-gym profile`` wrote beside a profile.

    Raises:
        ProfileError: a column is missing, a value is no number, or there are too few requests; the place is named.
        OSError: it cannot be read.
    """
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ProfileError(f"{path}:1: expected the columns {', '.join(COLUMNS)}")
    values = np.empty((len(rows) - 1, len(COLUMNS)))
    for line, row in enumerate(rows[1:], start=2):
        for number, name in enumerate(COLUMNS):
            text = row[number] if number < len(row) else ""
            try:
                values[line - 2, number] = float(text)
            except ValueError:
                raise ProfileError(f"{path}:{line}: {name}: {text!r} is not a number") from None
            if not math.isfinite(values[line - 2, number]):
                raise ProfileError(f"{path}:{line}: {name}: {text!r} must be finite")
    if len(values) < LEAST:
        raise ProfileError(f"{path}: {len(values)} requests, at least {LEAST} are needed")
    tokens, ttft_ms, prefill_ms, handover_ms = values.T
    launch_ms, slope = rising_line(tokens, handover_ms)
    return Between(len(values), float(np.median(ttft_ms - prefill_ms)), launch_ms, slope)
