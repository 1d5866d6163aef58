"""scripts/sim_to_real.py without workers: the model's side of a calibrated cluster, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from biscale_gym.calibration.calibrate import Calibration
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.records import DTYPE, RecordStream


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("sim_to_real")


CLUSTER = {"hardware": "h100-sxm5", "model": "llama-3.1-8b", "precision": "bf16", "serving_overhead_ms": 4.0}


@pytest.fixture(scope="module")
def scenario(script: ModuleType) -> Any:
    """A preset in the place of a calibrated one."""
    return script.modelled_scenario("live-smoke", 20.0, Calibration("trees", (), CLUSTER, "modelled"))


def test_the_model_serves_the_same_trace(script: ModuleType, scenario: Any) -> None:
    assert scenario.warmup_s == 0.0
    assert scenario.cluster.switching_settings().sigma == 0.0, "an emulated clock takes its time, no more and no less"
    trace, context = prepared(scenario, None, 3)
    profile = scenario.cluster.profile()
    side = script.model_side(scenario, "max-clock", trace, context.training, 3, profile)
    assert side.requests == len(trace)
    assert side.iterations["decode"] >= int(trace.output_tokens.max())
    assert side.iterations["prefill"] <= len(trace)
    assert side.seconds >= trace.duration_s
    least_ms = float(profile.latency_ms(2, 1980, 0, 0, trace.prompt_tokens.min(), trace.prompt_tokens.min() ** 2))
    assert side.ttft_ms[50] > 4.0 + least_ms
    assert side.ttft_ms[50] <= side.ttft_ms[90] <= side.ttft_ms[99]
    believed = scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"model": "llama-3.3-70b"})})
    saving = script.model_side(scenario, "biscale", trace, context.training, 3, believed.cluster.profile())
    assert saving.energy_j < side.energy_j


def test_errors_are_the_models(script: ModuleType) -> None:
    def side(scale: float) -> Any:
        percentiles = {50: 10.0 * scale, 90: 20.0 * scale, 99: 30.0 * scale}
        return script.Side(percentiles, percentiles, 5, {"prefill": 4, "decode": 80}, 100.0 * scale, 10.0)

    found = script.compared(side(1.0), side(0.9))
    assert found["ttft_ms"]["p90"] == {"live": 20.0, "model": 18.0, "error_percent": -10.0}
    assert found["modelled_energy_j"]["error_percent"] == -10.0
    assert found["iterations"]["decode"]["error_percent"] == 0.0
    assert script.table({"max-clock": found}).row_count == 10


def test_iterations_are_held_against_the_profile(script: ModuleType, scenario: Any, tmp_path: Path) -> None:
    """Iterations that follow one another take from end to end what the profile says and a tenth more."""
    profile = scenario.cluster.profile()
    fields = DTYPE.names
    assert fields is not None
    for phase, work in (("decode", (4, 2000, 0, 0.0)), ("prefill", (0, 0, 300, 90000.0))):
        took_s = 1.1e-3 * float(profile.latency_ms(2, 1980, *work))
        stream = RecordStream(tmp_path / f"{phase}-0.csv")
        from biscale_gym.live.records import IterationRecord

        for number in range(20):
            values = dict.fromkeys(fields, 0) | dict(
                zip(("batch", "kv_tokens", "prefill_tokens", "sum_len_sq"), work, strict=True)
            )
            end_s = took_s * (number + 1) + (5.0 if number >= 10 else 0.0)  # a pause in the middle
            values |= {"end_s": end_s, "duration_s": took_s - 5e-4, "clock_mhz": 1980, "source": "modelled"}
            stream.put(IterationRecord(**values))
        stream.close()
    found = script.iteration_errors(tmp_path, scenario)
    for phase in ("prefill", "decode"):
        assert found[phase]["iterations"] == 18, "not the first, nor the one after the pause"
        assert found[phase]["bias_percent"] == pytest.approx(100 * (1 / 1.1 - 1), abs=0.01)
        assert found[phase]["median_percent"] == pytest.approx(100 * (1 / 1.1 - 1), abs=0.01)
    assert len(np.unique(script.records_of(tmp_path, "decode")["end_s"])) == 20


def test_measured_joules_are_not_compared_with_modelled_ones(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(LiveError, match=r"h100: joules are compared with an emulated card's"):
        script.main(workers="h100", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
