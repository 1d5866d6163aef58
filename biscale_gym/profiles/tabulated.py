"""The table form: costs on a grid, measured or fitted elsewhere, compiled to the same vector as every other form."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_gym.profiles import layout as at
from biscale_gym.profiles.profile import Profile, ProfileError, Vector

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ProfileTable:
    """Costs of one TP degree on a grid.

    Attributes:
        clocks_mhz: ascending, shape (c,).
        idle_power_w: per GPU, shape (c,).
        decode_batches: ascending, from 1, at least two, shape (b,).
        decode_kv_tokens: a regular grid from 0, at least two, shape (k,).
        decode_latency_s, decode_power_w: shape (c, b, k).
        prefill_tokens: ascending, at least two, shape (m,).
        prefill_mean_length: knots of the mean prompt length as a token sees it, sum of squares / sum; shape (l,).
        prefill_latency_s, prefill_power_w: shape (c, m, l).
    """

    clocks_mhz: Floats
    idle_power_w: Floats
    decode_batches: Floats
    decode_kv_tokens: Floats
    decode_latency_s: Floats
    decode_power_w: Floats
    prefill_tokens: Floats
    prefill_mean_length: Floats
    prefill_latency_s: Floats
    prefill_power_w: Floats

    def __post_init__(self) -> None:
        """Refuse shapes, orders and values that cannot be interpolated."""
        for field in fields(self):
            values = np.ascontiguousarray(getattr(self, field.name), dtype=np.float64)
            object.__setattr__(self, field.name, values)
            if not np.all(np.isfinite(values)):
                raise ProfileError(f"profile table: {field.name} holds a value that is not finite")
        c = self.clocks_mhz.size
        decode = (c, self.decode_batches.size, self.decode_kv_tokens.size)
        prefill = (c, self.prefill_tokens.size, self.prefill_mean_length.size)
        expected = {
            "idle_power_w": (c,),
            "decode_latency_s": decode,
            "decode_power_w": decode,
            "prefill_latency_s": prefill,
            "prefill_power_w": prefill,
        }
        for name, shape in expected.items():
            values = getattr(self, name)
            if values.shape != shape:
                raise ProfileError(f"profile table: {name} has shape {values.shape}, its knots say {shape}")
            if values.min() < 0 or (name.endswith("latency_s") and values.min() <= 0):
                raise ProfileError(f"profile table: {name} must be positive")
        for name in ("clocks_mhz", "decode_batches", "decode_kv_tokens", "prefill_tokens", "prefill_mean_length"):
            knots = getattr(self, name)
            if knots.size < (1 if name == "clocks_mhz" else 2) or np.any(np.diff(knots) <= 0):
                raise ProfileError(f"profile table: {name} must be ascending, with at least two knots")
        steps = np.diff(self.decode_kv_tokens)
        if self.decode_kv_tokens[0] != 0 or not np.allclose(steps, steps[0]):
            raise ProfileError("profile table: decode_kv_tokens must be a regular grid that starts at 0")
        if self.decode_batches[0] != 1:
            raise ProfileError("profile table: decode_batches must start at 1")

    def save(self, path: Path) -> None:
        """Write the table as ``.npz``."""
        with path.open("wb") as stream:
            np.savez_compressed(stream, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ProfileTable:
        """Read a table written by ``save``.

        Raises:
            ProfileError: the file is missing, is not such a table, or lacks an array.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ProfileError(f"{path}: not a profile table ({error})") from error
        except ValueError as error:
            raise ProfileError(f"{path}: {error}") from error


