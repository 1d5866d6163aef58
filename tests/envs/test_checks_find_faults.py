"""Each check fails on an environment with the fault that it looks for, and says where."""

from __future__ import annotations

from collections.abc import Callable

import broken_environments
import gymnasium
import pytest
from every_environment import short

from biscale_gym.testing import (
    check_conservation,
    check_environment,
    check_reset_equals_fresh,
    check_same_across_processes,
    check_snapshot,
    check_vector_equals_single,
)

FAULTS: list[tuple[str, Callable[..., object], str]] = [
    ("LeakyReset", check_reset_equals_fresh, r"step 0: entry 'arrivals_1s' of the observation is .*, not "),
    ("DeafToSeeds", check_reset_equals_fresh, r"step 0: "),
    ("LeftoverReward", check_reset_equals_fresh, r"step 3: reward is "),
    ("HashSeeded", check_same_across_processes, r"one process against another: step 0: "),
    ("WrongEnergy", check_conservation, r"step 1: energy_j so far is .* by info, .* by the ledger"),
    ("EnergyOfTheLastStepIsLost", check_conservation, r"step \d+: energy_j so far is "),
    ("CountsTwice", check_conservation, r"step \d+: completed so far are \d+ by info, \d+ by the ledger"),
    ("WrongTime", check_conservation, r"step 1: dt_s so far is "),
    ("Terminates", check_conservation, r"step \d+: terminated is True"),
    ("OutsideItsSpace", check_conservation, r"step 1: entry 'gpus' of the observation is .*1\.5.*, outside \[0\.0, 1"),
    ("NotANumber", check_conservation, r"step 1: the reward is nan"),
    ("LosesRequests", check_conservation, r"step \d+: the simulator counts \d+ requests as finished, their ledger \d+"),
    ("SnapshotWithoutItsLane", check_snapshot, r"restored \(snapshot at step 75\): step 0: "),
    ("SnapshotWithoutItsGenerator", check_snapshot, r"restored \(snapshot at step 75\): step \d+: "),
    ("SnapshotThatDisturbs", check_snapshot, r"going on after a snapshot was made .*: step 0: "),
    ("SnapshotOnce", check_snapshot, r"restored after another episode .*: step 0: "),
    ("ShiftedSeeds", check_vector_equals_single, r"3 lanes on 1 thread: reset: lane 1 against the single environment"),
    ("MixedRewards", check_vector_equals_single, r"step \d+: lane 0 against the single environment: reward is "),
    ("FinalObsOfTheNewEpisode", check_vector_equals_single, r"step \d+: lane \d against .*: entry '"),
    ("NoFinalMetrics", check_vector_equals_single, r"step \d+: lane \d against .*: info has \['episode_metrics'\]"),
    ("SameSeedAfterReset", check_vector_equals_single, r"step \d+, after the reset: lane \d against "),
]


@pytest.mark.parametrize(("fault", "check", "told"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_a_check_finds_its_fault(fault: str, check: Callable[..., object], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check(
            f"broken_environments:Broken/{fault}-v0",
            **({} if check is check_conservation else {"steps": 150}),
            **short(fault),
        )


def test_violations_that_are_not_told_are_found() -> None:
    env_id = "broken_environments:Broken/NoViolations-v0"
    check_conservation(env_id, **short(env_id))
    with pytest.raises(AssertionError, match=r"step \d+: violations so far are 0 by info, [1-9]\d* by the ledger"):
        check_conservation(env_id, **short(env_id, rate_rps=150.0))


def test_every_fault_is_tried() -> None:
    tried = {name for name, _, _ in FAULTS} | {"NoViolations"}
    assert tried == {fault.__name__ for fault in (*broken_environments.SINGLE, *broken_environments.VECTOR)}


@pytest.mark.parametrize("fault", ["LeakyReset", "WrongEnergy", "SnapshotWithoutItsLane", "MixedRewards"])
def test_the_whole_check_finds_it_too(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_environment(f"broken_environments:Broken/{fault}-v0", steps=150, **short(fault))


def test_an_environment_without_snapshots_is_told_so() -> None:
    gymnasium.register("Broken/NoSnapshot-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    with pytest.raises(AssertionError, match="has no snapshot"):
        check_snapshot("Broken/NoSnapshot-v0")
