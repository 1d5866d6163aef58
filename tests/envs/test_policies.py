"""A controller plays an environment as it plays the simulator: same joules and latencies, request by request."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import PHASES, Placement
from biscale_gym.cluster.policy import policy
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import PlanContext, make_controller
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.simulate import StatedPlacement
from biscale_gym.control.workload import Requests
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.policies import ControllerPolicy, HighestClock

POINTS = ("boundary", "arrival", "overrun", "idle")
OVERRIDES = {"top_clock_mhz": 1830}
"""So that the grid is the run's whole list, and its top the card's."""


@policy
def restless(obs: Any, memory: Any, params: Any, model: Any) -> int:
    """A random walk of its own: the memory holds the generator's state."""
    memory[0] = (memory[0] * 1103515245.0 + 12345.0 + obs[f.TP]) % 2147483648.0
    return int(memory[0] // 65536.0) % int(obs[f.CLOCK_COUNT])


class Restless:
    """Random clocks at every decision point."""

    name = "restless"
    replans = False

    def plan(self, context: PlanContext) -> Placement:
        raise AssertionError("environments plan nothing")

    def policies(self, context: PlanContext) -> tuple[PhasePolicy, PhasePolicy]:
        return (
            PhasePolicy(restless, on_arrival=True, on_overrun=True, on_idle=True),
            PhasePolicy(restless, on_overrun=True, on_idle=True),
        )


@policy
def highest(obs: Any, memory: Any, params: Any, model: Any) -> int:
    return int(obs[f.CLOCK_COUNT]) - 1


class Highest(Restless):
    """The top clock, asked for at every decision point."""

    name = "highest"

    def policies(self, context: PlanContext) -> tuple[PhasePolicy, PhasePolicy]:
        return PhasePolicy(highest, on_arrival=True, on_idle=True), PhasePolicy(highest, on_idle=True)


def controller(name: str) -> Any:
    return {"restless": Restless, "highest": Highest}[name]() if name in ("restless", "highest") else name


def play(env: Any, agent: Any, **reset: Any) -> tuple[float, list[dict[str, Any]]]:
    obs, first = env.reset(**reset)
    infos, over, total = [first], False, 0.0
    while not over:
        action, _ = agent.predict(obs)
        obs, reward, terminated, over, info = env.step(action)
        assert not terminated
        total += reward
        infos.append(info)
    return total, infos


def simulated(env: Any, policies: Any, only: Any, interval_s: float | None) -> Simulator:
    """The same episode on a simulator of one's own, the policies compiled in."""
    setting, episode = env.unwrapped.setting, env.unwrapped.episode
    placement = setting.placement
    if only is not None:
        placement = Placement((placement.of(only)[episode.instance],))
    simulator = Simulator(
        setting.scenario.cluster,
        episode.profile,
        placement,
        episode.requests,
        setting.clocks_mhz,
        setting.scenario.slo,
        episode.cluster_seed,
        predicted=setting.profile if episode.profile is not setting.profile else None,
        only=only,
        switching=episode.switching,
    )
    if episode.warmup_s > 0.0:
        simulator.run(episode.warmup_s)
    simulator.set_policies(*policies, only_when_told=interval_s is not None)
    step = 0
    while interval_s is not None and simulator.now_s < episode.end_s:
        simulator.ask_everyone()
        step += 1
        simulator.run(min(episode.warmup_s + step * interval_s, episode.end_s))
    simulator.run(episode.end_s)
    return simulator


def assert_same(env: Any, other: Simulator) -> None:
    mine = env.unwrapped.simulator
    for name in ("first_token_s", "finish_s", "prefill_instance", "decode_instance", "preemptions"):
        np.testing.assert_array_equal(getattr(mine.requests(), name), getattr(other.requests(), name), err_msg=name)
    np.testing.assert_array_equal(mine.instances().energy_j, other.instances().energy_j)
    assert mine.instances().unallocated_j == other.instances().unallocated_j
    assert mine.state.glob[0]["digest"] == other.state.glob[0]["digest"]


def policies_of(env: Any, made: Any) -> Any:
    setting = env.unwrapped.setting
    context = PlanContext(
        setting.scenario, setting.profile, setting.source.training(), 1.0, clocks_mhz=setting.clocks_mhz
    )
    return (make_controller(made) if isinstance(made, str) else made).policies(context)


@pytest.mark.parametrize("randomisation", [None, "h100-uncertainty"])
@pytest.mark.parametrize("name", ["restless", "highest", "biscale"])
@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Decode-v0"])
def test_one_instance_is_played_as_in_the_simulator(env_id: str, name: str, randomisation: str | None) -> None:
    env = gymnasium.make(
        env_id,
        scenario="smoke",
        overrides=OVERRIDES,
        decision_points=POINTS,
        rate_rps=40.0,
        episode_s=15.0,
        randomisation=randomisation,
    )
    only = PHASES[env_id != "BiScale/Prefill-v0"]
    made = controller(name)
    agent = ControllerPolicy(made, env)
    # All that the controller subscribes to, and nothing else, is asked.
    points = agent.prefill_points if only == "prefill" else agent.decode_points
    env.close()
    env = gymnasium.make(
        env_id,
        scenario="smoke",
        overrides=OVERRIDES,
        decision_points=points,
        rate_rps=40.0,
        episode_s=15.0,
        randomisation=randomisation,
    )
    agent = ControllerPolicy(made, env)
    _, infos = play(env, agent, seed=7)
    other = simulated(env, policies_of(env, made), only, None)
    assert_same(env, other)
    assert len(infos) > 100
    start_j = simulated_start_j(env, only)
    spent_j = other.instances().energy_j.sum() - start_j
    assert sum(info["energy_j"] for info in infos) == pytest.approx(spent_j, rel=1e-9)


def simulated_start_j(env: Any, only: Any) -> float:
    """Joules of the warm-up, clocks held."""
    setting, episode = env.unwrapped.setting, env.unwrapped.episode
    return float(setting.simulator(episode, env.unwrapped.placement).instances().energy_j.sum())


@pytest.mark.parametrize("randomisation", [None, "h100-uncertainty"])
@pytest.mark.parametrize("name", ["restless", "highest", "biscale"])
def test_a_cluster_is_played_as_in_the_simulator(name: str, randomisation: str | None) -> None:
    env = gymnasium.make(
        "BiScale/Cluster-v0", scenario="smoke", overrides=OVERRIDES, episode_s=15.0, randomisation=randomisation
    )
    made = controller(name)
    play(env, ControllerPolicy(made, env), seed=11)
    assert_same(env, simulated(env, policies_of(env, made), None, 0.1))


@pytest.mark.parametrize("env_id", ["BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0"])
def test_an_environment_is_played_as_simulate_plays_it(env_id: str) -> None:
    """Through the very rollout of ``biscale-gym simulate``, with its stops for samples and windows."""
    overrides = {**OVERRIDES, "warmup_s": 0.0}
    settings: dict[str, Any] = {"scenario": "smoke", "overrides": overrides, "episode_s": 15.0}
    only: Any = {"BiScale/Prefill-v0": "prefill", "BiScale/Decode-v0": "decode"}.get(env_id)
    if only is not None:
        settings["decision_points"] = POINTS if only == "prefill" else ("boundary", "idle")
    env = gymnasium.make(env_id, **settings)
    play(env, ControllerPolicy("biscale", env), seed=2)
    setting, episode = env.unwrapped.setting, env.unwrapped.episode
    placement = setting.placement
    if only is not None:
        placement = Placement((placement.of(only)[episode.instance],))
    stated = StatedPlacement(placement, "biscale", make_controller("biscale").policies)
    served = Requests(episode.requests, setting.source.training(), 20.0, episode.end_s)
    interval_s = 0.1 if only is None else None
    rollout = Rollout(stated, setting.scenario, served, episode.cluster_seed, None, only, interval_s)
    energy = rollout.run().energy
    mine, others = env.unwrapped.simulator, rollout.simulator
    np.testing.assert_array_equal(mine.instances().energy_j, energy.energy_j)
    assert mine.instances().unallocated_j == energy.unallocated_j
    done = mine.requests().finish_s < episode.end_s
    assert done.sum() > 50
    for name in ("first_token_s", "finish_s"):
        np.testing.assert_array_equal(getattr(mine.requests(), name)[done], getattr(others.requests(), name)[done])


@pytest.mark.parametrize("lanes", [None, 2])
def test_tier_1_plans_over_the_cluster_as_in_a_comparison(lanes: int | None) -> None:
    settings: dict[str, Any] = {
        "scenario": "smoke",
        "overrides": {"warmup_s": 0.0, "window_s": 10.0},
        "rate_rps": 60.0,
        "planner": "biscale",
        "interval_s": 0.5,
    }
    env: Any
    if lanes is None:
        env = gymnasium.make("BiScale/Cluster-v0", **settings)
        agent = ControllerPolicy("biscale", env)
        play(env, agent, seed=8)
        mine, episode = env.unwrapped.simulator, env.unwrapped.episode
    else:
        env = gymnasium.make_vec("BiScale/Cluster-v0", num_envs=lanes, **settings)
        agent = ControllerPolicy("biscale", env)
        obs, _ = env.reset(seed=8)
        mine, episode = env.unwrapped.simulators[0], env.unwrapped.episodes[0]
        for _ in range(120):
            obs, *_ = env.step(agent.predict(obs)[0])
    setting = env.unwrapped.setting
    served = Requests(episode.requests, setting.source.training(), settings["rate_rps"], episode.end_s)
    rollout = Rollout(
        make_controller("biscale"), setting.scenario, served, episode.cluster_seed, None, None, settings["interval_s"]
    )
    energy = rollout.run().energy
    assert len({placement for _, placement in rollout.placements}) > 1, "the placement has to change"
    # The rollout's ledger has an entry per window and instance: the same joules, added up in another order.
    for prefill in (True, False):
        assert mine.instances().phase_energy_j(prefill) == pytest.approx(energy.phase_energy_j(prefill), rel=1e-12)
    assert mine.state.glob[0]["digest"] == rollout.simulator.state.glob[0]["digest"]
    done = mine.requests().finish_s < episode.end_s
    np.testing.assert_array_equal(mine.requests().finish_s[done], rollout.simulator.requests().finish_s[done])


def test_an_interval_must_divide_the_planners_window() -> None:
    with pytest.raises(ConfigError, match=r"interval_s \(0.3\) does not divide.*window_s \(20\)"):
        gymnasium.make("BiScale/Cluster-v0", scenario="smoke", planner="biscale", interval_s=0.3)


def test_the_highest_clock_of_the_environment_is_max_clock() -> None:
    env = gymnasium.make("BiScale/Cluster-v0", scenario="smoke", overrides=OVERRIDES, episode_s=5.0)
    played, _ = play(env, HighestClock(env), seed=3)
    mine = env.unwrapped.simulator.instances().energy_j
    again, _ = play(env, ControllerPolicy(Highest(), env), seed=3)
    assert played == again
    np.testing.assert_array_equal(mine, env.unwrapped.simulator.instances().energy_j)


def test_a_vector_of_lanes_is_answered_lane_by_lane() -> None:
    settings: dict[str, Any] = {"scenario": "smoke", "episode_s": 5.0}
    many = gymnasium.make_vec("BiScale/Prefill-v0", num_envs=3, **settings)
    agent = ControllerPolicy("biscale", many)
    obs, _ = many.reset(seed=5)
    rewards = np.zeros(3)
    for _ in range(40):
        actions, _ = agent.predict(obs)
        obs, reward, _, _, _ = many.step(actions)
        rewards += reward
    for lane in range(3):
        one = gymnasium.make("BiScale/Prefill-v0", **settings)
        single = ControllerPolicy("biscale", one)
        obs, _ = one.reset(seed=5 + lane)
        total = 0.0
        for _ in range(40):
            obs, reward, _, _, _ = one.step(single.predict(obs)[0])
            total += reward
        assert total == rewards[lane]


def test_evaluate_policy_works_with_a_controller() -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    env = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", episode_s=5.0)
    env.reset(seed=0)
    mean, _ = evaluation.evaluate_policy(ControllerPolicy("biscale", env), env, n_eval_episodes=2, warn=False)
    env.reset(seed=0)
    top, _ = evaluation.evaluate_policy(HighestClock(env), env, n_eval_episodes=2, warn=False)
    assert top < mean < 0.0


def test_a_clock_that_is_no_action_is_refused() -> None:
    env = gymnasium.make("BiScale/Decode-v0", scenario="smoke", episode_s=5.0)
    agent = ControllerPolicy(Highest(), env)
    obs, _ = env.reset(seed=0)
    with pytest.raises(EnvironmentUsageError, match=r"answers 1980 MHz.*valid: \[930, 1410, 1830\]"):
        agent.predict(obs)


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(EnvironmentUsageError, match="no environment of BiScale Gym"):
        ControllerPolicy("biscale", gymnasium.make("CartPole-v1"))
    with pytest.raises(EnvironmentUsageError, match="call reset"):
        ControllerPolicy("biscale", gymnasium.make("BiScale/Prefill-v0", scenario="smoke")).predict(None)
