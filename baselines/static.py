"""Any placement, one clock per phase."""

from __future__ import annotations

from typing import Any

from baselines.placements import PlacementSettings, Planner, check_clock
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import validate
from biscale_gym.control.controllers import PlanContext


class StaticSettings(PlacementSettings):
    """A placement, and the clocks; the greatest of the controllers' clocks where none is given."""

    prefill_clock_mhz: int | None = None
    decode_clock_mhz: int | None = None


class Static:
    """One clock per phase throughout.

    Args:
        settings: values of :class:`StaticSettings`.

    Raises:
        ConfigError: an unknown setting, or a wrong value.
    """

    name = "static"

    def __init__(self, **settings: Any) -> None:
        self.settings = validate(StaticSettings, settings, "controller 'static'")
        self._planner = Planner(self.settings)
        self.replans = self._planner.replans

    @property
    def notes(self) -> list[str]:
        """What readers of a run's record must know."""
        return self._planner.notes

    def plan(self, context: PlanContext) -> Placement:
        """The planner's placement at the two clocks.

        Raises:
            BaselineError: the card has no such clock; the nearest is named.
        """
        default_mhz = context.scenario.clocks_mhz[-1]
        prefill_mhz, decode_mhz = (
            default_mhz if clock_mhz is None else check_clock(context, clock_mhz)
            for clock_mhz in (self.settings.prefill_clock_mhz, self.settings.decode_clock_mhz)
        )
        return self._planner.plan(context, prefill_mhz, decode_mhz)

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Clocks are held."""
        return None, None
