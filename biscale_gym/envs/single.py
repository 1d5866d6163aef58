"""``BiScale/Prefill-v0`` and ``BiScale/Decode-v0``: one instance, a clock at every decision."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsInt

import gymnasium
import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.engine import BAD_ANSWER, DECISION
from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import Phase
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.envs import lanes
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.errors import EnvironmentUsageError, refused_action
from biscale_gym.envs.instance import InstanceSetting
from biscale_gym.envs.lanes import step_lane

Observation = NDArray[np.float32]
NO_ACTION = 0


def terms_info(terms: NDArray[np.float64]) -> dict[str, float]:
    """The terms of a step by name, with units."""
    energy_j, violations, completed, dt_s, now_s, _, discount = terms.tolist()
    return {
        "energy_j": energy_j,
        "violations": violations,
        "cost": violations,
        "completed": completed,
        "dt_s": dt_s,
        "now_s": now_s,
        "discount": discount,
    }


class InstanceEnv(gymnasium.Env[Observation, SupportsInt]):
    """One instance that serves its routed share of a scenario's workload; a step lasts until the next decision.

    Observation: float32 vector of fixed scales (``biscale_gym.envs.layout``). Action: index into the scenario's clocks.
    Reward: ``biscale_gym.envs.settings.RewardSettings``; its terms are in ``info``, with units, and ``info["cost"]`` is
    the number of SLO violations. An episode ends by truncation alone, with its figures in ``info["episode_metrics"]``.

    Args:
        scenario: preset or path.
        render_mode: one of ``metadata["render_modes"]``, or None.
        settings: values of ``InstanceEnvSettings``; ``overrides`` replaces scenario settings, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, a wrong value, or a scenario without a placement.
    """

    metadata: dict[str, Any] = {"render_modes": [], "render_fps": 10}  # noqa: RUF012 - as Gymnasium declares it
    phase: ClassVar[Phase]

    def __init__(self, scenario: str = "paper-67", render_mode: str | None = None, **settings: Any) -> None:
        self.setting = InstanceSetting(self.phase, scenario, settings)
        self.render_mode = render_mode
        self.observation_space = self.setting.observation_space
        self.action_space = self.setting.action_space
        self.episode: Episode | None = None
        self._simulator: Simulator | None = None
        self._start: InstanceLedger | None = None
        self._lane = np.zeros(1, lanes.LANE)
        self._obs = np.zeros(self.setting.observation_space.shape, np.float32)
        self._terms = np.zeros(lanes.TERMS)
        self._over = True

    @property
    def simulator(self) -> Simulator:
        """The modelled instance.

        Raises:
            EnvironmentUsageError: before the first reset.
        """
        if self._simulator is None:
            raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
        return self._simulator

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of everything random from now on.
            options: ``split``, ``trace_seed``, ``load``, ``instance``, ``start_s`` to be taken instead of drawn.

        Raises:
            ConfigError, TraceError: an unknown option, or an episode that cannot be.
        """
        super().reset(seed=seed)
        self.episode = self.setting.source.draw(self.np_random, options)
        self._simulator = self.setting.simulator(self.episode)
        self._start = self.setting.begin(self._lane, self._simulator, self.episode)
        self._advance(NO_ACTION)
        return self._obs.copy(), {**self.episode.info, **terms_info(self._terms)}

    def _advance(self, action: int) -> bool:
        """Step the lane; returns whether the episode goes on."""
        simulator = self.simulator
        reached = step_lane(simulator.handle(), self._lane, self.setting.params, action, self._obs, self._terms)
        if reached == BAD_ANSWER:
            raise refused_action(action, self.setting.scenario.clocks_mhz)
        self._over = reached != DECISION
        return not self._over

    def step(self, action: SupportsInt) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Set the clock, and go on to the next decision.

        Raises:
            EnvironmentUsageError: the episode is over, or the action is no index of a clock.
        """
        if self._over:
            raise EnvironmentUsageError("the episode is over (or was never begun): call reset() first")
        goes_on = self._advance(int(action))
        info: dict[str, Any] = terms_info(self._terms)
        if not goes_on:
            assert self.episode is not None
            assert self._start is not None
            info["episode_metrics"] = self.setting.metrics(self.simulator, self.episode, self._start)
        return self._obs.copy(), float(self._terms[lanes.REWARD]), False, not goes_on, info


class PrefillEnv(InstanceEnv):
    """``BiScale/Prefill-v0``: a step is one prefill batch, or a wait for the next prompt."""

    phase = "prefill"


class DecodeEnv(InstanceEnv):
    """``BiScale/Decode-v0``: a step is one decode iteration, or a wait for the next request."""

    phase = "decode"
