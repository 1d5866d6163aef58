from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biscale_gym.evaluation.statistics import (
    bootstrap_interval,
    crossed_interval,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 40])
def test_interquartile_mean_is_scipys_trimmed_mean(rng: np.random.Generator, count: int) -> None:
    values = rng.normal(size=(5, count))
    np.testing.assert_allclose(interquartile_mean(values, axis=1), stats.trim_mean(values, 0.25, axis=1), rtol=1e-14)


def test_mean_interval_is_students(rng: np.random.Generator) -> None:
    values = rng.normal(5.0, 2.0, 6)
    interval = mean_interval(values)
    low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert (interval.value, interval.low, interval.high) == pytest.approx((values.mean(), low, high))
    single = mean_interval(values[:1])
    assert single.value == values[0]
    assert np.isnan(single.low)


def test_bootstrap_interval_is_scipys_on_one_stratum(rng: np.random.Generator) -> None:
    values = rng.lognormal(size=30)
    ours = bootstrap_interval([values], interquartile_mean, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), interquartile_mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_bootstrap_resamples_within_strata(rng: np.random.Generator) -> None:
    strata = [np.full(5, 1.0), np.full(5, 9.0)]
    interval = bootstrap_interval(strata, lambda values, axis: np.mean(values, axis=axis))
    assert (interval.value, interval.low, interval.high) == (5.0, 5.0, 5.0)


def test_probability_of_improvement_is_mann_whitneys(rng: np.random.Generator) -> None:
    ours, theirs = rng.integers(0, 8, 20).astype(float), rng.integers(2, 10, 15).astype(float)
    chance = stats.mannwhitneyu(theirs, ours).statistic / (20 * 15)
    assert probability_of_improvement([ours], [theirs]) == pytest.approx(chance)
    assert probability_of_improvement([ours, np.zeros(2)], [theirs, np.ones(2)]) == pytest.approx((chance + 1.0) / 2)


def test_crossed_interval_of_one_agent_is_the_ordinary_bootstrap(rng: np.random.Generator) -> None:
    values = rng.lognormal(size=30)
    ours = crossed_interval([values[None, :]], interquartile_mean, resamples=20_000)
    theirs = bootstrap_interval([values], interquartile_mean, resamples=20_000)
    assert ours.value == theirs.value
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_crossed_interval_covers_agents_that_differ(rng: np.random.Generator) -> None:
    """Twenty seeds tell nothing of a seventh agent: runs taken for independent give far too narrow an interval."""

    def mean(values: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(values, axis=axis)

    covered = {"crossed": 0, "independent": 0}
    for _ in range(200):
        runs = rng.normal(0.0, 1.0, (6, 1)) + rng.normal(0.0, 0.3, (1, 20)) + rng.normal(0.0, 0.3, (6, 20))
        crossed = crossed_interval([runs], mean, resamples=400)
        independent = bootstrap_interval([runs.ravel()], mean, resamples=400)
        covered["crossed"] += crossed.low <= 0.0 <= crossed.high
        covered["independent"] += independent.low <= 0.0 <= independent.high
    assert covered["independent"] < 100
    assert covered["crossed"] > 160


def test_crossed_interval_draws_the_same_seeds_in_every_stratum() -> None:
    """What one stratum loses to a seed another gains, so the mean over both does not depend on the draw."""
    values = np.arange(10.0)[None, :]
    interval = crossed_interval([values, 9.0 - values], lambda drawn, axis: np.mean(drawn, axis=axis))
    assert interval.low == pytest.approx(4.5)
    assert interval.high == pytest.approx(4.5)


def test_crossed_interval_of_a_single_run_has_no_ends_and_of_unlike_strata_none() -> None:
    single = crossed_interval([np.array([[2.0]])], interquartile_mean)
    assert single.value == 2.0
    assert np.isnan([single.low, single.high]).all()
    with pytest.raises(ValueError, match="every stratum needs runs of the same agents and seeds"):
        crossed_interval([np.ones((1, 2)), np.ones((2, 2))], interquartile_mean)
