"""What decides how fast Stable-Baselines3's PPO learns: the vector environment, and the size of its batches.

    python scripts/ppo_speed.py

CPU seconds of this process, torch on one thread; compiling, importing and beginning episodes are not in them, nor what
the workers of SubprocVecEnv do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

import biscale_gym
from biscale_gym.sb3 import make_vec_env

VecEnvs = Callable[[], VecEnv]


def imported(env_id: str) -> str:
    """The id with the package to be imported first, for processes that have not."""
    return f"{biscale_gym.__name__}:{env_id}"


def kinds(env_id: str, lanes: int, few: int, settings: dict[str, Any]) -> dict[str, VecEnvs]:
    """Vector environments by name."""

    def sb3(kind: type[DummyVecEnv | SubprocVecEnv]) -> VecEnv:
        return sb3_make_vec_env(imported(env_id), few, seed=0, env_kwargs=settings, vec_env_cls=kind)

    return {
        f"SubprocVecEnv, {few} lanes": lambda: sb3(SubprocVecEnv),
        f"DummyVecEnv, {few} lanes": lambda: sb3(DummyVecEnv),
        f"native, {lanes} lanes": lambda: make_vec_env(env_id, lanes, seed=0, **settings),
    }


def step_us(make: VecEnvs, steps: int) -> float:
    """CPU microseconds of this process for one step of one lane."""
    envs = make()
    envs.reset()
    actions = np.array([envs.action_space.sample() for _ in range(envs.num_envs)])
    start_s = time.process_time()
    for _ in range(steps // envs.num_envs):
        envs.step(actions)
    spent_s = time.process_time() - start_s
    envs.close()
    return 1e6 * spent_s / (steps // envs.num_envs * envs.num_envs)


def learning_rate(make: VecEnvs, steps: int, **settings: Any) -> float:
    """Environment steps per CPU second of PPO, learning included."""
    model = PPO("MlpPolicy", make(), seed=0, device="cpu", **settings)
    model.learn(1)
    start_s = time.process_time()
    model.learn(steps)
    return float(model.num_timesteps / (time.process_time() - start_s))


def main(env_id: str = "BiScale/Prefill-v0", scenario: str = "paper-67", steps: int = 32_768) -> None:
    """Print both tables.

    Args:
        env_id: environment of one instance, or the cluster.
        scenario: preset or path.
        steps: of each measurement, all lanes together; few enough that no episode ends.
    """
    torch.set_num_threads(1)
    made = kinds(env_id, 64, 8, {"scenario": scenario})
    print("\n| vector environment | CPU µs per step of a lane |\n|---|--:|")
    for name, make in made.items():
        print(f"| {name} | {step_us(make, steps):.0f} |", flush=True)
    _, dummy, native = made.values()
    print("\n| PPO | steps per CPU second |\n|---|--:|")
    defaults = "batches of 64, 10 epochs (SB3's defaults)"
    measured = {
        f"DummyVecEnv, 8 lanes, {defaults}": learning_rate(dummy, steps, n_steps=512),
        f"native, 64 lanes, {defaults}": learning_rate(native, steps, n_steps=128),
        "native, 64 lanes, batches of 2,048, 4 epochs": learning_rate(
            native, steps, n_steps=128, batch_size=2048, n_epochs=4
        ),
    }
    for name, rate in measured.items():
        print(f"| {name} | {rate:,.0f} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
