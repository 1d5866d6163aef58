"""Profiles as a sweep on CPU workers or on a card would have written them, with known truths."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biscale_gym.profiles import Profile, load_profile
from biscale_gym.profiles.iterations import provenance_line

CLOCKS = (750, 1290, 1980)
HOST_MS = {"prefill": (1.2, 0.0), "decode": (0.5, 0.05)}
LATE_MS = 0.3
MODEL = {
    "layers": 4,
    "hidden_size": 256,
    "attention_heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp_size": 768,
    "mlp_matrices": 3,
    "vocabulary": 1024,
    "context_tokens": 2048,
    "precisions": ["bf16"],
}
PROVENANCE = {
    "identity": {
        "device": "a processor",
        "model": MODEL,
        "precision": "bf16",
        "kv_capacity_tokens": 32768,
        "emulates": {
            "hardware": "h100-sxm5",
            "model": "llama-3.3-70b",
            "precision": "fp8",
            "decode_precision": None,
            "clocks_mhz": list(CLOCKS),
        },
    },
    "power": "absent",
}


def batch_ms(batch: float, kv: float, tokens: float, squares: float) -> float:
    """What the made-up worker computes for a batch at the top clock."""
    if batch:
        return 3.0 + 0.1 * batch + 2e-4 * kv
    return 4.0 + 0.02 * tokens + 4e-6 * squares


def truth(emulated: Profile, clock: int, batch: float, kv: float, tokens: float, squares: float) -> tuple[float, float]:
    """Latency and host part [ms] of the made-up worker behind an emulated device."""
    fixed, each = HOST_MS["decode" if batch else "prefill"]
    host = fixed + each * (batch or tokens)
    work = (batch, kv, tokens, squares)
    factor = float(emulated.latency_ms(2, clock, *work) / emulated.latency_ms(2, CLOCKS[-1], *work))
    late = LATE_MS if clock != CLOCKS[-1] else 0.0
    return host + factor * batch_ms(*work) + late, host


@pytest.fixture(scope="session")
def emulated() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


@pytest.fixture(scope="session")
def cpu_rows(emulated: Profile) -> list[dict[str, Any]]:
    """Three repeats of every point, one of them disturbed; the lowest clock for some points too."""
    rng = np.random.default_rng(0)
    works = [("decode", b, c) for b in (1, 2, 4, 8, 16) for c in (64, 256, 1024)]
    works += [("prefill", n, c) for n in (1, 2) for c in (32, 64, 128, 256, 384, 512)]
    rows = []
    for repeat in range(3):
        for phase, count, tokens in works:
            for clock in CLOCKS[-1:] if phase == "prefill" else (CLOCKS[0], CLOCKS[-1]):
                decode = phase == "decode"
                work = (count, count * tokens, 0, 0) if decode else (0, 0, count * tokens, count * tokens**2)
                latency, host = truth(emulated, clock, *work)
                noise = 3.0 if repeat == 1 and rng.random() < 0.3 else float(np.exp(0.005 * rng.standard_normal()))
                names = ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq")
                rows.append(
                    {
                        "tp": 2,
                        "clock_mhz": clock,
                        **dict(zip(names, work, strict=True)),
                        "latency_ms": host + (latency - host) * noise,
                        "host_ms": host,
                        "point": f"{phase} {count}x{tokens}",
                    }
                )
    return rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows and provenance as a profile's file."""

    def written(rows: list[dict[str, Any]], provenance: dict[str, Any] | None, name: str = "profile.csv") -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as stream:
            if provenance is not None:
                stream.write(provenance_line(provenance))
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return written
