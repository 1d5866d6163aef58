"""A profile as a sweep on the made-up worker would have written it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration.made_up import CLOCKS, truth

from biscale_gym.profiles import Profile, load_profile
from biscale_gym.profiles.iterations import provenance_line


@pytest.fixture(scope="session")
def emulated() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


@pytest.fixture(scope="session")
def cpu_rows(emulated: Profile) -> list[dict[str, Any]]:
    """Three repeats of every point, one of them disturbed; at the lowest and the highest clock."""
    rng = np.random.default_rng(0)
    works = [("decode", b, c) for b in (1, 2, 4, 8, 16) for c in (64, 256, 1024)]
    works += [("prefill", n, c) for n in (1, 2) for c in (32, 64, 128, 256, 384, 512)]
    rows = []
    for repeat in range(3):
        for phase, count, tokens in works:
            for clock in (CLOCKS[0], CLOCKS[-1]):
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
