"""The same wrappers around the native vector environments, under the same names.

``FrameSkip`` is not among them: lanes end at different decisions, and what ends within a step begins anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorActionWrapper, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers import actions, rewards, steps
from biscale_gym.envs.wrappers.native import native, with_own_observations

Batch = NDArray[Any]
Stepped = tuple[Any, Any, Any, Any, dict[str, Any]]


def _same_step(env: Any, wrapper: str) -> None:
    """Refuse environments whose lanes do not begin anew within the step that ends them."""
    if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise EnvironmentUsageError(
            f"{wrapper} keeps something per lane and follows lanes that begin anew within a step "
            f"(AutoresetMode.SAME_STEP), not {env.metadata.get('autoreset_mode')}"
        )


def _begun(options: dict[str, Any] | None, lanes: int) -> NDArray[np.bool_]:
    """The lanes that a reset begins anew."""
    if options is None or "reset_mask" not in options:
        return np.ones(lanes, np.bool_)
    return np.asarray(options["reset_mask"], np.bool_)


def _ended_with(observations: Batch, infos: dict[str, Any]) -> tuple[Batch, NDArray[np.bool_]]:
    """(what each lane came to, before those that ended began anew; which ended)."""
    ended = infos.get("_final_obs")
    if ended is None:
        return observations, np.zeros(len(observations), np.bool_)
    reached = observations.copy()
    for lane in np.flatnonzero(ended):
        reached[lane] = infos["final_obs"][lane]
    return reached, ended


class ContinuousClocks(VectorActionWrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.ContinuousClocks`` in every lane: actions float[N, S]."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._native = native(env, type(self).__name__)
        self.single_action_space = actions.continuous_space(self._native)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def actions(self, actions_: Any) -> NDArray[np.int64]:
        """From float[N, S] to the environment's own actions."""
        clocks = actions.nearest_clocks(self._native, actions_).reshape(self.num_envs, self._native.slots)
        return clocks if self._native.per_slot else clocks[:, 0]


