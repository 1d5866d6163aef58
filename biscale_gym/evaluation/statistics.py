"""Statistics of a few expensive runs: interquartile mean, stratified bootstrap, probability of improvement.

The aggregate and its interval follow R. Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (NeurIPS 2021); the interval of a plain mean is Student's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval; the ends are NaN where one run cannot give any."""

    value: float
    low: float
    high: float


def mean_interval(values: Floats) -> Interval:
    """Mean of n runs with Student's 95 % interval, mean ± t(n−1) · s/√n. ``values``: float64[n], n ≥ 1."""
    from scipy.special import stdtrit

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def interquartile_mean(values: Floats, axis: int | None = None) -> Floats:
    """Mean of what is left when the lowest and the highest quarter (rounded down) are cut off.

    ``values``: float64 of any shape; over all of it, or along ``axis``.
    """
    ordered = np.sort(values, axis=axis)
    along = 0 if axis is None else axis
    count = ordered.shape[along]
    cut = count // 4
    kept = np.take(ordered, np.arange(cut, count - cut), axis=along)
    return np.asarray(np.mean(kept, axis=along), dtype=np.float64)


def bootstrap_interval(
    strata: list[Floats], statistic: Callable[..., Floats], resamples: int = 2000, seed: int = 0
) -> Interval:
    """``statistic`` over all runs, with the 95 % percentile interval of a bootstrap within each stratum.

    ``strata``: one float64[n_k] per stratum (a scenario, a trace). ``statistic(values, axis=...)`` works along an axis.
    """
    rng = np.random.default_rng(seed)
    draws = [stratum[rng.integers(len(stratum), size=(resamples, len(stratum)))] for stratum in strata]
    replicates = statistic(np.concatenate(draws, axis=1), axis=1)
    low, high = np.quantile(replicates, (0.025, 0.975))
    return Interval(float(statistic(np.concatenate(strata), axis=0)), float(low), float(high))


def crossed_interval(
    strata: list[Floats], statistic: Callable[..., Floats], resamples: int = 2000, seed: int = 0
) -> Interval:
    """``statistic`` over all runs of trained agents, with a 95 % percentile interval that owns up to both their seeds.

    Every agent serves every traffic seed, so the runs are not independent. Agents and traffic seeds are therefore drawn
    anew as wholes, the same ones in every stratum, and each stratum keeps its size: A. B. Owen, "The pigeonhole
    bootstrap" (Annals of Applied Statistics 1, 2007), whose intervals are if anything too wide. With one agent and one
    stratum it is the ordinary bootstrap. Of a single run there is no interval: its ends are NaN.

    ``strata``: one float64[agents, traffic seeds] per stratum, all of one shape. ``statistic(values, axis=...)`` works
    along an axis.

    Raises:
        ValueError: the strata differ in shape.
    """
    shapes = {stratum.shape for stratum in strata}
    if len(shapes) != 1:
        raise ValueError(f"every stratum needs runs of the same agents and seeds, got the shapes {sorted(shapes)}")
    ((agents, seeds),) = shapes
    value = float(statistic(np.concatenate([stratum.ravel() for stratum in strata]), axis=0))
    if agents * seeds < 2:
        return Interval(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    agent = rng.integers(agents, size=(resamples, agents))[:, :, None]
    traffic = rng.integers(seeds, size=(resamples, seeds))[:, None, :]
    draws = [stratum[agent, traffic].reshape(resamples, -1) for stratum in strata]
    low, high = np.quantile(statistic(np.concatenate(draws, axis=1), axis=1), (0.025, 0.975))
    return Interval(value, float(low), float(high))


def probability_of_improvement(ours: list[Floats], theirs: list[Floats]) -> float:
    """Chance that a run of ours has the *lower* value than one of theirs, ties counted half, averaged over strata.

    It is the Mann–Whitney U statistic over n·m. ``ours``, ``theirs``: one float64[n_k], float64[m_k] per stratum.
    """
    chances = []
    for mine, other in zip(ours, theirs, strict=True):
        lower = mine[:, None] < other[None, :]
        ties = mine[:, None] == other[None, :]
        chances.append(float(np.mean(lower + 0.5 * ties)))
    return float(np.mean(chances))
