"""The VecEnv over native vector environments, held against SB3's own over single ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from every_environment import IDS, short

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.sb3 import make_vec_env

LANES = 3
ENV_ID = "BiScale/Prefill-v0"


def dummy(env_id: str, **settings: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: gymnasium.make(env_id, disable_env_checker=True, **settings)] * LANES)


def same(ours: Any, theirs: Any) -> None:
    np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize("env_id", IDS)
def test_it_does_what_sb3_does_with_single_environments(env_id: str) -> None:
    ours, theirs = make_vec_env(env_id, LANES, seed=3, step_infos=True, **short(env_id)), dummy(env_id, **short(env_id))
    assert isinstance(ours, VecEnv)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    theirs.seed(3)
    same(ours.reset(), theirs.reset())
    same(ours.reset_infos, theirs.reset_infos)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(200):
        if hasattr(theirs.envs[0].unwrapped, "action_masks"):
            masks = np.stack(ours.env_method("action_masks"))
            same(masks, np.stack(theirs.env_method("action_masks")))
            actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        else:
            actions = np.stack([rng.integers(3, size=ours.action_space.shape) for _ in range(LANES)])
        obs, rewards, dones, infos = ours.step(actions)
        expected_obs, expected_rewards, expected_dones, expected_infos = theirs.step(actions)
        same(obs, expected_obs)
        same(rewards, expected_rewards)
        assert rewards.dtype == expected_rewards.dtype
        same(dones, expected_dones)
        for done, info, expected in zip(dones, infos, expected_infos, strict=True):
            if not done:
                assert expected.pop("TimeLimit.truncated") is False
            same(info, expected)
        # What is told of a new episode, less the terms: in its step those are the old one's.
        for found, expected in zip(ours.reset_infos, theirs.reset_infos, strict=True):
            assert {"split", "trace_seed", "start_s", "cluster_seed"} <= set(found)
            same(found, {name: expected[name] for name in found})
        ends += int(dones.sum())
    assert ends >= LANES


def test_an_episodes_end_is_told_in_full() -> None:
    envs = make_vec_env("BiScale/Prefill-v0", LANES, seed=0, **short(ENV_ID))
    envs.reset()
    dones = np.zeros(LANES, dtype=bool)
    while not dones.any():
        obs, _, dones, infos = envs.step(np.ones(LANES, dtype=np.int64))
    lane = int(np.argmax(dones))
    info = infos[lane]
    assert info["TimeLimit.truncated"] is True
    assert info["terminal_observation"].shape == envs.observation_space.shape
    assert not np.array_equal(info["terminal_observation"], obs[lane])
    assert info["episode_metrics"]["prefill_energy_j"] > 0
    assert envs.reset_infos[lane]["split"] == "train"
    assert all(infos[other] == {} for other in range(LANES) if not dones[other])
    assert info["now_s"] == pytest.approx(4.0)


def test_what_is_written_into_an_empty_info_is_gone_with_the_next_step() -> None:
    envs = make_vec_env(ENV_ID, LANES, seed=0, **short(ENV_ID))
    envs.reset()
    actions = np.ones(LANES, dtype=np.int64)
    _, _, dones, infos = envs.step(actions)
    assert not dones.any()
    infos[1]["mine"] = 1
    assert envs.step(actions)[3] == [{}] * LANES


def test_options_may_differ_between_lanes_and_serve_once() -> None:
    ours, theirs = (
        make_vec_env("BiScale/Decode-v0", LANES, **short(ENV_ID)),
        dummy("BiScale/Decode-v0", **short(ENV_ID)),
    )
    options = [{"trace_seed": 5}, {"split": "test"}, {"trace_seed": 5}]
    for envs in (ours, theirs):
        envs.seed(8)
        envs.set_options(options)
    same(ours.reset(), theirs.reset())
    same(ours.reset_infos, theirs.reset_infos)
    assert [info["split"] for info in ours.reset_infos] == ["train", "test", "train"]
    same(ours.reset(), theirs.reset())
    same(ours.reset_infos, theirs.reset_infos)


def test_attributes_of_lanes() -> None:
    envs = make_vec_env("BiScale/Prefill-v0", LANES, seed=0, **short(ENV_ID))
    assert envs.get_attr("render_mode") == [None] * LANES
    assert envs.get_attr("action_space", indices=1) == [envs.action_space]
    envs.reset()
    simulators = envs.get_attr("simulator")
    assert [one.now_s for one in simulators] == [info["now_s"] for info in envs.reset_infos]
    assert envs.get_attr("episode", indices=[2])[0].trace_seed == envs.reset_infos[2]["trace_seed"]
    assert envs.has_attr("setting")
    assert not envs.has_attr("action_masks")
    assert not envs.has_attr("nothing")
    envs.set_attr("note", "of all")
    assert envs.get_attr("note", indices=[0, 2]) == ["of all", "of all"]
    with pytest.raises(EnvironmentUsageError, match="lanes share 'note'"):
        envs.set_attr("note", "of one", indices=0)
    with pytest.raises(EnvironmentUsageError, match="'simulator' belongs to each lane"):
        envs.set_attr("simulator", None)
    with pytest.raises(AttributeError):
        envs.env_method("action_masks")
    with pytest.raises(EnvironmentUsageError, match="'close' does not return a row for each of the 3 lanes"):
        envs.env_method("close")
    assert envs.env_is_wrapped(Monitor) == [False] * LANES
    assert envs.env_is_wrapped(Monitor, indices=0) == [False]
    with pytest.warns(UserWarning, match="render_mode is None"):
        assert list(envs.get_images()) == [None] * LANES


def test_methods_of_lanes() -> None:
    envs = make_vec_env("BiScale/Prefill-v0", LANES, **short(ENV_ID))
    envs.envs.action_masks = lambda: np.eye(LANES, dtype=bool)
    assert envs.has_attr("action_masks")
    same(envs.env_method("action_masks"), list(np.eye(LANES, dtype=bool)))
    same(envs.env_method("action_masks", indices=[1]), [np.eye(LANES, dtype=bool)[1]])


def test_lanes_of_their_own_keep_their_attributes() -> None:
    env_id = "BiScale/Placement-v0"
    envs = make_vec_env(env_id, LANES, seed=0, **short(env_id))
    envs.reset()
    envs.set_attr("note", "of one", indices=1)
    assert envs.get_attr("note", indices=[1]) == ["of one"]
    assert not envs.has_attr("note")
    assert [len(mask) for mask in envs.env_method("action_masks")] == [envs.action_space.n] * LANES
    assert len({one.trace_seed for one in envs.get_attr("episode")}) > 1


def test_lanes_of_their_own_begin_with_options_of_their_own() -> None:
    env_id = "BiScale/Placement-v0"
    told, again = (make_vec_env(env_id, LANES, **short(env_id)) for _ in range(2))
    for envs in (told, again):
        envs.seed(3)
        envs.set_options([{"trace_seed": lane % 3} for lane in range(LANES)])
    first = told.reset()
    assert [one.trace_seed for one in told.get_attr("episode")] == [lane % 3 for lane in range(LANES)]
    same(first, again.reset())


def test_maskable_ppo_trains_on_placements() -> None:
    sb3_contrib = pytest.importorskip("sb3_contrib")
    env_id = "BiScale/Placement-v0"
    envs = make_vec_env(env_id, LANES, seed=0, **short(env_id))
    model = sb3_contrib.MaskablePPO("MlpPolicy", VecMonitor(envs), n_steps=32, batch_size=32, n_epochs=1, seed=0)
    model.learn(2 * 32 * LANES)
    assert len(model.ep_info_buffer) >= 1


def test_an_unknown_id_and_one_without_a_vector_form_are_refused() -> None:
    with pytest.raises(gymnasium.error.Error, match="Prefil"):
        make_vec_env("BiScale/Prefil-v0", 2)
    with pytest.raises(gymnasium.error.Error, match="vector entry point"):
        make_vec_env("Acrobot-v1", 2)


def test_ppo_trains_under_the_usual_wrappers() -> None:
    envs = VecNormalize(VecMonitor(make_vec_env("BiScale/Prefill-v0", LANES, seed=0, **short(ENV_ID))))
    model = PPO("MlpPolicy", envs, n_steps=64, batch_size=64, n_epochs=1, seed=0)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(4 * 64 * LANES)
    assert any((old != new).any() for old, new in zip(before, model.policy.parameters(), strict=True))
    assert len(model.ep_info_buffer) >= LANES
    assert all(episode["l"] > 10 and episode["r"] < 0 for episode in model.ep_info_buffer)
    # A policy of the vector environment plays a single one.
    env = gymnasium.make("BiScale/Prefill-v0", **short(ENV_ID))
    obs, _ = env.reset(seed=0)
    action, _ = model.predict(obs, deterministic=True)
    env.step(action)


def test_without_sb3_the_extra_is_named() -> None:
    program = "import sys; sys.modules['stable_baselines3'] = None; import biscale_gym.sb3"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: biscale_gym.sb3 needs Stable-Baselines3 and torch" in done.stderr
    assert "pip install 'biscale-gym[train]'" in done.stderr
