"""Units of both phases under load: both notions of attainment, in closed form and against a queue written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.planning import units
from biscale_gym.planning.classes import Measurement
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.probing import UnitOutcome, serve_together
from biscale_gym.planning.relaxation import usable_units
from biscale_gym.planning.units import Unit, keeps, measured_units
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

SLO = SloSettings(ttft_s=0.2, tpot_s=0.015)
UNIT = Unit(InstanceSpec("prefill", 2, 1980), 1, InstanceSpec("decode", 4, 1980), 1)


@pytest.fixture
def measurement(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(tmp_path))
    count = 1000
    # One in twelve has a prompt that takes longer than the SLO allows, another one in twelve so few tokens that the
    # transfer of its KV weighs on each; far apart, so that nobody waits.
    kind = np.arange(count) % 12
    training = Trace(
        5.0 * np.arange(count),
        np.where(kind == 3, 8000, np.where(kind == 7, 1600, 100)),
        np.where(kind == 7, 2, 60),
    )
    return Measurement(
        profile=profile,
        cluster=ClusterSettings(),
        slo=SLO,
        training=training,
        headroom=1.0,
        quantile=0.9,
        requests_per_probe=300,
        warmup_s=0.0,
        rate_tolerance=0.05,
        seed=1,
    )


def outcome_of(measurement: Measurement) -> UnitOutcome:
    return serve_together(
        measurement.profile,
        ClusterSettings(nodes=1),
        Placement(UNIT.instances),
        measurement.training,
        slo=SLO,
        quantile=measurement.quantile,
        warmup_s=0.0,
    )


def test_the_notions_differ_where_other_requests_fail_in_the_other_phase(measurement: Measurement) -> None:
    outcome = outcome_of(measurement)
    assert outcome.ttft_s <= SLO.ttft_s
    assert outcome.tpot_s <= SLO.tpot_s
    assert outcome.within_both == pytest.approx(10 / 12, abs=0.002)
    assert keeps(outcome, measurement, "separate")
    assert not keeps(outcome, measurement, "joint")
    assert keeps(outcome, replace(measurement, quantile=0.83), "joint")


def test_the_notions_agree_where_the_same_requests_fail(measurement: Measurement) -> None:
    kind = np.arange(1000) % 12
    both = Trace(5.0 * np.arange(1000), np.where(kind == 3, 8000, 100), np.where(kind == 3, 2, 60))
    measurement = replace(measurement, training=both)
    outcome = outcome_of(measurement)
    assert outcome.within_both == pytest.approx(11 / 12, abs=0.002)
    assert keeps(outcome, measurement, "separate")
    assert keeps(outcome, measurement, "joint")


def test_requests_that_nobody_can_hold_fail(measurement: Measurement) -> None:
    batching = ClusterSettings().batching.model_copy(update={"decode_kv_tokens": 5000})
    outcome = serve_together(
        measurement.profile,
        ClusterSettings(nodes=1, batching=batching),
        Placement(UNIT.instances),
        measurement.training,
        slo=SloSettings(ttft_s=10.0, tpot_s=10.0),
        quantile=0.95,
        warmup_s=0.0,
    )
    assert outcome.within_both == pytest.approx(11 / 12, abs=0.002)
    assert outcome.ttft_s == outcome.tpot_s == np.inf


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A queue with a closed form in place of the simulation: TTFT and TPOT fail in turn as the load grows."""
    asked = []

    def serve(profile, cluster, placement, trace, **given):  # type: ignore[no-untyped-def]
        asked.append(trace.rate_rps)
        slo, busy = given["slo"], trace.rate_rps / (2.0 * placement.gpus)
        fails_s = 0.1 * busy * 0.2 / slo.ttft_s
        return UnitOutcome(0.2 * busy, 0.014, 1.0 - 2.0 * fails_s)

    monkeypatch.setattr(units, "serve_together", serve)
    return asked


def test_a_units_rate_is_where_its_notion_begins_to_fail(measurement: Measurement, queue: list[float]) -> None:
    twice = Unit(replace(UNIT.prefill, pp=2), 1, replace(UNIT.decode, pp=2), 1)
    separate = measured_units(measurement, (UNIT, twice), "separate")
    joint = measured_units(measurement, (UNIT, twice), "joint")
    # The rate of a random trace is known to a few per cent.
    for one, limit_rps in zip(separate, (12.0, 24.0), strict=True):
        assert one.rate_rps == pytest.approx(limit_rps, rel=0.12)
    for one, limit_rps in zip(joint, (6.0, 12.0), strict=True):
        assert one.rate_rps == pytest.approx(limit_rps, rel=0.12)
    before = len(queue)
    assert measured_units(measurement, (UNIT, twice), "joint") == joint
    assert len(queue) == before


def test_an_slo_that_no_unit_keeps_is_relaxed_and_told(measurement: Measurement, queue: list[float]) -> None:
    strict = replace(measurement, slo=SloSettings(ttft_s=0.2, tpot_s=0.004))
    (one,), notes = usable_units(strict, (UNIT,), "separate")
    assert one.rate_rps > 0.0
    assert notes == (
        "no unit keeps the SLO at any rate: planned for 4 times it, the least relaxation (by doubling) "
        "that any unit keeps",
    )
    assert usable_units(measurement, (UNIT,), "separate")[1] == ()


def test_no_units_is_an_error(measurement: Measurement) -> None:
    with pytest.raises(PlanningError, match="share a node"):
        measured_units(measurement, (), "joint")