class ClockDeltas(VectorWrapper[Any, Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.ClockDeltas`` in every lane: actions int[N], or int[N, S]."""

    keeps = ("_last",)
    """What ``envs.saved`` keeps of it."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._native = with_own_observations(env, env.single_observation_space, type(self).__name__)
        _same_step(env, type(self).__name__)
        self.single_action_space = actions.delta_space(self._native)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._last: Batch = np.zeros((self.num_envs, self._native.size), np.float32)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every lane."""
        self._last, infos = self.env.reset(seed=seed, options=options)
        return self._last.copy(), infos

    def step(self, actions_: Any) -> Stepped:
        """Step with 0, 1 or 2 in every lane."""
        chosen = np.asarray(actions_).reshape(self.num_envs, self._native.slots)
        clocks = actions.stepped_clocks(self._native, self._last, chosen)
        taken = clocks if self._native.per_slot else clocks[:, 0]
        self._last, rewards_, terminated, truncated, infos = self.env.step(taken)
        return self._last.copy(), rewards_, terminated, truncated, infos


class History(VectorWrapper[Any, Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.History`` in every lane: observations [N, k x size], ``final_obs`` alike."""

    keeps = ("_rows",)

    def __init__(self, env: VectorEnv[Any, Any, Any], k: int) -> None:
        RecordConstructorArgs.__init__(self, k=k)
        super().__init__(env)
        self.k = steps.at_least_one("History: k", k)
        _same_step(env, type(self).__name__)
        self.single_observation_space = steps.stacked_space(env.single_observation_space, self.k)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        size = self.single_observation_space.low.size // self.k
        self._rows: Batch = np.zeros((self.num_envs, self.k, size), self.single_observation_space.dtype)

    def _stacked(self) -> Batch:
        return self._rows.reshape(self.num_envs, -1).copy()

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every lane, or in those of ``reset_mask``."""
        observations, infos = self.env.reset(seed=seed, options=options)
        begun = _begun(options, self.num_envs)
        self._rows[begun] = observations[begun, None]
        return self._stacked(), infos

    def step(self, actions_: Any) -> Stepped:
        """Step, and put the new observations last."""
        observations, rewards_, terminated, truncated, infos = self.env.step(actions_)
        reached, ended = _ended_with(observations, infos)
        self._rows[:, :-1] = self._rows[:, 1:]
        self._rows[:, -1] = reached
        if ended.any():
            final = self._stacked()
            final[~ended] = 0.0
            infos = {**infos, "final_obs": final}
            self._rows[ended] = observations[ended, None]
        return self._stacked(), rewards_, terminated, truncated, infos


class CostConstrained(VectorWrapper[Any, Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.CostConstrained`` in every lane; ``infos["cost"]`` is float64[N]."""

    replaces_reward = True

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._penalty = rewards.penalty_of_own_reward(env, type(self).__name__)

    def step(self, actions_: Any) -> Stepped:
        """Step; the rewards without their penalties."""
        observations, own, terminated, truncated, infos = self.env.step(actions_)
        return observations, rewards.energy_alone(own, infos, self._penalty), terminated, truncated, infos


class EnergyPerRequest(VectorWrapper[Any, Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.EnergyPerRequest`` in every lane."""

    replaces_reward = True

    def __init__(self, env: VectorEnv[Any, Any, Any], budget_j: float, violation_penalty: float = 1.0) -> None:
        RecordConstructorArgs.__init__(self, budget_j=budget_j, violation_penalty=violation_penalty)
        super().__init__(env)
        rewards.penalty_of_own_reward(env, type(self).__name__)
        self.budget_j = rewards.positive("EnergyPerRequest: budget_j", budget_j)
        self.violation_penalty = rewards.zero_or_more("EnergyPerRequest: violation_penalty", violation_penalty)

    def step(self, actions_: Any) -> Stepped:
        """Step; the rewards from their terms."""
        observations, _, terminated, truncated, infos = self.env.step(actions_)
        paid = rewards.requests_for_energy(infos, self.budget_j, self.violation_penalty)
        return observations, paid, terminated, truncated, infos


class SlackShaping(VectorWrapper[Any, Any, Any, Any, Any], RecordConstructorArgs):
    """``wrappers.SlackShaping`` in every lane; ``infos["shaping"]`` is float64[N]."""

    keeps = ("_potentials",)

    def __init__(self, env: VectorEnv[Any, Any, Any], weight: float = 1.0, gamma: float | None = 0.99) -> None:
        RecordConstructorArgs.__init__(self, weight=weight, gamma=gamma)
        super().__init__(env)
        self._native = with_own_observations(env, env.single_observation_space, type(self).__name__)
        _same_step(env, type(self).__name__)
        self.weight = rewards.zero_or_more("SlackShaping: weight", weight)
        self.gamma = rewards.discount_factor(gamma)
        self._potentials = np.zeros(self.num_envs)

    def potentials(self, observations: Batch) -> NDArray[np.float64]:
        """Phi of every lane's observation: float64[N]."""
        return self.weight * self._native.least_slack(observations)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every lane, or in those of ``reset_mask``."""
        observations, infos = self.env.reset(seed=seed, options=options)
        begun = _begun(options, self.num_envs)
        self._potentials[begun] = self.potentials(observations)[begun]
        return observations, infos

    def step(self, actions_: Any) -> Stepped:
        """Step; rewards and shaping."""
        observations, own, terminated, truncated, infos = self.env.step(actions_)
        reached, _ = _ended_with(observations, infos)
        gamma = infos["discount"] if self.gamma is None else self.gamma
        shaping = gamma * self.potentials(reached) - self._potentials
        self._potentials = self.potentials(observations)
        told = {**infos, "shaping": shaping, "_shaping": np.ones(self.num_envs, np.bool_)}
        return observations, own + shaping, terminated, truncated, told
