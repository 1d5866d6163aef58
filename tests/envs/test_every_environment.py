"""Every registered environment passes every check, whatever it plays and whatever it is answered."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from every_environment import IDS, QUICK_TABLE, short
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_gym.testing import (
    check_conservation,
    check_environment,
    check_reset_equals_fresh,
    check_snapshot,
    check_vector_equals_single,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "nominal": {},
    "overload": {"rate_rps": 150.0},
    "drawn hardware": {"randomisation": "h100-uncertainty"},
    "drawn load": {"load": (0.3, 1.0)},
}


def variant(env_id: str, name: str, recorded_trace: Path) -> dict[str, Any]:
    """Settings of a variant."""
    return short(env_id, **(VARIANTS[name] if name in VARIANTS else {"trace": str(recorded_trace)}))


def test_there_are_environments() -> None:
    assert {f"BiScale/{name}-v0" for name in ("Prefill", "Decode", "Cluster", "Placement")} <= set(IDS)


@pytest.mark.parametrize("env_id", IDS)
def test_all_checks_pass_and_no_checker_warns(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_environment(env_id, steps=150, **short(env_id))


@pytest.mark.parametrize("name", [*VARIANTS, "recorded trace"])
@pytest.mark.parametrize("env_id", IDS)
def test_whatever_is_played(env_id: str, name: str, recorded_trace: Path) -> None:
    settings = variant(env_id, name, recorded_trace)
    check_conservation(env_id, **settings)
    check_reset_equals_fresh(env_id, steps=80, **settings)
    check_snapshot(env_id, steps=80, **settings)
    check_vector_equals_single(env_id, steps=40, num_envs=(3,), threads=(1,), **settings)


@pytest.mark.parametrize("env_id", IDS)
@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from([*VARIANTS, "recorded trace"]),
    seed=st.integers(0, 2**31),
    actions=st.lists(st.integers(0, 1000), min_size=1, max_size=20),
    steps=st.integers(2, 120),
    share=st.floats(0.0, 1.0),
)
def test_whatever_is_answered(
    env_id: str, recorded_trace: Path, name: str, seed: int, actions: list[int], steps: int, share: float
) -> None:
    settings = variant(env_id, name, recorded_trace)
    check_conservation(env_id, seed=seed, actions=actions, **settings)
    check_snapshot(env_id, seed=seed, actions=actions, steps=steps, at_step=int(share * steps), **settings)
    check_vector_equals_single(
        env_id, seed=seed, actions=actions, steps=1, num_envs=(1 + seed % 3,), threads=(1,), **settings
    )


@pytest.mark.parametrize("env_id", IDS)
def test_a_long_overloaded_episode_keeps_its_books(env_id: str) -> None:
    told = check_conservation(env_id, actions=[0], **short(env_id, rate_rps=100.0, episode_s=25.0))
    assert told["violations"] > 50
    assert told["completed"] > 20


@pytest.mark.parametrize("env_id", IDS)
def test_the_scenarios_own_episode_keeps_its_books(env_id: str) -> None:
    quick = QUICK_TABLE if "Placement" in env_id else {}
    told = check_conservation(env_id, scenario="smoke", **quick)
    # Clocks keep the SLO here, whichever they are; random placements need not.
    assert told["violations"] == 0 or "Placement" in env_id
    assert told["dt_s"] == pytest.approx(55.0, abs=2.0)


@pytest.mark.parametrize("env_id", IDS)
def test_every_number_of_the_observation_has_a_name_of_its_own(env_id: str) -> None:
    env = gymnasium.make(env_id, **short(env_id))
    names = env.get_wrapper_attr("observation_names")
    assert len(set(names)) == len(names) == env.observation_space.shape[0]


@pytest.mark.parametrize("env_id", IDS)
def test_a_snapshot_of_another_environment_is_refused(env_id: str) -> None:
    one, other = (gymnasium.make(env_id, **short(env_id)).unwrapped for _ in range(2))
    with pytest.raises(ValueError, match="call reset"):
        one.snapshot()
    one.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="another environment's"):
        other.restore(one.snapshot())
