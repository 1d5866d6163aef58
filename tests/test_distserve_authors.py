"""The study of DistServe's own setting: what it calculates with, and that it gives the authors' figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.metrics import ttft_s


@pytest.fixture(scope="module")
def study(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("distserve_authors")


def test_a_curve_is_crossed_between_its_points(study: ModuleType) -> None:
    assert study.crossing((1.0, 2.0, 3.0), (100.0, 95.0, 85.0)) == pytest.approx(2.5)
    assert study.crossing((1.0, 2.0), (90.0, 80.0)) == pytest.approx(1.0)
    assert study.crossing((1.0, 2.0), (89.9, 80.0)) == 0.0
    assert math.isinf(study.crossing((1.0, 2.0), (100.0, 90.0)))


def test_configurations_are_read_as_the_authors_name_them(study: ModuleType) -> None:
    first, before_fix = study.placement_of("4212"), study.placement_of("4212", study.BEFORE_FIX)
    assert [(spec.phase, spec.tp, spec.pp) for spec in first.instances] == [("prefill", 4, 2), ("decode", 1, 2)]
    assert [(spec.tp, spec.pp) for spec in before_fix.instances] == [(4, 2), (4, 2)]
    assert study.gpus_of("4212") == 10
    assert study.label_of("4212") == "TP4·PP2 + TP1·PP2"
    assert not study.known("opt-66b", "4112")
    assert study.known("opt-66b", "4112", study.BEFORE_FIX)


def test_every_published_curve_has_a_point_per_rate(study: ModuleType) -> None:
    for published in study.PUBLISHED:
        for configuration, shares in published.curves.items():
            assert len(shares) == len(published.rates)
            assert all(0.0 <= share <= 100.0 for share in shares)
            assert study.known(published.model, configuration, study.FIRST)


def test_the_first_coefficients_are_the_fitted_ones(study: ModuleType) -> None:
    """simdistserve/estimators/profile_data/profiler-a100-80g.distserve.json @7057aef."""
    profile = study.profile_of("opt-13b", inflated=False)
    expected_ms = 16.456860431694288 + 0.09264750660897617 * 700 + 6.474785740229194e-06 * 700**2
    assert profile.latency_ms(1, 1410, prefill_tokens=700, sum_len_sq=700**2) == pytest.approx(expected_ms, rel=3e-4)
    decode_ms = 19.934702624895458 + 0.0006269356524350583 * (5000 + 20) + 0.03850697740828398 * 20
    assert profile.latency_ms(1, 1410, batch=20, kv_tokens=5000) == pytest.approx(decode_ms, rel=3e-4)
    assert profile.hash != study.profile_of("opt-13b").hash


def test_runs_are_as_long_as_asked(study: ModuleType) -> None:
    trace = study.trace_of(150, 3.0, seed=2)
    assert len(trace) == 150
    assert trace.rate_rps == pytest.approx(3.0, rel=0.25)


def test_the_authors_figures_come_out_of_the_code_that_made_them(study: ModuleType) -> None:
    """Nine configurations with and without pipelines at five loads: within what one of their runs is uncertain by."""
    (published,) = (one for one in study.PUBLISHED if one.label == "13B, 100 s")
    theirs = np.array(list(published.curves.values()))

    def rms(version: object) -> float:
        ours = [study.curve(published, name, version, 3).mean(axis=0) for name in published.curves]
        return float(np.sqrt(((np.array(ours) - theirs) ** 2).mean()))

    assert rms(study.FIRST) < 6.0
    assert rms(study.FINAL) > 10.0


def test_one_queue_and_one_lane_are_the_same(study: ModuleType) -> None:
    """With one stage the script's own queue and the engine's are the same instance."""
    version, trace = study.VERSIONS[-1], study.trace_of(400, 20.0, seed=1)
    profile, cluster = study.profile_of("opt-13b", False), study.cluster_of("opt-13b", False)
    placement = study.placement_of("4111", version)
    simulator = Simulator(cluster, profile, placement, trace, [study.CLOCK_MHZ], study.SLOS["opt-13b"])
    simulator.run()
    ours_s = study.one_queue_ttft_s(profile, placement.instances[0], trace)
    np.testing.assert_allclose(ours_s, ttft_s(simulator.requests()), rtol=1e-9)


def test_all_tables_are_made(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(tmp_path))
    monkeypatch.setattr(study, "STAGES", (1,))
    monkeypatch.setattr(study, "SLOS", {"opt-13b": study.SLOS["opt-13b"]})
    monkeypatch.setattr(study, "EXAMPLE_CONFIGURATIONS", ("2111",))
    few = study.replace(study.PUBLISHED[0], curves={"2111": study.PUBLISHED[0].curves["2111"]})
    monkeypatch.setattr(study, "PUBLISHED", (few,))
    monkeypatch.setattr(study, "queues", lambda _: [dict.fromkeys(("rate", "theirs", "lanes", "one queue"), 1.0)])
    study.main(seeds=2, requests=300, short_seeds=2, json_file=str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["phase"], row["tp"]) for row in figures["phases"]] == [
        (phase, tp) for phase in ("prefill", "decode") for tp in (1, 2, 4)
    ]
    (unit,) = figures["units"]
    assert unit["theirs_rps_per_gpu"] == pytest.approx(1.962, abs=0.001)
    assert unit["steady_rps_per_gpu"]["joint"]["value"] <= unit["steady_rps_per_gpu"]["separate"]["value"]
    assert len(figures["causes"]) == len(study.VERSIONS)
    assert figures["example"][0]["rps_per_gpu_quartiles"] == sorted(figures["example"][0]["rps_per_gpu_quartiles"])
    told = capsys.readouterr().out
    assert "TP2 + TP1" in told
    assert "goodput of a phase alone" in told
