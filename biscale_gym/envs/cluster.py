"""``BiScale/Cluster-v0``: the whole cluster, a clock for every instance at every control interval."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from biscale_gym.cluster.engine import BAD_ANSWER, DECISION
from biscale_gym.cluster.placement import PHASES, Placement
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import Controller, make_controller
from biscale_gym.envs import cluster_lanes as lanes
from biscale_gym.envs import cluster_layout as layout
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.instance import InstanceSetting
from biscale_gym.envs.lanes import REWARD
from biscale_gym.envs.setting import Setting
from biscale_gym.envs.settings import ClusterEnvSettings
from biscale_gym.envs.single import SingleEnv
from biscale_gym.envs.vector import NativeVectorEnv
from biscale_gym.envs.windows import WindowDemand
from biscale_gym.profiles import Profile


class ClusterSetting(Setting):
    """A cluster under the scenario's placement; instances take the slots of their phase in order."""

    env_id = "BiScale/Cluster-v0"
    settings_type = ClusterEnvSettings
    lane_dtype = lanes.CLUSTER_LANE
    terms = lanes.CLUSTER_TERMS
    reward_column = REWARD
    term_columns: ClassVar[dict[str, int]] = {
        **InstanceSetting.term_columns,
        "prefill_energy_j": lanes.PREFILL_J,
        "decode_energy_j": lanes.DECODE_J,
        "unallocated_energy_j": lanes.UNALLOCATED_J,
    }

    def __init__(self, scenario: str, settings: dict[str, Any]) -> None:
        super().__init__(scenario, settings)
        self._check_slots(self.placement)
        self._planner: Controller | None = None
        if self.settings.planner is not None:
            steps = self.scenario.window_s / self.settings.interval_s
            if not math.isclose(steps, round(steps), rel_tol=1e-9):
                raise ConfigError(
                    f"environment {self.env_id}: interval_s ({self.settings.interval_s:g}) does not divide the "
                    f"scenario's window_s ({self.scenario.window_s:g}): {self.settings.planner!r} plans at its borders"
                )
            self._planner = make_controller(self.settings.planner)
        low, high = layout.bounds()
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_names = layout.names()
        self.action_space = spaces.MultiDiscrete(np.full(layout.SLOTS, len(self.grid)))

    def _check_slots(self, placement: Placement) -> None:
        for phase in PHASES:
            count = sum(spec.pp for spec in placement.of(phase))
            if count > layout.SLOTS_PER_PHASE:
                raise ConfigError(
                    f"environment {self.env_id}: a placement of scenario {self.scenario_name!r} has {count} {phase} "
                    f"instances, there are slots for {layout.SLOTS_PER_PHASE} ({placement.describe()})"
                )

    def _demand(self, episode: Episode) -> WindowDemand:
        rate_rps = (self.settings.rate_rps or self.scenario.rate_rps) * episode.load
        if self.settings.trace is not None:
            rate_rps = episode.requests.rate_rps
        training = self.source.training()
        return WindowDemand(self.scenario, self.profile, training, self.clocks_mhz, episode, rate_rps)

    def placement_of(self, episode: Episode) -> Placement:
        """The planner's for the operator's estimate of the rate; without a planner the one frozen in the scenario."""
        if self._planner is None:
            return self.placement
        placement = self._planner.plan(self._demand(episode).context(0, None))
        self._check_slots(placement)
        return placement

    @property
    def replans(self) -> bool:
        """Whether a planner plans every window anew."""
        return self._planner is not None and self._planner.replans

    def turn(
        self, simulator: Simulator, episode: Episode, placement: Placement, lane: NDArray[Any], obs: Any
    ) -> Placement:
        """The planner's placement for the window that begins now, if one does."""
        if not self.replans or simulator.now_s < lane[0]["border_s"]:
            return placement
        assert self._planner is not None
        window = round(float(lane[0]["border_s"]) / self.scenario.window_s)
        planned = self._planner.plan(self._demand(episode).context(window, placement))
        self._check_slots(planned)
        if planned != placement:
            simulator.reconfigure(planned)
        lane["border_s"] = (window + 1) * self.scenario.window_s
        lanes.turn_cluster(simulator.handle(), lane, self.params, obs)
        return planned

    def _new_simulator(self, episode: Episode, placement: Placement, predicted: Profile | None) -> Simulator:
        return Simulator(
            self.scenario.cluster,
            episode.profile,
            placement,
            episode.requests,
            self.clocks_mhz,
            self.scenario.slo,
            episode.cluster_seed,
            predicted=predicted,
            switching=episode.switching,
        )

    def _subscribe(self, simulator: Simulator) -> None:
        """Nobody is asked at decision points: the action sets clocks between steps."""
        simulator.set_policies(None, PhasePolicy(slack=True), only_when_told=True)

    def _open(self, lane: NDArray[Any], simulator: Simulator) -> None:
        lane["start_s"] = simulator.now_s
        lane["interval_s"] = self.settings.interval_s
        lane["steps"] = 0
        windows = math.floor(simulator.now_s / self.scenario.window_s) + 1
        lane["border_s"] = windows * self.scenario.window_s if self.replans else np.inf
        lane["reference_w"] = self.settings.reference_w_per_gpu * self.scenario.cluster.gpus
        for name in ("prefill_j", "decode_j", "unallocated_j", "violations", "completed"):
            lane[name] = 0
        lane["memory"] = 0.0

    def first(self, handle: Any, lane: Any, obs: Any, terms: Any) -> int:
        """The first observation; no time passes."""
        lanes.begin_cluster(handle, lane, self.params, obs, terms)
        return DECISION

    def step(self, handle: Any, lane: Any, action: Any, obs: Any, terms: Any) -> int:
        """One control interval."""
        clocks = np.ascontiguousarray(action, dtype=np.int64)
        if clocks.shape != self.action_shape:
            return BAD_ANSWER
        return int(lanes.step_cluster(handle, lane, self.params, clocks, obs, terms))

    def step_all(self, parallel: bool, handles: Any, lanes_: Any, actions: Any, obs: Any, terms: Any, out: Any) -> int:
        """``step`` for every row."""
        run = lanes.step_clusters_in_parallel if parallel else lanes.step_clusters
        return int(run(handles, lanes_, self.params, actions, obs, terms, out))


class ClusterEnv(SingleEnv):
    """``BiScale/Cluster-v0``: a step is a control interval."""

    setting_type = ClusterSetting


class ClusterVectorEnv(NativeVectorEnv):
    """``BiScale/Cluster-v0``, many at once."""

    setting_type = ClusterSetting
