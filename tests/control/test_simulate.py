"""A stated placement on a recorded trace: an independent simulator's figures, policies, what is wrong in the file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.cluster.placement import PlacementError
from biscale_gym.cluster.simulator import ClusterError, lowest_idle_power_w
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import ControllerError
from biscale_gym.control.rollout import RunOutcome
from biscale_gym.control.simulate import simulate_file
from biscale_gym.profiles import ProfileError, load_profile
from biscale_gym.traces import Trace, TraceError, write_trace

SIMDISTSERVE = """
preset: simdistserve-a100
model: {model}
batching:
  prefill_token_budget: {budget}
  prefill_kv_tokens: 1000000000
  decode_kv_tokens: 50000
  preemption: none
  decode_iterations: output-length
tpot_definition: per-output-token
instances:
  - {{phase: prefill, tp: {tp}}}
  - {{phase: decode, tp: {tp}}}
"""

PLAIN = """
instances:
  - {phase: prefill, tp: 2, clock_mhz: 930}
  - {phase: decode, tp: 4, clock_mhz: 1005, count: 2}
"""


@pytest.mark.parametrize(
    ("trace", "model", "tp", "budget", "ttft_ms", "tpot_ms", "iterations", "end_s"),
    [
        ("r2", "opt-13b", 1, 66_144, (45.10, 118.24, 253.62), (26.990, 29.529, 32.179), (988, 18693), 497.38),
        ("r4", "opt-13b", 1, 66_144, (48.65, 136.77, 315.10), (34.666, 39.194, 42.259), (961, 7785), 258.12),
        ("r2", "opt-66b", 4, 78_496, (69.97, 186.64, 386.67), (38.804, 41.251, 44.197), (975, 13052), 501.24),
    ],
)
def test_the_figures_of_distserves_own_simulator(
    shared_data: Path,
    tmp_path: Path,
    trace: str,
    model: str,
    tp: int,
    budget: int,
    ttft_ms: tuple[float, ...],
    tpot_ms: tuple[float, ...],
    iterations: tuple[int, int],
    end_s: float,
) -> None:
    placement = tmp_path / "placement.yaml"
    placement.write_text(SIMDISTSERVE.format(model=model, tp=tp, budget=budget))
    row = simulate_file(placement, shared_data / "reference" / f"trace_n1000_{trace}_s0.csv", "hold").row
    for quantile, expected_ms, tolerance in zip(("p50", "p90", "p99"), tpot_ms, (0.003, 0.004, 0.01), strict=True):
        assert 1e3 * float(row[f"tpot_{quantile}_s"]) == pytest.approx(expected_ms, rel=tolerance)
    for quantile, expected_ms in zip(("p50", "p90", "p99"), ttft_ms, strict=True):
        assert 1e3 * float(row[f"ttft_{quantile}_s"]) == pytest.approx(expected_ms, rel=0.001)
    assert row["prefill_iterations"] == iterations[0]
    assert row["decode_iterations"] == pytest.approx(iterations[1], rel=0.0006)
    assert row["end_s"] == pytest.approx(end_s, abs=0.05)
    assert row["requests_judged"] == row["requests_finished"] == 1000


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    write_trace(Trace(np.linspace(0.0, 20.0, 100), np.full(100, 800), np.full(100, 60)), path)
    return path


def simulated(folder: Path, trace: Path, policy: str = "hold", text: str = PLAIN, seed: int = 0) -> RunOutcome:
    placement = folder / "placement.yaml"
    placement.write_text(text)
    return simulate_file(placement, trace, policy, seed)


def clocks_mhz(outcome: RunOutcome) -> list[list[float]]:
    """Every clock that each instance was seen at."""
    return [np.unique(column).tolist() for column in outcome.timeline["clock_mhz"].T]


def test_hold_keeps_the_files_clocks_and_max_clock_goes_to_the_top(tmp_path: Path, trace: Path) -> None:
    held, top = (simulated(tmp_path, trace, policy) for policy in ("hold", "max-clock"))
    assert clocks_mhz(held) == [[930.0], [1005.0], [1005.0]]
    assert clocks_mhz(top) == [[1980.0]] * 3
    assert float(top.row["ttft_p50_s"]) < float(held.row["ttft_p50_s"])
    assert float(top.row["tpot_p50_s"]) < float(held.row["tpot_p50_s"])
    assert float(top.row["total_energy_j"]) > float(held.row["total_energy_j"])
    assert top.provenance["placements"] == [[0.0, "1×P TP2@1980 + 2×D TP4@1980"]]


def test_a_clock_of_max_is_the_cards_top(tmp_path: Path, trace: Path) -> None:
    text = PLAIN.replace("930", "max").replace("clock_mhz: 1005, ", "")
    outcome, top = simulated(tmp_path, trace, text=text), simulated(tmp_path, trace, "max-clock")
    assert clocks_mhz(outcome) == [[1980.0]] * 3
    np.testing.assert_array_equal(outcome.ttft_s, top.ttft_s)


def test_a_controllers_policies_run_on_the_stated_placement(tmp_path: Path, trace: Path) -> None:
    outcome = simulated(tmp_path, trace, "biscale", PLAIN + "clocks_mhz: [705, 885, 930, 1005]\n")
    assert outcome.provenance["placements"] == [[0.0, "1×P TP2@930 + 2×D TP4@1005"]]
    assert int(outcome.row["clock_changes"]) > 0
    seen = {clock for column in clocks_mhz(outcome) for clock in column}
    assert seen <= {705.0, 885.0, 930.0, 1005.0, 1980.0}


def test_the_whole_run_counts_with_its_drain(tmp_path: Path, trace: Path) -> None:
    outcome = simulated(tmp_path, trace)
    row, profile = outcome.row, load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
    assert row["requests_judged"] == row["requests_finished"] == 100
    assert row["output_tokens"] == 100 * 59
    assert row["prompt_tokens"] == 100 * 800
    assert float(row["end_s"]) > 20.0
    idle_w = lowest_idle_power_w(profile)
    assert row["unallocated_energy_j"] == pytest.approx((16 - 10) * idle_w * float(row["end_s"]), rel=1e-9)


def test_the_seed_moves_the_clock_calls_and_nothing_else_is_random(tmp_path: Path, trace: Path) -> None:
    one, same, other = (simulated(tmp_path, trace, "biscale", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_equal(one.row, same.row)
    assert one.row["switching_energy_j"] != other.row["switching_energy_j"]
    assert len({simulated(tmp_path, trace, seed=seed).row["total_energy_j"] for seed in range(3)}) == 1


def test_the_file_replaces_what_it_names_of_the_preset(tmp_path: Path, trace: Path) -> None:
    changes = "router: least-loaded\ndecode_iterations: output-length\nswitching: instant\nnodes: 1\n"
    changes += "gpus_per_node: 12\n"
    cluster = simulated(tmp_path, trace, text=PLAIN + changes).provenance["scenario"]["cluster"]
    assert (cluster["nodes"], cluster["gpus_per_node"], cluster["switching"]) == (1, 12, "instant")
    assert (cluster["routing"]["prefill"], cluster["routing"]["decode"]) == ("least-loaded", "least-loaded")
    assert cluster["batching"]["decode_iterations"] == "output-length"
    assert cluster["batching"]["prefill_token_budget"] == 8192


@pytest.mark.parametrize("arrival_s", [[0.0], [7.0], [3.0, 3.0, 3.0]])
def test_a_trace_without_a_rate_is_simulated(tmp_path: Path, arrival_s: list[float]) -> None:
    path, count = tmp_path / "few.csv", len(arrival_s)
    write_trace(Trace(np.array(arrival_s), np.full(count, 500), np.full(count, 20)), path)
    row = simulated(tmp_path, path).row
    assert row["requests_finished"] == count
    assert row["joint_attainment"] == 1.0
    assert math.isfinite(float(row["mean_power_w"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "routr: least-loaded\n", r"routr: unknown key; did you mean 'router'\?"),
        (PLAIN.replace("clock_mhz: 930", "clock: 1"), r"instances\.0\.clock: unknown key; did you mean 'clock_mhz'\?"),
        (PLAIN + "batching: {prefil_token_budget: 5}\n", r"batching\.prefil_token_budget: .* 'prefill_token_budget'\?"),
        (PLAIN + "router: {prefil: least-loaded}\n", r"prefil: unknown key; did you mean 'prefill'\?"),
        (PLAIN + "router: least-busy\n", r"router.*Input should be 'weighted-round-robin', 'least-loaded'"),
        (PLAIN + "warmup_s: .inf\n", r"warmup_s: Input should be a finite number"),
        (PLAIN.replace("930", "top"), r"instances\.0\.clock_mhz.*Input should be 'max'"),
        ("preset: h100-2x8\n", r"instances: Field required"),
        ("- 1\n", r"expected a mapping at the top, found list"),
        (PLAIN + "preset: h100-8x2\n", r"no clusters preset 'h100-8x2'; did you mean 'h100-2x8'\?"),
        (PLAIN + "switching: nvlm\n", r"no switching preset 'nvlm'; did you mean 'nvml'\?"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(tmp_path: Path, trace: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulated(tmp_path, trace, text=text)


def test_a_fault_of_one_instance_is_the_only_one_told(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(ConfigError) as told:
        simulated(tmp_path, trace, text="instances: [{phase: prefill, tp: 2, gpus: 2}]\n")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("tp: 2", "tp: 3", PlacementError, r"TP 3 is not supported; the nearest is 2"),
        ("phase: decode", "phase: prefill", PlacementError, r"has no decode instance; add at least one"),
        ("count: 2", "count: 4", PlacementError, r"takes 18 GPUs, the cluster has 2 nodes of 8 = 16"),
        ("tp: 2", "tp: 1", ClusterError, r"does not fit a prefill instance of TP1; TP degrees that do: \[2, 4, 8\]"),
        ("930", "1000", ProfileError, r"has no clock 1000 MHz; the nearest is 1005 MHz"),
    ],
)
def test_an_impossible_placement_is_named(
    tmp_path: Path, trace: Path, old: str, new: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        simulated(tmp_path, trace, text=PLAIN.replace(old, new))


def test_an_empty_placement_is_named(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(PlacementError, match=r"^the placement \(empty\) has no prefill instance"):
        simulated(tmp_path, trace, text="instances: []\n")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("max-clok", r"^no policy 'max-clok'; did you mean 'max-clock'\? valid: hold, biscale"),
        ("holt", r"^no policy 'holt'; did you mean 'hold'\?"),
        ("nowhere:Policy", r"^controller 'nowhere:Policy' cannot be loaded"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_nearest(tmp_path: Path, trace: Path, policy: str, message: str) -> None:
    with pytest.raises(ControllerError, match=message):
        simulated(tmp_path, trace, policy)


def test_what_is_wrong_with_the_trace_is_named(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(TraceError, match=r"'t' lasts 20 s, which is shorter than the warm-up \(30 s\)"):
        simulated(tmp_path, trace, text=PLAIN + "warmup_s: 30\n")
    with pytest.raises(TraceError, match=r"absent\.csv: cannot be read"):
        simulated(tmp_path, tmp_path / "absent.csv")


def test_a_negative_seed_is_named(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(ClusterError, match="seed is -1"):
        simulated(tmp_path, trace, seed=-1)
