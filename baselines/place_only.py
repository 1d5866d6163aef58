"""Tier 1 alone: BiScale's placement with its base clocks, held."""

from __future__ import annotations

from typing import Any

from agents.placement import Tier1
from agents.settings import BiScaleSettings, load_settings
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.control.controllers import PlanContext


class PlaceOnly:
    """Placement every window, no clock changes inside one.

    Args:
        preset: of BiScale, whose tier 1 is used.
        changes: tier 1's settings to change.

    Raises:
        ConfigError: an unknown preset or setting, or a wrong value.
    """

    name = "place-only"

    def __init__(self, preset: str = "biscale", **changes: Any) -> None:
        self.tier1 = Tier1(load_settings(BiScaleSettings, preset, {"tier1": changes}).tier1)
        self.replans = True

    @property
    def foresees(self) -> bool:
        """Whether tier 1's forecast is the oracle."""
        return self.tier1.foresees

    @property
    def notes(self) -> list[str]:
        """What readers of a run's record must know."""
        return self.tier1.notes

    def plan(self, context: PlanContext) -> Placement:
        """Tier 1's placement for the next window."""
        return self.tier1.plan(context)

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """The planned clocks are held."""
        return None, None
