"""The environments' dynamics stay what they were under their version."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from every_environment import IDS


@pytest.fixture(scope="module")
def golden(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("golden_trajectories")


@pytest.fixture(scope="module")
def prefill(golden: ModuleType) -> dict[str, Any]:
    return golden.record("BiScale/Prefill-v0")


@pytest.mark.parametrize("env_id", IDS)
def test_the_golden_trajectory_is_played_again(golden: ModuleType, env_id: str) -> None:
    path = golden.path_of(env_id)
    assert path.is_file(), f"no golden trajectory of {env_id}: python scripts/golden_trajectories.py --id {env_id}"
    found = golden.record(env_id)
    assert found["numbers"]["episodes_ended"] >= 1
    told = golden.difference(found, json.loads(path.read_text(encoding="utf-8")))
    assert told is None, golden.advice(env_id, told)


def test_no_golden_file_is_left_over(golden: ModuleType) -> None:
    assert sorted(golden.FOLDER.glob("*.json")) == sorted(golden.path_of(env_id) for env_id in IDS)


def test_another_number_is_told(golden: ModuleType, prefill: dict[str, Any]) -> None:
    other = copy.deepcopy(prefill)
    other["numbers"]["energy_j"] *= 1.0 + 3e-6
    other["digest"] = "another"
    told = golden.difference(prefill, other)
    assert told.startswith("energy_j is ")
    assert "--id BiScale/Prefill-v0" in golden.advice("BiScale/Prefill-v0", told)


def test_an_entry_that_was_zero_is_told(golden: ModuleType, prefill: dict[str, Any]) -> None:
    other = copy.deepcopy(prefill)
    assert "last overrun" not in other["numbers"]
    other["numbers"]["last overrun"] = 1.0
    assert golden.difference(prefill, other) == "last overrun is 0.0, the golden trajectory has 1.0"


def test_the_last_bit_counts_on_the_same_arithmetic_alone(golden: ModuleType, prefill: dict[str, Any]) -> None:
    other = copy.deepcopy(prefill)
    assert golden.difference(prefill, other) is None
    other["digest"] = "another"
    assert "digest" in golden.difference(prefill, other)
    other["fingerprint"]["numba"] = "another"
    assert golden.difference(prefill, other) is None


def test_another_action_gives_another_trajectory(
    golden: ModuleType, prefill: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pattern is seven long: one decision in the whole trajectory differs.
    actions = golden.ACTIONS * (golden.STEPS // 7 + 1)
    actions[100] = (actions[100] + 1) % 3
    monkeypatch.setattr(golden, "ACTIONS", actions)
    assert golden.record("BiScale/Prefill-v0")["digest"] != prefill["digest"]
