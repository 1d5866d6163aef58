"""A learned policy as a compiled one: it answers as torch, acts as in its environment, is refused elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.cluster import features as f
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.envs import layout
from biscale_gym.envs.mlp import ClockMLP, decode_clock, load_model
from biscale_gym.envs.network import ModelError
from biscale_gym.envs.shield import NO_SHIELD, ShieldSettings
from tests.envs.test_policies import assert_same, simulated

CLOCKS_MHZ = (750, 930, 1110, 1290, 1470, 1650, 1830)
OVERRIDES = {"clocks_mhz": list(CLOCKS_MHZ), "top_clock_mhz": CLOCKS_MHZ[-1]}
POINTS = ("boundary", "arrival", "overrun", "idle")


def network(phase: str, outputs: int, activation: str, seed: int = 0, gain: float = 1.0) -> torch.nn.Sequential:
    """``gain`` above 1 makes its answers vary more."""
    torch.manual_seed(seed)
    between = torch.nn.ReLU if activation == "relu" else torch.nn.Tanh
    size = layout.size(phase, len(CLOCKS_MHZ))  # type: ignore[arg-type]
    layers = torch.nn.Sequential(
        torch.nn.Linear(size, 32), between(), torch.nn.Linear(32, 16), between(), torch.nn.Linear(16, outputs)
    )
    with torch.no_grad():
        for weights in layers.parameters():
            weights *= gain
    return layers


def model_of(layers: torch.nn.Sequential, phase: str, head: str = "argmax", **more: Any) -> ClockMLP:
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    return ClockMLP(
        phase=phase,  # type: ignore[arg-type]
        clocks_mhz=CLOCKS_MHZ,
        slo_s=(0.01, 2.0),
        weights=tuple(layer.weight.detach().numpy().T.copy() for layer in linear),
        biases=tuple(layer.bias.detach().numpy().copy() for layer in linear),
        activation="relu" if isinstance(layers[1], torch.nn.ReLU) else "tanh",
        head=head,  # type: ignore[arg-type]
        **more,
    )


def random_observations(phase: Any, count: int) -> np.ndarray[Any, Any]:
    low, high = layout.bounds(phase, len(CLOCKS_MHZ))
    return np.random.default_rng(1).uniform(low, high, (count, len(low))).astype(np.float32)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_actions_are_torchs_on_random_observations(phase: str, activation: str) -> None:
    layers = network(phase, len(CLOCKS_MHZ), activation)
    observations = random_observations(phase, 10_000)
    with torch.no_grad():
        wanted = layers(torch.as_tensor(observations)).argmax(dim=1).numpy()
    assert len(np.unique(wanted)) > 2
    np.testing.assert_array_equal(model_of(layers, phase).actions(observations), wanted)


@pytest.mark.parametrize("head", ["squashed", "clipped"])
def test_one_output_says_the_nearest_clock(head: str) -> None:
    layers = network("decode", 1, "relu")
    observations = random_observations("decode", 10_000)
    with torch.no_grad():
        said = 3.0 * layers(torch.as_tensor(observations))[:, 0]
        number = (torch.tanh(said) if head == "squashed" else said.clamp(-1.0, 1.0)).numpy().astype(np.float64)
    mhz = 750.0 + 0.5 * (number + 1.0) * 1080.0
    wanted = np.abs(mhz[:, None] - np.array(CLOCKS_MHZ)).argmin(axis=1)
    assert len(np.unique(wanted)) > 2
    model = model_of(layers, "decode", head)
    scaled = replace(
        model,
        weights=(*model.weights[:-1], 3.0 * model.weights[-1]),
        biases=(*model.biases[:-1], 3.0 * model.biases[-1]),
    )
    np.testing.assert_array_equal(scaled.actions(observations), wanted)


def played(env: Any, model: ClockMLP) -> set[int]:
    """Play an episode with the model's own actions; which there were."""
    observation, _ = env.reset(seed=3)
    over, actions = False, set()
    while not over:
        action = int(model.actions(observation[None])[0])
        actions.add(action)
        observation, _, _, over, _ = env.step(action)
    return actions


SHIELDED = {"kv_high": 0.02, "kv_low": 0.01, "headroom": 0.2}
"""Tight enough to act on the scenario smoke."""


