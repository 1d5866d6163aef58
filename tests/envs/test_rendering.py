"""Pictures: what they show is what the engine's state says, and nobody pays who does not look."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.rendering.figure import HEIGHT, WIDTH, TimelineFigure, _rounded
from biscale_gym.envs.rendering.timeline import BATCH, CLOCK_MHZ, QUANTITIES, SAMPLES, SLACK_S, Timeline, Track, read

IDS = ("BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0")


def make(env_id: str, render_mode: str | None = None) -> Any:
    return gymnasium.make(env_id, scenario="smoke", episode_s=3.0, render_mode=render_mode)


def play(env: Any, steps: int = 10_000) -> list[Any]:
    """The frames of an episode, one per step."""
    frames, over = [], False
    while not over and len(frames) < steps:
        *_, over, _ = env.step(env.action_space.sample())
        frames.append(env.render())
    return frames


@pytest.fixture(autouse=True)
def no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.mark.parametrize("env_id", IDS)
def test_frames_are_pictures_that_move(env_id: str) -> None:
    env = make(env_id, "rgb_array")
    env.reset(seed=1)
    env.action_space.seed(1)
    first = env.render()
    frames = play(env, 40)
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8 for frame in [first, *frames])
    assert not np.array_equal(first, frames[-1])
    assert np.array_equal(env.render(), frames[-1])
    assert first.max() == 255
    assert first.min() < 100


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_finds_no_fault_in_any_mode(env_id: str) -> None:
    pytest.importorskip("pygame")
    check_env(make(env_id, "rgb_array").unwrapped)


def test_frames_repeat() -> None:
    def frames() -> list[Any]:
        env = make("BiScale/Prefill-v0", "rgb_array")
        env.reset(seed=3)
        env.action_space.seed(3)
        return play(env, 20)

    np.testing.assert_array_equal(frames(), frames())


def test_rendering_changes_no_number() -> None:
    plain, drawn = make("BiScale/Decode-v0"), make("BiScale/Decode-v0", "rgb_array")
    np.testing.assert_array_equal(plain.reset(seed=2)[0], drawn.reset(seed=2)[0])
    for number in range(30):
        mine, theirs = plain.step(number % 3), drawn.step(number % 3)
        drawn.render()
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]


def test_a_new_episode_begins_an_empty_picture() -> None:
    env = make("BiScale/Prefill-v0", "rgb_array")
    env.reset(seed=1)
    play(env, 30)
    env.reset(seed=1)
    fresh = make("BiScale/Prefill-v0", "rgb_array")
    fresh.reset(seed=1)
    np.testing.assert_array_equal(env.render(), fresh.render())


def test_ansi_tells_the_state() -> None:
    env = make("BiScale/Cluster-v0", "ansi")
    env.reset(seed=1)
    env.step(np.zeros(16, np.int64))
    lines = env.render().splitlines()
    inst = env.unwrapped.simulator.state.inst
    assert len(lines) == 2
    assert lines[0].startswith(f"{env.unwrapped.simulator.now_s:.3f} s  prefill 0: ")
    assert " decode 1: " in lines[1]
    for line, row in zip(lines, inst, strict=False):
        assert f"{env.unwrapped.simulator.clocks_mhz[row['clock']]} MHz" in line or "->" in line
        assert f"{row['power_w']:.0f} W" in line


def test_readings_are_those_of_the_observation() -> None:
    env = make("BiScale/Decode-v0")
    observation, _ = env.reset(seed=1)
    told = 0
    for _ in range(60):
        (reading,) = read(env.unwrapped.simulator).values()
        assert observation[4] == pytest.approx(reading.values[CLOCK_MHZ] / 2000)
        assert observation[5] == pytest.approx(reading.target_mhz / 2000)
        if observation[0] and reading.values[BATCH] > 0:
            slo_s = env.unwrapped.setting.scenario.slo.tpot_s
            assert observation[22] == pytest.approx(np.clip(reading.values[SLACK_S] / (10 * slo_s), -4, 4), abs=1e-6)
            told += 1
        observation, *_ = env.step(1)
    assert told > 10


def test_prefill_slack_is_that_of_the_observation() -> None:
    env = make("BiScale/Prefill-v0")
    observation, _ = env.reset(seed=1)
    slacks = slice(19 + 2 + 8, 19 + 2 + 16)
    told, over = 0, False
    while not over:
        (reading,) = read(env.unwrapped.simulator).values()
        if observation[0]:
            slo_s = env.unwrapped.setting.scenario.slo.ttft_s
            assert observation[slacks].min() == pytest.approx(max(reading.values[SLACK_S] / slo_s, -4), abs=1e-6)
            told += 1
        else:
            assert np.isnan(reading.values[SLACK_S])
        observation, _, _, over, _ = env.step(0)
    assert told > 10


def test_who_waits_longest_decides_the_prefill_slack() -> None:
    env = make("BiScale/Cluster-v0")
    env.reset(seed=1)
    simulator = env.unwrapped.simulator
    inst = simulator.state.inst[0]
    while inst["batch_head"] < 0:
        env.step(np.zeros(16, np.int64))
    slack_s = read(simulator)[0].values[SLACK_S]
    oldest_s = simulator.state.req["arrival_s"][inst["batch_head"]]
    slo_s = env.unwrapped.setting.scenario.slo.ttft_s
    assert slack_s == pytest.approx(slo_s - (simulator.now_s - oldest_s))
    inst["queue_head"], inst["batch_head"] = inst["batch_head"], -1
    assert read(simulator)[0].values[SLACK_S] == slack_s


def test_going_back_in_time_begins_anew() -> None:
    env = make("BiScale/Prefill-v0", "rgb_array")
    env.reset(seed=1)
    simulator = env.unwrapped.simulator
    env.step(0)
    before = simulator.snapshot()
    for _ in range(5):
        env.step(0)
    simulator.restore(before)
    env.step(0)
    timeline = env.unwrapped._renderer._timeline
    assert [len(track.series(timeline.now_s)[0]) for track in timeline.tracks.values()] == [1]


def test_tracks_keep_the_window_and_no_more() -> None:
    track = Track("prefill 0", 10.0)
    times = np.linspace(0.0, 40.0, 20_000)
    for now_s in times:
        track.add(now_s, np.full(len(QUANTITIES), now_s))
    ages_s, values = track.series(40.0)
    assert SAMPLES - 2 <= len(ages_s) <= SAMPLES
    assert ages_s[0] == pytest.approx(-10.0, abs=0.02)
    assert ages_s[-1] == 0.0
    assert (np.diff(ages_s) > 0).all()
    np.testing.assert_allclose(values[:, 0], ages_s + 40.0)


def test_few_samples_are_kept_as_they_came() -> None:
    track = Track("decode 0", 30.0)
    for now_s in (1.0, 2.0, 33.0):
        track.add(now_s, np.arange(5.0))
    assert track.series(33.0)[0].tolist() == [0.0]
    assert track.series(31.5)[0].tolist() == [-29.5, 1.5]


def test_scales_widen_by_round_numbers() -> None:
    assert [_rounded(value) for value in (0.0, 0.3, 0.5, 1.0, 1.01, 4.9, 730.0, 1980.0)] == [
        0.001,
        0.5,
        0.5,
        1.0,
        2.0,
        5.0,
        1000.0,
        2000.0,
    ]
    timeline = Timeline(10.0)
    figure = TimelineFigure(timeline)
    timeline.tracks[0] = Track("prefill 0", 10.0)
    timeline.tracks[0].add(0.0, np.array([1410.0, 3.0, np.nan, 700.0, -0.4]))
    figure.draw("")
    limits = [axes.get_ylim() for axes in figure._axes]
    assert limits[0] == (0.0, 2000.0)
    assert limits[1] == (0.0, 5.0)
    assert limits[4][0] == -0.5


def test_a_window_opens_and_closes() -> None:
    pygame = pytest.importorskip("pygame")
    env = make("BiScale/Prefill-v0", "human")
    env.unwrapped._renderer._window._fps = 0  # no pacing
    env.reset(seed=1)
    assert env.render() is None
    assert pygame.display.get_surface().get_size() == (WIDTH, HEIGHT)
    env.step(0)
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    assert shown.max() == 255
    assert shown.min() < 100
    env.close()
    assert not pygame.display.get_init()


def test_no_screen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "nonesuch")
    env = make("BiScale/Prefill-v0", "human")
    with pytest.raises(EnvironmentUsageError, match=r"found no screen .*SDL_VIDEODRIVER=dummy"):
        env.reset(seed=1)


@pytest.mark.parametrize(("missing", "mode"), [("matplotlib", "rgb_array"), ("pygame", "human")])
def test_a_missing_library_is_named_with_its_extra(missing: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [missing, *(module for module in sys.modules if module.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyNotInstalled, match=rf"{missing}.*biscale-gym\[render\]"):
        make("BiScale/Prefill-v0", mode)


def test_render_without_a_mode_says_what_to_do() -> None:
    env = make("BiScale/Prefill-v0")
    env.reset(seed=1)
    with pytest.raises(EnvironmentUsageError, match=r"make it with one of \['human', 'rgb_array', 'ansi'\]"):
        env.unwrapped.render()


def test_an_unknown_mode_names_the_nearest() -> None:
    from biscale_gym.envs.instance import PrefillEnv

    with pytest.raises(EnvironmentUsageError, match=r"no render_mode 'rgb'.*did you mean 'rgb_array'"):
        PrefillEnv(scenario="smoke", render_mode="rgb")


def test_nothing_is_imported_for_who_does_not_look() -> None:
    program = (
        "import sys, gymnasium, biscale_gym\n"
        "env = gymnasium.make('BiScale/Prefill-v0', scenario='smoke', episode_s=1.0)\n"
        "env.reset(seed=0); env.step(0)\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'matplotlib', 'pygame', 'torch', 'moviepy'}, loaded\n"
        "assert 'biscale_gym.envs.rendering' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)


class _Clip:
    """Stands for moviepy's clip: notes what RecordVideo hands it."""

    written: list[tuple[int, int, str]]

    def __init__(self, frames: list[Any], fps: int) -> None:
        self.frames, self.fps = frames, fps

    def write_videofile(self, path: str, **_: Any) -> None:
        assert {frame.shape for frame in self.frames} == {(HEIGHT, WIDTH, 3)}
        type(self).written.append((len(self.frames), self.fps, path))


def test_record_video_gets_a_frame_per_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import types

    for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["moviepy.video.io.ImageSequenceClip"], "ImageSequenceClip", _Clip, raising=False)
    _Clip.written = []
    env = gymnasium.wrappers.RecordVideo(make("BiScale/Cluster-v0", "rgb_array"), str(tmp_path / "films"))
    env.reset(seed=1)
    steps, over = 0, False
    while not over:
        *_, over, _ = env.step(np.zeros(16, np.int64))
        steps += 1
    env.close()
    assert steps == 30
    assert [(frames, fps) for frames, fps, _ in _Clip.written] == [(steps + 1, 10)]


def test_record_video_writes_a_film(tmp_path: Any) -> None:
    pytest.importorskip("moviepy")
    env = gymnasium.wrappers.RecordVideo(make("BiScale/Cluster-v0", "rgb_array"), str(tmp_path / "films"))
    env.reset(seed=1)
    over = False
    while not over:
        *_, over, _ = env.step(np.zeros(16, np.int64))
    env.close()
    (film,) = tmp_path.glob("films/*.mp4")
    assert film.stat().st_size > 1000
