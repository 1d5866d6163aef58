"""What the single and the vector environment of one instance have in common: spaces, episodes, simulators, metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger
from biscale_gym.cluster.placement import Phase, Placement, written_placement
from biscale_gym.cluster.settings import SloSettings
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import ConfigError, validate
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.envs import lanes, layout
from biscale_gym.envs.encoding import encoder_params
from biscale_gym.envs.episodes import Episode, EpisodeSource
from biscale_gym.envs.settings import InstanceEnvSettings
from biscale_gym.envs.share import routed_share
from biscale_gym.metrics import Counted, measure
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.traces import Trace

ENV_IDS = {"prefill": "BiScale/Prefill-v0", "decode": "BiScale/Decode-v0"}


def starting_placement(scenario: ScenarioSettings, name: str, top_clock_mhz: int) -> Placement:
    """The placement frozen in a scenario.

    Raises:
        ConfigError: it has none.
    """
    if not scenario.placement:
        raise ConfigError(
            f"scenario {name!r} has no placement for environments to start from; "
            f"python scripts/freeze_placements.py --scenario {name} plans one and writes it down"
        )
    return written_placement(scenario.placement, top_clock_mhz)


def decided(requests: RequestLedger, slo: SloSettings, now_s: float) -> RequestLedger:
    """The requests whose fate is known at an episode's end: done, rejected, or in flight past their deadline."""
    prefilled = ~np.isnan(requests.first_token_s)
    late_prefill = ~prefilled & (now_s - requests.arrival_s > slo.ttft_s)
    budget_s = slo.tpot_s * (requests.output_tokens - 1)
    late_decode = prefilled & (now_s - np.nan_to_num(requests.first_token_s) > budget_s)
    return requests.take(requests.finished | requests.rejected | late_prefill | late_decode)


class InstanceSetting:
    """Everything about an environment of one instance but its episodes' state.

    Args:
        phase: of the instance.
        scenario: preset or path.
        settings: values of InstanceEnvSettings, and ``overrides``, scenario settings replaced, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, a wrong value, or a scenario without a placement.
    """

    def __init__(self, phase: Phase, scenario: str, settings: dict[str, Any]) -> None:
        overrides = settings.pop("overrides", None)
        self.phase: Phase = phase
        self.scenario_name = scenario
        self.scenario = load_scenario(scenario, overrides)
        self.settings = validate(InstanceEnvSettings, settings, f"environment {ENV_IDS[phase]}")
        if self.scenario.tpot_definition != "per-decode-token":
            raise ConfigError(
                f"scenario {scenario!r} judges TPOT {self.scenario.tpot_definition}, environments do per-decode-token"
            )
        cluster = self.scenario.cluster
        self.profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
        self.placement = starting_placement(self.scenario, scenario, self.profile.top_clock_mhz)
        specs = self.placement.of(phase)
        fixed = self.settings.instance
        if fixed is not None and fixed >= len(specs):
            raise ConfigError(
                f"environment {ENV_IDS[phase]}: scenario {scenario!r} has no {phase} instance {fixed}; "
                f"valid: 0 to {len(specs) - 1}"
            )
        self.clocks_mhz = self._run_clocks()
        self.grid = [self.clocks_mhz.index(clock) for clock in self.scenario.clocks_mhz]
        self.params = encoder_params(self.clocks_mhz, self.grid)
        low, high = layout.bounds(phase, len(self.grid))
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Discrete(len(self.grid))
        points = self.settings.decision_points
        asked = PhasePolicy(
            on_arrival="arrival" in points, on_overrun="overrun" in points, on_idle="idle" in points, slack=True
        )
        self.policies = (asked, None) if phase == "prefill" else (None, asked)
        self.source = EpisodeSource(
            self.scenario, self.profile, self.settings, self._share, instances=len(specs), fixed_instance=fixed
        )
        self._blanks: dict[int, Simulator] = {}

    def _run_clocks(self) -> tuple[int, ...]:
        placed = {spec.clock_mhz for spec in self.placement.instances}
        return tuple(sorted({*self.scenario.clocks_mhz, self.scenario.top_clock_mhz, *placed}))

    def _share(self, demand: Trace, instance: int) -> Trace:
        return routed_share(demand, self.placement, self.phase, instance, self.profile)

    def _new_simulator(self, episode: Episode, predicted: Profile | None) -> Simulator:
        spec = self.placement.of(self.phase)[episode.instance]
        return Simulator(
            self.scenario.cluster,
            episode.profile,
            Placement((spec,)),
            episode.requests,
            self.clocks_mhz,
            self.scenario.slo,
            episode.cluster_seed,
            predicted=predicted,
            only=self.phase,
            switching=episode.switching,
        )

    def simulator(self, episode: Episode) -> Simulator:
        """A simulator at the end of the episode's warm-up, clocks held until then, nobody asked yet.

        On drawn hardware, predictions are the nominal hardware's.
        """
        if episode.profile is not self.profile:
            simulator = self._new_simulator(episode, self.profile)
        else:
            if episode.instance not in self._blanks:
                self._blanks[episode.instance] = self._new_simulator(episode, None)
            simulator = self._blanks[episode.instance].anew(episode.requests, episode.cluster_seed)
        simulator.set_policies(None, None)
        if episode.warmup_s > 0.0:
            simulator.run(episode.warmup_s)
        simulator.set_policies(*self.policies)
        return simulator

    def begin(self, lane: NDArray[Any], simulator: Simulator, episode: Episode) -> InstanceLedger:
        """Set a lane (LANE[1]) to the end of the warm-up; returns the instance's ledger there."""
        settings, ledger = self.settings, simulator.instances()
        inst = simulator.state.inst[0]
        lane["end_s"] = episode.end_s
        lane["reference_w"] = settings.reference_w_per_gpu * int(inst["tp"])
        lane["violation_penalty"] = settings.violation_penalty
        lane["discount_per_s"] = settings.discount_per_s
        lane["at_s"] = simulator.now_s
        lane["energy_j"] = lanes.energy_now_j(simulator.state, 0)
        lane["violations"] = inst["late"] + simulator.state.glob[0]["rejected"]
        lane["completed"] = inst["completed"]
        return ledger

    def metrics(self, simulator: Simulator, episode: Episode, start: InstanceLedger) -> dict[str, float]:
        """The episode's figures, as ``biscale_gym.metrics.measure`` reads them off the ledger, of this phase alone."""
        requests = decided(simulator.requests(), self.scenario.slo, simulator.now_s)
        counted = Counted(episode.warmup_s, episode.end_s, simulator.instances().since(start))
        overhead_s = self.scenario.cluster.serving_overhead_ms * 1e-3
        measured = measure(requests, counted, self.scenario.slo, self.scenario.tpot_definition, overhead_s)
        own = {name: float(value) for name, value in measured.row.items() if not name.startswith(self._not_ours)}
        return {name: value for name, value in own.items() if np.isfinite(value)}

    @property
    def _not_ours(self) -> tuple[str, ...]:
        """Figures that say nothing of one instance of this phase."""
        cluster = ("total_", "unallocated_", "joint_", "goodput", "gpus_used", "mean_power_w")
        return (*cluster, "decode_", "tpot_") if self.phase == "prefill" else (*cluster, "prefill_", "ttft_")
