"""One environment at a time, of any setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.engine import BAD_ANSWER, DECISION
from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.errors import EnvironmentUsageError, no_render_mode, refused_action
from biscale_gym.envs.setting import Setting
from biscale_gym.envs.snapshots import Snapshots

if TYPE_CHECKING:
    from biscale_gym.envs.rendering import Renderer

Observation = NDArray[np.float32]


class SingleEnv(Snapshots, gymnasium.Env[Observation, Any]):
    """A modelled cluster, or one instance of it, that serves a scenario's workload.

    Observation: float32 vector of fixed scales. Action: indices into the scenario's clocks. Reward:
    ``biscale_gym.envs.settings.RewardSettings``; its terms are in ``info``, with units, and ``info["cost"]`` is the
    number of SLO violations. An episode ends by truncation alone, with its figures in ``info["episode_metrics"]``.

    Args:
        scenario: preset or path.
        render_mode: one of ``metadata["render_modes"]``, or None.
        settings: values of the setting's ``settings_type``; ``overrides`` replaces scenario settings, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, a wrong value, or a scenario without a placement.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as Gymnasium declares it
        "render_modes": ["human", "rgb_array", "ansi"],
        "render_fps": 10,
    }
    setting_type: ClassVar[type[Setting]]
    _changing = ("episode", "placement", "_start", "_lane", "_obs", "_terms", "_over")

    def __init__(self, scenario: str = "paper-67", render_mode: str | None = None, **settings: Any) -> None:
        self.setting = self.setting_type(scenario, settings)
        self.render_mode = render_mode
        self.observation_space = self.setting.observation_space
        self.action_space = self.setting.action_space
        self.episode: Episode | None = None
        self.placement: Placement | None = None
        self._simulator: Simulator | None = None
        self._start: InstanceLedger | None = None
        self._lane = np.zeros(1, self.setting.lane_dtype)
        self._obs: Observation = np.zeros(self.setting.observation_shape, np.float32)
        self._terms = np.zeros(self.setting.terms)
        self._over = True
        self._renderer: Renderer | None = None
        if render_mode is not None:
            from biscale_gym.envs.rendering import Renderer  # here: nobody else waits for what it imports

            self._renderer = Renderer(render_mode, self.metadata)

    @property
    def simulator(self) -> Simulator:
        """The model behind the environment.

        Raises:
            EnvironmentUsageError: before the first reset.
        """
        if self._simulator is None:
            raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
        return self._simulator

    def slots_of(self, lane: int = 0) -> NDArray[np.int64]:
        """The instance in each slot of a cluster environment: int64[SLOTS], -1: none."""
        slots: NDArray[np.int64] = self._lane[0]["slots"].copy()
        return slots

    @property
    def observation_names(self) -> list[str]:
        """A name for every number of the observation, e.g. ``tokens[3]``."""
        return self.setting.observation_names

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of everything random from now on.
            options: see ``biscale_gym.envs.episodes.OPTIONS``: to be taken instead of drawn; ``episode.info`` as the
                options plays that episode again.

        Raises:
            ConfigError, TraceError: an unknown option, or an episode that cannot be.
        """
        super().reset(seed=seed)
        self.episode = self.setting.source.draw(self.np_random, options)
        self.placement = self.setting.placement_of(self.episode)
        self._simulator = self.setting.simulator(self.episode, self.placement)
        self._start = self.setting.begin(self._lane, self._simulator, self.episode)
        self.setting.first(self._simulator.handle(), self._lane, self._obs, self._terms)
        # An episode without a single decision is still one step long, so that it can be told to be over.
        self._over = False
        if self._renderer is not None:
            self._renderer.begin(self._simulator)
        return self._obs.copy(), {**self.episode.info, **self.setting.info(self._terms)}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Set clocks, and go on to the next decision.

        Raises:
            EnvironmentUsageError: the episode is over, or the action is no index of a clock.
        """
        if self._over:
            raise EnvironmentUsageError("the episode is over (or was never begun): call reset() first")
        reached = self.setting.step(self.simulator.handle(), self._lane, action, self._obs, self._terms)
        if reached == BAD_ANSWER:
            raise refused_action(action, self.setting.scenario.clocks_mhz)
        self._over = reached != DECISION
        info = self.setting.info(self._terms)
        if self._over:
            assert self.episode is not None
            assert self._start is not None
            info["episode_metrics"] = self.setting.metrics(self.simulator, self.episode, self._start)
        elif self.setting.replans:
            assert self.episode is not None
            assert self.placement is not None
            self.placement = self.setting.turn(self.simulator, self.episode, self.placement, self._lane, self._obs)
        if self._renderer is not None:
            self._renderer.sample(self.simulator)
        return self._obs.copy(), float(self._terms[self.setting.reward_column]), False, self._over, info

    def render(self) -> Any:
        """What the last seconds looked like.

        Returns:
            uint8[height, width, 3] (``rgb_array``), a line of text per instance (``ansi``), or None: the picture is in
            a window (``human``), which every step and reset draws anyway.

        Raises:
            EnvironmentUsageError: made without a render mode, or not reset yet.
            DependencyNotInstalled: what draws is missing; the message names the extra.
        """
        if self._renderer is None:
            raise no_render_mode(self.metadata)
        return self._renderer.render(self.simulator)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._renderer is not None:
            self._renderer.close()
