"""First steps: make an environment, look at it, play it with a fixed clock and with BiScale's controller."""

# %% [markdown]
# # First steps
#
# Run the cells in Jupyter or VS Code, or the file as a script: `python notebooks/01_first_steps.py`.
# The first run compiles the model, which takes a minute or two; after that, seconds.

# %%
from typing import Any

import gymnasium

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.envs.policies import ControllerPolicy, HighestClock

# %% [markdown]
# One prefill instance under a light load. A step is one batch (or a wait for the next prompt), an action the index of
# the clock for it.

# %%
env = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", episode_s=20.0)
observation, info = env.reset(seed=0)
print("clocks [MHz]:", env.unwrapped.setting.scenario.clocks_mhz)
print("this episode:", {name: info[name] for name in ("split", "trace_seed", "instance", "start_s")})
for name, value in list(zip(env.unwrapped.observation_names, observation, strict=True))[:12]:
    print(f"  {name:18} {value:.3f}")

# %% [markdown]
# A step costs joules; a prompt that waits longer than the SLO costs the penalty. Both are in `info` with their units.

# %%
observation, reward, terminated, truncated, info = env.step(0)
print(f"reward {reward:.4f}: {info['energy_j']:.1f} J in {info['dt_s']:.3f} s, {info['violations']:.0f} late")


# %% [markdown]
# Any agent with `predict` plays: the fixed clock, BiScale's model predictive control, or a policy of
# Stable-Baselines3. Episodes end by truncation alone, with their figures in `info["episode_metrics"]`.


# %%
def play(agent: Any, seed: int) -> dict[str, float]:
    """The figures of one episode of the validation split."""
    observation, _ = env.reset(seed=seed, options={"split": "validation", "trace_seed": seed})
    truncated = False
    while not truncated:
        observation, _, _, truncated, info = env.step(agent.predict(observation)[0])
    return info["episode_metrics"]


played = {agent.name: play(agent, seed=0) for agent in (HighestClock(env), ControllerPolicy("biscale", env))}
for name, figures in played.items():
    print(f"{name:14} {figures['prefill_energy_j']:7.0f} J, {100 * figures['ttft_attainment']:.1f} % within the SLO")
