"""Episodes on record: played again they are the same to the last bit, and what is not said is said where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym
from biscale_gym.config import ConfigError
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers import ContinuousClocks, FrameSkip, RecordEpisode, ReplayError, recording, replay

IDS = ("BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0")


def make(env_id: str = "BiScale/Prefill-v0", **kwargs: Any) -> Any:
    return gymnasium.make(env_id, scenario="smoke", **{"episode_s": 2.0, **kwargs})


def play(env: Any, seed: int | None = 1, steps: int = 10_000) -> list[float]:
    env.reset(seed=seed)
    env.action_space.seed(seed)
    rewards, over = [], False
    while not over and len(rewards) < steps:
        _, reward, _, over, _ = env.step(env.action_space.sample())
        rewards.append(reward)
    return rewards


@pytest.fixture
def record(tmp_path: Path) -> Path:
    env = RecordEpisode(make(), tmp_path)
    play(env)
    return env.paths[0]


def rewritten(path: Path, change: Any, sealed: bool = True) -> Path:
    """A copy whose lines were changed, sealed anew or not."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    *body, summary = lines
    text = "".join(f"{recording._canonical(line)}\n" for line in body)
    if sealed:
        summary.pop("sha256")
        summary["sha256"] = recording._seal(text, summary)
    copy = path.with_name("changed.jsonl")
    copy.write_text(f"{text}{recording._canonical(summary)}\n")
    return copy


@pytest.mark.parametrize(
    "drawn",
    [{}, {"load": [0.4, 0.8]}, {"randomisation": "h100-uncertainty"}, {"discount_per_s": 0.9, "max_episode_steps": 7}],
    ids=["plain", "thinned", "other hardware", "cut"],
)
@pytest.mark.parametrize("env_id", IDS)
def test_a_replay_is_the_episode(env_id: str, drawn: dict[str, Any], tmp_path: Path) -> None:
    env = RecordEpisode(make(env_id, **drawn), tmp_path)
    played = [play(env, seed=1), play(env, seed=None)]
    assert len(env.paths) == 2
    for rewards, path in zip(played, env.paths, strict=True):
        again = replay(path)
        assert again.rewards.tolist() == rewards
        assert again.complete
        assert again.env_id == env_id
        assert (again.episode_metrics is None) == ("max_episode_steps" in drawn)
        summary = json.loads(path.read_text().splitlines()[-1])
        assert summary["rewards_digest"] == recording.rewards_digest(again.rewards)
        assert summary["energy_j"] == float(np.sum(again.energy_j)) > 0


def test_wrappers_go_around_it(tmp_path: Path) -> None:
    recorder = RecordEpisode(make("BiScale/Cluster-v0"), tmp_path)
    play(FrameSkip(ContinuousClocks(recorder), 3))
    again = replay(recorder.paths[0])
    assert len(again.rewards) == 20
    assert {len(action) for action in again.actions} == {16}
    assert again.actions[0] == again.actions[2]


def test_placements_are_recorded_too(tmp_path: Path) -> None:
    env = RecordEpisode(gymnasium.make("BiScale/Placement-v0", scenario="smoke"), tmp_path)
    env.reset(seed=1)
    over, rewards = False, []
    while not over:
        masks = env.unwrapped.action_masks()
        action = int(np.flatnonzero(masks)[-1])
        _, reward, _, over, info = env.step(action)
        rewards.append(reward)
    again = replay(env.paths[0])
    assert again.rewards.tolist() == rewards
    assert again.episode_metrics == info["episode_metrics"]


def test_an_interrupted_episode_is_marked(tmp_path: Path) -> None:
    env = RecordEpisode(make(), tmp_path)
    rewards = play(env, seed=1, steps=5)
    play(env, seed=2, steps=3)
    env.close()
    first, second = (replay(path) for path in env.paths)
    assert first.rewards.tolist() == rewards
    assert len(second.rewards) == 3
    assert not first.complete
    assert not second.complete
    assert first.episode_metrics is None


def test_chosen_episodes_alone_are_written(tmp_path: Path) -> None:
    env = RecordEpisode(make(), tmp_path / "new", episode_trigger=lambda episode: episode == 1)
    for _ in range(3):
        play(env)
    (path,) = env.paths
    assert path.name.startswith("prefill-v0-000001-")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "new", path]


def test_the_record_says_what_was_played(record: Path) -> None:
    header = json.loads(record.read_text().splitlines()[0])
    assert header["env_id"] == "BiScale/Prefill-v0"
    assert header["kwargs"] == {"scenario": "smoke", "episode_s": 2.0}
    assert header["seed"] == 1
    assert header["fingerprint"]["biscale_gym"] == biscale_gym.__version__


