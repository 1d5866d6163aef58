"""The golden trajectory of every environment: what a fixed seed and fixed actions give on the scenario ``smoke``.

``python scripts/golden_trajectories.py`` remakes tests/envs/golden/; ``--id`` only that of one environment. The tests
compare: to the last bit where the arithmetic is the recorded one, readable numbers to rounding elsewhere. A change of
an environment's dynamics shows there, and asks for another version of its id.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.fingerprint import arithmetic_differences, fingerprint, same_arithmetic
from biscale_gym.testing.trajectories import Actions, names_of, play

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "envs" / "golden"
SETTINGS: dict[str, Any] = {"scenario": "smoke", "episode_s": 5.0, "warmup_s": 2.0}
QUICK_TABLE = {"requests_per_probe": 200, "probe_warmup_s": 1.0, "rate_tolerance": 0.2, "overrides": {"window_s": 3.0}}
SEED = 2026
ACTIONS = [2, 0, 1, 1, 2, 0, 0]
STEPS = 400
SUMMED = ("energy_j", "violations", "completed", "dt_s")
ROUNDING = 1e-6
"""Relative: what readable numbers may be off under another arithmetic."""


def ids() -> list[str]:
    """Environments that have a golden trajectory: all but those on real time."""
    return sorted(name for name in gymnasium.registry if name.startswith("BiScale/") and "/Live-" not in name)


def path_of(env_id: str) -> Path:
    """The file of an environment."""
    return FOLDER / f"{env_id.split('/')[1]}.json"


def settings_of(env_id: str) -> dict[str, Any]:
    """What an environment is made with."""
    return {**SETTINGS, **(QUICK_TABLE if "Placement" in env_id else {})}


def record(env_id: str) -> dict[str, Any]:
    """Play an environment and tell what came of it.

    Returns:
        ``digest``: SHA-256 of all observations and rewards; ``numbers``: sums over the steps, and the entries of the
        last observation that are not 0, by name; and what was played, and on what.
    """
    env = gymnasium.make(env_id, disable_env_checker=True, **settings_of(env_id))
    played = play(env, SEED, Actions(ACTIONS), STEPS)
    steps = [one for one in played if one.action is not None]
    digest = hashlib.sha256()
    for one in played:
        digest.update(np.ascontiguousarray(one.obs, dtype="<f4").tobytes())
        digest.update(np.array(one.reward, dtype="<f8").tobytes())
    numbers = {"episodes_ended": float(sum(one.over for one in steps)), "reward": sum(one.reward for one in steps)}
    numbers |= {name: float(sum(one.info[name] for one in steps)) for name in SUMMED}
    last = zip(names_of(env), played[-1].obs.ravel().tolist(), strict=True)
    numbers |= {f"last {name}": value for name, value in last if value != 0.0}
    made = {"settings": settings_of(env_id), "seed": SEED, "actions": ACTIONS, "steps": STEPS}
    return {"id": env_id, **made, "digest": digest.hexdigest(), "numbers": numbers, "fingerprint": fingerprint()}


def difference(found: dict[str, Any], golden: dict[str, Any]) -> str | None:
    """What a fresh record and the golden one differ in, in words; None where they agree as far as they must."""
    for name in ("settings", "seed", "actions", "steps"):
        if found[name] != golden[name]:
            return f"{name} is {found[name]}, the golden file has {golden[name]}"
    ours, theirs = found["numbers"], golden["numbers"]
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name, 0.0), theirs.get(name, 0.0)
        if abs(a - b) > ROUNDING * max(abs(a), abs(b)) + 1e-7:
            return f"{name} is {a!r}, the golden trajectory has {b!r}"
    if same_arithmetic(found["fingerprint"], golden["fingerprint"]) and found["digest"] != golden["digest"]:
        return "the numbers agree to rounding, the digest of observations and rewards does not, on the same arithmetic"
    return None


def advice(env_id: str, told: str) -> str:
    """What to do about a difference."""
    return (
        f"{env_id} no longer plays its golden trajectory: {told}. If its dynamics were meant to change, raise the "
        f"version of its id (before its first release: say so in CHANGELOG.md), then remake {path_of(env_id).name} "
        f"with python scripts/golden_trajectories.py --id {env_id}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Remake the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--id", action="append", choices=ids(), help="only this environment; may be repeated")
    chosen = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for env_id in chosen.id or ids():
        path, found = path_of(env_id), record(env_id)
        if path.is_file():
            golden = json.loads(path.read_text(encoding="utf-8"))
            told = difference(found, golden)
            elsewhere = arithmetic_differences(found["fingerprint"], golden["fingerprint"])
            print(f"{env_id}: {told or 'as it was'}" + (f" (arithmetic: {'; '.join(elsewhere)})" if elsewhere else ""))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
