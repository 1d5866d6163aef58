"""The multi-agent cluster: PettingZoo's own tests, and the same cluster as the single agent's."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.config import ConfigError
from biscale_gym.envs import cluster_layout as layout

pettingzoo = pytest.importorskip("pettingzoo")

SETTINGS: dict[str, Any] = {"scenario": "smoke", "episode_s": 3.0}


def make() -> Any:
    from biscale_gym.envs.parallel import parallel_env

    return parallel_env(**SETTINGS)


def test_pettingzoos_own_tests_pass() -> None:
    from pettingzoo.test import parallel_api_test, parallel_seed_test

    parallel_api_test(make(), num_cycles=60)
    parallel_seed_test(make, num_cycles=20)


def test_a_planner_that_changes_the_placement_is_refused() -> None:
    from biscale_gym.envs.parallel import parallel_env

    with pytest.raises(ConfigError, match="planner 'biscale' changes it"):
        parallel_env(scenario="smoke", planner="biscale")


def test_agents_play_the_same_cluster() -> None:
    many, one = make(), gymnasium.make("BiScale/Cluster-v0", **SETTINGS)
    seen, _ = many.reset(seed=9)
    obs, _ = one.reset(seed=9)
    rng = np.random.default_rng(0)
    truncated = False
    while not truncated:
        actions = {agent: int(rng.integers(3)) for agent in many.agents}
        clocks = np.zeros(layout.SLOTS, dtype=np.int64)
        for agent, action in actions.items():
            clocks[many.slots[agent]] = action
        for agent, slot in many.slots.items():
            start = layout.slot_start(slot)
            own = np.concatenate([obs[start : start + layout.slot_size(slot)], obs[layout.TOTALS :]])
            np.testing.assert_array_equal(seen[agent], own)
            assert many.observation_space(agent).contains(seen[agent])
        seen, rewards, ended, over, infos = many.step(actions)
        obs, reward, _, truncated, info = one.step(clocks)
        assert set(rewards.values()) == {reward}
        assert set(over.values()) == {truncated}
        assert not any(ended.values())
        own_j = sum(infos[agent]["own_energy_j"] for agent in infos)
        assert own_j + info["unallocated_energy_j"] == pytest.approx(info["energy_j"], rel=1e-9)
    assert many.agents == []
