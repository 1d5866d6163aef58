"""What a controller believes: a profile learned from noisy iterations of the true one, wrong by a stated amount.

BiScale plans with models fitted to profiled iterations, not with the hardware. Here the iterations are drawn from the
true profile with measurement noise, boosted trees are fitted to them (fitted.py), and a smooth error of stated size may
be laid over the predicted latencies, as a model trained elsewhere or long ago would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from biscale_gym.config import Settings, cache_root
from biscale_gym.profiles.fitted import FitSettings, fit_tables, predict
from biscale_gym.profiles.iterations import Iterations, synthetic_iterations
from biscale_gym.profiles.profile import Profile, ProfileError
from biscale_gym.profiles.tabulated import ProfileTable, TabulatedProfile

_LARGEST_BATCH = 1024
_WAVES = 4
_LARGEST = 2.5
"""No point is off by more than so many times the mean."""

_FIT = FitSettings(folds=0)


class PredictionSettings(Settings):
    """How the predicted profile comes about.

    Attributes:
        rows: profiled iterations per TP degree, half prefill, half decode.
        noise: standard deviation of the logarithm of their latencies and powers.
        error: mean absolute relative error laid over the fitted latencies: a smooth random function of the batch
            (decode) or of tokens and mean length (prefill), the same at every clock.
        bias: factor on the fitted latencies; below 1 the controller is too hopeful.
        seed: of sample, noise and error.
    """

    rows: Annotated[int, Field(ge=200)] = 4000
    noise: Annotated[float, Field(ge=0)] = 0.02
    error: Annotated[float, Field(ge=0, lt=0.4)] = 0.0
    bias: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0


@dataclass(frozen=True)
class PredictionError:
    """Mean absolute percentage errors of a predicted profile against the truth, on iterations it was not fitted to."""

    tp: int
    phase: str
    latency_percent: float
    power_percent: float


def predicted_profile(profile: Profile, settings: PredictionSettings, clocks_mhz: Sequence[int]) -> TabulatedProfile:
    """The profile that a controller plans with; fits are kept on disk.

    Args:
        profile: the truth.
        settings: sample, noise and error.
        clocks_mhz: clocks that are profiled, ascending; the others are unknown to the controller.

    Raises:
        ProfileError: scikit-learn is not installed.
    """
    tables = {
        tp: _erring(profile, _fitted(profile, settings, tuple(clocks_mhz), tp), settings, tp)
        for tp in profile.tensor_parallel_degrees
    }
    decode = None if profile.decode is None else predicted_profile(profile.decode, settings, clocks_mhz)
    return TabulatedProfile(
        profile.hardware, profile.model, profile.model_name, profile.precision, tables, decode=decode
    )


def prediction_errors(
    profile: Profile, predicted: TabulatedProfile, rows: int = 2000, seed: int = 1
) -> list[PredictionError]:
    """How wrong a predicted profile is: per TP degree and phase, on ``rows`` fresh iterations without noise.

    Of both phases in the profile's own precision; of another one of decode, ask with ``profile.decode``.
    """
    errors = []
    for tp, table in predicted.tables.items():
        fresh = _profiled(profile, tp, predicted.clocks_mhz, rows, 0.0, seed)
        busy = fresh.rows((fresh.batch > 0) | (fresh.prefill_tokens > 0))
        percent = 100 * np.abs(predict(table, tp, busy) / np.column_stack([busy.latency_ms, busy.power_w_per_gpu]) - 1)
        for phase, mask in (("prefill", busy.prefill_tokens > 0), ("decode", busy.batch > 0)):
            latency, power = percent[mask].mean(axis=0)
            errors.append(PredictionError(tp, phase, float(latency), float(power)))
    return errors


def _profiled(profile: Profile, tp: int, clocks_mhz: Sequence[int], rows: int, noise: float, seed: int) -> Iterations:
    rng = np.random.default_rng([seed, tp])
    return synthetic_iterations(profile, tp, clocks_mhz, rows, noise, rng, largest_batch=_LARGEST_BATCH)


def _fitted(profile: Profile, settings: PredictionSettings, clocks_mhz: tuple[int, ...], tp: int) -> ProfileTable:
    try:
        import sklearn
    except ImportError as error:
        raise ProfileError("a predicted profile is fitted by scikit-learn: pip install 'biscale-gym[train]'") from error
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("fitted.py", "iterations.py"))
    sample = {name: getattr(settings, name) for name in ("rows", "noise", "seed")}
    key = [profile.hash, sample, clocks_mhz, tp, sklearn.__version__, hashlib.sha256(sources).hexdigest()]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_root() / "predictions" / f"{name}.npz"
    if path.exists():
        try:
            return ProfileTable.load(path)
        except ProfileError:
            path.unlink(missing_ok=True)
    iterations = _profiled(profile, tp, clocks_mhz, settings.rows, settings.noise, settings.seed)
    table = fit_tables(iterations, _FIT)[0][tp]
    _keep(table, path)
    return table


def _keep(table: ProfileTable, path: Path) -> None:
    """Write whole or not at all; a folder that cannot be written costs the next fit, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(descriptor)
        table.save(Path(temporary))
        Path(temporary).replace(path)
    except OSError:
        return


def _erring(profile: Profile, table: ProfileTable, settings: PredictionSettings, tp: int) -> ProfileTable:
    """``table`` with bias and smooth error on its latencies; its joules per iteration stay what they are."""
    if settings.error == 0.0 and settings.bias == 1.0:
        return table
    seen = _profiled(profile, tp, [int(clock) for clock in table.clocks_mhz], 1000, 0.0, settings.seed)
    decode, prefill = seen.rows(seen.batch > 0), seen.rows(seen.prefill_tokens > 0)
    knots = {
        "decode": (table.decode_batches, np.ones_like(table.decode_kv_tokens)),
        "prefill": (table.prefill_tokens, table.prefill_mean_length),
    }
    work = {
        "decode": (decode.batch, np.ones_like(decode.batch)),
        "prefill": (prefill.prefill_tokens, prefill.sum_len_sq / prefill.prefill_tokens),
    }
    changed = {}
    for number, (phase, axes) in enumerate(knots.items()):
        wave = _Waves(np.random.default_rng([settings.seed, tp, number]))
        size = np.abs(wave(*work[phase])).mean()
        error = np.clip(wave(*np.meshgrid(*axes, indexing="ij")) / size, -_LARGEST, _LARGEST)
        factor = settings.bias * (1.0 + settings.error * error)
        changed[f"{phase}_latency_s"] = getattr(table, f"{phase}_latency_s") * factor
        changed[f"{phase}_power_w"] = getattr(table, f"{phase}_power_w") / factor
    return replace(table, **changed)


class _Waves:
    """A smooth random function of the logarithms of two positive quantities."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._x, self._y = rng.normal(0.0, 0.7, (2, _WAVES))
        self._phase = rng.uniform(0.0, 2.0 * np.pi, _WAVES)

    def __call__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at points of one shape."""
        u, v = np.log(x)[..., None], np.log(y)[..., None]
        return np.asarray(np.cos(self._x * u + self._y * v + self._phase).sum(axis=-1))
