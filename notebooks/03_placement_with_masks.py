"""Place instances with MaskablePPO: actions that do not fit the cluster are masked."""

# %% [markdown]
# # Placement with masks
#
# Needs sb3-contrib (`pip install 'biscale-gym[train]'`). `BiScale/Placement-v0` builds the placement of the next window
# an instance at a time; the last action commits it and plays the window. Making it measures class tables, once; they
# are kept on disk. Worker processes do that and import this file, hence `if __name__ == "__main__"`, which is true in a
# notebook.

# %%
from typing import Any

import gymnasium
from sb3_contrib import MaskablePPO

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.envs.policies import PlannerPolicy

if __name__ == "__main__":
    env = gymnasium.make("BiScale/Placement-v0", scenario="smoke", requests_per_probe=1_000)
    bare: Any = env.unwrapped
    env.reset(seed=0)
    for number, row in enumerate(bare.classes[:4]):
        told = f"{row.phase} TP{row.tp} at {row.clock_mhz} MHz"
        print(f"action {number}: {told}, {row.rate_rps:.1f} requests/s, {row.joules_per_request:.0f} J each")
    print(f"action {bare.commit}: commit; allowed now: {bare.action_masks().sum()} of {bare.action_space.n}")


# %% [markdown]
# Any agent with `predict` plays, masked or not.


# %%
def play(env: gymnasium.Env[Any, Any], agent: Any, masked: bool) -> tuple[float, dict[str, float]]:
    """Return and figures of one episode of the validation split."""
    observation, _ = env.reset(seed=0, options={"split": "validation", "trace_seed": 0})
    bare: Any = env.unwrapped
    total, truncated = 0.0, False
    while not truncated:
        extra = {"action_masks": bare.action_masks()} if masked else {}
        action, _ = agent.predict(observation, deterministic=True, **extra)
        observation, reward, _, truncated, info = env.step(action)
        total += float(reward)
    return total, info["episode_metrics"]


# %% [markdown]
# MaskablePPO asks the environment for its masks. A few hundred steps do not learn to place; they show how it is wired.
# Beside it BiScale's planner, which solves an integer programme at every window.

# %%
if __name__ == "__main__":
    model = MaskablePPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=2, gamma=1.0, seed=0, device="cpu")
    model.learn(128)
    results = {
        "BiScale": play(env, PlannerPolicy("biscale", env), masked=False),
        "MaskablePPO": play(env, model, masked=True),
    }
    for name, (total, figures) in results.items():
        kept = 100.0 * figures["joint_attainment"]
        print(f"{name:12} return {total:6.2f}, {figures['total_energy_j']:8.0f} J, {kept:.1f} % within both SLOs")
