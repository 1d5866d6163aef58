"""Profiled iterations: what a profiling run writes and a fit reads."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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


EXTRA_COLUMNS = ("host_ms", "point")
"""What a file may hold beside ``COLUMNS``."""
POWER = "power_w_per_gpu"


@dataclass(frozen=True, eq=False)
class Profiled:
    """A profile's file: iterations, and how they came about.

    Attributes:
        iterations: of n rows; power is NaN where the file has none.
        host_ms: float64[n], the part of ``latency_ms`` that no clock changes (scheduling, bookkeeping, messages).
        points: str[n], operating point of each row: rows of one point are repeats of the same measurement.
        provenance: the JSON of the file's first line; empty without one.
    """

    iterations: Iterations
    host_ms: Floats
    points: NDArray[np.str_]
    provenance: dict[str, Any]

    @property
    def has_power(self) -> bool:
        """Whether power was measured."""
        return not bool(np.isnan(self.iterations.power_w_per_gpu).any())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.iterations)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Profiled:
        """The rows of a mask or of positions."""
        return Profiled(self.iterations.rows(chosen), self.host_ms[chosen], self.points[chosen], self.provenance)


def work_of(iterations: Iterations) -> NDArray[np.str_]:
    """Operating points of iterations without labels, str[n]: the work done, whatever the clock."""
    columns = ("tp", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq")
    work = zip(*(getattr(iterations, name).tolist() for name in columns), strict=True)
    return np.array([" ".join(f"{value:g}" for value in row) for row in work], dtype=np.str_)


def write_iterations(path: Path, iterations: Iterations, provenance: dict[str, Any] | None = None) -> None:
    """Write a CSV file with the columns of ``Iterations``, under a line of provenance if there is any."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        if provenance is not None:
            stream.write(provenance_line(provenance))
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(getattr(iterations, name).tolist() for name in COLUMNS), strict=True))


def provenance_line(provenance: dict[str, Any]) -> str:
    """The first line of a file: where its numbers come from."""
    return f"# {json.dumps(provenance, ensure_ascii=False)}\n"


def read_iterations(path: Path) -> Iterations:
    """Read the iterations of a CSV file, power included.

    Raises:
        ProfileError: as ``read_profiled``, or there is no power.
    """
    profiled = read_profiled(path)
    if not profiled.has_power:
        raise ProfileError(f"{path}: column {POWER!r} is missing")
    return profiled.iterations


def read_profiled(path: Path) -> Profiled:
    """Read a CSV file of profiled iterations; lines before the header that begin with ``#`` are provenance.

    Raises:
        ProfileError: provenance that is no JSON, a missing or unknown column, a value that is not a number or
            negative, a row of another length, or a mixed iteration; file, line and column are named.
        OSError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: not a text file") from None
    provenance, first = _provenance(path, lines)
    table = list(csv.reader(lines[first:]))
    header = table[0] if table else []
    known = (*COLUMNS, *EXTRA_COLUMNS)
    for name in header:
        if name not in known:
            raise ProfileError(f"{path}: unknown column {name!r}; {nearest(name, list(known))}")
    for name in COLUMNS:
        if name not in header and name != POWER:
            raise ProfileError(f"{path}: column {name!r} is missing")
    texts: dict[str, list[str]] = {name: [] for name in header}
    for line, cells in enumerate(table[1:], start=first + 2):
        if len(cells) != len(header):
            raise ProfileError(f"{path}:{line}: {len(cells)} values for {len(header)} columns")
        for name, cell in zip(header, cells, strict=True):
            texts[name].append(cell)
    columns = {
        name: np.array([_number(cell, f"{path}:{line}: {name}") for line, cell in enumerate(cells, start=first + 2)])
        for name, cells in texts.items()
        if name != "point"
    }
    rows = len(table) - 1
    if rows < 1:
        raise ProfileError(f"{path}: no row")
    columns.setdefault(POWER, np.full(rows, np.nan))
    host_ms = columns.pop("host_ms", np.zeros(rows))
    iterations = Iterations(**columns)
    _check_rows(path, iterations, host_ms, first + 2)
    points = np.array(texts["point"], dtype=np.str_) if "point" in texts else work_of(iterations)
    return Profiled(iterations, host_ms, points, provenance)


def _provenance(path: Path, lines: list[str]) -> tuple[dict[str, Any], int]:
    """What the comment lines at the top say, and the index of the first line below them."""
    first = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
    provenance: dict[str, Any] = {}
    for index, line in enumerate(lines[:first]):
        try:
            provenance |= json.loads(line[1:])
        except (ValueError, TypeError) as error:
            raise ProfileError(f"{path}:{index + 1}: provenance must be one JSON object per line ({error})") from None
    return provenance, first


def _check_rows(path: Path, iterations: Iterations, host_ms: Floats, first_line: int) -> None:
    """Refuse rows that are no iteration."""
    decode, prefill = iterations.batch > 0, iterations.prefill_tokens > 0
    busy_ms = np.where(decode | prefill, iterations.latency_ms, np.inf)
    faults = {
        "an iteration must be prefill or decode, this one is both": decode & prefill,
        "latency_ms must be positive": busy_ms <= 0,
        "host_ms must be less than latency_ms": host_ms >= busy_ms,
    }
    for fault, rows in faults.items():
        if rows.any():
            raise ProfileError(f"{path}:{first_line + int(rows.argmax())}: {fault}")


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
