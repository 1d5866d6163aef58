"""A policy of all clocks at once: outside of its environment it sees and does the same."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.control.controllers import ControllerError, PlanContext
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.simulate import StatedPlacement
from biscale_gym.control.workload import requests_for
from biscale_gym.envs import cluster_layout as layout
from biscale_gym.envs.cluster_mlp import ClusterClocks, ClusterMLP, load_cluster_model
from biscale_gym.envs.network import ModelError, Network
from biscale_gym.envs.policies import ControllerPolicy
from tests.envs.test_policies import assert_same

CLOCKS_MHZ = (930, 1410, 1830)
DECODE = (InstanceSpec("decode", 2, 1410),) * 2


def random_model(interval_s: float = 0.1, seed: int = 0) -> ClusterMLP:
    generator = np.random.default_rng(seed)
    sizes = (layout.SIZE, 64, layout.SLOTS * len(CLOCKS_MHZ))
    weights = tuple(generator.normal(size=shape).astype(np.float32) for shape in pairwise(sizes))
    biases = tuple(generator.normal(size=size).astype(np.float32) for size in sizes[1:])
    return ClusterMLP(CLOCKS_MHZ, ((0.01, 1.0), (0.01, 1.0)), interval_s, Network(weights, biases, "relu"))


class Alternating:
    """Another placement in every window."""

    name = "alternating"
    replans = True

    def plan(self, context: PlanContext) -> Placement:
        tp = 2 + 2 * (len(context.history_rps) % 2)
        return Placement((InstanceSpec("prefill", 2, 1410), InstanceSpec("prefill", tp, 930), *DECODE))

    def policies(self, context: PlanContext) -> Any:
        return None, None


class Joint(StatedPlacement):
    """A stated placement under a policy of all clocks."""

    def __init__(self, placement: Placement, model: ClusterMLP) -> None:
        super().__init__(placement, "joint", None)
        self.model = model

    def cluster_policy(self, context: PlanContext) -> ClusterClocks:
        return self.model.policy(context.clocks_mhz, context.scenario.slo)


def lively_model(env: Any) -> ClusterMLP:
    """A network whose answers vary in an episode of the environment."""
    for seed in range(40):
        model = random_model(seed=seed)
        observation, _ = env.reset(seed=1)
        over, actions = False, set()
        while not over:
            action = model.actions(observation[None])[0]
            actions.add(tuple(action[env.unwrapped.slots_of(0) >= 0]))
            observation, _, _, over, _ = env.step(action)
        if len(actions) > 3:
            return model
    pytest.fail("no network's answers vary")


@pytest.mark.parametrize("planner", [None, f"{__name__}:Alternating"])
@pytest.mark.parametrize("randomisation", [None, "h100-uncertainty"])
def test_it_sees_and_does_what_it_does_in_its_environment(planner: str | None, randomisation: str | None) -> None:
    env: Any = gymnasium.make(
        "BiScale/Cluster-v0",
        scenario="smoke",
        episode_s=15.0,
        warmup_s=2.0,
        planner=planner,
        randomisation=randomisation,
        overrides={"window_s": 5.0},
    )
    model = lively_model(env)
    observation, _ = env.reset(seed=1)
    setting, episode = env.unwrapped.setting, env.unwrapped.episode
    mine = Simulator(
        setting.scenario.cluster,
        episode.profile,
        env.unwrapped.placement,
        episode.requests,
        setting.clocks_mhz,
        setting.scenario.slo,
        episode.cluster_seed,
        predicted=setting.profile if episode.profile is not setting.profile else None,
        switching=episode.switching,
    )
    mine.run(episode.warmup_s)
    clocks = model.policy(setting.clocks_mhz, setting.scenario.slo)
    clocks.begin(mine)
    over, step, turns = False, 0, 0
    while not over:
        clocks.decide(mine)
        np.testing.assert_array_equal(clocks.observation, observation)
        observation, _, _, over, _ = env.step(model.actions(observation[None])[0])
        step += 1
        mine.run(min(episode.warmup_s + step * 0.1, episode.end_s))
        if not over and len(env.unwrapped.simulator.lanes) > len(mine.lanes):
            mine.reconfigure(env.unwrapped.placement)
            turns += 1
    assert turns == (0 if planner is None else 3)
    assert_same(env, mine)


def served(model: ClusterMLP, overrides: dict[str, Any], only: Any = None, interval_s: float | None = None) -> Rollout:
    scenario = load_scenario("smoke", {"duration_s": 12.0, "warmup_s": 1.0, **overrides})
    profile = scenario.cluster.profile()
    placement = Placement((InstanceSpec("prefill", 2, 1410), InstanceSpec("decode", 2, 1410)))
    requests = requests_for(scenario, profile, "test", 0, None, None)
    return Rollout(Joint(placement, model), scenario, requests, 0, profile, only, interval_s)


@pytest.mark.parametrize("overrides", [{}, {"window_s": 4.0, "window_start": "steady-state"}])
def test_a_run_is_decided_at_every_interval_until_all_is_served(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = served(random_model(0.5), overrides)
    times_s: list[float] = []
    decide = ClusterClocks.decide

    def noted(self: ClusterClocks, simulator: Simulator) -> None:
        times_s.append(simulator.now_s)
        decide(self, simulator)

    monkeypatch.setattr(ClusterClocks, "decide", noted)
    rollout.run()
    assert rollout.counts()["in_flight"] == 0
    last_s = max(times_s)
    assert last_s >= 12.0
    if not overrides:
        assert times_s == [0.5 * number for number in range(len(times_s))]
        assert np.nanmax(rollout.ledger().finish_s) <= last_s + 0.5
    else:
        assert {0.5 * number for number in range(24)} <= set(times_s)
    assert len(np.unique(rollout.timeline.arrays(rollout.lanes)["clock_mhz"])) > 1


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = random_model()
    slo = load_scenario("smoke").slo
    with pytest.raises(ModelError, match=r"the cluster model chooses from .* the run has no 930 MHz"):
        model.policy((1410, 1830), slo)
    with pytest.raises(ModelError, match=r"for TPOT SLOs from 0\.01 to 1 s, the run has 2 s"):
        model.policy(CLOCKS_MHZ, slo.model_copy(update={"tpot_s": 2.0}))
    with pytest.raises(ModelError, match="a policy of 16 slots over 2 clocks"):
        ClusterMLP(CLOCKS_MHZ[1:], model.slo_s, 0.1, model.network)
    with pytest.raises(ControllerError, match="expected neither a control interval nor a single phase"):
        served(model, {}, interval_s=0.1)
    many = Placement((InstanceSpec("prefill", 1, 1410),) * 9 + (InstanceSpec("decode", 2, 1410),))
    scenario = load_scenario("smoke", {"cluster.model": "llama-3.1-8b", "cluster.precision": "bf16"})
    requests = requests_for(scenario, scenario.cluster.profile(), "test", 0, None, None)
    with pytest.raises(ModelError, match="knows 8 instances of a phase; the placement at 0 s has 10 in all"):
        Rollout(Joint(many, model), scenario, requests).run()
    env = gymnasium.make("BiScale/Cluster-v0", scenario="smoke")
    with pytest.raises(ControllerError, match="all instances together, which an environment cannot ask for"):
        ControllerPolicy(Joint(many, model), env)


def test_it_is_saved_whole(tmp_path: Path) -> None:
    model = random_model()
    model.save(tmp_path / "policy")
    again = load_cluster_model(tmp_path / "policy.json")
    assert (again.clocks_mhz, again.slo_s, again.interval_s) == (model.clocks_mhz, model.slo_s, model.interval_s)
    low, high = layout.bounds()
    rows = np.random.default_rng(1).uniform(low, high, (50, len(low))).astype(np.float32)
    np.testing.assert_array_equal(again.actions(rows), model.actions(rows))
    path = tmp_path / "policy.json"
    told = json.loads(path.read_text())
    for change, message in (
        ({"observation_version": 99}, "train it again"),
        ({"format": 1}, "has format 1, this version reads 'cluster 1' here"),
        ({"sha256": "0"}, "SHA-256"),
        ({"slo_s": [[0.1, 1.0]]}, "not a whole model"),
    ):
        path.write_text(json.dumps({**told, **change}))
        with pytest.raises(ModelError, match=message):
            load_cluster_model(path)
