"""A trained model without torch: compiled and as ONNX it acts as SB3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from biscale_gym.config import validate
from biscale_gym.envs.mlp import load_model
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.export import clock_model, export_model
from biscale_gym.training.settings import TrainingSettings

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


def test_what_is_no_clock_policy_is_onnx_alone(tmp_path: Path) -> None:
    cluster, settings = untrained(env_id="BiScale/Cluster-v0")
    assert export_model(cluster, settings, tmp_path, {}) == ["policy.onnx"]
    rows = observations(cluster, 50)
    session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "policy.onnx"))
    (logits,) = session.run(None, {"observation": rows})
    clocks = int(cluster.action_space.nvec[0])
    actions, _ = cluster.predict(rows, deterministic=True)
    np.testing.assert_array_equal(logits.reshape(len(rows), -1, clocks).argmax(axis=2), actions)
    stacked, settings = untrained(wrappers=[{"name": "History", "arguments": {"k": 2}}])
    assert clock_model(stacked, settings, {}) is None


def test_a_policy_with_a_state_has_no_such_form(tmp_path: Path) -> None:
    model, settings = untrained(algorithm="recurrent-ppo")
    assert export_model(model, settings, tmp_path, {}) == []


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
