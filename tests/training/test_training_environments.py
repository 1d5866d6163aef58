"""Lanes of several scenarios as one vector environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml

from biscale_gym.config import presets_dir
from biscale_gym.sb3 import GymnasiumVecEnv
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings

Make = Callable[..., TrainingSettings]


@pytest.fixture
def busier(tmp_path: Path) -> str:
    """The smoke scenario with a tighter SLO, as a file."""
    values = yaml.safe_load((presets_dir() / "scenarios" / "smoke.yaml").read_text())
    path = tmp_path / "busier.yaml"
    path.write_text(yaml.safe_dump({**values, "slo": {"ttft_s": 0.12, "tpot_s": 0.1}}))
    return str(path)


def test_lanes_are_those_of_each_scenario(tiny: Make, busier: str) -> None:
    settings = tiny({"scenarios": ["smoke", busier], "lanes": 5})
    lanes = make_lanes(settings)
    assert [part.num_envs for part in lanes.parts] == [3, 2]
    alone = [
        GymnasiumVecEnv(gymnasium.make_vec(settings.env_id, count, scenario=name, **settings.env), keep_infos=True)
        for name, count in (("smoke", 3), (busier, 2))
    ]
    lanes.seed(7)
    alone[0].seed(7)
    alone[1].seed(10)
    np.testing.assert_array_equal(lanes.reset(), np.concatenate([envs.reset() for envs in alone]))
    draws = np.random.default_rng(0)
    sums = dict.fromkeys(("energy_j", "violations", "completed"), 0.0)
    ended = 0
    for _ in range(150):
        actions = draws.integers(3, size=5)
        theirs = [envs.step(part) for envs, part in zip(alone, np.split(actions, [3]), strict=True)]
        observations, rewards, dones, infos = lanes.step(actions)
        for position, own in enumerate((observations, rewards, dones)):
            np.testing.assert_array_equal(own, np.concatenate([one[position] for one in theirs]))
        for envs in alone:
            for name in sums:
                sums[name] += float(envs.infos[name].sum())
        assert [bool(info.get("TimeLimit.truncated")) for info in infos] == dones.tolist()
        ended += int(dones.sum())
    assert ended > 0
    assert {name: pytest.approx(lanes.totals[name]) for name in sums} == sums
    assert lanes.get_attr("setting", indices=[4])[0].scenario.slo.ttft_s == 0.12


def test_a_multiplier_is_a_penalty(tiny: Make) -> None:
    penalised = make_lanes(
        tiny({"constraint": {"kind": "penalty", "penalty": 2.0}, "env.overrides": {"slo.ttft_s": 0.1}})
    )
    multiplied = make_lanes(tiny({"constraint": {}, "env.overrides": {"slo.ttft_s": 0.1}}))
    multiplied.multiplier = 2.0
    for lanes in (penalised, multiplied):
        lanes.seed(0)
        lanes.reset()
    actions = np.zeros(8, np.int64)
    for _ in range(100):
        expected, rewards = penalised.step(actions)[1], multiplied.step(actions)[1]
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert multiplied.totals["violations"] > 0


def test_settings_may_differ_by_scenario(tiny: Make, busier: str) -> None:
    own = {"episode_s": 2.0, "violation_penalty": 4.0}
    lanes = make_lanes(tiny({"scenarios": ["smoke", busier], "scenario_env": {busier: own}}))
    first, second = (part.get_attr("setting")[0].settings for part in lanes.parts)
    assert (first.episode_s, first.violation_penalty, first.warmup_s) == (3.0, 1.0, 1.0)
    assert (second.episode_s, second.violation_penalty, second.warmup_s) == (2.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("env_id", "rate_rps", "seconds"),
    [
        ("BiScale/Prefill-v0", None, 2 / 30.0),
        ("BiScale/Decode-v0", None, 1 / 30.0),
        ("BiScale/Prefill-v0", 12.0, 2 / 12.0),
        ("BiScale/Cluster-v0", None, 1 / 30.0),
    ],
)
def test_a_penalty_may_count_in_requests(env_id: str, rate_rps: float | None, seconds: float, tiny: Make) -> None:
    placement = [
        {"phase": "prefill", "tp": 2, "clock_mhz": 930, "count": 2},
        {"phase": "decode", "tp": 2, "clock_mhz": 930},
    ]
    env = {
        "episode_s": 20.0,
        "overrides": {"rate_rps": 30.0, "slo": {"ttft_s": 0.1, "tpot_s": 0.02}, "placement": placement},
        **({} if rate_rps is None else {"rate_rps": rate_rps}),
    }
    constraint = {"kind": "penalty", "unit": "request", "penalty": 3.0}
    plain = make_lanes(tiny({"env_id": env_id, "env": {**env, "violation_penalty": 0.0}}))
    priced = make_lanes(tiny({"env_id": env_id, "env": env, "constraint": constraint}))
    for lanes in (plain, priced):
        lanes.seed(0)
        lanes.reset()
    shape = (8, *plain.action_space.shape)
    late = 0.0
    for _ in range(50):
        energy, rewards = (lanes.step(np.zeros(shape, np.int64))[1] for lanes in (plain, priced))
        violations = priced.parts[0].infos["violations"]
        np.testing.assert_allclose(rewards, energy / seconds - 3.0 * violations, rtol=1e-5, atol=1e-6)
        late += violations.sum()
    assert late > 0


def test_a_price_in_requests_needs_a_rate(tiny: Make, tmp_path: Path) -> None:
    constraint = {"unit": "request"}
    with pytest.raises(TrainingError, match=r"a recorded trace has a rate of its own; set env\.rate_rps"):
        make_lanes(tiny({"constraint": constraint, "env.trace": str(tmp_path / "recorded.csv")}))
    with pytest.raises(TrainingError, match="rewards of BiScale/Placement-v0 are shares of a window"):
        make_lanes(tiny({"constraint": constraint, "env_id": "BiScale/Placement-v0", "env": {}}))


def test_loads_move_for_episodes_to_come(tiny: Make) -> None:
    lanes = make_lanes(tiny())
    lanes.seed(0)
    lanes.set_load(0.4, 0.4)
    lanes.reset()
    assert {episode.load for episode in lanes.get_attr("episode")} == {0.4}


def test_scenarios_with_other_clocks_are_refused(tiny: Make) -> None:
    with pytest.raises(
        TrainingError, match=r"'smoke' and 'paper-67' cannot be trained on together: their spaces differ"
    ):
        make_lanes(tiny({"scenarios": ["smoke", "paper-67"]}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env_id": "BiScale/Prefil-v0"}, "did you mean 'BiScale/Prefill-v0'"),
        ({"wrappers": ["FrameSkip"]}, "it needs environments one by one"),
        ({"wrappers": ["Histori"]}, "did you mean 'History'"),
        ({"wrappers": [{"History": {"n": 2}}]}, "wrapper History: "),
        ({"algorithm": "sac", "hyperparameters": {}}, "the wrapper ContinuousClocks makes clocks continuous"),
        ({"algorithm": "maskable-ppo"}, "needs action masks, BiScale/Prefill-v0 has none"),
        ({"algorithm": "recurrent-ppo", "discount": "time", "env.discount_per_s": 0.9}, "discount: time is not for"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], message: str, tiny: Make) -> None:
    settings = tiny(changed)
    with pytest.raises(TrainingError) as caught:
        make_model(settings, make_lanes(settings))
    assert message in str(caught.value)