@dataclass(frozen=True)
class TabulatedProfile(Profile):
    """Costs by interpolation in tables, one per TP degree.

    Decode is linear between batch knots and between KV knots, prefill bilinear between its knots, both in latency and
    in joules per iteration; beyond the outermost knots the last cell is continued. A mixed iteration costs the sum of
    both parts.
    """

    tables: Mapping[int, ProfileTable]

    def __post_init__(self) -> None:
        """Refuse a set of tables without a common list of clocks."""
        if not self.tables:
            raise ProfileError(f"{self.hardware.description}: no table for {self.model_name} in {self.precision}")
        if not self.clocks_mhz:
            raise ProfileError(f"{self.hardware.description}: the tables of {self.model_name} share no clock")

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Clocks that every table has."""
        common = set.intersection(*(set(table.clocks_mhz.astype(int).tolist()) for table in self.tables.values()))
        return tuple(sorted(common))

    @property
    def tensor_parallel_degrees(self) -> tuple[int, ...]:
        """TP degrees with a table."""
        return tuple(sorted(self.tables))

    @property
    def hash(self) -> str:
        """Identifies settings and table contents."""
        digest = hashlib.sha256(super().hash.encode())
        for tp in self.tensor_parallel_degrees:
            digest.update(str(tp).encode())
            for field in fields(self.tables[tp]):
                digest.update(np.ascontiguousarray(getattr(self.tables[tp], field.name)).tobytes())
        return digest.hexdigest()[:16]

    def _compile(self, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
        return compile_table(self.tables[tp], tp, clocks_mhz, max_batch)


def compile_table(table: ProfileTable, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
    """The compiled profile of one table, for clocks that it has."""
    chosen = np.searchsorted(table.clocks_mhz, clocks_mhz)
    clocks, segments = len(clocks_mhz), table.decode_kv_tokens.size - 1
    decode = at.HEADER + clocks * at.ROW
    prefill = decode + segments * (max_batch + 1) * clocks * at.ENTRY
    knots = np.concatenate([table.prefill_tokens, table.prefill_mean_length])
    joules = table.prefill_latency_s * table.prefill_power_w
    grid = np.stack([table.prefill_latency_s, joules], axis=-1)[chosen].ravel()
    vector = np.zeros(prefill + knots.size + grid.size)
    vector[at.KIND], vector[at.CLOCKS], vector[at.MAX_BATCH], vector[at.TP] = at.TABULATED, clocks, max_batch, tp
    vector[at.DECODE], vector[at.BATCH_STRIDE] = decode, clocks * at.ENTRY
    vector[at.KV_SEGMENTS], vector[at.KV_STEP] = segments, table.decode_kv_tokens[1]
    vector[at.PREFILL], vector[at.LIMIT_W] = prefill, np.inf
    vector[at.PREFILL_TOKEN_KNOTS] = table.prefill_tokens.size
    vector[at.PREFILL_LENGTH_KNOTS] = table.prefill_mean_length.size
    rows = vector[at.HEADER : decode].reshape(clocks, at.ROW)
    rows[:, at.GHZ] = np.asarray(clocks_mhz) / 1000
    rows[:, at.IDLE] = table.idle_power_w[chosen]
    rows[:, at.HEADROOM_W] = np.inf
    entries = vector[decode:prefill].reshape(segments, max_batch + 1, clocks, at.ENTRY)
    latency_s, decode_j = table.decode_latency_s[chosen], (table.decode_latency_s * table.decode_power_w)[chosen]
    for values, constant, slope in ((latency_s, at.A, at.C), (decode_j, at.N0, at.NK)):
        dense = _every_batch(table.decode_batches, values, max_batch)
        slopes = np.diff(dense, axis=2) / table.decode_kv_tokens[1]
        starts = dense[:, :, :-1] - slopes * table.decode_kv_tokens[:-1]
        entries[..., slope] = slopes.transpose(2, 1, 0)
        entries[..., constant] = starts.transpose(2, 1, 0)
    vector[prefill : prefill + knots.size] = knots
    vector[prefill + knots.size :] = grid
    return vector


def _every_batch(knots: Floats, values: Floats, max_batch: int) -> Floats:
    """Values (c, b, k) at every batch 0..max_batch, linear between knots and beyond the last; batch 0 is batch 1."""
    batch = np.maximum(np.arange(max_batch + 1), 1.0)
    cell = np.clip(np.searchsorted(knots, batch, side="right") - 1, 0, knots.size - 2)
    share = ((batch - knots[cell]) / (knots[cell + 1] - knots[cell]))[None, :, None]
    interpolated: Floats = (1 - share) * values[:, cell] + share * values[:, cell + 1]
    return interpolated


def tabulate(
    profile: Profile,
    tp: int,
    clocks_mhz: Sequence[int],
    batches: Sequence[int],
    kv_tokens: Sequence[float],
    prefill_tokens: Sequence[float],
    mean_lengths: Sequence[float],
) -> ProfileTable:
    """Any profile on a grid of your own, knots as in ``ProfileTable``."""
    b, kv = np.meshgrid(np.asarray(batches, dtype=float), np.asarray(kv_tokens, dtype=float), indexing="ij")
    m, length = np.meshgrid(np.asarray(prefill_tokens, float), np.asarray(mean_lengths, float), indexing="ij")
    decode = [(profile.latency_ms(tp, f, b, kv), profile.power_w(tp, f, b, kv)) for f in clocks_mhz]
    prefill = [
        (profile.latency_ms(tp, f, 0, 0, m, m * length), profile.power_w(tp, f, 0, 0, m, m * length))
        for f in clocks_mhz
    ]
    return ProfileTable(
        clocks_mhz=np.asarray(clocks_mhz, dtype=float),
        idle_power_w=np.array([profile.idle_power_w(tp, f) for f in clocks_mhz]),
        decode_batches=np.asarray(batches, dtype=float),
        decode_kv_tokens=np.asarray(kv_tokens, dtype=float),
        decode_latency_s=1e-3 * np.array([latency for latency, _ in decode]),
        decode_power_w=np.array([power for _, power in decode]),
        prefill_tokens=np.asarray(prefill_tokens, dtype=float),
        prefill_mean_length=np.asarray(mean_lengths, dtype=float),
        prefill_latency_s=1e-3 * np.array([latency for latency, _ in prefill]),
        prefill_power_w=np.array([power for _, power in prefill]),
    )
