"""The checks themselves. All take an id, how much to play and the environment's settings (``biscale_gym.testing``)."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.vector import NativeVectorEnv
from biscale_gym.envs.vector_info import lane_info
from biscale_gym.testing.trajectories import (
    Actions,
    Env,
    Step,
    assert_same,
    difference,
    first_step,
    go_on,
    lane_masks_of,
    masks_of,
    names_of,
    next_step,
    play,
)

JOULES = 1e-9
"""Relative: what joules told step by step may be off, as sums of many terms are."""
LONGEST_EPISODE_STEPS = 10_000_000


def _made(env_id: str, settings: dict[str, Any]) -> Env:
    return gymnasium.make(env_id, disable_env_checker=True, **settings)


def check_environment(
    env_id: str, *, seed: int = 0, steps: int = 300, actions: Sequence[int] | None = None, **settings: Any
) -> None:
    """Every check of this package, Gymnasium's own checker, and SB3's where it is installed.

    Args:
        env_id: as for ``gymnasium.make``; ``module:Name-v0`` imports the module that registers it.
        seed: of the first episode, and of random actions.
        steps: how far trajectories are compared. An episode should be shorter, so that resets are among them.
        actions: whole numbers, taken in turn (``trajectories.Actions``); None: random.
        settings: of the environment. ``check_conservation`` plays a whole episode of them.

    Raises:
        AssertionError: at the first step and entry that is wrong.
    """
    checked = _made(env_id, settings).unwrapped
    check_env(checked)
    if importlib.util.find_spec("stable_baselines3") is not None:
        from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

        check_env_for_sb3(checked)
    check_reset_equals_fresh(env_id, seed=seed, steps=steps, actions=actions, **settings)
    check_snapshot(env_id, seed=seed, steps=steps, actions=actions, **settings)
    check_conservation(env_id, seed=seed, actions=actions, **settings)
    if checked.spec is not None and checked.spec.vector_entry_point is not None:
        check_vector_equals_single(env_id, seed=seed, steps=steps, actions=actions, **settings)
    check_same_across_processes(env_id, seed=seed, steps=steps, actions=actions, **settings)


def check_reset_equals_fresh(
    env_id: str, *, seed: int = 0, steps: int = 300, actions: Sequence[int] | None = None, **settings: Any
) -> None:
    """A used environment that is reset with a seed gives what a fresh one gives, to the last bit.

    It is used twice before: left in the middle of an episode, and played on over the end of one.

    Args: as of ``check_environment``.

    Raises:
        AssertionError: at the first step and entry that differ.
    """
    fresh = _made(env_id, settings)
    expected = play(fresh, seed, Actions(actions, seed), steps)
    used = _made(env_id, settings)
    for other_seed, before in ((seed + 1, steps // 3 + 1), (seed + 2, steps)):
        play(used, other_seed, Actions(None, other_seed), before)
        found = play(used, seed, Actions(actions, seed), steps)
        assert_same(f"{env_id}: reset after {before} steps against a fresh one", found, expected, names_of(used))


def check_same_across_processes(
    env_id: str, *, seed: int = 0, steps: int = 300, actions: Sequence[int] | None = None, **settings: Any
) -> None:
    """Two fresh processes, with other hash seeds, give the same trajectory, to the last bit.

    Args: as of ``check_environment``; the settings must be picklable.

    Raises:
        AssertionError: at the first step and entry that differ.
        subprocess.CalledProcessError: a process failed; its message is on standard error.
    """
    program = (
        "import sys, pathlib; from biscale_gym.testing.trajectories import play_job; "
        "play_job(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    here = [str(Path(folder).resolve()) for folder in sys.path]
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        job.write_bytes(pickle.dumps((here, env_id, settings, seed, actions, steps)))
        results = [Path(folder) / "first", Path(folder) / "second"]
        for hash_seed, result in enumerate(results, 1):
            environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(here)}
            subprocess.run([sys.executable, "-c", program, job, result], check=True, env=environment)
        first, second = (pickle.loads(result.read_bytes()) for result in results)
    assert_same(f"{env_id}: one process against another", first, second, names_of(_made(env_id, settings)))


def check_snapshot(
    env_id: str,
    *,
    seed: int = 0,
    steps: int = 300,
    actions: Sequence[int] | None = None,
    at_step: int | None = None,
    **settings: Any,
) -> None:
    """``snapshot()`` changes nothing, and after ``restore()`` everything comes again, to the last bit.

    The trajectory is played once without a snapshot; then with one, restored after as many steps as follow it (resets
    among them), and restored again after a reset with another seed.

    Args:
        env_id: as of ``check_environment``, as all that follow but ``at_step``.
        seed: of the first episode.
        steps: of the trajectory.
        actions: in turn, or random.
        at_step: where the snapshot is made; None: at the middle.
        settings: of the environment.

    Raises:
        AssertionError: at the first step and entry that differ, counted from the snapshot; or there is no snapshot.
    """
    assert hasattr(_made(env_id, settings).unwrapped, "snapshot"), f"{env_id} has no snapshot()"
    at = steps // 2 if at_step is None else at_step
    after = max(1, steps - at)
    plain = _made(env_id, settings)
    last = play(plain, seed, Actions(actions, seed), at)[-1]
    expected = go_on(plain, last, Actions(actions, seed + 1), after)

    env = _made(env_id, settings)
    inner: Any = env.unwrapped
    names = names_of(env)
    last = play(env, seed, Actions(actions, seed), at)[-1]
    kept = inner.snapshot()
    what = f"{env_id}: {{}} (snapshot at step {at})"
    found = go_on(env, last, Actions(actions, seed + 1), after)
    assert_same(what.format("going on after a snapshot was made"), found, expected, names)
    inner.restore(kept)
    found = go_on(env, last, Actions(actions, seed + 1), after)
    assert_same(what.format("restored"), found, expected, names)
    play(env, seed + 3, Actions(None, seed + 3), after)
    inner.restore(kept)
    found = go_on(env, last, Actions(actions, seed + 1), after)
    assert_same(what.format("restored after another episode"), found, expected, names)


def check_vector_equals_single(
    env_id: str,
    *,
    seed: int = 0,
    steps: int = 300,
    actions: Sequence[int] | None = None,
    num_envs: Sequence[int] = (1, 3),
    threads: Sequence[int] = (1, 2),
    **settings: Any,
) -> None:
    """Lane n of the id's own vector environment, seeded with s, is the single environment seeded with s + n.

    Compared to the last bit: observations, rewards, infos, masks, ``final_obs`` and ``final_info``, through at least
    one automatic reset of every lane.

    Args:
        env_id: as of ``check_environment``.
        seed: of lane 0.
        steps: at least so many, and on until every lane was reset.
        actions: in turn, or random.
        num_envs: numbers of lanes.
        threads: of the compiled step; each is tried with each number of lanes, where the environment has one.
        settings: of the environment.

    Raises:
        AssertionError: at the first step, lane and entry that differ.
    """
    for lanes in num_envs:
        vector: Any = gymnasium.make_vec(env_id, lanes, vectorization_mode="vector_entry_point", **settings)
        if not isinstance(vector.unwrapped, NativeVectorEnv):
            _check_lanes(f"{env_id}, {lanes} lanes", vector, env_id, seed, steps, actions, settings)
            continue
        for count in threads:
            what = f"{env_id}, {lanes} lanes on {count} thread{'s' if count > 1 else ''}"
            vector = gymnasium.make_vec(
                env_id, lanes, vectorization_mode="vector_entry_point", threads=count, **settings
            )
            _check_lanes(what, vector, env_id, seed, steps, actions, settings)


def _check_lanes(
    what: str,
    vector: Any,
    env_id: str,
    seed: int,
    steps: int,
    actions: Sequence[int] | None,
    settings: dict[str, Any],
) -> None:
    lanes = range(vector.num_envs)
    singles = [_made(env_id, settings) for _ in lanes]
    names = names_of(singles[0])
    choosers = [Actions(actions, seed + lane) for lane in lanes]
    expected = [first_step(env, seed + lane) for lane, env in zip(lanes, singles, strict=True)]
    obs, infos = vector.reset(seed=seed)
    for lane in lanes:
        found = Step(None, obs[lane], 0.0, False, False, lane_info(infos, lane))
        _assert_lane(what, "reset", lane, found, expected[lane], names)
    resets = [0] * len(lanes)
    number = 0
    while number < steps or min(resets) == 0:
        number += 1
        assert number < LONGEST_EPISODE_STEPS, f"{what}: lane {resets.index(0)} never ended"
        step = f"step {number}"
        _check_masks(what, step, vector, singles)
        expected = [next_step(env, chooser) for env, chooser in zip(singles, choosers, strict=True)]
        obs, rewards, terminated, truncated, infos = vector.step(np.stack([one.action for one in expected]))
        for lane, single in enumerate(expected):
            info = lane_info(infos, lane)
            seen = obs[lane]
            if single.over:
                resets[lane] += 1
                assert "final_obs" in info, f"{what}: {step}: lane {lane} has no final_obs at its episode's end"
                begun = first_step(singles[lane])
                new = {name: info.get(name) for name in begun.info if name not in single.info}
                old = {name: value for name, value in begun.info.items() if name in new}
                _assert_lane(
                    what,
                    f"{step}, after the reset",
                    lane,
                    Step(None, seen, 0.0, False, False, new),
                    Step(None, begun.obs, 0.0, False, False, old),
                    names,
                )
                seen, info = info["final_obs"], info["final_info"]
            found = Step(single.action, seen, float(rewards[lane]), bool(terminated[lane]), bool(truncated[lane]), info)
            _assert_lane(what, step, lane, found, single, names)


def _check_masks(what: str, step: str, vector: Any, singles: Sequence[Env]) -> None:
    masks = [masks_of(env) for env in singles]
    for lane, mask in enumerate(masks):
        if mask is not None:
            ours = lane_masks_of(vector)[lane]
            wrong = np.flatnonzero(ours != mask)
            assert not wrong.size, f"{what}: {step}: lane {lane}: action_masks differs at choice {wrong[0]}"


def _assert_lane(what: str, step: str, lane: int, found: Step, expected: Step, names: Sequence[str]) -> None:
    told = difference(found, expected, names)
    assert told is None, f"{what}: {step}: lane {lane} against the single environment: {told}"


class _Books:
    """The ledger's own account of an episode, from where it is opened on."""

    def __init__(self, simulator: Simulator, over: bool) -> None:
        self.simulator = simulator
        self.instances = simulator.instances()
        self.start_s = simulator.now_s
        self.finished = self._finished()
        self.broken = self.violations(over)

    def _finished(self) -> int:
        return int(self.simulator.requests().finished.sum())

    def instances_j(self) -> float:
        """Joules of all instances."""
        return float(self.simulator.instances().since(self.instances).energy_j.sum())

    def unallocated_j(self) -> float:
        """Joules of GPUs that no instance holds."""
        return self.simulator.instances().since(self.instances).unallocated_j

    def completed(self) -> int:
        """Requests finished."""
        return self._finished() - self.finished

    def violations(self, over: bool) -> int:
        """Requests that broke the SLO of a phase, each counted in each phase; at the end those past it in flight too.

        All since the simulator's start; ``broken`` holds those before the books were opened.
        """
        requests, now_s = self.simulator.requests(), self.simulator.now_s
        glob = self.simulator.state.glob[0]
        is_prefill = self.simulator.instances().is_prefill
        arrived = (requests.arrival_s <= now_s) & ~requests.rejected
        broken = int(requests.rejected.sum())
        prefilled = ~np.isnan(requests.first_token_s)
        if is_prefill.any():
            done_s = np.where(prefilled, requests.first_token_s, now_s)
            late = done_s - requests.arrival_s > glob["ttft_slo_s"]
            broken += int((arrived & late & (prefilled | over)).sum())
        if (~is_prefill).any():
            done_s = np.where(requests.finished, requests.finish_s, now_s)
            budget_s = glob["tpot_slo_s"] * (requests.output_tokens - 1).astype(np.float64)
            late = np.nan_to_num(done_s - requests.first_token_s) > budget_s
            decoding = requests.output_tokens > 1
            broken += int((arrived & prefilled & decoding & late & (requests.finished | over)).sum())
        return broken

    def check_requests(self, where: str) -> None:
        """Every request is waited for, in flight, finished or rejected, and its times are in order."""
        requests, now_s, counts = self.simulator.requests(), self.simulator.now_s, self.simulator.counts()
        come = requests.arrival_s < now_s
        known = {
            "finished": requests.finished,
            "rejected": requests.rejected,
            "in_flight": come & ~requests.finished & ~requests.rejected,
        }
        for name, chosen in known.items():
            # A request that arrives at this very instant may be in or not.
            edge = int((requests.arrival_s == now_s).sum()) if name == "in_flight" else 0
            found = int(chosen.sum())
            assert found <= counts[name] <= found + edge, (
                f"{where}: the simulator counts {counts[name]} requests as {name}, their ledger {found}"
            )
        assert counts["arrived"] == counts["finished"] + counts["rejected"] + counts["in_flight"], f"{where}: {counts}"
        early = (requests.finished | requests.rejected) & (requests.arrival_s > now_s)
        assert not early.any(), f"{where}: request {int(np.argmax(early))} is done before it arrives"
        both = requests.finished & requests.rejected
        assert not both.any(), f"{where}: request {int(np.argmax(both))} is finished and rejected"
        backwards = (requests.first_token_s < requests.arrival_s) | (requests.finish_s < requests.first_token_s)
        assert not backwards.any(), f"{where}: times of request {int(np.argmax(backwards))} are out of order"