@pytest.mark.parametrize("env_id", IDS)
def test_an_episodes_draw_as_options_is_that_episode(env_id: str) -> None:
    env = make(env_id, load=(0.4, 0.9), randomisation="h100-uncertainty")
    first, told = env.reset(seed=11)
    episode = env.unwrapped.episode
    other = make(env_id, load=(0.4, 0.9), randomisation="h100-uncertainty")
    other.reset(seed=12)
    assert other.unwrapped.episode.info != episode.info
    again, retold = other.reset(options=episode.info)
    np.testing.assert_array_equal(first, again)
    assert told == retold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_seed": -1}, "cluster_seed is -1, expected a whole number from 0"),
        ({"thinning_seed": 1.5}, "thinning_seed is 1.5, expected a whole number from 0"),
        ({"hardware_seed": 3}, "hardware_seed: hardware is drawn only where randomisation names a preset"),
        ({"clusterseed": 3}, "no reset option 'clusterseed'; did you mean 'cluster_seed'"),
    ],
)
def test_a_wrong_option_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().reset(options=options)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_the_first_step_that_differs_is_named(record: Path) -> None:
    def change(lines: list[Any]) -> None:
        lines[4][1] = float(np.nextafter(lines[4][1], 0.0))
        lines[9][2] += 1.0

    with pytest.raises(ReplayError, match=r"step 4 of \d+ differs: reward was -0\.\d+, is -0\.\d+$"):
        replay(rewritten(record, change))


def test_joules_are_compared_too(record: Path) -> None:
    def change(lines: list[Any]) -> None:
        lines[6][2] = float(np.nextafter(lines[6][2], 0.0))

    with pytest.raises(ReplayError, match=r"step 6 of \d+ differs: energy_j was"):
        replay(rewritten(record, change))


def test_another_action_shows_in_the_joules(record: Path) -> None:
    def change(lines: list[Any]) -> None:
        for line in lines[1:-1]:
            line[0] = 2 - line[0]

    with pytest.raises(ReplayError, match=r"step \d+ of \d+ differs: reward was"):
        replay(rewritten(record, change))


def test_other_arithmetic_is_named_as_a_reason(record: Path) -> None:
    def change(lines: list[Any]) -> None:
        lines[0]["fingerprint"]["cpu"] = "i486"
        lines[4][1] *= 2

    with pytest.raises(ReplayError, match=r"step 4 .*\(since then: cpu: i486 -> "):
        replay(rewritten(record, change))


@pytest.mark.parametrize(
    ("change", "sealed", "message"),
    [
        (lambda lines: lines[3].__setitem__(1, 0.0), False, "was cut short or altered after it was written"),
        (lambda lines: lines.pop(), False, "was cut short or altered|not the record of an episode"),
        (lambda lines: lines[0].update(format="biscale-gym-episode/9"), True, "format 'biscale-gym-episode/9'"),
        (lambda lines: lines[0].update(env_id="BiScale/Prefill-v9"), True, "did you mean 'BiScale/Prefill-v0'"),
        (lambda lines: lines[0].update(scenario_hash="0" * 16), True, "its scenario has changed since"),
        (lambda lines: lines[0].update(requests_hash="0" * 16), True, "its requests have changed since"),
        (lambda lines: lines[0]["kwargs"].update(scenario="smokes"), True, "cannot be begun here: no scenario"),
        (lambda lines: lines[0]["episode"].update(start_s=1e9), True, "cannot be begun here: reset option start_s"),
        (lambda lines: lines[-1].update(complete=False), True, r"the episode ends at step (\d+) of \1, unlike then"),
        (lambda lines: lines[-1]["episode_metrics"].update(ttft_p99_s=1.0), True, "figures differ: ttft_p99_s"),
    ],
)
def test_a_bad_record_is_one_clear_error(record: Path, change: Any, sealed: bool, message: str) -> None:
    with pytest.raises(ReplayError, match=message) as raised:
        replay(rewritten(record, change, sealed))
    assert "changed.jsonl: " in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]\n[]\n", b"{}\n{}\n", b'{"format": "x"}\n'])
def test_garbage_is_no_record(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.jsonl"
    path.write_bytes(content)
    with pytest.raises(ReplayError, match="not the record of an episode"):
        replay(path)


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="cannot be read"):
        replay(tmp_path / "nothing.jsonl")


def test_it_goes_directly_around_the_environment(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUsageError, match=r"found FrameSkip below it; write FrameSkip\(RecordEpisode\("):
        RecordEpisode(FrameSkip(make(), 2), tmp_path)


def test_it_wants_to_know_how_the_environment_was_made(tmp_path: Path) -> None:
    from biscale_gym.envs.instance import PrefillEnv

    with pytest.raises(EnvironmentUsageError, match=r"use gymnasium.make\(id\)"):
        RecordEpisode(PrefillEnv(scenario="smoke"), tmp_path)


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = RecordEpisode(make(), tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        play(env)
    assert list(tmp_path.iterdir()) == []
