"""Episodes as files that can be played again and compared to the last bit.

A record is JSON, a line each: a header (environment, its arguments, the episode's draw, what the bits depend on), then
``[action, reward, energy_j]`` per step, then a summary with the seal (SHA-256 of all lines before it and of itself).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, RecordVideo, TimeLimit
from numpy.typing import NDArray

from biscale_gym.config import config_hash, nearest
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers.native import setting_of
from biscale_gym.fingerprint import arithmetic_differences, fingerprint

FORMAT = "biscale-gym-episode/1"
COLUMNS = ("action", "reward", "energy_j")
_TRANSPARENT = (OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, RecordVideo, TimeLimit)
"""What may lie below: it passes actions and rewards on as they are."""


class ReplayError(ValueError):
    """A record that cannot be played again, or that did not come out the same; the message names file and step."""


@dataclass(frozen=True)
class Replay:
    """An episode that came out as it was recorded.

    Attributes:
        env_id: as registered.
        complete: whether the episode had reached its end.
        actions: a number, or a list of them, per step.
        rewards, energy_j: float64[steps].
        episode_metrics: the figures at the end; None where it was not reached.
    """

    env_id: str
    complete: bool
    actions: list[Any]
    rewards: NDArray[np.float64]
    energy_j: NDArray[np.float64]
    episode_metrics: dict[str, float] | None


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def rewards_digest(rewards: Any) -> str:
    """First 16 hex digits of the SHA-256 of the rewards as little-endian float64."""
    return hashlib.sha256(np.asarray(rewards, dtype="<f8").tobytes()).hexdigest()[:16]


def _seal(text: str, summary: dict[str, Any]) -> str:
    return hashlib.sha256((text + _canonical(summary)).encode()).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    """Write a file at once: nobody ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class RecordEpisode(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Writes each episode as ``<environment>-<number>-<seal>.jsonl``; ``replay`` plays it again.

    Goes directly around the environment, other wrappers around it: what is recorded is what the environment itself was
    told and answered. A file is written when its episode ends; by ``reset`` or ``close`` before that, it is marked
    incomplete.

    Args:
        env: made by ``gymnasium.make``.
        folder: made when the first record is written.
        episode_trigger: from an episode's number, from 0, to whether it is recorded; None: all are.

    Raises:
        EnvironmentUsageError: wrappers below, an environment not made by ``gymnasium.make``, or made with arguments
            that JSON does not know.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], folder: str | Path, episode_trigger: Callable[[int], bool] | None = None
    ) -> None:
        RecordConstructorArgs.__init__(self, folder=folder, episode_trigger=episode_trigger)
        super().__init__(env)
        self.folder = Path(folder)
        self.paths: list[Path] = []
        """The records written so far."""
        self._trigger = episode_trigger
        self._episode = -1
        self._header: dict[str, Any] | None = None
        self._steps: list[list[Any]] = []
        self._setting = setting_of(env, type(self).__name__)
        self._made_as = self._how_made(env)

    def _how_made(self, env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
        """Id and arguments of the environment."""
        below: Any = env
        while below is not below.unwrapped:
            if not isinstance(below, _TRANSPARENT):
                name = type(below).__name__
                raise EnvironmentUsageError(
                    f"RecordEpisode goes directly around the environment, found {name} below it; "
                    f"write {name}(RecordEpisode(env, ...), ...)"
                )
            below = below.env
        spec = env.unwrapped.spec
        if spec is None:
            raise EnvironmentUsageError("RecordEpisode writes down how to make the environment: use gymnasium.make(id)")
        kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
        try:
            kwargs = json.loads(_canonical(kwargs))
        except (TypeError, ValueError) as error:
            raise EnvironmentUsageError(f"RecordEpisode cannot write the environment's arguments ({error})") from error
        limit = None if env.spec is None else env.spec.max_episode_steps
        return {"env_id": spec.id, "kwargs": kwargs, "max_episode_steps": limit}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; one that was under way is written as incomplete."""
        self._write(complete=False, metrics=None)
        observation, info = self.env.reset(seed=seed, options=options)
        self._episode += 1
        if self._trigger is None or self._trigger(self._episode):
            base: Any = self.env.unwrapped
            self._header = {
                "format": FORMAT,
                **self._made_as,
                "scenario_hash": config_hash(self._setting.scenario),
                "seed": seed,
                "episode": base.episode.info,
                "requests_hash": base.episode.requests.hash,
                "fingerprint": fingerprint(),
                "columns": COLUMNS,
            }
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and note it."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._header is not None:
            self._steps.append([np.asarray(action).tolist(), float(reward), float(info["energy_j"])])
            if terminated or truncated:
                self._write(complete=True, metrics=info.get("episode_metrics"))
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Write an episode that was under way as incomplete, and close the environment."""
        self._write(complete=False, metrics=None)
        super().close()

    def _write(self, complete: bool, metrics: dict[str, float] | None) -> None:
        header, steps = self._header, self._steps
        self._header, self._steps = None, []
        if header is None or not steps:
            return
        text = "".join(f"{_canonical(line)}\n" for line in (header, *steps))
        summary = {
            "steps": len(steps),
            "complete": complete,
            "rewards_digest": rewards_digest([reward for _, reward, _ in steps]),
            "energy_j": float(np.sum([energy_j for _, _, energy_j in steps])),
            "episode_metrics": metrics,
        }
        seal = _seal(text, summary)
        short = header["env_id"].rpartition("/")[2].lower()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{short}-{self._episode:06d}-{seal[:8]}.jsonl"
        _write_whole(path, f"{text}{_canonical({**summary, 'sha256': seal})}\n")
        self.paths.append(path)


def _read(path: Path) -> tuple[dict[str, Any], list[list[Any]], dict[str, Any]]:
    """Header, steps and summary of a record.

    Raises:
        ReplayError: it cannot be read, is no record, is of another format, or was altered.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        header, *steps, summary = [json.loads(line) for line in lines]
        written = header["format"]
        seal = summary.pop("sha256", None) if isinstance(summary, dict) else None
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReplayError(f"{path}: not the record of an episode ({error!r})") from error
    if written != FORMAT:
        raise ReplayError(f"{path}: is a record of format {written!r}, this version plays {FORMAT!r}")
    if seal is None or _seal("".join(lines[:-1]), summary) != seal:
        raise ReplayError(f"{path}: was cut short or altered after it was written: its seal does not fit")
    return header, steps, summary


def _made(path: Path, header: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """The environment of a record, at the start of its episode.

    Raises:
        ReplayError: it cannot be made here, or what it plays has changed.
    """
    env_id = header["env_id"]
    ours = sorted(name for name in gymnasium.registry if name.startswith("BiScale/"))
    if env_id not in ours:
        raise ReplayError(f"{path}: environment {env_id!r} is not of this version; {nearest(env_id, ours)}")
    try:
        env = gymnasium.make(env_id, max_episode_steps=header["max_episode_steps"], **header["kwargs"])
        base: Any = env.unwrapped
        scenario = config_hash(setting_of(env, "replay").scenario)
        if scenario != header["scenario_hash"]:
            raise ReplayError(
                f"{path}: its scenario has changed since: the hash of its values was {header['scenario_hash']}, "
                f"is {scenario}"
            )
        env.reset(options=header["episode"])
    except (TypeError, ValueError) as error:
        if isinstance(error, ReplayError):
            raise
        raise ReplayError(f"{path}: its episode cannot be begun here: {error}") from error
    requests = base.episode.requests.hash
    if requests != header["requests_hash"]:
        raise ReplayError(f"{path}: its requests have changed since: their hash was {header['requests_hash']}")
    return env


def _why(recorded: dict[str, Any]) -> str:
    """What is known to be different here from where the record was made."""
    here = fingerprint()
    found = arithmetic_differences(here, recorded)
    for name in ("biscale_gym", "git_revision"):
        if here[name] != recorded.get(name):
            found.append(f"{name}: {recorded.get(name)} -> {here[name]}")
    return f" (since then: {'; '.join(found)})" if found else ""


def replay(path: str | Path) -> Replay:
    """Plays a recorded episode again, and compares every reward, every step's joules and the figures, bit for bit.

    Args:
        path: of a file that ``RecordEpisode`` wrote.

    Raises:
        ReplayError: no (whole) record, of another version, or the first step that differs.
    """
    path = Path(path)
    header, steps, summary = _read(path)
    env = _made(path, header)
    count, metrics, over = len(steps), None, False
    for number, (action, *recorded) in enumerate(steps, start=1):
        _, reward, terminated, truncated, info = env.step(np.asarray(action) if isinstance(action, list) else action)
        over = terminated or truncated
        for name, was, now in zip(COLUMNS[1:], recorded, (reward, info["energy_j"]), strict=True):
            if was != now:
                raise ReplayError(
                    f"{path}: step {number} of {count} differs: {name} was {was!r}, is {float(now)!r}"
                    f"{_why(header['fingerprint'])}"
                )
        if over != (number == count and summary["complete"]):
            ends = "ends" if over else "does not end"
            raise ReplayError(
                f"{path}: the episode {ends} at step {number} of {count}, unlike then{_why(header['fingerprint'])}"
            )
        metrics = info.get("episode_metrics")
    env.close()
    figures = summary["episode_metrics"]
    if metrics != figures:
        differ = sorted(name for name, value in (metrics or {}).items() if (figures or {}).get(name) != value)
        raise ReplayError(f"{path}: figures differ: {', '.join(differ)}{_why(header['fingerprint'])}")
    return Replay(
        env_id=header["env_id"],
        complete=summary["complete"],
        actions=[action for action, *_ in steps],
        rewards=np.array([reward for _, reward, _ in steps]),
        energy_j=np.array([energy_j for *_, energy_j in steps]),
        episode_metrics=metrics,
    )