@pytest.mark.parametrize("shield", [{}, SHIELDED], ids=["bare", "shielded"])
@pytest.mark.parametrize("head", ["argmax", "squashed", "clipped"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_compiled_policy_acts_as_the_model_in_its_environment(
    phase: str, every: int, head: str, shield: dict[str, float]
) -> None:
    points = POINTS if phase == "prefill" else ("boundary", "idle")
    env: Any = gymnasium.make(
        f"BiScale/{phase.capitalize()}-v0",
        scenario="smoke",
        episode_s=20.0,
        decision_points=points,
        decide_every=every,
        shield=shield,
        overrides=OVERRIDES,
    )
    outputs = len(CLOCKS_MHZ) if head == "argmax" else 1
    for seed in range(40):
        layers = network(phase, outputs, "relu", seed, gain=4.0)
        overruled = ShieldSettings(**shield)
        model = model_of(layers, phase, head, decision_points=points, decide_every=every, shield=overruled)
        if len(played(env, model)) > 2:
            break
    else:
        pytest.fail("no network's answers vary")
    setting = env.unwrapped.setting
    slo = setting.scenario.slo
    compiled = model.policy(setting.clocks_mhz, slo.ttft_s if phase == "prefill" else slo.tpot_s)
    policies = (compiled, None) if phase == "prefill" else (None, compiled)
    assert_same(env, simulated(env, policies, phase, None))


def test_a_kept_clock_is_decided_anew_after_so_many_batches() -> None:
    env: Any = gymnasium.make("BiScale/Decode-v0", scenario="smoke", episode_s=10.0, decide_every=4)
    env.reset(seed=0)
    iterations = []
    for _ in range(20):
        simulator = env.unwrapped.simulator
        iterations.append((int(simulator.state.obs[1][f.ITERATION]), int(simulator.state.obs[1][f.REASON])))
        env.step(0)
    steps = [
        after - before
        for (before, reason), (after, then) in pairwise(iterations)
        if reason == f.BOUNDARY and then == f.BOUNDARY
    ]
    assert steps
    assert set(steps) == {4}


def test_the_kv_guard_holds_the_highest_clock_until_memory_is_free() -> None:
    shield = ShieldSettings(kv_high=0.8, kv_low=0.5)
    model = model_of(network("decode", len(CLOCKS_MHZ), "relu"), "decode", shield=shield)
    params = model.policy(CLOCKS_MHZ, 0.1).params
    bare = replace(model, shield=NO_SHIELD).policy(CLOCKS_MHZ, 0.1).params
    env: Any = gymnasium.make("BiScale/Decode-v0", scenario="smoke", episode_s=10.0, overrides=OVERRIDES)
    env.reset(seed=0)
    state = env.unwrapped.simulator.state
    obs, memory = state.obs[1].copy(), np.zeros(MEMORY_SIZE)
    inst = state.inst[0]
    profile = state.predicted[inst["predicted_start"] : inst["predicted_stop"]]
    obs[f.REASON], obs[f.KV_CAPACITY_TOKENS] = f.BOUNDARY, 1000.0
    answers = []
    for used in (400.0, 810.0, 600.0, 499.0):
        obs[f.KV_TOKENS] = used
        unguarded = decode_clock(obs, np.zeros(MEMORY_SIZE), bare, profile)
        answers.append((decode_clock(obs, memory, params, profile), unguarded))
    top = len(CLOCKS_MHZ) - 1
    assert [guarded for guarded, _ in answers] == [answers[0][1], top, top, answers[3][1]]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model_of(network("decode", len(CLOCKS_MHZ), "tanh"), "decode", about={"seed": 0}).save(tmp_path / "clocks")
    return tmp_path / "clocks"


def test_a_saved_model_comes_back_whole(saved: Path) -> None:
    model = load_model(saved)
    again = load_model(saved.with_suffix(".json"))
    observations = random_observations("decode", 100)
    np.testing.assert_array_equal(model.actions(observations), again.actions(observations))
    assert (model.phase, model.activation, model.about) == ("decode", "tanh", {"seed": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation_version": layout.VERSION + 1}, "train it again"),
        ({"format": 99}, "format 99"),
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"layers": 9}, "not a whole model"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    path = saved.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_a_missing_model_names_those_at_hand(saved: Path) -> None:
    with pytest.raises(ModelError, match="clocks"):
        load_model(saved.with_name("clock"))


def test_another_grid_or_slo_is_refused(saved: Path) -> None:
    model = load_model(saved)
    with pytest.raises(ModelError, match="no 1290 MHz"):
        model.policy((750, 930, 1110, 1470, 1650, 1830), 0.1)
    with pytest.raises(ModelError, match=r"from 0\.01 to 2 s, the run has 5 s"):
        model.policy(CLOCKS_MHZ, 5.0)


def test_layers_that_do_not_fit_are_refused() -> None:
    model = model_of(network("decode", len(CLOCKS_MHZ), "relu"), "decode")
    with pytest.raises(ModelError, match="takes 58 numbers"):
        replace(model, phase="prefill")
    with pytest.raises(ModelError, match="not finite"):
        replace(model, biases=(*model.biases[:-1], np.full(len(CLOCKS_MHZ), np.nan, np.float32)))
