from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biscale_gym.evaluation.statistics import (
    bootstrap_interval,
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
