"""Generated traces: reproducible, at the rate asked for, and as bursty as they say."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from biscale_gym.config import ConfigError, preset_names, validate
from biscale_gym.traces import Trace, TraceError, WorkloadSettings, generate, load_workload, thin
from biscale_gym.traces.arrivals import day_curve
from biscale_gym.traces.settings import DiurnalArrivals
from biscale_gym.traces.statistics import index_of_dispersion, interarrival_cv, window_counts, window_rates

PRESETS = preset_names("workloads")


def workload(arrivals: dict[str, object], rank_correlation: float = 0.0) -> WorkloadSettings:
    lognormal = {"kind": "lognormal", "mu": 5.0, "sigma": 1.0, "min_tokens": 1, "max_tokens": 100_000}
    lengths = {"prompt_tokens": lognormal, "output_tokens": lognormal, "rank_correlation": rank_correlation}
    values = {"name": "w", "description": "d", "source": "s", "arrivals": arrivals, "lengths": lengths}
    return validate(WorkloadSettings, values, "test")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_generate_reproducibly(name: str) -> None:
    settings = load_workload(name)
    trace = generate(settings, 10.0, 900.0, seed=5)
    assert trace.hash == generate(settings, 10.0, 900.0, seed=5).hash
    assert trace.hash != generate(settings, 10.0, 900.0, seed=6).hash
    assert trace.name == name
    assert trace.duration_s < 900.0
    if name != "diurnal":
        assert len(trace) == pytest.approx(9_000, rel=0.06)


def test_the_arrivals_and_lengths_of_other_presets_are_taken_over() -> None:
    assert load_workload("paper").arrivals == load_workload("azure-conv-like").arrivals
    assert load_workload("paper").lengths == load_workload("sharegpt-like").lengths
    diurnal = load_workload("diurnal").arrivals
    assert isinstance(diurnal, DiurnalArrivals)
    assert diurnal.bands == load_workload("azure-conv-like").arrivals.bands  # type: ignore[union-attr]


def test_rate_changes_keep_lengths_in_order() -> None:
    settings = load_workload("paper")
    slow, fast = (generate(settings, rate, 600.0, seed=1) for rate in (5.0, 20.0))
    np.testing.assert_array_equal(fast.prompt_tokens[: len(slow)], slow.prompt_tokens)


def test_poisson_gaps_are_exponential() -> None:
    trace = generate(workload({"kind": "poisson"}), 5.0, 4_000.0, seed=0)
    assert kstest(np.diff(trace.arrival_s), "expon", args=(0.0, 0.2)).pvalue > 0.01


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_their_cv_at_every_rate(cv: float) -> None:
    for rate_rps in (2.0, 40.0):
        trace = generate(workload({"kind": "gamma", "cv": cv}), rate_rps, 60_000.0 / rate_rps, seed=0)
        assert interarrival_cv(trace) == pytest.approx(cv, rel=0.05)
        assert trace.rate_rps == pytest.approx(rate_rps, rel=0.05)


def test_markov_bursts() -> None:
    arrivals = {
        "kind": "markov",
        "states": [{"mean_s": 10.0, "relative_rate": 4.0}, {"mean_s": 30.0, "relative_rate": 0.0}],
        "next_state": [[0.0, 1.0], [1.0, 0.0]],
    }
    trace = generate(workload(arrivals), 10.0, 20_000.0, seed=0)
    assert len(trace) == pytest.approx(200_000, rel=0.01)
    silent = np.mean(window_counts(trace, 1.0) == 0)
    assert silent == pytest.approx(0.75, abs=0.05)
    # Interrupted Poisson process: over long windows the index of dispersion tends to 1 + 2 rate end / (end + start)^2.
    busy_rps, end, start = 40.0, 1.0 / 10.0, 1.0 / 30.0
    limit = 1.0 + 2.0 * busy_rps * end / (end + start) ** 2
    assert index_of_dispersion(trace, 400.0) == pytest.approx(limit, rel=0.35)


def test_a_silent_source_is_named() -> None:
    arrivals = {
        "kind": "markov",
        "states": [{"mean_s": 1e-3, "relative_rate": 1.0}, {"mean_s": 1e6, "relative_rate": 0.0}],
        "next_state": [[0.0, 1.0], [1.0, 0.0]],
    }
    with pytest.raises(TraceError, match="silent for all of 10 s"):
        generate(workload(arrivals), 1.0, 10.0, seed=0)


def test_a_day_follows_its_curve() -> None:
    arrivals = {"kind": "diurnal", "peak_to_trough": 4.0, "peak_hour": 15.0}
    trace = generate(workload(arrivals), 5.0, 86_400.0, seed=0)
    rates = window_rates(trace, 3_600.0)
    settings = DiurnalArrivals(kind="diurnal", peak_to_trough=4.0, peak_hour=15.0)
    expected = 5.0 * day_curve(settings, rates.start_s + 1_800.0)
    np.testing.assert_allclose(rates.requests_per_s, expected, rtol=0.05)
    assert rates.requests_per_s.max() / rates.requests_per_s.min() == pytest.approx(4.0, rel=0.1)


def test_thinning_and_generating_at_a_lower_rate_agree() -> None:
    settings = load_workload("azure-conv-like")
    direct = generate(settings, 5.0, 3_600.0, seed=2)
    thinned = thin(generate(settings, 20.0, 3_600.0, seed=2), 0.25, seed=9)
    for window_s in (10.0, 60.0):
        # One course of the rate underlies both, so their curves differ only by Poisson noise.
        assert index_of_dispersion(thinned, window_s) == pytest.approx(index_of_dispersion(direct, window_s), rel=0.2)


def test_lengths_have_their_rank_correlation() -> None:
    trace = generate(workload({"kind": "poisson"}, rank_correlation=-0.4), 100.0, 400.0, seed=0)
    assert spearmanr(trace.prompt_tokens, trace.output_tokens).statistic == pytest.approx(-0.4, abs=0.02)


def test_a_day_of_2_6_million_requests_takes_seconds() -> None:
    settings = load_workload("paper")
    start = time.process_time()
    trace = generate(settings, 30.0, 86_400.0, seed=0)
    assert len(trace) == pytest.approx(2_592_000, rel=0.01)
    assert time.process_time() - start < 10.0


def test_misuse_is_named(tmp_path: Path) -> None:
    settings = load_workload("sharegpt-like")
    with pytest.raises(TraceError, match=r"rate_rps is 0\.0, expected a positive number"):
        generate(settings, 0.0, 10.0, 0)
    with pytest.raises(TraceError, match="duration_s is nan"):
        generate(settings, 1.0, float("nan"), 0)
    with pytest.raises(TraceError, match="no request of 'sharegpt-like' in 1 s at 1e-06"):
        generate(settings, 1e-6, 1.0, 0)
    with pytest.raises(TraceError, match="no workload preset 'papper'; did you mean 'paper'"):
        load_workload("papper")

    circle = tmp_path / "circle.yaml"
    circle.write_text(f"description: d\nsource: s\narrivals: {circle}\nlengths: paper\n", encoding="utf-8")
    with pytest.raises(TraceError, match="in a circle"):
        load_workload(str(circle))


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ({"kind": "gamma", "cv": 0.0}, "greater than 0"),
        ({"kind": "gama", "cv": 1.0}, "arrivals"),
        ({"kind": "diurnal", "peak_to_trough": 0.5, "peak_hour": 3.0}, "greater than or equal to 1"),
        (
            {"kind": "markov", "states": [{"mean_s": 1.0, "relative_rate": 0.0}] * 2, "next_state": [[0, 1], [1, 0]]},
            "nothing would ever arrive",
        ),
        (
            {"kind": "markov", "states": [{"mean_s": 1.0, "relative_rate": 1.0}] * 2, "next_state": [[0, 0.5], [1, 0]]},
            "must sum to 1",
        ),
    ],
)
def test_bad_settings_are_named(arrivals: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workload(arrivals)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": [5, 4]}, "must ascend"),
        ({"tokens": [0, 4]}, "must ascend from at least 1"),
        ({"tokens": [1, 4], "probabilities": [0.0, 0.5]}, "rise from 0 to 1"),
        ({"tokens": [1, 4], "probabilities": [0.0, 0.5, 1.0]}, "3 probabilities for 2 tokens"),
    ],
)
def test_bad_quantile_tables_are_named(values: dict[str, object], message: str) -> None:
    marginal = {"kind": "quantiles", **values}
    lengths = {"prompt_tokens": marginal, "output_tokens": marginal}
    whole = {"name": "w", "description": "d", "source": "s", "arrivals": {"kind": "poisson"}, "lengths": lengths}
    with pytest.raises(ConfigError, match=message):
        validate(WorkloadSettings, whole, "test")


def test_published_means_of_the_figures_only_presets() -> None:
    def means(trace: Trace) -> tuple[float, float]:
        return float(trace.prompt_tokens.mean()), float(trace.output_tokens.mean())

    sharegpt = generate(load_workload("sharegpt-like"), 100.0, 3_000.0, seed=0)
    assert means(sharegpt) == pytest.approx((229.7, 203.1), rel=0.02)
    code = generate(load_workload("azure-code-like"), 2.57, 100_000.0, seed=0)
    assert means(code) == pytest.approx((2048, 27.9), rel=0.02)
    np.testing.assert_allclose(np.quantile(code.prompt_tokens, (0.5, 0.9)), (1469, 5188), rtol=0.03)
    np.testing.assert_allclose(np.quantile(code.output_tokens, (0.5, 0.9)), (13, 55), atol=2)
    hours = [generate(load_workload("azure-code-like"), 2.57, 3_432.0, seed) for seed in range(30)]
    assert np.mean([interarrival_cv(hour) for hour in hours]) == pytest.approx(13.2, rel=0.1)
