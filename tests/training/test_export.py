"""A trained model without torch: compiled and as ONNX it acts as SB3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from biscale_gym.config import validate
from biscale_gym.envs.cluster_mlp import load_cluster_model
from biscale_gym.envs.mlp import load_model
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.export import clock_model, cluster_model, export_model
from biscale_gym.training.settings import TrainingSettings
from tests.envs.test_policies import assert_same, simulated

CONTINUOUS = [{"name": "ContinuousClocks"}]


def untrained(**changes: Any) -> tuple[Any, TrainingSettings]:
    """A model of random weights, some of them large, so that its actions vary."""
    values = {
        "env_id": "BiScale/Prefill-v0",
        "scenarios": ["smoke"],
        "env": {"episode_s": 3.0},
        "lanes": 4,
        "total_steps": 64,
        "hyperparameters": {},
        **changes,
    }
    if values.get("algorithm", "ppo") in ("ppo", "maskable-ppo", "recurrent-ppo"):
        values["hyperparameters"] = {"n_steps": 16, "batch_size": 64}
    else:
        values["hyperparameters"] = {"buffer_size": 64}
    settings = validate(TrainingSettings, values, "test")
    model: Any = make_model(settings, make_lanes(settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.policy.parameters():
            if weights.ndim == 2:
                weights *= 4.0
    return model, settings


def observations(model: Any, count: int) -> np.ndarray[Any, Any]:
    space = model.observation_space
    return np.random.default_rng(0).uniform(space.low, space.high, (count, *space.shape)).astype(np.float32)


def told(number: np.ndarray[Any, Any], clocks_mhz: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The nearest clock to numbers in [-1, 1]."""
    mhz = clocks_mhz[0] + 0.5 * (number.astype(np.float64) + 1.0) * (clocks_mhz[-1] - clocks_mhz[0])
    found: np.ndarray[Any, Any] = np.abs(mhz[:, None] - np.array(clocks_mhz)).argmin(axis=1)
    return found


@pytest.mark.parametrize(
    ("algorithm", "wrappers"),
    [("ppo", []), ("qr-dqn", []), ("ppo", CONTINUOUS), ("sac", CONTINUOUS), ("tqc", CONTINUOUS)],
)
@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Decode-v0"])
def test_every_form_acts_as_the_trained_model(algorithm: str, wrappers: list[Any], env_id: str, tmp_path: Path) -> None:
    model, settings = untrained(algorithm=algorithm, wrappers=wrappers, env_id=env_id, activation="relu")
    names = export_model(model, settings, tmp_path, {"step": 0})
    assert sorted(names) == ["policy.json", "policy.onnx", "policy.safetensors"]
    rows = observations(model, 10_000)
    wanted, _ = model.predict(rows, deterministic=True)
    clocks = load_model(tmp_path / "policy")
    session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "policy.onnx"))
    _, action = session.run(None, {"observation": rows})
    if wrappers:
        np.testing.assert_allclose(action, wanted, atol=1e-4)
        wanted = told(wanted[:, 0], clocks.clocks_mhz)
        # A number half-way between two clocks may round to either side.
        assert np.mean(clocks.actions(rows) == wanted) > 0.9995
    else:
        np.testing.assert_array_equal(clocks.actions(rows), wanted)
        np.testing.assert_array_equal(action, wanted)
    assert len(np.unique(wanted)) > 1


def test_a_policy_of_all_clocks_acts_as_the_trained_model(tmp_path: Path) -> None:
    cluster, settings = untrained(env_id="BiScale/Cluster-v0", env={"episode_s": 3.0, "interval_s": 0.2})
    names = export_model(cluster, settings, tmp_path, {"step": 5})
    assert names == ["policy.onnx", "policy.safetensors", "policy.json"]
    rows = observations(cluster, 10_000)
    session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "policy.onnx"))
    (logits,) = session.run(None, {"observation": rows})
    clocks = int(cluster.action_space.nvec[0])
    actions, _ = cluster.predict(rows, deterministic=True)
    np.testing.assert_array_equal(logits.reshape(len(rows), -1, clocks).argmax(axis=2), actions)
    exported = load_cluster_model(tmp_path / "policy")
    # Of 160,000 answers one or two are ties but for torch's rounding.
    others = np.argwhere(exported.actions(rows) != actions)
    assert len(others) < 5
    for row, slot in others:
        of_slot = logits[row].reshape(-1, clocks)[slot]
        assert of_slot.max() - of_slot[exported.actions(rows[row : row + 1])[0, slot]] < 1e-5
    assert (exported.interval_s, exported.about["step"]) == (0.2, 5)
    assert exported.slo_s == ((0.6, 0.6), (0.1, 0.1))


def test_what_is_no_clock_policy_is_onnx_alone() -> None:
    stacked, settings = untrained(wrappers=[{"name": "History", "arguments": {"k": 2}}])
    assert clock_model(stacked, settings, {}) is None
    continuous, settings = untrained(env_id="BiScale/Cluster-v0", wrappers=CONTINUOUS)
    assert cluster_model(continuous, settings, {}) is None
    recurrent, settings = untrained(env_id="BiScale/Cluster-v0", algorithm="recurrent-ppo")
    assert cluster_model(recurrent, settings, {}) is None


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Decode-v0"])
def test_a_policy_with_a_state_acts_as_the_trained_model_in_its_environment(
    env_id: str, every: int, tmp_path: Path
) -> None:
    phase = "prefill" if "Prefill" in env_id else "decode"
    overrides = {"top_clock_mhz": 1830}
    env_settings = {"episode_s": 10.0, "decide_every": every, "overrides": overrides}
    env: Any = gymnasium.make(env_id, scenario="smoke", **env_settings)
    for seed in range(20):
        model, settings = untrained(
            seed=seed, env_id=env_id, algorithm="recurrent-ppo", lstm_size=24, net_arch=[16], env=env_settings
        )
        observation, _ = env.reset(seed=2)
        over, state, start, actions = False, None, np.array([True]), set()
        while not over:
            action, state = model.predict(observation, state, start, deterministic=True)
            actions.add(int(action))
            observation, _, _, over, _ = env.step(int(action))
            start = np.array([False])
        if len(actions) > 1:
            break
    else:
        pytest.fail("no network's answers vary")
    assert export_model(model, settings, tmp_path, {}) == ["policy.safetensors", "policy.json"]
    setting = env.unwrapped.setting
    slo = setting.scenario.slo
    clocks = load_model(tmp_path / "policy")
    policy = clocks.policy(setting.clocks_mhz, slo.ttft_s if phase == "prefill" else slo.tpot_s)
    assert_same(env, simulated(env, (policy, None) if phase == "prefill" else (None, policy), phase, None))


def test_the_description_says_what_was_trained(tmp_path: Path) -> None:
    model, settings = untrained(
        env={"episode_s": 3.0, "decide_every": 4}, shield={"kv_high": 0.85, "kv_low": 0.7, "headroom": 0.95}
    )
    export_model(model, settings, tmp_path, {"step": 7})
    clocks = load_model(tmp_path / "policy")
    assert (clocks.phase, clocks.decide_every, clocks.shield.headroom) == ("prefill", 4, 0.95)
    assert clocks.slo_s == (0.6, 0.6)
    assert clocks.about["step"] == 7
    assert clocks.about["settings"]["seed"] == 0
    assert "git_revision" in clocks.about["fingerprint"]
