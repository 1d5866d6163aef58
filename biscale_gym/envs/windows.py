"""What a planner is told at the border of a window, in environments where placements change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.placement import Placement
from biscale_gym.control.controllers import PlanContext, no_arrivals
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.envs.episodes import Episode
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace


@dataclass(frozen=True)
class WindowDemand:
    """The demand of an episode as a planner may know it: windows that are over, and the operator's estimate.

    Attributes:
        scenario: what is served.
        profile: what the planner believes iterations cost.
        training: demand to plan with; never the episode's.
        clocks_mhz: the run's clock list.
        episode: what is played.
        mean_rate_rps: the operator's estimate of the mean rate.
    """

    scenario: ScenarioSettings
    profile: Profile
    training: Trace
    clocks_mhz: tuple[int, ...]
    episode: Episode
    mean_rate_rps: float

    @property
    def borders_s(self) -> list[float]:
        """Where windows begin."""
        return [0.0, *np.arange(self.scenario.window_s, self.episode.end_s, self.scenario.window_s).tolist()]

    def arrivals_s(self, window: int) -> NDArray[np.float64]:
        """Arrivals of a window that is over, from its start: float64[requests], read-only."""
        start_s = window * self.scenario.window_s
        arrival_s = self.episode.requests.arrival_s
        first, last = np.searchsorted(arrival_s, (start_s, start_s + self.scenario.window_s))
        own: NDArray[np.float64] = arrival_s[first:last] - start_s
        own.setflags(write=False)
        return own

    def past_rps(self, window: int) -> tuple[float, ...]:
        """Mean rates of the windows before one, in order."""
        return tuple(len(self.arrivals_s(past)) / self.scenario.window_s for past in range(window))

    def last_arrivals_s(self, window: int) -> NDArray[np.float64]:
        """Arrivals of the window before one; none before the first."""
        return self.arrivals_s(window - 1) if window else no_arrivals()

    def context(self, window: int, previous: Placement | None) -> PlanContext:
        """What a controller knows when it plans a window."""
        return PlanContext(
            scenario=self.scenario,
            profile=self.profile,
            training=self.training,
            mean_rate_rps=self.mean_rate_rps,
            history_rps=self.past_rps(window),
            previous=previous,
            clocks_mhz=self.clocks_mhz,
            last_arrivals_s=self.last_arrivals_s(window),
        )
