"""What reference controllers score on the environments: the tables of docs/environments/.

    python scripts/environment_scores.py                 # every environment, as published
    python scripts/environment_scores.py --env-id BiScale/Decode-v0 --seeds 5 --episode-s 60

Every agent plays the same episodes: seed n resets with ``seed=n`` and the split's trace n. Joules are over those of the
highest clock on the same episode; every figure is the mean over seeds with Student's 95 % interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import tyro

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.policies import ControllerPolicy, HighestClock, PlannerPolicy
from biscale_gym.evaluation.statistics import Floats, mean_interval

IDS = ("BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0", "BiScale/Placement-v0")
ENERGY = {
    "BiScale/Prefill-v0": "prefill_energy_j",
    "BiScale/Decode-v0": "decode_energy_j",
    "BiScale/Cluster-v0": "total_energy_j",
    "BiScale/Placement-v0": "total_energy_j",
}
ATTAINMENT = {"BiScale/Prefill-v0": "ttft_attainment", "BiScale/Decode-v0": "tpot_attainment"}
"""Of environments of one phase; of the others it is that of both SLOs."""

Agent = Any
Made = tuple[gymnasium.Env[Any, Any], Agent]


class RandomAction:
    """A uniformly random action, of those allowed where there are masks."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self._env = env

    def predict(self, observation: Any = None) -> tuple[Any, None]:
        """An action of the environment's action space, which the caller seeds."""
        masks = getattr(self._env.unwrapped, "action_masks", None)
        space: Any = self._env.action_space
        return (space.sample() if masks is None else space.sample(mask=masks().astype(np.int8))), None


class LowestClock:
    """Every clock at the bottom of the environment's list."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self._answer = np.zeros(env.action_space.shape or (), dtype=np.int64)

    def predict(self, observation: Any = None) -> tuple[Any, None]:
        """Action 0 for every slot."""
        return self._answer, None


def clock_agents(env_id: str, scenario: str, episode_s: float | None) -> dict[str, Callable[[], Made]]:
    """Agents of an environment whose actions are clocks; the first is what the others are held against."""

    def made(agent: Callable[[Any], Agent], **settings: Any) -> Made:
        env = gymnasium.make(env_id, scenario=scenario, episode_s=episode_s, **settings)
        return env, agent(env)

    def biscale() -> Made:
        env, agent = made(lambda env: ControllerPolicy("biscale", env))
        if env_id == "BiScale/Cluster-v0":
            return env, agent
        points = agent.prefill_points if env_id == "BiScale/Prefill-v0" else agent.decode_points
        return made(lambda env: ControllerPolicy("biscale", env), decision_points=points)

    return {
        "highest clock": lambda: made(HighestClock),
        "BiScale": biscale,
        "lowest clock": lambda: made(LowestClock),
        "random clocks": lambda: made(RandomAction),
    }


def placement_agents(scenario: str, episode_s: float | None) -> dict[str, Callable[[], Made]]:
    """Planners of Placement-v0. The card ends where the grid does, so that DistServe's instances are classes."""
    overrides = {"top_clock_mhz": max(load_scenario(scenario).clocks_mhz)}

    def made(planner: str | None, clocks: str) -> Made:
        env = gymnasium.make(
            "BiScale/Placement-v0", scenario=scenario, episode_s=episode_s, clocks=clocks, overrides=overrides
        )
        return env, RandomAction(env) if planner is None else PlannerPolicy(planner, env)

    return {
        "DistServe, highest clock": lambda: made("distserve", "hold"),
        "DistServe, BiScale's clocks": lambda: made("distserve", "biscale"),
        "BiScale, base clocks held": lambda: made("biscale", "hold"),
        "BiScale": lambda: made("biscale", "biscale"),
        "random (allowed) actions": lambda: made(None, "biscale"),
    }


def agents(env_id: str, scenario: str, episode_s: float | None) -> dict[str, Callable[[], Made]]:
    """Reference agents of an environment, by name."""
    if env_id == "BiScale/Placement-v0":
        return placement_agents(scenario, episode_s)
    return clock_agents(env_id, scenario, episode_s)


def play(env: gymnasium.Env[Any, Any], agent: Agent, seed: int, split: str) -> tuple[dict[str, float], float]:
    """The figures of one episode, and the sum of its rewards."""
    observation, _ = env.reset(seed=seed, options={"split": split, "trace_seed": seed})
    env.action_space.seed(seed)
    total, over = 0.0, False
    info: dict[str, Any] = {}
    while not over:
        observation, reward, _, over, info = env.step(agent.predict(observation)[0])
        total += float(reward)
    return info["episode_metrics"], total


def shown(values: Floats, form: str) -> str:
    """Mean and half the width of its interval."""
    interval = mean_interval(values)
    return f"{interval.value:{form}} ± {interval.high - interval.value:{form}}".replace("-", "−")


def scores(env_id: str, scenario: str, split: str, seeds: int, episode_s: float | None) -> list[str]:
    """The rows of an environment's table: agent, energy against the first agent's, attainment, return."""
    rows, reference = [], np.ones(seeds)
    for number, (name, make) in enumerate(agents(env_id, scenario, episode_s).items()):
        env, agent = make()
        played = [play(env, agent, seed, split) for seed in range(seeds)]
        energy_j = np.array([metrics[ENERGY[env_id]] for metrics, _ in played])
        reference = reference if number else energy_j
        kept = np.array([metrics[ATTAINMENT.get(env_id, "joint_attainment")] for metrics, _ in played])
        returns = np.array([total for _, total in played])
        ratio = f"{shown(100.0 * energy_j / reference, '.2f')} %" if number else "100 %"
        rows.append(f"| {name} | {ratio} | {shown(100.0 * kept, '.2f')} % | {shown(returns, ',.2f')} |")
    return rows


def main(
    env_id: str = ",".join(IDS),
    scenario: str = "paper-67",
    split: str = "test",
    seeds: int = 10,
    episode_s: float | None = None,
) -> None:
    """Print a Markdown table per environment.

    Args:
        env_id: environments, separated by commas.
        scenario: preset or path.
        split: of the workload: validation or test.
        seeds: how many episodes, 0, 1, ...
        episode_s: length of an episode; None: the scenario's.
    """
    for one in env_id.split(","):
        print(f"\n{one}\n\n| agent | energy | within the SLO | return |\n|---|--:|--:|--:|", flush=True)
        for row in scores(one, scenario, split, seeds, episode_s):
            print(row, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
