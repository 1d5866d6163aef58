"""How policies are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from biscale_gym.config import ConfigError
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.policies import ControllerPolicy, HighestClock
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.evaluation import Evaluator, Played, judged, reference
from biscale_gym.training.settings import TrainingSettings

Make = Callable[..., TrainingSettings]


def played(energy_j: list[float], attainment: float) -> Played:
    return Played(energy_j, [100.0] * len(energy_j), {"ttft_attainment": attainment, "shown": attainment}, -1.0)


@pytest.mark.parametrize(
    ("own", "biscale", "changed", "keeps"),
    [
        (0.995, 0.992, {}, True),
        (0.985, 0.980, {}, False),  # its P99 is late
        (0.995, 0.999, {}, False),  # more are late than BiScale's
        (0.995, 0.999, {"evaluation.tolerance": 0.005}, True),
        (0.995, 0.999, {"evaluation.not_below_reference": False}, True),
        (0.985, 0.980, {"evaluation.attainment": 0.98}, True),
    ],
)
def test_keeping_the_slo(own: float, biscale: float, changed: dict[str, Any], keeps: bool, tiny: Make) -> None:
    references = {"smoke": {"max-clock": played([4.0, 4.0], 1.0), "biscale": played([2.0, 4.0], biscale)}}
    score = judged(tiny(changed), {"smoke": played([2.0, 2.0], own)}, references)
    assert score.keeps_slo is keeps
    assert score.ratios == {"max-clock": 0.5, "biscale": 0.75}
    assert score.energy == 0.75
    assert score.attainment == own


def test_a_policy_keeps_the_slo_where_it_does_in_every_scenario(tiny: Make) -> None:
    settings = tiny({"scenarios": ["smoke", "tight"], "evaluation.references": ["biscale"]})
    references = {name: {"biscale": played([1.0], 0.99)} for name in settings.scenarios}
    one_fails = {"smoke": played([0.5], 1.0), "tight": played([0.7], 0.98)}
    score = judged(settings, one_fails, references)
    assert (score.keeps_slo, score.attainment) == (False, 0.98)
    assert score.energy == pytest.approx(0.6)
    assert [figures["keeps_slo"] for figures in score.scenarios.values()] == [1.0, 0.0]


def test_ranks() -> None:
    from biscale_gym.training.evaluation import Score

    figures = [(False, 0.1, 0.5), (False, 0.9, 0.98), (True, 1.5, 0.99), (True, 0.9, 0.991)]
    ordered = [Score(keeps, energy, {}, attainment, 0.0, {}) for keeps, energy, attainment in figures]
    assert sorted(ordered, key=lambda score: score.rank) == ordered
    assert sorted(ordered, key=lambda score: -score.objective) == ordered


@pytest.mark.parametrize(
    ("env_id", "energy", "share"),
    [
        ("BiScale/Prefill-v0", "prefill_energy_j", "ttft_attainment"),
        ("BiScale/Decode-v0", "decode_energy_j", "tpot_attainment"),
        ("BiScale/Cluster-v0", "total_energy_j", "joint_attainment"),
    ],
)
def test_references_are_what_single_environments_give(
    env_id: str, energy: str, share: str, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biscale_gym.planning.table_cache.cache_root", lambda: tmp_path)
    settings = tiny({"env_id": env_id, "env.load": [0.5, 1.0]})
    made = {"max-clock": HighestClock, "biscale": lambda env: ControllerPolicy("biscale", env)}
    for name, agent_of in made.items():
        env = gymnasium.make(env_id, scenario="smoke", **{**settings.env, "episode_s": 5.0})
        agent: Any = agent_of(env)
        if name == "biscale" and env_id != "BiScale/Cluster-v0":
            points = agent.prefill_points if env_id == "BiScale/Prefill-v0" else agent.decode_points
            env = gymnasium.make(
                env_id, scenario="smoke", **{**settings.env, "episode_s": 5.0, "decision_points": points}
            )
            agent = agent_of(env)
        expected = []
        for episode in range(2):
            options = {"split": "validation", "trace_seed": episode}
            observation, _ = env.reset(seed=settings.evaluation.seed + episode, options=options)
            over = False
            while not over:
                observation, _, _, over, info = env.step(agent.predict(observation)[0])
            expected.append(info["episode_metrics"])
        found = reference(settings, "smoke", name)
        assert found.energy_j == [one[energy] for one in expected]
        kept = sum(one[share] * one["requests_judged"] for one in expected)
        assert found.attainment == pytest.approx(kept / sum(one["requests_judged"] for one in expected))
        assert reference(settings, "smoke", name) == found  # from disk


def test_a_model_is_scored_alike_every_time(tiny: Make) -> None:
    settings = tiny({"evaluation.references": []})
    model = make_model(settings, make_lanes(settings))
    evaluator = Evaluator(settings)
    first, second = evaluator.score(model), evaluator.score(model)
    assert first == second == Evaluator(settings).score(model)
    assert first.energy == pytest.approx(first.scenarios["smoke"]["energy_mj"])
    assert np.isfinite(first.mean_return)


def test_a_shielded_policy_is_judged_with_its_shield(tiny: Any) -> None:
    changes = {"env_id": "BiScale/Decode-v0", "evaluation.episode_s": 20.0}
    bare, guarded = tiny(changes), tiny({**changes, "shield": {"headroom": 0.01}})
    model = make_model(bare, make_lanes(bare))
    # A network that always asks for the lowest clock; no iteration is within a hundredth of the SLO at any.
    with torch.no_grad():
        for weights in model.policy.action_net.parameters():
            weights.zero_()
        model.policy.action_net.bias[0] = 1.0
    alone, overruled = Evaluator(bare).score(model), Evaluator(guarded).score(model)
    assert overruled.ratios["max-clock"] == pytest.approx(1.0, abs=0.02)
    assert alone.ratios["max-clock"] < 0.9


@pytest.mark.parametrize("shielded", [True, False])
def test_a_policy_trains_under_its_shield(shielded: bool, tiny: Any) -> None:
    changes = {"env_id": "BiScale/Decode-v0", "shield": {"headroom": 0.01}, "train_shielded": shielded}
    lanes = make_lanes(tiny(changes))
    lanes.reset()
    for _ in range(20):
        lanes.step(np.zeros(lanes.num_envs, np.int64))
    # The lowest clock is asked for, and no iteration is within a hundredth of the SLO at any.
    clocks_mhz = load_scenario("smoke").clocks_mhz
    asked = {one.clocks_mhz[one.state.inst[0]["target"]] for one in lanes.get_attr("simulator")}
    assert asked == {clocks_mhz[-1] if shielded else clocks_mhz[0]}


def test_the_lanes_shield_is_the_runs(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"env\.shield"):
        tiny({"env.shield": {"headroom": 0.9}})


def test_a_shield_of_what_is_no_clock_policy_is_refused(tiny: Any) -> None:
    with pytest.raises(TrainingError, match="shield"):
        make_lanes(tiny({"env_id": "BiScale/Cluster-v0", "shield": {"headroom": 0.9}}))
    settings = tiny({"shield": {"headroom": 0.9}, "wrappers": ["ClockDeltas"]})
    model = make_model(settings, make_lanes(settings))
    with pytest.raises(TrainingError, match="shield"):
        Evaluator(settings).score(model)
