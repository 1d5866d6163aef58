"""Wrappers: their formulas, what they conserve, and that environments stay well-formed inside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.envs import wrappers
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers import (
    ClockDeltas,
    ContinuousClocks,
    CostConstrained,
    EnergyPerRequest,
    FrameSkip,
    History,
    SafetySteps,
    SlackShaping,
    vector,
)
from biscale_gym.envs.wrappers.native import native
from biscale_gym.envs.wrappers.steps import ADDED

IDS = ("BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0")
PREFILL, DECODE, CLUSTER = IDS
CLOCKS_MHZ = [930, 1410, 1830]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wrappers.md").read_text()

WRAPPED: dict[str, Callable[[Any], Any]] = {
    "ContinuousClocks": ContinuousClocks,
    "ClockDeltas": ClockDeltas,
    "FrameSkip": lambda env: FrameSkip(env, 3),
    "History": lambda env: History(env, 4),
    "CostConstrained": CostConstrained,
    "EnergyPerRequest": lambda env: EnergyPerRequest(env, 200.0),
    "SlackShaping": SlackShaping,
    "all": lambda env: History(SlackShaping(ContinuousClocks(FrameSkip(CostConstrained(env), 2)), gamma=None), 2),
}


def make(env_id: str, **kwargs: Any) -> Any:
    return gymnasium.make(env_id, scenario="smoke", **{"episode_s": 3.0, **kwargs})


def make_vec(env_id: str, num_envs: int = 3, **kwargs: Any) -> Any:
    return gymnasium.make_vec(env_id, num_envs=num_envs, scenario="smoke", **{"episode_s": 1.0, **kwargs})


def all_clocks(env: Any, index: int) -> Any:
    """An action that asks for one clock everywhere."""
    return np.full_like(env.unwrapped.action_space.sample(), index) if "Cluster" in env.unwrapped.spec.id else index


def play(env: Any, action: Callable[[int], Any], seed: int = 1) -> list[tuple[Any, float, dict[str, Any]]]:
    """Observation, reward and info of every step of an episode."""
    env.reset(seed=seed)
    steps, over = [], False
    while not over:
        observation, reward, terminated, over, info = env.step(action(len(steps)))
        assert not terminated
        steps.append((observation, reward, info))
    return steps


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version.*")
@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("name", WRAPPED)
def test_gymnasium_finds_no_fault(env_id: str, name: str) -> None:
    check_env(WRAPPED[name](make(env_id).unwrapped), skip_render_check=True)


@pytest.mark.filterwarnings("ignore:.*we recommend.*", "ignore:.*Box.*")
@pytest.mark.parametrize("env_id", IDS)
def test_stable_baselines_finds_no_fault(env_id: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    for wrap in WRAPPED.values():
        checker.check_env(wrap(make(env_id)), skip_render_check=True)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("name", WRAPPED)
def test_numbers_stay_finite_and_inside_their_spaces(env_id: str, name: str) -> None:
    env = WRAPPED[name](make(env_id))
    env.action_space.seed(5)
    steps = play(env, lambda _: env.action_space.sample(), seed=5)
    assert steps[-1][2]["episode_metrics"]
    for observation, reward, info in steps:
        assert env.observation_space.contains(observation)
        assert np.isfinite(reward)
        assert type(reward) is float
        assert all(np.isfinite(value) for key, value in info.items() if key != "episode_metrics")


@pytest.mark.parametrize("name", WRAPPED)
def test_the_same_seed_is_the_same_episode(name: str) -> None:
    used, fresh = WRAPPED[name](make(PREFILL)), WRAPPED[name](make(PREFILL))
    used.action_space.seed(2)
    actions = [used.action_space.sample() for _ in range(400)]
    play(used, actions.__getitem__, seed=9)
    again, first = play(used, actions.__getitem__, seed=3), play(fresh, actions.__getitem__, seed=3)
    assert len(again) == len(first)
    for (seen, reward, _), (other, same, _) in zip(again, first, strict=True):
        np.testing.assert_array_equal(seen, other)
        assert reward == same


@pytest.mark.parametrize("name", ["ContinuousClocks", "ClockDeltas", "History", "CostConstrained", "SlackShaping"])
@pytest.mark.parametrize("env_id", IDS)
def test_a_lane_is_the_single_environment(env_id: str, name: str) -> None:
    """Rewards and observations of a lane, over the end of its first episode."""
    wrap = (lambda kind: (lambda env: kind(env, 4)) if name == "History" else kind)(getattr(wrappers, name))
    wrap_all = (lambda kind: (lambda env: kind(env, 4)) if name == "History" else kind)(getattr(vector, name))
    lanes, single = wrap_all(make_vec(env_id, 2)), wrap(make(env_id, episode_s=1.0))
    observations, _ = lanes.reset(seed=4)
    observation, _ = single.reset(seed=5)
    assert lanes.action_space.contains(lanes.action_space.sample())
    single.action_space.seed(0)
    ended = 0
    while ended < 2:
        np.testing.assert_array_equal(observations[1], observation)
        action = single.action_space.sample()
        observations, rewards, _, truncated, infos = lanes.step(np.stack([action, action]))
        observation, reward, _, over, info = single.step(action)
        assert rewards[1] == reward
        assert infos["cost"][1] == info["cost"]
        assert truncated[1] == over
        if over:
            np.testing.assert_array_equal(infos["final_obs"][1], observation)
            observation, _ = single.reset()
            ended += 1


def test_lanes_reset_by_a_mask_begin_anew() -> None:
    lanes = vector.History(vector.SlackShaping(make_vec(DECODE, 3)), 2)
    lanes.reset(seed=1)
    before, *_ = lanes.step(np.zeros(3, np.int64))
    after, _ = lanes.reset(seed=[7, 8, 9], options={"reset_mask": np.array([False, True, False])})
    size = after.shape[1] // 2
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(after[1, :size], after[1, size:])


def test_wrapped_environments_are_made_from_their_spec() -> None:
    env = History(SlackShaping(ClockDeltas(FrameSkip(make(DECODE), 2)), weight=3.0), 2)
    again = gymnasium.make(env.spec)
    assert str(again) == str(env)
    np.testing.assert_array_equal(env.reset(seed=1)[0], again.reset(seed=1)[0])
    assert env.step(2)[1] == again.step(2)[1]


# -- actions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "index"),
    [(-1.0, 0), (1.0, 2), (-7.0, 0), (7.0, 2), (0.0, 1), (0.5, 1), (0.6, 2), (-0.5, 0), (-0.4, 1)],
)
def test_the_nearest_clock_is_nearest_in_mhz(number: float, index: int) -> None:
    """The middle of 930 and 1,830 is 1,380 MHz, nearest to 1,410; the borders are 1,170 (-0.467) and 1,620 (0.533)."""
    assert ContinuousClocks(make(PREFILL)).action(np.array([number], np.float32)) == index


def test_half_way_is_the_lower_clock() -> None:
    told = native(make(PREFILL), "")
    border = 2.0 * (1170.0 - 930.0) / 900.0 - 1.0
    clocks = wrappers.actions.nearest_clocks(told, np.array([border, np.nextafter(border, 1.0) + 1e-12]))
    assert clocks.tolist() == [0, 1]


def test_every_clock_can_be_said_exactly() -> None:
    env = ContinuousClocks(make(CLUSTER))
    numbers = [2.0 * (clock - 930.0) / 900.0 - 1.0 for clock in CLOCKS_MHZ]
    action = env.action(np.array(numbers + [1.0] * 13, np.float32))
    assert action.tolist() == [0, 1, 2] + [2] * 13


def test_no_number_is_refused() -> None:
    env = ContinuousClocks(make(PREFILL))
    env.reset(seed=1)
    with pytest.raises(EnvironmentUsageError, match="holds NaN"):
        env.step(np.array([np.nan], np.float32))


@pytest.mark.parametrize("env_id", IDS)
def test_deltas_step_and_saturate(env_id: str) -> None:
    env = ClockDeltas(make(env_id))
    env.reset(seed=1)

    def targets() -> list[int]:
        simulator = env.unwrapped.simulator
        return [
            simulator.clocks_mhz[row["target"]] for row in simulator.state.inst[: simulator.state.glob[0]["instances"]]
        ]

    def stepped(mhz: int, step: int) -> int:
        return CLOCKS_MHZ[min(max(CLOCKS_MHZ.index(mhz) + step, 0), 2)]

    before, seen = targets(), set()
    for number in [2, 2, 2, 1, 0, 0, 0, 0, 1, 2, 0, 2, 2]:
        env.step(all_clocks(env, number))
        after = targets()
        assert after == [stepped(mhz, number - 1) for mhz in before]
        before = after
        seen.update(after)
    assert seen == set(CLOCKS_MHZ)


def test_from_a_clock_beside_the_grid_deltas_lead_onto_it() -> None:
    told = native(make(PREFILL), "")
    observations = np.zeros((5, told.size), np.float32)
    observations[:, told.targets[0]] = np.array([1500, 1500, 1500, 1980, 1980]) / 2000.0
    clocks = wrappers.actions.stepped_clocks(told, observations, np.array([[0], [1], [2], [2], [0]]))
    assert clocks[:, 0].tolist() == [1, 1, 2, 2, 2]


def test_another_step_is_refused() -> None:
    env = ClockDeltas(make(PREFILL).unwrapped)
    env.reset(seed=1)
    with pytest.raises(EnvironmentUsageError, match=r"action 3 is no step; valid: 0 \(down\)"):
        env.step(3)


# -- steps and observations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount_per_s", [1.0, 0.9])
@pytest.mark.parametrize("env_id", IDS)
def test_frame_skip_conserves_what_adds_up(env_id: str, discount_per_s: float) -> None:
    plain, skipped = make(env_id, discount_per_s=discount_per_s), make(env_id, discount_per_s=discount_per_s)
    steps = play(plain, lambda number: all_clocks(plain, number // 4 % 3))
    jumps = play(FrameSkip(skipped, 4), lambda number: all_clocks(skipped, number % 3))
    assert len(jumps) == -(-len(steps) // 4)
    for name in set(ADDED) & steps[0][2].keys():
        np.testing.assert_allclose(
            sum(info[name] for *_, info in jumps), sum(info[name] for *_, info in steps), rtol=1e-12, err_msg=name
        )
    total = np.prod([info["discount"] for *_, info in steps])
    assert np.prod([info["discount"] for *_, info in jumps]) == pytest.approx(total, rel=1e-9)

    def returned(episode: list[tuple[Any, float, dict[str, Any]]]) -> float:
        worth, value = 1.0, 0.0
        for _, reward, info in episode:
            value += worth * reward
            worth *= info["discount"]
        return value

    assert returned(jumps) == pytest.approx(returned(steps), rel=1e-9)
    assert jumps[-1][2]["episode_metrics"] == steps[-1][2]["episode_metrics"]
    np.testing.assert_array_equal(jumps[0][0], steps[3][0])


def test_history_is_the_last_observations() -> None:
    plain, stacked = make(DECODE), History(make(DECODE), 3)
    first, _ = plain.reset(seed=1)
    seen = [first] * 3
    np.testing.assert_array_equal(stacked.reset(seed=1)[0], np.concatenate(seen))
    for number in range(6):
        seen = [*seen[1:], plain.step(number % 3)[0]]
        np.testing.assert_array_equal(stacked.step(number % 3)[0], np.concatenate(seen))


@pytest.mark.parametrize(("wrap", "value"), [(FrameSkip, 0), (FrameSkip, 1.5), (History, 0), (History, True)])
def test_counts_begin_at_one(wrap: Any, value: Any) -> None:
    with pytest.raises(EnvironmentUsageError, match=rf"is {value}, expected a whole number from 1 up"):
        wrap(make(PREFILL), value)


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_cost_constrained_is_the_energy_alone(env_id: str) -> None:
    """At the lowest clock and with an SLO of a tenth, requests break it."""
    strict = {"overrides": {"slo.ttft_s": 0.05, "slo.tpot_s": 0.02}, "violation_penalty": 5.0}
    env = CostConstrained(make(env_id, **strict))
    steps = play(env, lambda _: all_clocks(env, 0))
    gpus = 16 if "Cluster" in env_id else 2
    gpus = env.unwrapped.setting.scenario.cluster.gpus if "Cluster" in env_id else gpus
    for _, reward, info in steps:
        assert reward == pytest.approx(-info["energy_j"] / (700.0 * gpus), rel=1e-9, abs=1e-9)
        assert info["cost"] == info["violations"]
    assert sum(info["cost"] for *_, info in steps) > 0


def test_energy_per_request_is_above_zero_within_its_budget() -> None:
    strict = {"overrides": {"slo.ttft_s": 0.05}}
    steps = play(make(PREFILL, **strict), lambda _: 1)
    in_time = sum(info["completed"] - info["violations"] for *_, info in steps)
    joules = sum(info["energy_j"] for *_, info in steps)
    assert 0 < in_time < sum(info["completed"] for *_, info in steps)

    def total(budget_j: float) -> float:
        return sum(reward for _, reward, _ in play(EnergyPerRequest(make(PREFILL, **strict), budget_j), lambda _: 1))

    paid = joules / in_time
    assert total(paid) == pytest.approx(0.0, abs=1e-9 * in_time)
    assert total(1.01 * paid) > 0.0 > total(0.99 * paid)
    assert total(2.0 * paid) == pytest.approx(in_time / 2.0)


@pytest.mark.parametrize("gamma", [0.97, None])
@pytest.mark.parametrize("env_id", IDS)
def test_shaping_telescopes(env_id: str, gamma: float | None) -> None:
    """The discounted sum of what is added is gamma^T phi(last) - phi(first): no policy can gain by it on the way."""
    plain, shaped = make(env_id, discount_per_s=0.9), SlackShaping(make(env_id, discount_per_s=0.9), 2.0, gamma)
    before = shaped.potential(shaped.reset(seed=1)[0])
    added, worth = 0.0, 1.0
    steps = play(shaped, lambda number: all_clocks(shaped, number % 3))
    for (_, own, _), (_, reward, info) in zip(
        play(plain, lambda number: all_clocks(plain, number % 3)), steps, strict=True
    ):
        assert reward - own == pytest.approx(info["shaping"], abs=1e-12)
        added += worth * info["shaping"]
        worth *= info["discount"] if gamma is None else gamma
    assert added == pytest.approx(worth * shaped.potential(steps[-1][0]) - before, abs=1e-9)
    assert any(info["shaping"] != 0.0 for *_, info in steps)


def test_the_potential_is_the_least_slack_of_present_slots() -> None:
    told = native(make(CLUSTER), "")
    observation = np.zeros(told.size, np.float32)
    assert told.least_slack(observation) == 0.0
    for slot, slacks in ((0, [0.5, 0.25]), (8, [2.0, 3.0, 4.0]), (9, [-1.0, -0.5, 0.0])):
        observation[told.slacks[slot]] = slacks
    observation[told.present[[0, 8]]] = 1.0
    assert told.least_slack(observation) == 0.25
    observation[told.present[9]] = 1.0
    assert told.least_slack(np.stack([observation, observation])).tolist() == [-1.0, -1.0]


def test_six_are_handed_out() -> None:
    plain, safe = make(PREFILL, overrides={"slo.ttft_s": 0.05}), make(PREFILL, overrides={"slo.ttft_s": 0.05})
    safe = SafetySteps(CostConstrained(safe))
    safe.reset(seed=1)
    costs, over = [], False
    while not over:
        *_, cost, _, over, _ = safe.step(0)
        costs.append(cost)
    assert costs == [info["violations"] for *_, info in play(plain, lambda _: 0)]
    assert sum(costs) > 0


# -- what does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda env: CostConstrained(FrameSkip(env, 2)), "put CostConstrained inside FrameSkip"),
        (lambda env: EnergyPerRequest(CostConstrained(env), 1.0), "put EnergyPerRequest inside CostConstrained"),
        (lambda env: ClockDeltas(History(env, 2)), "put ClockDeltas further inside"),
        (lambda env: SlackShaping(History(env, 2)), "put SlackShaping further inside"),
        (lambda env: SlackShaping(env, gamma=1.5), "gamma is 1.5, expected more than 0 and at most 1"),
        (lambda env: SlackShaping(env, weight=-1.0), "weight is -1.0, expected 0 or more"),
        (lambda env: EnergyPerRequest(env, 0.0), "budget_j is 0.0, expected a number above 0"),
        (lambda env: EnergyPerRequest(env, 1.0, float("nan")), "violation_penalty is nan, expected 0 or more"),
    ],
)
def test_a_wrong_order_or_number_is_said(wrong: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(EnvironmentUsageError, match=re.escape(message)):
        wrong(make(PREFILL))


def test_other_environments_are_refused() -> None:
    env = gymnasium.make("CartPole-v1")
    for wrap in (ContinuousClocks, ClockDeltas, CostConstrained, SlackShaping):
        with pytest.raises(EnvironmentUsageError, match=f"{wrap.__name__} wraps the environments of biscale_gym"):
            wrap(env)


def test_placements_are_no_clocks() -> None:
    env = gymnasium.make("BiScale/Placement-v0", scenario="smoke")
    for wrap in (ContinuousClocks, ClockDeltas, SlackShaping, WRAPPED["FrameSkip"], WRAPPED["EnergyPerRequest"]):
        with pytest.raises(EnvironmentUsageError, match="wraps environments whose actions are clocks, not BiScale/Pl"):
            wrap(env)
    plain, constrained = env, CostConstrained(gymnasium.make("BiScale/Placement-v0", scenario="smoke"))
    for wrapped in (plain, constrained):
        wrapped.reset(seed=1)
    over = False
    while not over:
        action = int(np.flatnonzero(plain.unwrapped.action_masks())[-1])
        _, reward, _, over, info = plain.step(action)
        _, energy, *_ = constrained.step(action)
        assert energy == pytest.approx(reward + plain.unwrapped.settings.violation_penalty * info["cost"])


def test_lanes_that_begin_anew_a_step_later_are_refused() -> None:
    lanes = gymnasium.make_vec(PREFILL, num_envs=1, vectorization_mode="sync", scenario="smoke", episode_s=1.0)
    with pytest.raises(EnvironmentUsageError, match="SAME_STEP"):
        vector.History(lanes, 2)


# -- docs/wrappers.md --------------------------------------------------------------------------------------------------


def test_every_wrapper_is_on_the_page() -> None:
    named = {name for name in wrappers.__all__ if name[0].isupper() and name not in ("Replay", "ReplayError")}
    rows = {row.split("`")[1].partition("(")[0] for row in PAGE.splitlines() if row.startswith("| `")}
    assert named <= rows


@pytest.mark.parametrize("program", re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_the_programs_of_the_page_run(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/wrappers.md", "exec"), {})
