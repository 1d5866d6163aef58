"""Load curves: what is read off windows, what a curve looks like, and that it is measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biscale_gym.cluster.policy import hold
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.planning import curves, table_cache
from biscale_gym.planning.classes import Measurement
from biscale_gym.planning.curves import (
    CurvePolicy,
    LoadCurve,
    LoadPoint,
    Windows,
    load_curves,
    measure_curve,
    points_of,
    serve_windows,
)
from biscale_gym.profiles import Profile
from biscale_gym.traces.trace import Trace

CLOCKS_MHZ = (750, 1110, 1830)
WINDOW_S = 60.0


@pytest.fixture(scope="module")
def training() -> Trace:
    rng = np.random.default_rng(0)
    n = 3000
    return Trace(
        np.cumsum(rng.exponential(0.1, n)), rng.integers(10, 600, n), rng.integers(2, 300, n), "poisson at 10/s"
    )


@pytest.fixture
def measurement(profile: Profile, training: Trace) -> Measurement:
    return Measurement(
        profile=profile,
        cluster=ClusterSettings(),
        slo=SloSettings(ttft_s=0.6, tpot_s=0.1),
        training=training,
        headroom=0.95,
        quantile=0.99,
        requests_per_probe=500,
        warmup_s=5.0,
        rate_tolerance=0.02,
        seed=1,
    )


def held(clock_mhz: int) -> CurvePolicy:
    """A clock that stays."""
    return CurvePolicy(PhasePolicy(function=hold), CLOCKS_MHZ, clock_mhz, "none")


def test_windows_share_out_a_runs_requests_and_joules(measurement: Measurement, training: Trace) -> None:
    seen = serve_windows(measurement, "prefill", 2, held(1830), training, WINDOW_S)
    whole = serve_windows(measurement, "prefill", 2, held(1830), training, 1e9)
    assert len(seen.load_rps) == round(training.duration_s / WINDOW_S)
    assert len(whole.load_rps) == 1
    later = training.arrival_s >= measurement.warmup_s
    mean = training.prompt_tokens[later].sum() / training.prompt_tokens.mean() / (training.duration_s - 5.0)
    assert whole.load_rps[0] == pytest.approx(mean)
    lengths_s = np.full(len(seen.load_rps), WINDOW_S)
    # The first window begins after the warm-up, the second at a multiple of the window.
    lengths_s[0] = WINDOW_S - measurement.warmup_s
    lengths_s[-1] = training.duration_s - WINDOW_S * (len(lengths_s) - 1)
    counted_s = training.duration_s - measurement.warmup_s
    assert seen.load_rps @ lengths_s == pytest.approx(whole.load_rps[0] * counted_s)
    assert seen.power_w @ lengths_s == pytest.approx(whole.power_w[0] * counted_s)


@pytest.mark.parametrize("window_s", [2.0, 4.9, 5.1, 7.0])
def test_windows_may_be_shorter_than_the_warm_up(measurement: Measurement, training: Trace, window_s: float) -> None:
    seen = serve_windows(measurement, "prefill", 2, held(1830), training, window_s)
    whole = serve_windows(measurement, "prefill", 2, held(1830), training, 1e9)
    assert len(seen.load_rps) == pytest.approx((training.duration_s - measurement.warmup_s) / window_s, abs=1.5)
    assert seen.power_w.mean() == pytest.approx(whole.power_w[0], rel=0.05)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_curve_rises_and_ends_where_requests_are_late(measurement: Measurement, phase: Any) -> None:
    curve = measure_curve(measurement, phase, 2, held(1110), WINDOW_S)
    rates = [point.load_rps for point in curve.points]
    powers = [point.power_w for point in curve.points]
    missed = [point.missed for point in curve.points]
    assert rates == sorted(rates)
    assert powers == sorted(powers)
    assert missed == sorted(missed)
    assert missed[0] < 0.01
    assert missed[-1] > 0.1
    idle_w = 2.0 * measurement.profile.idle_power_w(2, 1110)
    assert idle_w < powers[0] < powers[-1] < 2 * 700.0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_longer_requests_are_more_load(measurement: Measurement, training: Trace, phase: Any) -> None:
    twice = Trace(training.arrival_s, 2 * training.prompt_tokens, 2 * training.output_tokens)
    once, longer = (serve_windows(measurement, phase, 2, held(1830), trace, 1e9) for trace in (training, twice))
    assert longer.load_rps[0] == pytest.approx(2.0 * once.load_rps[0])


@pytest.mark.parametrize("always", [0.0, 0.02])
def test_near_its_limit_a_curve_is_measured_in_fine_steps(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch, always: float
) -> None:
    requests: dict[float, int] = {}

    def probe(training: Any, rate_rps: float, count: int, seed: int) -> float:
        requests[rate_rps] = count
        return rate_rps

    def windows(measurement: Any, phase: Any, tp: int, served: Any, rate_rps: float, window_s: float) -> Windows:
        return Windows(np.array([rate_rps]), np.array([100.0]), np.array([always if rate_rps < 10.0 else 1.0]))

    monkeypatch.setattr(curves, "probe_trace", probe)
    monkeypatch.setattr(curves, "serve_windows", windows)
    points = measure_curve(measurement, "prefill", 2, held(1), 1.0).points
    last = max(point.load_rps for point in points if point.missed <= always)
    first = min(point.load_rps for point in points if point.missed > always)
    assert 10.0 / curves.FINE_STEP < last < 10.0 <= first <= 10.0 * curves.FINE_STEP
    # What is late at any rate is no limit: coarse steps go on.
    assert len(requests) < 25
    assert requests[last] == curves.FINE_REQUESTS * measurement.requests_per_probe
    assert requests[min(requests)] == measurement.requests_per_probe


def test_where_requests_are_long_a_curve_begins_lower(measurement: Measurement, training: Trace) -> None:
    longer = Trace(training.arrival_s, 40 * training.prompt_tokens, training.output_tokens, "long prompts")
    long = replace(measurement, training=longer, slo=SloSettings(ttft_s=10.0, tpot_s=0.1))
    curve = measure_curve(long, "prefill", 2, held(1110), WINDOW_S)
    carried = [point.load_rps for point in curve.points if point.missed < 0.05]
    assert carried
    assert max(carried) < 2 * curves.FIRST_RATE_RPS
    assert curve.points[-1].missed > 0.1


def test_a_faster_clock_carries_more_for_more_power(measurement: Measurement) -> None:
    slow, fast = (measure_curve(measurement, "prefill", 2, held(clock), WINDOW_S) for clock in (750, 1830))

    def carried(curve: LoadCurve) -> float:
        return max(point.load_rps for point in curve.points if point.missed < 0.01)

    assert carried(fast) > 1.2 * carried(slow)
    at = np.array([0.5 * carried(slow)])
    assert fast.at(at)[0] > slow.at(at)[0]


def test_between_its_points_a_curve_is_linear_and_beyond_them_infinite() -> None:
    curve = LoadCurve("decode", 2, (LoadPoint(2.0, 100.0, 0.0), LoadPoint(4.0, 300.0, 0.2)))
    power_w, missed = curve.at(np.array([1.0, 3.0, 4.0, 4.1]))
    np.testing.assert_allclose(power_w, [100.0, 200.0, 300.0, np.inf])
    np.testing.assert_allclose(missed, [0.0, 0.1, 0.2, np.inf])


def test_curves_measured_by_other_code_are_not_taken(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_cache, "cache_root", lambda: tmp_path)
    asked: list[str] = []

    def measure(measurement: Any, phase: Any, tp: int, served: Any, window_s: float) -> LoadCurve:
        asked.append(phase)
        return LoadCurve(phase, tp, (LoadPoint(1.0, 100.0, 0.0),))

    monkeypatch.setattr(curves, "measure_curve", measure)
    changed = tmp_path / "curves.py"
    changed.write_text(Path(curves.__file__).read_text() + "\nSTEP = 2.0\n")
    for source in (curves.__file__, str(changed), curves.__file__):
        monkeypatch.setattr(curves, "__file__", source)
        load_curves(measurement, [("prefill", 2)], {"prefill": held(1110)}, WINDOW_S)
    assert asked == ["prefill"] * 2


def test_curves_are_measured_once(measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "cache_root", lambda: tmp_path)
    asked: list[tuple[Any, ...]] = []

    def measure(measurement: Any, phase: Any, tp: int, served: Any, window_s: float) -> LoadCurve:
        asked.append((phase, tp))
        return LoadCurve(phase, tp, (LoadPoint(1.0, float(tp), 0.0),))

    monkeypatch.setattr(curves, "measure_curve", measure)
    kinds: list[Any] = [("prefill", 2), ("decode", 4)]
    policies: Any = {"prefill": held(1110), "decode": held(1110)}
    first = load_curves(measurement, kinds, policies, WINDOW_S)
    assert load_curves(measurement, kinds, policies, WINDOW_S) == first
    assert asked == kinds
    others: Any = {**policies, "decode": replace(held(1110), code="another")}
    load_curves(measurement, kinds, others, WINDOW_S)
    assert asked == [*kinds, ("decode", 4)]
    load_curves(replace(measurement, slo=SloSettings(ttft_s=0.5, tpot_s=0.1)), kinds[:1], policies, WINDOW_S)
    assert asked[3:] == [("prefill", 2)]


def test_a_window_after_an_overload_says_nothing_of_its_own_rate() -> None:
    quiet = Windows(np.array([10.0, 10.0]), np.array([100.0, 100.0]), np.array([0.0, 0.0]))
    after = Windows(np.array([30.0, 10.0]), np.array([400.0, 390.0]), np.array([0.9, 0.8]))
    points = points_of([quiet, after])
    assert [(point.load_rps, point.power_w, point.missed) for point in points] == [
        (10.0, 100.0, 0.0),
        (30.0, 400.0, 0.9),
    ]
