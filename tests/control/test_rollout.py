"""Whole runs: reproducible to the last bit, planned at every window, counted from warm-up to end."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from numba import njit

from biscale_gym.cluster.placement import InstanceSpec, Placement, PlacementError
from biscale_gym.cluster.policy import POLICY_SIGNATURE
from biscale_gym.cluster.simulator import PhasePolicy, PolicyError, lowest_idle_power_w
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.rollout import Rollout, RunJob, RunOutcome, rollout_of, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.traces import Trace, TraceError, write_trace

INSTANCES = [{"phase": "prefill", "tp": 2, "count": 2}, {"phase": "decode", "tp": 4, "count": 2}]
JOB = RunJob(
    scenario="smoke",
    controller="max-clock",
    overrides={"rate_rps": 5.0},
    controller_settings={"planner": "given", "instances": INSTANCES},
)


@njit(POLICY_SIGNATURE)
def by_queue(obs, memory, params, model):  # type: ignore[no-untyped-def]
    memory[0] += params[0]
    return int(memory[0] + obs[11]) % int(obs[5])


@njit(POLICY_SIGNATURE)
def off_the_list(obs, memory, params, model):  # type: ignore[no-untyped-def]
    return int(obs[5])


class Alternating:
    """Another placement at every window, and clocks that change all the time."""

    name = "alternating"
    replans = True

    def __init__(self, prefill_tp: int = 2, answers: str = "by-queue") -> None:
        self.prefill_tp = prefill_tp
        self.function = {"by-queue": by_queue, "off-the-list": off_the_list}[answers]
        self.contexts: list[PlanContext] = []
        self.notes: list[str] = []

    def plan(self, context: PlanContext) -> Placement:
        self.contexts.append(context)
        count = 1 + len(self.contexts) % 2
        self.notes.append(f"plan {len(self.contexts)}: {count} for prefill")
        prefill = InstanceSpec("prefill", self.prefill_tp, 1410)
        return Placement((*[prefill] * count, InstanceSpec("decode", 4, 1410), InstanceSpec("decode", 4, 930)))

    def policies(self, context: PlanContext) -> tuple[PhasePolicy, PhasePolicy]:
        mine = PhasePolicy(self.function, np.array([1.0]), on_idle=True)
        return (mine, mine)


OWN = f"{__name__}:Alternating"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


def assert_equal(one: RunOutcome, other: RunOutcome) -> None:
    np.testing.assert_equal(one.row, other.row)
    assert one.action_digest == other.action_digest
    assert one.provenance == other.provenance
    np.testing.assert_array_equal(one.ttft_s, other.ttft_s)
    np.testing.assert_array_equal(one.tpot_s, other.tpot_s)
    for name, values in one.timeline.items():
        np.testing.assert_array_equal(values, other.timeline[name])
    np.testing.assert_equal(one.windows, other.windows)


@pytest.mark.parametrize("job", [JOB, RunJob(scenario="smoke", controller=OWN)], ids=["static", "own"])
def test_a_run_is_its_job_and_its_seed(job: RunJob) -> None:
    first = run(job)
    assert_equal(run(job), first)
    other = run(job.model_copy(update={"seed": 1}))
    assert other.provenance["trace_hash"] != first.provenance["trace_hash"]
    assert other.provenance["training_hash"] == first.provenance["training_hash"]
    assert other.row["total_energy_j"] != first.row["total_energy_j"]
    assert other.row["seed"] == 1


def test_a_recorded_trace_keeps_its_requests_and_the_seed_moves_the_clock_calls(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_trace(Trace(np.linspace(0.0, 40.0, 200), np.full(200, 900), np.full(200, 40)), path)
    one, other = (run(RunJob(scenario="smoke", controller=OWN, trace=str(path), seed=seed)) for seed in (0, 1))
    assert one.provenance["trace_hash"] == other.provenance["trace_hash"]
    assert one.row["split"] == "all"
    assert one.row["switching_energy_j"] != other.row["switching_energy_j"]


def test_every_window_is_planned_from_what_came_before(profile: Profile) -> None:
    scenario = load_scenario("smoke")
    requests = requests_for(scenario, profile, "test", 3, None, None)
    controller = Alternating()
    rollout = Rollout(controller, scenario, requests, seed=3)
    rollout.run()
    assert [at_s for at_s, _ in rollout.placements] == [0.0, 20.0, 40.0]
    assert [len(placement.of("prefill")) for _, placement in rollout.placements] == [2, 1, 2]
    assert len(rollout.simulator.lanes) == 5
    first, _, last = controller.contexts
    arrived = np.histogram(requests.evaluated.arrival_s, [0.0, 20.0, 40.0])[0]
    assert first.history_rps == ()
    assert last.history_rps == tuple(arrived / 20.0)
    assert first.previous is None
    assert last.previous == rollout.placements[1][1]
    assert last.training is requests.training
    assert set(last.clocks_mhz) == {930, 1410, 1830, 1980}


def test_the_record_tells_what_was_planned() -> None:
    outcome = run(RunJob(scenario="smoke", controller=OWN))
    assert outcome.provenance["notes"] == [f"plan {n}: {count} for prefill" for n, count in ((1, 2), (2, 1), (3, 2))]
    assert outcome.provenance["placements"][1] == [20.0, "1×P TP2@1410 + 1×D TP4@1410 + 1×D TP4@930"]
    timeline = outcome.timeline
    assert timeline["label"].tolist() == [
        "prefill 0 TP2", "prefill 1 TP2", "decode 2 TP4", "decode 3 TP4", "prefill 4 TP2"
    ]  # fmt: skip
    there = np.isfinite(timeline["power_w"])
    early, middle, late = (np.searchsorted(timeline["time_s"], at_s) for at_s in (10.0, 35.0, 50.0))
    assert there[[early, middle, late]].tolist() == [
        [True, True, True, True, False], [True, False, True, True, False], [True, False, True, True, True]
    ]  # fmt: skip
    assert timeline["time_s"][-1] < 60.0


def test_the_digest_tells_actions_apart() -> None:
    def digest(**settings: int) -> str:
        own = {**JOB.controller_settings, **settings}
        return run(JOB.model_copy(update={"controller": "static", "controller_settings": own})).action_digest

    assert digest(prefill_clock_mhz=930) == digest(prefill_clock_mhz=930)
    assert digest(prefill_clock_mhz=930) != digest(prefill_clock_mhz=1410)


def test_joules_are_counted_from_the_warm_up_to_the_stated_end(profile: Profile) -> None:
    row = run(JOB.model_copy(update={"rate_rps": 0.1})).row
    counted_s = 60.0 - 5.0
    assert row["gpus_used"] == pytest.approx(12.0, rel=1e-12)
    assert row["unallocated_energy_j"] == pytest.approx(4 * lowest_idle_power_w(profile) * counted_s, rel=1e-12)
    assert row["total_energy_j"] == pytest.approx(float(row["mean_power_w"]) * counted_s, rel=1e-12)


def test_a_recorded_trace_counts_to_its_last_arrival_and_its_drain_is_served(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "t.csv"
    write_trace(Trace(np.linspace(0.0, 40.0, 200), np.full(200, 900), np.full(200, 400)), path)
    row = run(JOB.model_copy(update={"trace": str(path)})).row
    assert row["unallocated_energy_j"] == pytest.approx(4 * lowest_idle_power_w(profile) * 35.0, rel=1e-12)
    assert row["requests_judged"] == (np.linspace(0.0, 40.0, 200) >= 5.0).sum()
    assert row["end_s"] > 40.0
    assert (row["requests_arrived"], row["requests_finished"], row["requests_in_flight"]) == (200, 200, 0)


def test_windows_add_up_to_the_run() -> None:
    outcome = run(RunJob(scenario="smoke", controller=OWN))
    windows, row = outcome.windows, outcome.row
    assert windows["start_s"].tolist() == [5.0, 20.0, 40.0]
    assert windows["end_s"].tolist() == [20.0, 40.0, 60.0]
    for name in ("prefill_energy_j", "decode_energy_j", "unallocated_energy_j", "prompt_tokens", "requests_judged"):
        assert windows[name].sum() == pytest.approx(row[name], rel=1e-12), name
    assert windows["ttft_p99_s"].max() >= row["ttft_p99_s"]


def test_a_request_at_a_border_is_judged_once(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_trace(Trace(np.arange(0.0, 61.0), np.full(61, 900), np.full(61, 40)), path)
    outcome = run(JOB.model_copy(update={"trace": str(path)}))
    assert outcome.windows["requests_judged"].tolist() == [15, 20, 21]
    assert outcome.row["requests_judged"] == 56


STEADY = {**JOB.overrides, "window_start": "steady-state"}


def test_a_steady_window_is_served_alone(tmp_path: Path) -> None:
    """More prompts than prefill can do arrive late in the first window: only where queues are carried do they wait."""
    path = tmp_path / "t.csv"
    burst_s = np.concatenate([np.arange(0.0, 19.0), np.linspace(19.0, 19.9, 300), np.arange(21.0, 60.0)])
    write_trace(Trace(burst_s, np.full(len(burst_s), 4000), np.full(len(burst_s), 40)), path)
    carried, steady = (
        run(JOB.model_copy(update={"trace": str(path), "overrides": {**JOB.overrides, "window_start": start}}))
        for start in ("carried", "steady-state")
    )
    assert carried.windows["ttft_p99_s"][1] > 1.0
    assert steady.windows["ttft_p99_s"][1] < 0.5
    assert steady.windows["start_s"].tolist() == [5.0, 25.0, 45.0]
    # No clock changes and nothing was carried into it: the first window is the same in both.
    for name in ("prefill_energy_j", "decode_energy_j", "ttft_p99_s", "tpot_p99_s", "requests_judged"):
        assert steady.windows[name][0] == pytest.approx(carried.windows[name][0], rel=1e-12), name
    assert steady.row["requests_judged"] == steady.windows["requests_judged"].sum()
    assert steady.row["requests_judged"] == sum(
        ((burst_s >= a) & (burst_s < b)).sum() for a, b in ((5, 20), (25, 40), (45, 60))
    )
    assert steady.row["requests_finished"] == steady.row["requests_arrived"] == len(burst_s)
    counted_s = 15.0 + 15.0 + (burst_s[-1] - 45.0)
    assert steady.row["total_energy_j"] == pytest.approx(float(steady.row["mean_power_w"]) * counted_s, rel=1e-12)


def test_steady_windows_are_planned_as_carried_ones_are() -> None:
    job = RunJob(scenario="smoke", controller=OWN)
    carried, steady = run(job), run(job.model_copy(update={"overrides": {"window_start": "steady-state"}}))
    assert steady.provenance["placements"] == carried.provenance["placements"]
    assert steady.timeline["label"].tolist() == [
        *("prefill 0 TP2", "prefill 1 TP2", "decode 2 TP4", "decode 3 TP4"),
        *("prefill 4 TP2", "decode 5 TP4", "decode 6 TP4"),
        *("prefill 7 TP2", "prefill 8 TP2", "decode 9 TP4", "decode 10 TP4"),
    ]
    middle = np.searchsorted(steady.timeline["time_s"], 30.0)
    assert np.flatnonzero(np.isfinite(steady.timeline["clock_mhz"][middle])).tolist() == [4, 5, 6]
    assert_equal(run(job.model_copy(update={"overrides": {"window_start": "steady-state"}})), steady)


def test_a_steady_window_needs_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_trace(Trace(np.array([0.0, 10.0, 45.0, 60.0]), np.full(4, 900), np.full(4, 40)), path)
    with pytest.raises(TraceError, match="has no arrival from 20 to 40 s"):
        run(JOB.model_copy(update={"trace": str(path), "overrides": STEADY}))
    with pytest.raises(ConfigError, match="must exceed warmup_s"):
        run(JOB.model_copy(update={"overrides": {**STEADY, "window_s": 5.0}}))


def test_rows_name_the_controllers_settings() -> None:
    job = RunJob(scenario="smoke", controller="biscale", controller_settings={"tier1": {"margin": 0.0}, "preset": "x"})
    assert job.controller_name == "biscale preset=x tier1.margin=0.0"
    assert RunJob(scenario="smoke", controller="biscale").controller_name == "biscale"


def test_what_a_controller_does_wrong_is_named() -> None:
    def with_settings(**settings: object) -> RunOutcome:
        return run(RunJob(scenario="smoke", controller=OWN, controller_settings=settings))

    with pytest.raises(PlacementError, match=r"^instance 0 \(prefill TP3\): TP 3 is not supported; the nearest is 2"):
        with_settings(prefill_tp=3)
    with pytest.raises(PolicyError, match=r"policy, for instance \d at .* answered 4, .* the nearest is 3; "):
        with_settings(answers="off-the-list")


# -- randomised hardware -----------------------------------------------------------------------------------------------

FAMILY = "h100-uncertainty"


def test_the_seed_draws_the_hardware_that_environments_draw(profile: Profile) -> None:
    rollout = rollout_of(JOB.model_copy(update={"randomisation": FAMILY, "seed": 3}))
    env = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", randomisation=FAMILY)
    env.reset(options={"hardware_seed": 3})
    theirs = env.unwrapped.simulator
    assert rollout.profile.hash == theirs.profile.hash != profile.hash
    assert rollout.simulator.state.glob["switch_median_s"] == theirs.state.glob["switch_median_s"]
    assert rollout.predicted.hash == profile.hash


def test_controllers_know_the_nominal_hardware_only(profile: Profile) -> None:
    job = RunJob(scenario="smoke", controller=OWN, randomisation=FAMILY, overrides={"window_s": 20.0})
    rollout = rollout_of(job)
    rollout.run()
    assert [context.profile.hash for context in rollout.controller.contexts] == [profile.hash] * 3


def test_a_record_says_which_hardware_served() -> None:
    nominal, drawn, other = (
        run(JOB.model_copy(update={"randomisation": family, "seed": seed}))
        for family, seed in ((None, 1), (FAMILY, 1), (FAMILY, 2))
    )
    assert drawn.row["scenario"] == f"{nominal.row['scenario']} randomisation={FAMILY}"
    assert nominal.provenance["randomisation"] is None
    assert drawn.provenance["randomisation"] == FAMILY
    hashes = [outcome.provenance["profile_hash"] for outcome in (nominal, drawn, other)]
    assert len(set(hashes)) == 3
    assert {one.provenance["believed_profile_hash"] for one in (nominal, drawn, other)} == {hashes[0]}
    medians = [outcome.provenance["switching"]["median_ms"] for outcome in (nominal, drawn, other)]
    assert medians[0] < min(medians[1:]), "the family's calls take at least as long"
    assert drawn.provenance["trace_hash"] == nominal.provenance["trace_hash"]
    assert drawn.row["total_energy_j"] != nominal.row["total_energy_j"]


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no randomisation preset 'h100'; valid: h100-uncertainty"):
        rollout_of(JOB.model_copy(update={"randomisation": "h100"}))
