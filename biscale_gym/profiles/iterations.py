"""Profiled iterations: what a profiling run writes and a fit reads."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_gym.config import nearest
from biscale_gym.profiles.profile import Profile, ProfileError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Iterations:
    """Profiled iterations as columns of one length n, named as in the CSV file.

    Attributes:
        tp: tensor-parallel degree.
        clock_mhz: locked SM clock.
        batch: decode sequences; 0 in a prefill iteration.
        kv_tokens: their KV tokens in total.
        prefill_tokens: prompt tokens; 0 in a decode iteration.
        sum_len_sq: sum of squared prompt lengths.
        latency_ms: duration; ignored in idle measurements, the rows with neither batch nor prefill_tokens.
        power_w_per_gpu: mean power per GPU.
    """

    tp: Floats
    clock_mhz: Floats
    batch: Floats
    kv_tokens: Floats
    prefill_tokens: Floats
    sum_len_sq: Floats
    latency_ms: Floats
    power_w_per_gpu: Floats

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.tp.size)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Iterations:
        """The rows of a mask or of positions."""
        return Iterations(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


COLUMNS = tuple(field.name for field in fields(Iterations))


def write_iterations(path: Path, iterations: Iterations) -> None:
    """Write a CSV file with the columns of ``Iterations``."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(getattr(iterations, name).tolist() for name in COLUMNS), strict=True))


def read_iterations(path: Path) -> Iterations:
    """Read a CSV file of profiled iterations.

    Raises:
        ProfileError: a column is missing or unknown, a value is not a number or negative, or an iteration is mixed;
            file and line are named.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        header = list(reader.fieldnames or [])
        for name in header:
            if name not in COLUMNS:
                raise ProfileError(f"{path}: unknown column {name!r}; {nearest(name, list(COLUMNS))}")
        for name in COLUMNS:
            if name not in header:
                raise ProfileError(f"{path}: column {name!r} is missing")
        columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for line, row in enumerate(reader, start=2):
            for name in COLUMNS:
                columns[name].append(_number(row[name], f"{path}:{line}: {name}"))
            if columns["batch"][-1] and columns["prefill_tokens"][-1]:
                raise ProfileError(f"{path}:{line}: an iteration must be prefill or decode, this one is both")
            idle = not columns["batch"][-1] and not columns["prefill_tokens"][-1]
            if not idle and columns["latency_ms"][-1] <= 0:
                raise ProfileError(f"{path}:{line}: latency_ms must be positive")
    return Iterations(**{name: np.array(values) for name, values in columns.items()})


def _number(text: str | None, place: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text or "")
    except ValueError:
        raise ProfileError(f"{place}: {text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise ProfileError(f"{place}: {text!r} must be finite and not negative")
    return value


def synthetic_iterations(
    profile: Profile,
    tp: int,
    clocks_mhz: Sequence[int],
    rows: int,
    noise: float,
    rng: np.random.Generator,
    largest_batch: int = 256,
    longest_prompt: int = 4096,
) -> Iterations:
    """What profiling ``profile`` would have measured: half decode, half prefill, and one idle row per clock.

    Batches and prompt counts are log-uniform, lengths lognormal; latency and power carry independent lognormal noise.

    Args:
        profile: source of the true costs.
        tp: tensor-parallel degree.
        clocks_mhz: clocks to sample.
        rows: iterations, idle rows not counted.
        noise: standard deviation of the logarithm of the noise.
        rng: source of randomness.
        largest_batch: of decode.
        longest_prompt: in tokens.
    """
    decode = np.arange(rows) < rows // 2
    clock = rng.choice(np.asarray(clocks_mhz, dtype=float), rows)
    batch = np.floor(np.exp(rng.uniform(0, np.log(largest_batch + 0.99), rows)))
    context = np.clip(rng.lognormal(6.5, 0.8, rows), 16, longest_prompt)
    prompts = np.floor(np.exp(rng.uniform(0, np.log(8.99), rows))).astype(int)
    lengths = [np.floor(np.clip(rng.lognormal(6.3, 1.0, count), 4, longest_prompt)) for count in prompts]
    table = {
        "tp": np.full(rows, float(tp)),
        "clock_mhz": clock,
        "batch": np.where(decode, batch, 0.0),
        "kv_tokens": np.where(decode, np.floor(batch * context), 0.0),
        "prefill_tokens": np.where(decode, 0.0, [length.sum() for length in lengths]),
        "sum_len_sq": np.where(decode, 0.0, [(length**2).sum() for length in lengths]),
        "latency_ms": np.empty(rows),
        "power_w_per_gpu": np.empty(rows),
    }
    work = ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq")
    for mhz in clocks_mhz:
        here = clock == mhz
        arguments = [table[name][here] for name in work]
        table["latency_ms"][here] = profile.latency_ms(tp, mhz, *arguments)
        table["power_w_per_gpu"][here] = profile.power_w(tp, mhz, *arguments)
    for name in ("latency_ms", "power_w_per_gpu"):
        table[name] *= np.exp(noise * rng.standard_normal(rows))
    idle = {name: np.zeros(len(clocks_mhz)) for name in table}
    idle["tp"] += tp
    idle["clock_mhz"] = np.asarray(clocks_mhz, dtype=float)
    idle["power_w_per_gpu"] = np.array([profile.idle_power_w(tp, mhz) for mhz in clocks_mhz])
    return Iterations(**{name: np.concatenate([table[name], idle[name]]) for name in COLUMNS})
