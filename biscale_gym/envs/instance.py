"""``BiScale/Prefill-v0`` and ``BiScale/Decode-v0``: one instance, asked for a clock at every decision point."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from biscale_gym.cluster.placement import Phase, Placement
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import ConfigError
from biscale_gym.envs import lanes, layout
from biscale_gym.envs.episodes import Episode, EpisodeSource
from biscale_gym.envs.setting import Setting
from biscale_gym.envs.settings import InstanceEnvSettings
from biscale_gym.envs.share import routed_share
from biscale_gym.envs.shield import shield_params
from biscale_gym.envs.single import SingleEnv
from biscale_gym.envs.vector import NativeVectorEnv
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

NO_ACTION = 0
_OF_THE_CLUSTER = ("total_", "unallocated_", "joint_", "goodput", "gpus_used", "mean_power_w")


class InstanceSetting(Setting):
    """One instance of a phase, fed with the requests that the scenario's placement routes to it."""

    phase: ClassVar[Phase]
    settings_type = InstanceEnvSettings
    lane_dtype = lanes.LANE
    terms = lanes.TERMS
    reward_column = lanes.REWARD
    term_columns: ClassVar[dict[str, int]] = {
        "energy_j": lanes.ENERGY_J,
        "violations": lanes.VIOLATIONS,
        "cost": lanes.VIOLATIONS,
        "completed": lanes.COMPLETED,
        "dt_s": lanes.DT_S,
        "now_s": lanes.NOW_S,
        "discount": lanes.DISCOUNT,
    }

    def __init__(self, scenario: str, settings: dict[str, Any]) -> None:
        super().__init__(scenario, settings)
        self.params = np.concatenate([self.params, shield_params(self.settings.shield)])
        low, high = layout.bounds(self.phase, len(self.grid))
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_names = layout.names(self.phase, len(self.grid))
        self.action_space = spaces.Discrete(len(self.grid))
        points = self.settings.decision_points
        asked = PhasePolicy(
            on_arrival="arrival" in points, on_overrun="overrun" in points, on_idle="idle" in points, slack=True
        )
        self._policies = (asked, None) if self.phase == "prefill" else (None, asked)

    def _source(self) -> EpisodeSource:
        count, fixed = len(self.placement.of(self.phase)), self.settings.instance
        if fixed is not None and fixed >= count:
            raise ConfigError(
                f"environment {self.env_id}: scenario {self.scenario_name!r} has no {self.phase} instance {fixed}; "
                f"valid: 0 to {count - 1}"
            )
        return EpisodeSource(self.scenario, self.profile, self.settings, self._fed, count, fixed)

    def _fed(self, demand: Trace, instance: int) -> Trace:
        return routed_share(demand, self.placement, self.phase, instance, self.profile)

    def _new_simulator(self, episode: Episode, placement: Placement, predicted: Profile | None) -> Simulator:
        return Simulator(
            self.scenario.cluster,
            episode.profile,
            Placement((placement.of(self.phase)[episode.instance],)),
            episode.requests,
            self.clocks_mhz,
            self.scenario.slo,
            episode.cluster_seed,
            predicted=predicted,
            only=self.phase,
            switching=episode.switching,
        )

    def _subscribe(self, simulator: Simulator) -> None:
        simulator.set_policies(*self._policies)

    def _open(self, lane: NDArray[Any], simulator: Simulator) -> None:
        inst = simulator.state.inst[0]
        lane["decide_every"] = self.settings.decide_every
        lane["reference_w"] = self.settings.reference_w_per_gpu * int(inst["tp"])
        lane["baseline_w"] = self.settings.baseline_w_per_gpu * int(inst["tp"])
        lane["guarded"] = 0
        lane["energy_j"] = lanes.energy_now_j(simulator.state, 0)
        lane["violations"] = inst["late"] + simulator.state.glob[0]["rejected"]
        lane["completed"] = inst["completed"]

    def first(self, handle: Any, lane: Any, obs: Any, terms: Any) -> int:
        """To the first decision."""
        return int(lanes.step_lane(handle, lane, self.params, NO_ACTION, obs, terms))

    def step(self, handle: Any, lane: Any, action: Any, obs: Any, terms: Any) -> int:
        """Answer, and on to the next decision."""
        return int(lanes.step_lane(handle, lane, self.params, int(action), obs, terms))

    def step_all(self, parallel: bool, handles: Any, lanes_: Any, actions: Any, obs: Any, terms: Any, out: Any) -> int:
        """``step`` for every row."""
        run = lanes.step_lanes_in_parallel if parallel else lanes.step_lanes
        return int(run(handles, lanes_, self.params, actions, obs, terms, out))


class PrefillSetting(InstanceSetting):
    """A prefill instance."""

    env_id = "BiScale/Prefill-v0"
    phase = "prefill"
    left_out = (*_OF_THE_CLUSTER, "decode_", "tpot_")


class DecodeSetting(InstanceSetting):
    """A decode instance; requests reach it a nominal prefill after they arrive."""

    env_id = "BiScale/Decode-v0"
    phase = "decode"
    left_out = (*_OF_THE_CLUSTER, "prefill_", "ttft_")


class PrefillEnv(SingleEnv):
    """``BiScale/Prefill-v0``: a step is one prefill batch, or a wait for the next prompt."""

    setting_type = PrefillSetting


class DecodeEnv(SingleEnv):
    """``BiScale/Decode-v0``: a step is one decode iteration, or a wait for the next request."""

    setting_type = DecodeSetting


class PrefillVectorEnv(NativeVectorEnv):
    """``BiScale/Prefill-v0``, many at once."""

    setting_type = PrefillSetting


class DecodeVectorEnv(NativeVectorEnv):
    """``BiScale/Decode-v0``, many at once."""

    setting_type = DecodeSetting