def _opened(env: Env, over: bool = False) -> _Books | None:
    """Books of the environment's simulator; None where it has none yet, because nothing has been placed."""
    inner: Any = env.unwrapped
    try:
        return _Books(inner.simulator, over)
    except EnvironmentUsageError:
        return None


def check_conservation(
    env_id: str, *, seed: int = 0, actions: Sequence[int] | None = None, **settings: Any
) -> dict[str, float]:
    """A whole episode keeps its books: what the infos tell adds up to what the simulator's ledger holds, at every step.

    - Requests: arrived = finished + in flight + rejected, as the requests' ledger has them; ``completed`` adds up.
    - Joules: ``energy_j`` adds up to the instances' joules (with those of unallocated GPUs where info tells them) to
      1e-9, and with the reset's to the episode's metrics.
    - Violations add up to the requests that the ledger shows late or rejected, at the end with those in flight that
      are past their deadline; ``dt_s`` adds up to the time that has passed.
    - Observations lie in the space, rewards are finite, nothing is ever terminated.

    An environment that gets its simulator in the middle of an episode is held to it step by step from there on, and as
    a whole by the episode's metrics.

    Args: as of ``check_environment``.

    Returns:
        The episode's sums (``energy_j``, ``violations``, ``completed``, ``dt_s``, ``reward``, ``steps``).

    Raises:
        AssertionError: at the first step where it does not hold.
    """
    env = _made(env_id, settings)
    names = names_of(env)
    chooser = Actions(actions, seed)
    last = first_step(env, seed)
    _check_step(f"{env_id}: reset", env, last, names)
    books = _opened(env)
    at_reset_j = last.info.get("energy_j", 0.0)
    told = dict.fromkeys(("energy_j", "violations", "completed", "dt_s", "reward", "steps"), 0.0)
    unbooked = dict(told)
    with_unallocated = False
    while not last.over:
        last = next_step(env, chooser)
        for name in ("energy_j", "violations", "completed", "dt_s"):
            told[name] += last.info[name]
        told["reward"] += last.reward
        told["steps"] += 1
        where = f"{env_id}: step {told['steps']:.0f}"
        assert told["steps"] < LONGEST_EPISODE_STEPS, f"{where}: the episode never ended"
        _check_step(where, env, last, names)
        with_unallocated |= "unallocated_energy_j" in last.info
        if books is None:
            books, unbooked = _opened(env, last.over), dict(told)
        if books is None:
            continue
        books.check_requests(where)
        so_far = {name: told[name] - unbooked[name] for name in told}
        joules = books.instances_j() + (books.unallocated_j() if with_unallocated else 0.0)
        _check_close(where, "energy_j", so_far["energy_j"], joules)
        broken, completed = books.violations(last.over) - books.broken, books.completed()
        assert so_far["violations"] == broken, (
            f"{where}: violations so far are {so_far['violations']:.0f} by info, {broken} by the ledger"
        )
        assert so_far["completed"] == completed, (
            f"{where}: completed so far are {so_far['completed']:.0f} by info, {completed} by the ledger"
        )
        _check_close(where, "dt_s", so_far["dt_s"], books.simulator.now_s - books.start_s)
        _check_close(where, "now_s", last.info["now_s"], books.simulator.now_s)
    metrics = last.info["episode_metrics"]
    measured_j = metrics.get("total_energy_j", metrics.get("prefill_energy_j", metrics.get("decode_energy_j")))
    assert measured_j is not None, f"{env_id}: episode_metrics has no joules: {sorted(metrics)}"
    _check_close(f"{env_id}: the episode with its reset", "energy_j", told["energy_j"] + at_reset_j, measured_j)
    return told


def _check_close(where: str, name: str, told: float, booked: float) -> None:
    assert abs(told - booked) <= JOULES * max(1.0, abs(booked)), (
        f"{where}: {name} so far is {told!r} by info, {booked!r} by the ledger"
    )


def _check_step(where: str, env: Env, step: Step, names: Sequence[str]) -> None:
    space: Any = env.observation_space
    obs = step.obs
    assert obs.dtype == space.dtype, f"{where}: the observation is {obs.dtype}, the space {space.dtype}"
    assert obs.shape == space.shape, f"{where}: the observation has shape {obs.shape}, the space {space.shape}"
    outside = np.flatnonzero(~((obs >= space.low) & (obs <= space.high)))
    if outside.size:
        entry = outside[0]
        low, high = space.low.ravel()[entry], space.high.ravel()[entry]
        raise AssertionError(
            f"{where}: entry {names[entry]!r} of the observation is {obs.ravel()[entry]!r}, outside [{low}, {high}]"
        )
    assert not step.terminated, f"{where}: terminated is True; episodes are truncated, never terminated"
    assert np.isfinite(step.reward), f"{where}: the reward is {step.reward!r}"
