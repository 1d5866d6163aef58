"""Other rewards than the default (``settings.RewardSettings``: - energy - penalty x violations)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.wrappers.native import native, setting_of, with_own_observations
from biscale_gym.envs.wrappers.steps import FrameSkip


def penalty_of_own_reward(env: Any, wrapper: str) -> float:
    """The environment's violation penalty, where its own reward arrives.

    Raises:
        EnvironmentUsageError: a wrapper below has changed the reward, or no environment of this package.
    """
    penalty = float(setting_of(env, wrapper).settings.violation_penalty)
    below = env
    while below is not below.unwrapped:
        changed = isinstance(below, (FrameSkip, gymnasium.RewardWrapper, gymnasium.vector.VectorRewardWrapper))
        if changed or getattr(below, "replaces_reward", False):
            raise EnvironmentUsageError(
                f"{wrapper} starts from the environment's own reward, {type(below).__name__} below it changes that; "
                f"put {wrapper} inside {type(below).__name__}"
            )
        below = below.env
    return penalty


def energy_alone(reward: Any, info: dict[str, Any], penalty: float) -> Any:
    """What is left of the default reward without its penalty."""
    return reward + penalty * info["cost"]


def requests_for_energy(info: dict[str, Any], budget_j: float, penalty: float) -> Any:
    """Completed - joules / budget - penalty x violations."""
    return info["completed"] - info["energy_j"] / budget_j - penalty * info["violations"]


def positive(name: str, value: float) -> float:
    """``value``.

    Raises:
        EnvironmentUsageError: it is not finite and above 0.
    """
    if not np.isfinite(value) or not value > 0.0:
        raise EnvironmentUsageError(f"{name} is {value}, expected a number above 0")
    return float(value)


def zero_or_more(name: str, value: float) -> float:
    """``value``.

    Raises:
        EnvironmentUsageError: it is not finite or negative.
    """
    if not np.isfinite(value) or value < 0.0:
        raise EnvironmentUsageError(f"{name} is {value}, expected 0 or more")
    return float(value)


def discount_factor(value: float | None) -> float | None:
    """``value``.

    Raises:
        EnvironmentUsageError: it is a number outside (0, 1].
    """
    if value is not None and not 0.0 < value <= 1.0:
        raise EnvironmentUsageError(f"SlackShaping: gamma is {value}, expected more than 0 and at most 1, or None")
    return value


class CostConstrained(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The reward is the energy alone; ``info["cost"]``, the SLO violations, is left to a constraint.

    r is the default reward's first term: - joules / (reference power x 1 s) where actions are clocks. For methods with
    a Lagrangian or a safety layer, which read ``info["cost"]`` as Safety-Gymnasium has it; ``SafetySteps`` hands it out
    in its tuple of six.

    Raises:
        EnvironmentUsageError: no environment of this package, or its reward was changed below.
    """

    replaces_reward = True

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._penalty = penalty_of_own_reward(env, type(self).__name__)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step; the reward without its penalty."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(energy_alone(reward, info, self._penalty)), terminated, truncated, info


class EnergyPerRequest(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Requests bought with joules: r = completed - joules / budget_j - violation_penalty x violations.

    At a penalty of 1 a late request does not count as served, and the sum over an episode is above 0 exactly where a
    request served in time costs less than ``budget_j``. Set, again and again, to what the policy found last pays per
    request, the budget comes down to the least that any policy pays (Dinkelbach, "On nonlinear fractional programming",
    Management Science 13, 1967).

    Args:
        env: to wrap.
        budget_j: joules that a completed request may cost.
        violation_penalty: of a request that breaks its SLO, in completed requests.

    Raises:
        EnvironmentUsageError: no environment of clocks, its reward was changed below, or a wrong number.
    """

    replaces_reward = True

    def __init__(self, env: gymnasium.Env[Any, Any], budget_j: float, violation_penalty: float = 1.0) -> None:
        RecordConstructorArgs.__init__(self, budget_j=budget_j, violation_penalty=violation_penalty)
        super().__init__(env)
        native(env, type(self).__name__)
        penalty_of_own_reward(env, type(self).__name__)
        self.budget_j = positive("EnergyPerRequest: budget_j", budget_j)
        self.violation_penalty = zero_or_more("EnergyPerRequest: violation_penalty", violation_penalty)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step; the reward from its terms."""
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = float(requests_for_energy(info, self.budget_j, self.violation_penalty))
        return observation, reward, terminated, truncated, info


class SlackShaping(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Adds gamma x phi(next) - phi(now), with phi = weight x the least SLO slack of any request in the observation.

    Losing slack is told when it happens, not when the request is late. Optimal policies stay what they were (Ng, Harada
    and Russell, "Policy invariance under reward transformations", ICML 1999), if gamma is the learner's and the learner
    bootstraps at truncation: values are those of the environment less phi.

    Args:
        env: to wrap.
        weight: reward per unit of slack (``layout.py``: one TTFT SLO; for decode ten TPOT SLOs).
        gamma: the learner's discount per step; None: it discounts by ``info["discount"]``.

    Raises:
        EnvironmentUsageError: no environment of clocks, observations changed below, or a wrong number.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], weight: float = 1.0, gamma: float | None = 0.99) -> None:
        RecordConstructorArgs.__init__(self, weight=weight, gamma=gamma)
        super().__init__(env)
        self._native = with_own_observations(env, env.observation_space, type(self).__name__)
        self.weight = zero_or_more("SlackShaping: weight", weight)
        self.gamma = discount_factor(gamma)
        self._potential = 0.0

    def potential(self, observation: Any) -> float:
        """Phi of one observation."""
        return self.weight * float(self._native.least_slack(observation))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._potential = self.potential(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step; the reward and the shaping, which is in ``info["shaping"]`` too."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        gamma = info["discount"] if self.gamma is None else self.gamma
        before, self._potential = self._potential, self.potential(observation)
        shaping = gamma * self._potential - before
        return observation, float(reward) + shaping, terminated, truncated, {**info, "shaping": shaping}


class SafetySteps(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Safety-Gymnasium's step of six: observation, reward, cost, terminated, truncated, info.

    The outermost wrapper: nothing of Gymnasium's own goes around it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: Any) -> tuple[Any, float, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        """Step; the cost is ``info["cost"]``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), float(info["cost"]), terminated, truncated, info
