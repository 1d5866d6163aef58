"""What a vector environment refuses, it refuses before any lane has moved."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.envs import episodes
from biscale_gym.envs.errors import EnvironmentUsageError

SETTINGS: dict[str, Any] = {"scenario": "smoke", "episode_s": 5.0}


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Cluster-v0"])
def test_a_wrong_action_of_one_lane_moves_no_lane(env_id: str, wrong: int) -> None:
    envs, untouched = (gymnasium.make_vec(env_id, num_envs=3, **SETTINGS) for _ in range(2))
    for env in (envs, untouched):
        env.reset(seed=4)
    right = np.zeros(envs.action_space.shape, dtype=np.int64)
    actions = right.copy()
    actions.flat[-1] = wrong
    with pytest.raises(EnvironmentUsageError, match=f"action {wrong} is no clock index; the nearest is"):
        envs.step(actions)
    for seen, expected in zip(envs.step(right)[:2], untouched.step(right)[:2], strict=True):
        np.testing.assert_array_equal(seen, expected)


def test_lanes_that_were_never_reset_are_not_stepped() -> None:
    envs = gymnasium.make_vec("BiScale/Decode-v0", num_envs=2, **SETTINGS)
    actions = np.zeros(2, dtype=np.int64)
    with pytest.raises(EnvironmentUsageError, match="not every lane has been reset"):
        envs.step(actions)
    envs.reset(seed=0, options={"reset_mask": np.array([True, False])})
    with pytest.raises(EnvironmentUsageError, match="not every lane has been reset"):
        envs.step(actions)
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(actions)


def test_episodes_are_drawn_without_what_planners_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("nobody asked for the training trace")

    monkeypatch.setattr(episodes, "generated_training", refused)
    gymnasium.make_vec("BiScale/Cluster-v0", num_envs=2, **SETTINGS).reset(seed=0)


def test_lanes_lie_side_by_side_also_in_their_later_episodes() -> None:
    envs: Any = gymnasium.make_vec("BiScale/Prefill-v0", num_envs=3, **SETTINGS).unwrapped
    envs.reset(seed=0)

    def begin() -> list[int]:
        return [simulator.state.glob.ctypes.data for simulator in envs.simulators]

    first = begin()
    assert first[0] % (2 << 20) == 0
    assert np.diff(first).tolist() == [envs.simulators[0].room_bytes] * 2
    envs.reset(seed=1)
    assert begin() == first


@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Cluster-v0"])
def test_quiet_steps_are_the_same_steps_and_tell_of_ends_alone(env_id: str) -> None:
    quiet, told = (gymnasium.make_vec(env_id, num_envs=2, **SETTINGS) for _ in range(2))
    for env in (quiet, told):
        env.reset(seed=4)
    columns = told.unwrapped.setting.term_columns
    of_every_lane = {*columns, *(f"_{name}" for name in columns)}
    ends = 0
    while ends < 3:
        actions = told.action_space.sample()
        seen, rewards, over, own = quiet.unwrapped.step_quietly(actions)
        expected, all_rewards, _, ended, infos = told.step(actions)
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_array_equal(rewards, all_rewards.astype(np.float32))
        np.testing.assert_array_equal(over, ended)
        assert set(own) == set(infos) - of_every_lane
        if ended.any():
            lane = int(np.argmax(ended))
            assert own["final_info"]["now_s"][lane] == infos["now_s"][lane]
        ends += int(ended.sum())
