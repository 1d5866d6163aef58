"""Behaviour cloning: before training, a policy learns what a controller does in the training episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm

from biscale_gym.envs.policies import ControllerPolicy, PlannerPolicy, setting_of
from biscale_gym.sb3 import GymnasiumVecEnv
from biscale_gym.training.algorithms import find_algorithm
from biscale_gym.training.environments import LanesVecEnv
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings, WarmStartSettings

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rollout:
    """What a controller did; T steps of N lanes.

    Attributes:
        observations: float32[T, N, size].
        actions: [T, N] or [T, N, slots], as the policy has them.
        masks: bool[T, N, actions] of what was allowed; None where everything is.
        rewards, discounts: float32[T, N].
        ended: bool[T, N], an episode's last step.
    """

    observations: Floats
    actions: NDArray[Any]
    masks: NDArray[np.bool_] | None
    rewards: Floats
    discounts: Floats
    ended: NDArray[np.bool_]

    def returns(self) -> Floats:
        """Discounted sums of rewards: float32[T, N]; behind a lane's end as much as the rollout's mean per step."""
        mean_discount = float(self.discounts.mean())
        beyond = float(self.rewards.mean()) / (1.0 - mean_discount)
        found = np.empty_like(self.rewards)
        coming = np.full(self.rewards.shape[1], beyond, np.float32)
        for step in reversed(range(len(self.rewards))):
            coming = np.where(self.ended[step], np.float32(beyond), coming)
            coming = self.rewards[step] + self.discounts[step] * coming
            found[step] = coming
        return found


def _teacher(settings: TrainingSettings, part: GymnasiumVecEnv, controller: str) -> Callable[[Any], NDArray[Any]]:
    """From observations of the part's lanes to the controller's actions, in the form of the wrapped action space."""
    if isinstance(part.envs, SyncVectorEnv):
        planners = [PlannerPolicy(controller, env) for env in part.envs.envs]
        return lambda observations: np.array([one.predict(observations[0])[0] for one in planners])
    names = [wrapper.name for wrapper in settings.wrappers]
    if "ClockDeltas" in names:
        raise TrainingError(
            "warm_start: a controller says clocks, not steps up and down; remove the wrapper ClockDeltas"
        )
    agent = ControllerPolicy(controller, part)
    if "ContinuousClocks" not in names:
        return lambda observations: agent.predict(observations)[0]
    clocks = np.array(setting_of(part).scenario.clocks_mhz, dtype=np.float64)
    numbers = (2.0 * (clocks - clocks[0]) / (clocks[-1] - clocks[0]) - 1.0).astype(np.float32)
    return lambda observations: numbers[agent.predict(observations)[0]].reshape(len(observations), -1)


def rollout(settings: TrainingSettings, lanes: LanesVecEnv, warm: WarmStartSettings, gamma: float) -> Rollout:
    """Let the controller play the run's own lanes.

    Raises:
        TrainingError: the wrappers' actions are not clocks.
        ControllerError, EnvironmentUsageError: no such controller, or it answers what is no action.
    """
    teachers = [_teacher(settings, part, warm.controller) for part in lanes.parts]
    masked = find_algorithm(settings.algorithm).masked
    steps = -(-warm.steps // lanes.num_envs)
    observation = lanes.reset()
    rows: list[tuple[Any, ...]] = []
    for _ in range(steps):
        masks = np.stack(lanes.env_method("action_masks")) if masked else np.zeros(0)
        shares = zip(teachers, lanes.starts[:-1], lanes.starts[1:], strict=True)
        action = np.concatenate([teacher(observation[start:stop]) for teacher, start, stop in shares])
        following, rewards, ended, _ = lanes.step(action)
        discounts = lanes.discounts if settings.discount == "time" else np.full(lanes.num_envs, gamma)
        rows.append((observation, action, masks, rewards, discounts.astype(np.float32), ended))
        observation = following
    observations, actions, allowed, rewards_, discounts_, ended_ = (
        np.stack(column) for column in zip(*rows, strict=True)
    )
    return Rollout(observations, actions, allowed if masked else None, rewards_, discounts_, ended_)


def clone(settings: TrainingSettings, model: BaseAlgorithm, lanes: LanesVecEnv) -> dict[str, float]:
    """Teach ``model.policy`` the controller's actions, and its value function their returns.

    Returns:
        ``agreement``: share of decisions that the cloned policy takes as the controller; ``loss``: of the last epoch.

    Raises:
        TrainingError: the algorithm's policy cannot be cloned so.
    """
    warm = settings.warm_start
    assert warm is not None
    algorithm = find_algorithm(settings.algorithm)
    if not algorithm.on_policy or algorithm.recurrent:
        raise TrainingError(f"warm_start is for ppo and maskable-ppo, algorithm is {settings.algorithm}; remove it")
    policy: Any = model.policy
    played = rollout(settings, lanes, warm, float(getattr(model, "gamma", 1.0)))
    flat = {
        "observations": torch.as_tensor(played.observations.reshape(-1, played.observations.shape[-1])),
        "actions": torch.as_tensor(played.actions.reshape(-1, *played.actions.shape[2:])),
    }
    if played.masks is not None:
        flat["masks"] = torch.as_tensor(played.masks.reshape(-1, played.masks.shape[-1]))
    with_values = warm.value_weight > 0.0 and float(played.discounts.mean()) < 1.0
    if with_values:
        flat["returns"] = torch.as_tensor(played.returns().reshape(-1))
    optimiser = torch.optim.Adam(policy.parameters(), lr=warm.learning_rate)
    draws = np.random.default_rng(settings.seed)
    count = len(flat["observations"])
    # Errors of a value function that says 0 count as 1.
    scale = float(flat["returns"].square().mean().sqrt()) + 1e-8 if with_values else 1.0
    policy.set_training_mode(True)
    mean_loss = 0.0
    for _ in range(warm.epochs):
        losses = []
        order = draws.permutation(count)
        for first in range(0, count, warm.batch_size):
            batch = {name: values[order[first : first + warm.batch_size]] for name, values in flat.items()}
            masks = {"action_masks": batch["masks"]} if "masks" in batch else {}
            values, log_probability, _ = policy.evaluate_actions(batch["observations"], batch["actions"], **masks)
            loss = -log_probability.mean()
            if with_values:
                error = (values.flatten() - batch["returns"]) / scale
                loss = loss + warm.value_weight * (error**2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        mean_loss = float(np.mean(losses))
    policy.set_training_mode(False)
    return {"agreement": _agreement(policy, flat), "loss": mean_loss}


def _agreement(policy: Any, flat: dict[str, Any]) -> float:
    """Share of numbers of the actions that the policy's most likely action has as the controller's."""
    same, count = 0.0, 0
    for first in range(0, len(flat["observations"]), 8192):
        part = slice(first, first + 8192)
        masks = {"action_masks": flat["masks"][part]} if "masks" in flat else {}
        with torch.no_grad():
            found = policy._predict(flat["observations"][part], deterministic=True, **masks)
        wanted = flat["actions"][part]
        alike = (found == wanted) if not found.is_floating_point() else (found - wanted).abs() < 0.1
        same += float(alike.float().sum())
        count += alike.numel()
    return same / count
