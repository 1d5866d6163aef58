"""What an environment is, apart from its episodes' state: spaces, episodes, simulators, compiled steps, metrics.

``single.py`` and ``vector.py`` make one environment, or many at once, of a setting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger
from biscale_gym.cluster.placement import Placement, written_placement
from biscale_gym.cluster.settings import SloSettings
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import ConfigError, validate
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.envs.encoding import encoder_params
from biscale_gym.envs.episodes import Episode, EpisodeSource
from biscale_gym.envs.settings import EpisodeSettings
from biscale_gym.metrics import Counted, measure
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

Terms = NDArray[np.float64]


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


class Setting(ABC):
    """One environment's setting.

    Args:
        scenario: preset or path.
        settings: values of ``settings_type``, and ``overrides``, scenario settings replaced, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, a wrong value, or a scenario without a placement.
    """

    env_id: ClassVar[str]
    settings_type: ClassVar[type[EpisodeSettings]]
    lane_dtype: ClassVar[np.dtype[Any]]
    term_columns: ClassVar[dict[str, int]]
    """What ``info`` reports of a step, by name, and its column among the terms."""
    reward_column: ClassVar[int]
    terms: ClassVar[int]
    left_out: ClassVar[tuple[str, ...]] = ()
    """Figures of a row that say nothing of this environment, by how their names begin."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    observation_names: list[str]
    """A name for every number of the observation."""

    def __init__(self, scenario: str, settings: dict[str, Any]) -> None:
        overrides = settings.pop("overrides", None)
        self.scenario_name = scenario
        self.scenario = load_scenario(scenario, overrides)
        self.settings: Any = validate(self.settings_type, settings, f"environment {self.env_id}")
        if self.scenario.tpot_definition != "per-decode-token":
            raise ConfigError(
                f"scenario {scenario!r} judges TPOT {self.scenario.tpot_definition}, environments do per-decode-token"
            )
        cluster = self.scenario.cluster
        self.profile = cluster.profile()
        self.placement = starting_placement(self.scenario, scenario, self.profile.top_clock_mhz)
        placed = {spec.clock_mhz for spec in self.placement.instances}
        self.clocks_mhz = tuple(sorted({*self.scenario.clocks_mhz, self.scenario.top_clock_mhz, *placed}))
        self.grid = [self.clocks_mhz.index(clock) for clock in self.scenario.clocks_mhz]
        self.params = encoder_params(self.clocks_mhz, self.grid)
        self._blanks: dict[tuple[Placement, int], Simulator] = {}
        self.source = self._source()

    def _source(self) -> EpisodeSource:
        return EpisodeSource(self.scenario, self.profile, self.settings, self._fed)

    def _fed(self, demand: Trace, instance: int) -> Trace:
        """What of the cluster's demand the environment is fed with: all of it."""
        return demand

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        assert self.observation_space.shape is not None
        return self.observation_space.shape

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: () for a single clock."""
        assert self.action_space.shape is not None
        return self.action_space.shape

    def placement_of(self, episode: Episode) -> Placement:
        """The placement that an episode starts with: the one frozen in the scenario."""
        return self.placement

    @property
    def replans(self) -> bool:
        """Whether placements change at the borders of windows (``turn``)."""
        return False

    def turn(
        self, simulator: Simulator, episode: Episode, placement: Placement, lane: NDArray[Any], obs: Any
    ) -> Placement:
        """At the border of a window: change the placement and write the observation of the new one into ``obs``.

        Returns the placement from now on. The simulator's handle may be another one afterwards.
        """
        return placement

    @abstractmethod
    def _new_simulator(self, episode: Episode, placement: Placement, predicted: Profile | None) -> Simulator: ...

    @abstractmethod
    def _subscribe(self, simulator: Simulator) -> None:
        """Let the agent decide from now on."""

    @abstractmethod
    def _open(self, lane: NDArray[Any], simulator: Simulator) -> None:
        """Set what of a lane (its dtype[1]) is the environment's own, at the end of the warm-up."""

    @abstractmethod
    def first(self, handle: Any, lane: Any, obs: Any, terms: Any) -> int:
        """Compiled: run a lane to its first observation; returns as ``step``."""

    @abstractmethod
    def step(self, handle: Any, lane: Any, action: Any, obs: Any, terms: Any) -> int:
        """Compiled: step one lane; returns one of engine's DECISION, REACHED (the end), BAD_ANSWER."""

    @abstractmethod
    def step_all(self, parallel: bool, handles: Any, lanes: Any, actions: Any, obs: Any, terms: Any, out: Any) -> int:
        """Compiled: ``step`` for every row; returns how many lanes ended, -1 for a bad action (nothing has moved)."""

    def simulator(self, episode: Episode, placement: Placement) -> Simulator:
        """A simulator of the placement at the end of the episode's warm-up, clocks held until then.

        On drawn hardware, predictions are the nominal hardware's.
        """
        if episode.profile is not self.profile:
            simulator = self._new_simulator(episode, placement, self.profile)
        else:
            kind = (placement, episode.instance)
            if kind not in self._blanks:
                self._blanks[kind] = self._new_simulator(episode, placement, None)
            simulator = self._blanks[kind].anew(episode.requests, episode.cluster_seed)
        simulator.set_policies(None, None)
        if episode.warmup_s > 0.0:
            simulator.run(episode.warmup_s)
        self._subscribe(simulator)
        return simulator

    def begin(self, lane: NDArray[Any], simulator: Simulator, episode: Episode) -> InstanceLedger:
        """Set a lane (lane_dtype[1]) to the end of the warm-up; returns the instances' ledger there."""
        lane["end_s"] = episode.end_s
        lane["violation_penalty"] = self.settings.violation_penalty
        lane["discount_per_s"] = self.settings.discount_per_s
        lane["at_s"] = simulator.now_s
        self._open(lane, simulator)
        return simulator.instances()

    def metrics(self, simulator: Simulator, episode: Episode, start: InstanceLedger) -> dict[str, float]:
        """The episode's figures, as ``biscale_gym.metrics.measure`` reads them off the ledger."""
        return self.figures(simulator.requests(), simulator.instances().since(start), episode)

    def figures(self, ledger: RequestLedger, energy: InstanceLedger, episode: Episode) -> dict[str, float]:
        """The figures of an episode.

        Args:
            ledger: of the episode's requests.
            energy: of the instances, from the end of the warm-up to the episode's end, its ``now_s``.
            episode: which one.
        """
        requests = decided(ledger, self.scenario.slo, energy.now_s)
        counted = Counted(episode.warmup_s, episode.end_s, energy)
        overhead_s = self.scenario.cluster.serving_overhead_ms * 1e-3
        measured = measure(requests, counted, self.scenario.slo, self.scenario.tpot_definition, overhead_s)
        own = {name: float(value) for name, value in measured.row.items() if not name.startswith(self.left_out)}
        return {name: value for name, value in own.items() if np.isfinite(value)}

    def info(self, terms: Terms) -> dict[str, Any]:
        """The terms of a step (float64[terms]) by name, with units."""
        values = terms.tolist()
        return {name: values[column] for name, column in self.term_columns.items()}
