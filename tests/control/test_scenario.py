"""Scenarios: presets, overrides, and what is wrong with them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from biscale_gym.config import ConfigError, config_hash, preset_names
from biscale_gym.control.scenario import load_scenario
from biscale_gym.profiles import load_profile
from biscale_gym.traces import load_workload


@pytest.mark.parametrize("name", preset_names("scenarios"))
def test_every_preset_is_whole(name: str) -> None:
    scenario = load_scenario(name)
    profile = load_profile(scenario.cluster.hardware, scenario.cluster.model, scenario.cluster.precision)
    assert {*scenario.clocks_mhz, scenario.top_clock_mhz} <= set(profile.clocks_mhz)
    assert scenario.description
    load_workload(scenario.workload)


def test_overrides_replace_what_they_name_and_nothing_else() -> None:
    plain = load_scenario("smoke")
    changed = load_scenario("smoke", {"cluster.batching.prefill_token_budget": 512, "slo.ttft_s": 0.3, "rate_rps": 7.0})
    assert changed.cluster.batching.prefill_token_budget == 512
    assert (changed.slo.ttft_s, changed.rate_rps) == (0.3, 7.0)
    back = {"cluster.batching.prefill_token_budget": 8192, "slo.ttft_s": 0.6, "rate_rps": 20.0}
    assert config_hash(load_scenario("smoke", back)) == config_hash(plain)
    assert config_hash(changed) != config_hash(plain)
    assert load_scenario("smoke").slo.ttft_s == 0.6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rate_rsp": 3.0}, r"rate_rsp: unknown key; did you mean 'rate_rps'\?"),
        ({"slo.ttft": 1.0}, r"slo\.ttft: unknown key; did you mean 'ttft_s'\?"),
        ({"cluster.batching.chunked": True}, r"batching\.chunked: unknown key; did you mean 'chunked_prefill'\?"),
        ({"clustr.nodes": 1}, r"no settings group 'clustr' \(in 'clustr\.nodes'\); did you mean 'cluster'\?"),
        ({"cluster.bathing.x": 1}, r"no settings group 'bathing' \(in .*\); did you mean 'batching'\?"),
        ({"rate_rps.x": 1}, r"no settings group 'rate_rps' \(in 'rate_rps\.x'\); valid: cluster, slo"),
        ({"rate_rps": 0.0}, r"rate_rps: Input should be greater than 0"),
        ({"rate_rps": "many"}, r"rate_rps: Input should be a valid number"),
        ({"warmup_s": float("nan")}, r"warmup_s: Input should be a finite number"),
        ({"cluster.routing.prefill": "round-robin"}, r"routing\.prefill: Input should be 'weighted-round-robin'"),
        ({"warmup_s": 60.0}, r"duration_s \(60\.0\) must exceed warmup_s \(60\.0\)"),
        ({"clocks_mhz": [1410, 930]}, r"clocks_mhz must ascend without repeats, got \[1410, 930\]"),
        ({"clocks_mhz": []}, r"clocks_mhz: "),
    ],
)
def test_a_wrong_override_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^scenario 'smoke'.*{message}"):
        load_scenario("smoke", overrides)


def test_an_unknown_scenario_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^no scenarios preset 'paper67'; did you mean 'paper-67'\? valid: .*smoke"):
        load_scenario("paper67")


def test_a_wrong_line_of_a_scenario_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rest = "workload: paper\nrate_rps: 5\nclocks_mhz: [1410]\ntop_clock_mhz: 1980\n"
    path.write_text(f"{rest}slo: {{ttft_s: 1, tpot: 0.1}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: slo\.tpot: unknown key; did you mean 'tpot_s'\?"):
        load_scenario(str(path))
    path.write_text("workload: [paper\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        load_scenario(str(path))
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_scenario(str(tmp_path / "absent.yaml"))
