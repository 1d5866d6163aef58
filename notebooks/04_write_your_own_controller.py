"""A controller of your own: compiled once, it plays a comparison and every environment alike."""

# %% [markdown]
# # Write your own controller
#
# The rule: run decode at the lowest clock whose predicted iteration takes at most a share of the TPOT SLO. A clock
# policy is a compiled function of the features (docs/policies.md); a controller says which policy each phase has.

# %%
from typing import Any

import gymnasium
import numpy as np

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import Placement, written_placement
from biscale_gym.cluster.policy import policy
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.control.controllers import PlanContext
from biscale_gym.envs.policies import ControllerPolicy, HighestClock
from biscale_gym.profiles.kernels import iteration_latency

SHARE, CLOCKS = 0, 1  # positions in params: the share of the SLO, then the clocks to choose from


@policy
def slowest_in_time(obs: Any, memory: Any, params: Any, model: Any) -> int:
    """The lowest clock at which the coming iteration keeps to its share of the SLO; the highest if none does."""
    limit_s = params[SHARE] * obs[f.SLO_S]
    for position in range(CLOCKS, len(params)):
        clock = int(params[position])
        tokens, sum_sq = obs[f.RECOMPUTE_TOKENS], obs[f.RECOMPUTE_SUM_SQ]
        if iteration_latency(model, clock, obs[f.BATCH], obs[f.BATCH_KV_TOKENS], tokens, sum_sq) <= limit_s:
            return clock
    return int(params[len(params) - 1])


class SlowestInTime:
    """``slowest_in_time`` for decode; prefill clocks stay as they were placed."""

    name = "slowest-in-time"
    replans = False

    def __init__(self, share: float = 0.8) -> None:
        self.share = share

    def plan(self, context: PlanContext) -> Placement:
        """The placement that the scenario has frozen."""
        return written_placement(context.scenario.placement, context.scenario.top_clock_mhz)

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Nothing for prefill, the rule for decode."""
        clocks = [context.clock_index(clock) for clock in sorted(context.scenario.clocks_mhz)]
        return None, PhasePolicy(slowest_in_time, np.array([self.share, *clocks], dtype=np.float64))


# %% [markdown]
# It answers an environment through `predict`, like any agent: here a decode instance, beside the highest clock.

# %%
env = gymnasium.make("BiScale/Decode-v0", scenario="smoke", episode_s=20.0)


def play(env: gymnasium.Env[Any, Any], agent: Any, seed: int) -> dict[str, float]:
    """The figures of one episode of the validation split."""
    observation, _ = env.reset(seed=seed, options={"split": "validation", "trace_seed": seed})
    truncated = False
    while not truncated:
        observation, _, _, truncated, info = env.step(agent.predict(observation)[0])
    return info["episode_metrics"]


agents: dict[str, Any] = {"highest clock": HighestClock(env)}
agents |= {f"{share:.0%} of the SLO": ControllerPolicy(SlowestInTime(share), env) for share in (0.3, 0.8)}
played = {name: play(env, agent, seed=0) for name, agent in agents.items()}
for name, figures in played.items():
    print(f"{name:14} {figures['decode_energy_j']:6.0f} J, {100 * figures['tpot_attainment']:.1f} % within the SLO")

# %% [markdown]
# The same class plays the whole cluster, where prefill instances keep the clocks that they were placed with. In a
# module of your own it also joins a comparison, on placements that its `plan` makes:
# `biscale-gym compare --scenario smoke --controllers distserve,your_module:SlowestInTime`.

# %%
cluster = gymnasium.make("BiScale/Cluster-v0", scenario="smoke", episode_s=20.0)
figures = play(cluster, ControllerPolicy(SlowestInTime(), cluster), seed=0)
print(f"cluster: {figures['total_energy_j']:.0f} J, {100 * figures['joint_attainment']:.1f} % within both SLOs")
