"""Playing an environment, and telling where two trajectories part."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Env = gymnasium.Env[Any, Any]


@dataclass(frozen=True)
class Step:
    """What a reset (``action`` None, reward 0) or a step returned."""

    action: Any
    obs: NDArray[Any]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def over(self) -> bool:
        """Whether the episode ended here."""
        return self.terminated or self.truncated


class Actions:
    """The actions of a trajectory: a function of what is given, and of the masks on the way.

    Args:
        given: whole numbers to be taken in turn, over and over, each modulo the number of choices (in slot k of a
            MultiDiscrete, increased by k; in a Box, in fifths of its range). None: random actions.
        seed: of the random ones.
    """

    def __init__(self, given: Sequence[int] | None = None, seed: int = 0) -> None:
        self._given = None if given is None else list(given)
        self._taken = 0
        self._rng = np.random.default_rng(seed)

    def next(self, space: spaces.Space[Any], mask: NDArray[np.bool_] | None) -> Any:
        """The next action of a space.

        Args:
            space: Discrete, MultiDiscrete or Box.
            mask: bool[choices] of what is allowed now, where the environment has ``action_masks``.

        Raises:
            AssertionError: nothing is allowed.
            TypeError: a space of another kind.
        """
        number = int(self._rng.integers(2**31)) if self._given is None else self._given[self._taken % len(self._given)]
        self._taken += 1
        if isinstance(space, spaces.Discrete):
            allowed = np.arange(space.n) if mask is None else np.flatnonzero(mask)
            assert allowed.size, "action_masks allows nothing"
            return int(space.start + allowed[number % allowed.size])
        assert mask is None, f"masks are understood for Discrete actions, not for {space}"
        if isinstance(space, spaces.MultiDiscrete):
            numbers = number + np.arange(space.nvec.size)
            if self._given is None:
                numbers = self._rng.integers(2**31, size=space.nvec.size)
            return (numbers.reshape(space.nvec.shape) % space.nvec).astype(space.dtype)
        if isinstance(space, spaces.Box):
            share = (number % 6) / 5.0 if self._given is not None else self._rng.random(space.shape)
            return (space.low + share * (space.high - space.low)).astype(space.dtype)
        raise TypeError(f"no actions for the space {space}")


def masks_of(env: Env) -> NDArray[np.bool_] | None:
    """The environment's action mask now; None where it has none."""
    if not env.has_wrapper_attr("action_masks"):
        return None
    return np.asarray(env.get_wrapper_attr("action_masks")(), dtype=np.bool_)


def lane_masks_of(vector: Any) -> NDArray[np.bool_]:
    """The action masks of a vector environment, a row per lane; Gymnasium's own passes the call on to its lanes."""
    masks = vector.call("action_masks") if hasattr(vector, "call") else vector.action_masks()
    return np.stack(masks).astype(np.bool_)


def names_of(env: Env) -> list[str]:
    """A name for every number of the observation."""
    if env.has_wrapper_attr("observation_names"):
        return list(env.get_wrapper_attr("observation_names"))
    shape = env.observation_space.shape or ()
    return [f"obs[{number}]" for number in range(int(np.prod(shape)))]


def first_step(env: Env, seed: int | None = None, options: dict[str, Any] | None = None) -> Step:
    """Reset."""
    obs, info = env.reset(seed=seed, options=options)
    return Step(None, obs, 0.0, False, False, info)


def next_step(env: Env, actions: Actions) -> Step:
    """Step."""
    action = actions.next(env.action_space, masks_of(env))
    obs, reward, terminated, truncated, info = env.step(action)
    return Step(action, obs, float(reward), bool(terminated), bool(truncated), info)


def go_on(env: Env, last: Step, actions: Actions, steps: int) -> list[Step]:
    """The next ``steps`` entries of a trajectory after ``last``; an ended episode is followed by an unseeded reset."""
    played = []
    for _ in range(steps):
        last = first_step(env) if last.over else next_step(env, actions)
        played.append(last)
    return played


def play(env: Env, seed: int | None, actions: Actions, steps: int) -> list[Step]:
    """A reset with a seed and the ``steps`` entries after it."""
    first = first_step(env, seed)
    return [first, *go_on(env, first, actions, steps)]


def _same(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
        a, b = np.asarray(ours), np.asarray(theirs)
        return a.dtype == b.dtype and a.shape == b.shape and bool(np.all((a == b) | ((a != a) & (b != b))))
    return bool(ours == theirs or (ours != ours and theirs != theirs))


def _info_difference(ours: dict[str, Any], theirs: dict[str, Any], where: str = "info") -> str | None:
    if ours.keys() != theirs.keys():
        return f"{where} has {sorted(ours.keys() ^ theirs.keys())} in one of the two only"
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _info_difference(value, other, f"{where}[{name!r}]")
            if inner is not None:
                return inner
        elif not _same(value, other):
            return f"{where}[{name!r}] is {value!r}, not {other!r}"
    return None


def difference(ours: Step, theirs: Step, names: Sequence[str]) -> str | None:
    """What differs between two entries of a trajectory, in words; None where nothing does, to the last bit."""
    if not _same(ours.obs, theirs.obs):
        if ours.obs.shape != theirs.obs.shape or ours.obs.dtype != theirs.obs.dtype:
            a, b = ours.obs, theirs.obs
            return f"the observation is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
        a, b = ours.obs.ravel(), theirs.obs.ravel()
        entry = int(np.flatnonzero(~((a == b) | ((a != a) & (b != b))))[0])
        return f"entry {names[entry]!r} of the observation is {a[entry]!r}, not {b[entry]!r}"
    for name in ("reward", "terminated", "truncated"):
        if not _same(getattr(ours, name), getattr(theirs, name)):
            return f"{name} is {getattr(ours, name)!r}, not {getattr(theirs, name)!r}"
    return _info_difference(ours.info, theirs.info)


def assert_same(what: str, ours: Sequence[Step], theirs: Sequence[Step], names: Sequence[str]) -> None:
    """Two trajectories are equal to the last bit.

    Raises:
        AssertionError: they part; names the first step and the entry. Step 0 is the first entry given.
    """
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        found = difference(a, b, names)
        assert found is None, f"{what}: step {number}: {found}"


def play_job(job: Path, result: Path) -> None:
    """Play a pickled (sys.path, id, settings, seed, actions, steps) and pickle the trajectory: what a process runs."""
    path, env_id, settings, seed, actions, steps = pickle.loads(job.read_bytes())
    sys.path[:] = path
    env = gymnasium.make(env_id, disable_env_checker=True, **settings)
    result.write_bytes(pickle.dumps(play(env, seed, Actions(actions, seed), steps)))
