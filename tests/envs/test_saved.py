"""Lanes that are written down and set again elsewhere go on as if nothing had been."""

from __future__ import annotations

import io
import json
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import VectorEnv

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.saved import Saved, restore_lanes, saved_lanes
from biscale_gym.envs.wrappers import vector
from tests.envs.every_environment import short

LANES = 3


def made(env_id: str, wrapped: bool = False, lanes: int = LANES, **settings: Any) -> VectorEnv[Any, Any, Any]:
    envs = gymnasium.make_vec(env_id, lanes, vectorization_mode="vector_entry_point", **short(env_id, **settings))
    return vector.History(vector.SlackShaping(vector.ClockDeltas(envs)), 2) if wrapped else envs


def through_a_file(saved: Saved) -> Saved:
    """As a checkpoint keeps it: arrays without pickle, values as JSON."""
    stream = io.BytesIO()
    np.savez(stream, **dict(saved.arrays))
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as loaded:
        return Saved({name: loaded[name] for name in loaded.files}, json.loads(json.dumps(saved.values)))


def action(envs: VectorEnv[Any, Any, Any], draws: np.random.Generator) -> Any:
    """Random, of those allowed where there are masks."""
    singles = getattr(envs, "envs", None)
    if singles is None:
        return draws.integers(3, size=envs.action_space.shape)
    return np.array([draws.choice(np.flatnonzero(env.unwrapped.action_masks())) for env in singles])


@pytest.mark.parametrize(
    ("env_id", "more"),
    [
        ("BiScale/Prefill-v0", {"load": (0.5, 1.0), "randomisation": "h100-uncertainty"}),
        ("BiScale/Prefill-v0", {"wrapped": True}),
        ("BiScale/Decode-v0", {}),
        ("BiScale/Cluster-v0", {}),
        ("BiScale/Placement-v0", {}),
    ],
    ids=["prefill-drawn", "prefill-wrapped", "decode", "cluster", "placement"],
)
def test_restored_lanes_go_on_alike(env_id: str, more: dict[str, Any]) -> None:
    draws = np.random.default_rng(0)
    envs = made(env_id, **more)
    envs.reset(seed=5)
    before, after = (6, 25) if "Placement" in env_id else (40, 400)
    for _ in range(before):
        envs.step(action(envs, draws))
    kept = through_a_file(saved_lanes(envs))
    actions, steps = [], []
    for _ in range(after):
        actions.append(action(envs, draws))
        steps.append(envs.step(actions[-1]))
    other = made(env_id, **more)
    restore_lanes(other, kept)
    ended = 0
    for chosen, expected in zip(actions, steps, strict=True):
        found = other.step(chosen)
        for own, theirs in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(own, theirs)
        ended += int(found[3].sum())
        assert str(found[4].get("final_info")) == str(expected[4].get("final_info"))
    assert ended > LANES  # what was drawn after the first end was the same, too


def test_what_cannot_be_saved_or_set_is_told() -> None:
    envs = made("BiScale/Prefill-v0")
    with pytest.raises(EnvironmentUsageError, match="not every lane has been reset"):
        saved_lanes(envs)
    envs.reset(seed=0)
    with pytest.raises(EnvironmentUsageError, match="3 lanes were saved, this vector has 2"):
        restore_lanes(made("BiScale/Prefill-v0", lanes=2), saved_lanes(envs))
    with pytest.raises(EnvironmentUsageError, match="cannot be saved"):
        saved_lanes(gymnasium.make_vec("CartPole-v1", 2))
