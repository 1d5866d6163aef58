"""No control: any placement, every clock at the card's top. The unit of every ratio."""

from __future__ import annotations

from typing import Any

from baselines.placements import PlacementSettings, Planner
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import validate
from biscale_gym.control.controllers import PlanContext


class MaxClock:
    """The top clock throughout.

    Args:
        settings: values of :class:`baselines.placements.PlacementSettings`.

    Raises:
        ConfigError: an unknown setting, or a wrong value.
    """

    name = "max-clock"

    def __init__(self, **settings: Any) -> None:
        self._planner = Planner(validate(PlacementSettings, settings, "controller 'max-clock'"))
        self.replans = self._planner.replans

    @property
    def notes(self) -> list[str]:
        """What readers of a run's record must know."""
        return self._planner.notes

    def plan(self, context: PlanContext) -> Placement:
        """The planner's placement at the top clock."""
        top_mhz = context.scenario.top_clock_mhz
        return self._planner.plan(context, top_mhz, top_mhz)

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Clocks are held."""
        return None, None
