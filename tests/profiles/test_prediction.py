"""What controllers believe: fitted near the truth, wrong by what is asked for, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from biscale_gym.config import ConfigError
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.profiles import Profile, ProfileError, fitted, prediction
from biscale_gym.profiles.prediction import PredictionSettings, predicted_profile, prediction_errors

pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: train)")
CLOCKS_MHZ = (930, 1470, 1980)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "cache_root", lambda: folder)
        patch.setattr(prediction, "_FIT", fitted.FitSettings(trees=60, learning_rate=0.2, folds=0))
        yield folder


@pytest.fixture(scope="module")
def eight(cache: Path) -> Profile:
    from biscale_gym.profiles import load_profile

    return load_profile("h100-sxm5", "llama-3.1-8b", "bf16")


def believed(profile: Profile, **settings: float):
    return predicted_profile(profile, PredictionSettings(rows=1500, **settings), CLOCKS_MHZ)


def mean_error_percent(profile: Profile, predicted) -> dict[str, float]:
    errors = prediction_errors(profile, predicted, rows=600)
    return {phase: np.mean([e.latency_percent for e in errors if e.phase == phase]) for phase in ("prefill", "decode")}


def test_the_fit_is_near_the_truth(eight: Profile) -> None:
    for error in prediction_errors(eight, believed(eight), rows=600):
        assert 0 < error.latency_percent < 4
        assert 0 < error.power_percent < 4


@pytest.mark.parametrize("error", [0.1, 0.3])
def test_the_error_has_the_size_that_is_asked_for(eight: Profile, error: float) -> None:
    for percent in mean_error_percent(eight, believed(eight, error=error)).values():
        assert percent == pytest.approx(100 * error, rel=0.25)


def test_bias_is_a_factor_and_joules_stay(eight: Profile) -> None:
    plain, hopeful = believed(eight), believed(eight, bias=0.9)
    work = {"prefill_tokens": 700.0, "sum_len_sq": 700.0**2}
    for tp in eight.tensor_parallel_degrees:
        ratio = hopeful.latency_ms(tp, 1470, **work) / plain.latency_ms(tp, 1470, **work)
        assert ratio == pytest.approx(0.9)
        joules = [one.latency_ms(tp, 1470, **work) * one.power_w(tp, 1470, **work) for one in (plain, hopeful)]
        assert joules[0] == pytest.approx(joules[1])


def test_latency_never_rises_with_the_clock(eight: Profile) -> None:
    for table in believed(eight, error=0.3).tables.values():
        assert (np.diff(table.decode_latency_s, axis=0) <= 0).all()
        assert (np.diff(table.prefill_latency_s, axis=0) <= 0).all()


def test_fits_are_reproduced_and_kept(eight: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = believed(eight)
    files = sorted((cache / "predictions").iterdir())
    assert len(files) == len(eight.tensor_parallel_degrees)
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "fit_tables", lambda *_: pytest.fail("fitted again"))
        assert believed(eight).hash == first.hash
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert believed(eight).hash == first.hash, "a torn file is fitted anew"
    assert believed(eight, seed=1).hash != first.hash
    assert believed(eight, error=0.1).hash != first.hash


def test_a_clock_that_was_not_profiled_is_unknown(eight: Profile) -> None:
    with pytest.raises(ProfileError, match="the nearest is 1470"):
        believed(eight).compile(1, (1500,), 8)


@pytest.mark.parametrize(("setting", "value"), [("error", 0.5), ("bias", 0.0), ("rows", 3), ("nois", 0.1)])
def test_wrong_settings_are_named(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        run(RunJob(scenario="smoke", controller="max-clock", overrides={"prediction": {setting: value}}))


def test_controllers_plan_with_what_they_believe(cache: Path) -> None:
    tiny = {
        "cluster.model": "llama-3.1-8b",
        "cluster.precision": "bf16",
        "clocks_mhz": [930, 1470],
        "duration_s": 40.0,
        "training_s": 60.0,
    }
    instances = [{"phase": "prefill", "tp": 1}, {"phase": "decode", "tp": 1}]
    static = {"planner": "given", "instances": instances}
    known = run(RunJob(scenario="smoke", controller="static", overrides=tiny, controller_settings=static))
    settings = {"rows": 1500, "bias": 0.5}
    job = RunJob(
        scenario="smoke", controller="static", overrides={**tiny, "prediction": settings}, controller_settings=static
    )
    assert run(job).row["prefill_energy_j"] == known.row["prefill_energy_j"], "the cluster itself is the true one"
    quick = {"tier1": {"requests_per_probe": 200, "warmup_s": 2.0, "rate_tolerance": 0.2}}
    plans = {
        bias: run(
            RunJob(
                scenario="smoke",
                controller="biscale",
                overrides={**tiny, "prediction": {"rows": 1500, "bias": bias}},
                controller_settings=quick,
            )
        )
        for bias in (0.5, 1.0)
    }
    assert plans[0.5].action_digest != plans[1.0].action_digest
    # Every iteration lasts twice as long as believed: the guards send the clocks to the top.
    assert plans[0.5].row["total_energy_j"] > plans[1.0].row["total_energy_j"]
