"""Train a clock policy with PPO, and hold it against the highest clock and BiScale on episodes it has not seen."""

# %% [markdown]
# # Train a clock policy
#
# Needs Stable-Baselines3 (`pip install 'biscale-gym[train]'`). The training here takes seconds and is far too short for
# a good policy; docs/rl-tips.md says what to enlarge.

# %%
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import PPO

from biscale_gym.envs.policies import ControllerPolicy, HighestClock
from biscale_gym.sb3 import make_vec_env

SETTINGS: dict[str, Any] = {"scenario": "smoke", "episode_s": 20.0}

# %% [markdown]
# Eight lanes that one compiled call steps. Observations are scaled already, so nothing normalises them.

# %%
envs = make_vec_env("BiScale/Prefill-v0", 8, seed=0, load=(0.5, 1.0), **SETTINGS)
model = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, n_epochs=4, gamma=0.99, seed=0, device="cpu")
model.learn(4_096)

# %% [markdown]
# The reward is what PPO climbs, not what counts. What counts is joules at the SLO kept, on a split that training did
# not see: `validation` while you choose, `test` once.


# %%
def evaluate(agent: Any, env: gymnasium.Env[Any, Any], seeds: range) -> tuple[float, float]:
    """Mean joules and mean share within the SLO over episodes of the validation split."""
    energy_j, kept = [], []
    for seed in seeds:
        observation, _ = env.reset(seed=seed, options={"split": "validation", "trace_seed": seed})
        truncated = False
        while not truncated:
            action, _ = agent.predict(observation, deterministic=True)
            observation, _, _, truncated, info = env.step(action)
        energy_j.append(info["episode_metrics"]["prefill_energy_j"])
        kept.append(info["episode_metrics"]["ttft_attainment"])
    return float(np.mean(energy_j)), float(np.mean(kept))


env = gymnasium.make("BiScale/Prefill-v0", **SETTINGS)
agents = {"highest clock": HighestClock(env), "BiScale": ControllerPolicy("biscale", env), "PPO": model}
results = {name: evaluate(agent, env, range(3)) for name, agent in agents.items()}
for name, (joules, within) in results.items():
    print(f"{name:14} {joules:7.0f} J, {100 * within:.1f} % within the SLO")
