"""Placement-v0: masks, windows, and the same joules as a comparison's run of the same planner."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import make_controller
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.workload import Requests
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.policies import PlannerPolicy

ENV_ID = "BiScale/Placement-v0"


@pytest.fixture(scope="module")
def env() -> Any:
    return gymnasium.make(ENV_ID, scenario="smoke")


def play(env: Any, agent: Any, **reset: Any) -> list[tuple[float, dict[str, Any]]]:
    obs, _ = env.reset(**reset)
    over, steps = False, []
    while not over:
        action, _ = agent.predict(obs)
        assert env.unwrapped.action_masks()[action]
        obs, reward, terminated, over, info = env.step(action)
        assert not terminated
        steps.append((reward, info))
    return steps


@pytest.mark.parametrize("clocks", ["biscale", "hold"])
def test_a_planner_is_played_as_in_a_comparison(clocks: str) -> None:
    env = gymnasium.make(ENV_ID, scenario="smoke", clocks=clocks)
    controller = make_controller("biscale" if clocks == "biscale" else "place-only")
    steps = play(env, PlannerPolicy(controller, env), seed=4)
    episode = env.unwrapped.episode
    requests = Requests(episode.requests, env.unwrapped.source.training(), env.unwrapped.scenario.rate_rps, 60.0)
    rollout = Rollout(controller, env.unwrapped.scenario, requests, seed=episode.cluster_seed)
    counted = rollout.run()
    spent = sum(info["energy_j"] for _, info in steps)
    energy = counted.energy
    whole_j = energy.phase_energy_j(True) + energy.phase_energy_j(False) + energy.unallocated_j
    assert spent == pytest.approx(whole_j, rel=1e-9)
    mine, others = env.unwrapped.simulator.requests(), rollout.simulator.requests()
    done = mine.finish_s < episode.end_s
    np.testing.assert_array_equal(mine.finish_s[done], others.finish_s[done])
    assert [info["placement"] for _, info in steps if "placement" in info] == [
        placement.describe() for _, placement in rollout.placements
    ]


def test_masks_allow_what_fits_and_leave_room_for_the_other_phase(env: Any) -> None:
    env.reset(seed=0)
    bare, rng = env.unwrapped, np.random.default_rng(0)
    over = False
    while not over:
        masks = env.unwrapped.action_masks()
        assert masks.any(), "there is always something to do"
        assert masks[bare.commit] == (
            {row.phase for row in map(bare.classes.__getitem__, bare.chosen)} == {"prefill", "decode"}
        )
        action = int(rng.choice(np.flatnonzero(masks)))
        obs, _, _, over, info = env.step(action)
        assert not info["refused"]
        assert env.observation_space.contains(obs)
        assert sum(bare.classes[number].gpus for number in bare.chosen) <= 16


def test_a_forbidden_action_changes_nothing_and_costs(env: Any) -> None:
    first, _ = env.reset(seed=0)
    obs, reward, _, over, info = env.step(env.unwrapped.commit)
    assert (reward, over, info["refused"]) == (-1.0, False, True)
    np.testing.assert_array_equal(obs, first)
    with pytest.raises(EnvironmentUsageError, match="neither a class nor the commit; the nearest is 0"):
        env.step(-3)


def test_windows_are_seen_when_they_are_over(env: Any) -> None:
    agent = PlannerPolicy("place-only", env)
    obs, _ = env.reset(seed=1)
    names = [entry.name for entry in env.unwrapped.observation_entries for _ in range(entry.size)]
    past, over = names.index("past_rates"), False
    assert obs[past] == 0.0
    while not over:
        obs, _, _, over, info = env.step(agent.predict(obs)[0])
        if info["window"] and not over:
            rate_rps = env.unwrapped.demand.context(info["window"], None).history_rps[-1]
            assert obs[past] == pytest.approx(np.log1p(rate_rps) / np.log(1001.0), rel=1e-6)


def test_a_plan_of_unknown_classes_is_refused(env: Any) -> None:
    env.reset(seed=0)
    with pytest.raises(EnvironmentUsageError, match="no class of the environment"):
        PlannerPolicy("distserve", env).predict()


def test_a_warm_up_that_swallows_the_first_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_s is 20, expected less than the scenario's window_s of 20"):
        gymnasium.make(ENV_ID, scenario="smoke", warmup_s=20.0)
