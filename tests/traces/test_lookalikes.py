"""The look-alikes against the traces that they resemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ks_2samp, spearmanr

from biscale_gym.config import validate
from biscale_gym.traces import Trace, WorkloadSettings, generate, load_workload, read_trace, write_trace
from biscale_gym.traces.commands import fit_file
from biscale_gym.traces.fitting import fit_workload
from biscale_gym.traces.settings import ModulatedArrivals
from biscale_gym.traces.statistics import interarrival_cv, variance_time_curve

SEEDS = range(8)

REAL = {
    "azure-conv-like": "AzureLLMInferenceTrace_conv.csv",
    "mooncake-like": "mooncake_conversation_trace.jsonl",
}


def pairs(name: str, shared_data: Path) -> tuple[Trace, list[Trace]]:
    settings = load_workload(name)
    assert settings.native_rate_rps is not None
    real = read_trace(shared_data / "traces" / REAL[name])
    return real, [generate(settings, settings.native_rate_rps, real.duration_s, seed) for seed in SEEDS]


@pytest.mark.parametrize("name", REAL)
def test_length_distributions(name: str, shared_data: Path) -> None:
    real, alike = pairs(name, shared_data)
    for trace in alike:
        assert ks_2samp(trace.prompt_tokens, real.prompt_tokens).statistic < 0.03
        assert ks_2samp(trace.output_tokens, real.output_tokens).statistic < 0.03
    correlation = np.mean([spearmanr(trace.prompt_tokens, trace.output_tokens).statistic for trace in alike])
    assert correlation == pytest.approx(spearmanr(real.prompt_tokens, real.output_tokens).statistic, abs=0.02)


def test_azure_arrivals_vary_alike_from_1_s_to_300_s(shared_data: Path) -> None:
    windows_s = np.geomspace(1.0, 300.0, 15)
    real, alike = pairs("azure-conv-like", shared_data)
    ratios = np.array([variance_time_curve(trace, windows_s) for trace in alike]) / variance_time_curve(real, windows_s)
    # Every seed by itself, an hour as the real trace is, and closer still on average.
    assert ratios.max() < 1.5
    assert ratios.min() > 1.0 / 1.5
    np.testing.assert_allclose(ratios.mean(axis=0), 1.0, atol=0.2)
    assert np.mean([interarrival_cv(trace) for trace in alike]) == pytest.approx(interarrival_cv(real), abs=0.05)


def test_mooncake_arrivals_vary_alike_on_average(shared_data: Path) -> None:
    windows_s = np.geomspace(6.0, 300.0, 8)
    real, alike = pairs("mooncake-like", shared_data)
    ratios = np.array([variance_time_curve(trace, windows_s) for trace in alike]) / variance_time_curve(real, windows_s)
    np.testing.assert_allclose(ratios.mean(axis=0), 1.0, atol=0.3)


@pytest.mark.parametrize(("name", "shortest_s"), [("azure-conv-like", 1.0), ("mooncake-like", 6.0)])
def test_the_presets_are_what_the_fit_gives(name: str, shortest_s: float, shared_data: Path) -> None:
    real = read_trace(shared_data / "traces" / REAL[name])
    fitted = fit_workload(real, "", "", shortest_s=shortest_s)
    preset = load_workload(name)
    assert fitted.lengths == preset.lengths
    assert isinstance(fitted.arrivals, ModulatedArrivals)
    assert isinstance(preset.arrivals, ModulatedArrivals)
    figures = [
        [(band.period_s, band.relative_variance) for band in arrivals.bands]
        for arrivals in (fitted.arrivals, preset.arrivals)
    ]
    np.testing.assert_allclose(figures[0], figures[1], rtol=0.02)


def test_fitting_a_file_gives_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    source = generate(load_workload("azure-conv-like"), 8.0, 2_000.0, seed=0)
    write_trace(source, path)
    text = fit_file(path, "mine", "measured")
    settings = validate(WorkloadSettings, {"name": "mine", **yaml.safe_load(text)}, "fit")
    alike = generate(settings, 8.0, 2_000.0, seed=1)
    assert ks_2samp(alike.prompt_tokens, source.prompt_tokens).statistic < 0.03
