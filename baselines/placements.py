"""Placements for baselines that only set clocks: another planner's, or one written down."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from baselines.distserve import DistServe
from baselines.errors import BaselineError
from baselines.place_only import PlaceOnly
from biscale_gym.cluster.placement import InstanceSpec, Phase, Placement
from biscale_gym.config import Settings
from biscale_gym.control.controllers import Controller, PlanContext


class InstanceSettings(Settings):
    """Some equal instances."""

    phase: Phase
    tp: int = Field(ge=1)
    pp: int = Field(default=1, ge=1)
    count: int = Field(default=1, ge=1)
    weight: float = Field(default=1.0, gt=0.0)


class PlacementSettings(Settings):
    """Where the instances come from."""

    planner: Literal["distserve", "place-only", "given"] = "distserve"
    instances: tuple[InstanceSettings, ...] = ()
    """With ``planner: given``."""


class Planner:
    """Another planner's placements, at clocks of one's own."""

    def __init__(self, settings: PlacementSettings) -> None:
        if (settings.planner == "given") != bool(settings.instances):
            raise BaselineError(
                f"planner {settings.planner!r} with {len(settings.instances)} instances: write `instances` down "
                "with planner 'given', and only with it"
            )
        self._given = settings.instances
        planners: dict[str, type[DistServe] | type[PlaceOnly]] = {"distserve": DistServe, "place-only": PlaceOnly}
        self._planner: Controller | None = None if self._given else planners[settings.planner]()

    @property
    def replans(self) -> bool:
        """As the planner has it; a given placement stays."""
        return self._planner is not None and self._planner.replans

    @property
    def notes(self) -> list[str]:
        """The planner's."""
        return list(getattr(self._planner, "notes", ()))

    def plan(self, context: PlanContext, prefill_mhz: int, decode_mhz: int) -> Placement:
        """The placement with its clocks replaced."""
        if self._planner is None:
            specs = tuple(
                InstanceSpec(entry.phase, entry.tp, prefill_mhz, entry.weight, entry.pp)
                for entry in self._given
                for _ in range(entry.count)
            )
        else:
            specs = self._planner.plan(context).instances
        clocks = {"prefill": prefill_mhz, "decode": decode_mhz}
        return Placement(tuple(replace(spec, clock_mhz=clocks[spec.phase]) for spec in specs))


def check_clock(context: PlanContext, clock_mhz: int) -> int:
    """The clock, if the card has it.

    Raises:
        BaselineError: it has not; the nearest is named.
    """
    clocks = context.profile.clocks_mhz
    if clock_mhz not in clocks:
        closest = min(clocks, key=lambda clock: abs(clock - clock_mhz))
        raise BaselineError(f"the card has no clock {clock_mhz} MHz; the nearest is {closest} MHz")
    return clock_mhz
