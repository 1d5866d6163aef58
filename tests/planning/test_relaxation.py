"""Where no class keeps an SLO at any rate: the least relaxation, by doubling, and a note of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.planning import classes
from biscale_gym.planning.classes import Column, InstanceClass, Measurement
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.probing import ProbeOutcome
from biscale_gym.planning.relaxation import usable_table
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

CLOCKS_MHZ = (705, 1980)
COLUMNS = [Column(phase, tp, 1, CLOCKS_MHZ) for phase in ("prefill", "decode") for tp in (2, 4)]
SLO = SloSettings(ttft_s=0.6, tpot_s=0.1)


@pytest.fixture
def measurement(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(tmp_path))
    monkeypatch.setattr(classes, "default_workers", lambda: 1)
    rng = np.random.default_rng(0)
    training = Trace(np.cumsum(rng.exponential(0.1, 2000)), np.full(2000, 100), np.full(2000, 50))
    return Measurement(
        profile=profile,
        cluster=ClusterSettings(),
        slo=SLO,
        training=training,
        headroom=1.0,
        quantile=0.99,
        requests_per_probe=200,
        warmup_s=1.0,
        rate_tolerance=0.05,
        seed=1,
    )


@pytest.fixture
def at_best_s(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float]:
    """The latency of each (phase, TP) at no load; it grows with the load, whatever the clock."""
    best_s = {("prefill", 2): 0.2, ("prefill", 4): 0.1, ("decode", 2): 0.02, ("decode", 4): 0.01}

    def serve(profile, settings, spec, trace, **_):  # type: ignore[no-untyped-def]
        busy = trace.rate_rps / 20.0
        latency_s = best_s[spec.phase, spec.tp] / (1.0 - busy) if busy < 1.0 else math.inf
        return ProbeOutcome(latency_s, joules=100.0 * len(trace), requests=len(trace))

    monkeypatch.setattr(classes, "serve_alone", serve)
    return best_s


def carried(table: tuple[InstanceClass, ...], phase: str) -> dict[int, bool]:
    """Whether the classes of each TP carry anything."""
    return {row.tp: row.rate_rps > 0.0 for row in table if row.phase == phase}


def test_slos_that_some_class_keeps_stay(measurement: Measurement, at_best_s: dict[tuple[str, int], float]) -> None:
    at_best_s["prefill", 2] = 5.0
    table, notes = usable_table(measurement, COLUMNS)
    assert notes == ()
    assert carried(table, "prefill") == {2: False, 4: True}
    assert carried(table, "decode") == {2: True, 4: True}


@pytest.mark.parametrize(
    ("phase", "least_s", "factor"),
    [("prefill", 0.61, 2), ("prefill", 1.5, 4), ("decode", 0.9, 16), ("decode", 20.0, 256)],
)
def test_an_slo_that_no_class_keeps_is_doubled_until_one_does_and_that_is_said(
    measurement: Measurement, at_best_s: dict[tuple[str, int], float], phase: str, least_s: float, factor: int
) -> None:
    at_best_s[phase, 2], at_best_s[phase, 4] = 1e3, least_s
    table, (note,) = usable_table(measurement, COLUMNS)
    what, other = ("TTFT", "decode") if phase == "prefill" else ("TPOT", "prefill")
    assert note.startswith(f"no {phase} class keeps the {what} SLO at any rate: planned for {factor} times it")
    assert carried(table, phase) == {2: False, 4: True}
    assert carried(table, other) == {2: True, 4: True}


def test_both_phases_may_need_it(measurement: Measurement, at_best_s: dict[tuple[str, int], float]) -> None:
    at_best_s.update({("prefill", 2): 1.0, ("prefill", 4): 1.0, ("decode", 2): 0.3, ("decode", 4): 0.3})
    _, notes = usable_table(measurement, COLUMNS)
    assert [note.split(":")[0] for note in notes] == [
        "no prefill class keeps the TTFT SLO at any rate", "no decode class keeps the TPOT SLO at any rate"
    ]  # fmt: skip
    assert "for 2 times it" in notes[0]
    assert "for 4 times it" in notes[1]


def test_what_is_never_served_is_an_error(measurement: Measurement, at_best_s: dict[tuple[str, int], float]) -> None:
    at_best_s["decode", 2] = at_best_s["decode", 4] = math.inf
    with pytest.raises(PlanningError, match=r"^no decode class serves this workload within 256 times the SLO$"):
        usable_table(measurement, COLUMNS)


def test_a_phase_without_a_class_is_an_error(measurement: Measurement, at_best_s: dict[tuple[str, int], float]) -> None:
    with pytest.raises(PlanningError, match="no class fits"):
        usable_table(measurement, COLUMNS[:2])
