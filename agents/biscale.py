"""BiScale: tier 1 places instances every few minutes, tier 2 sets every instance's clock at every batch."""

from __future__ import annotations

from typing import Any

from agents.placement import Tier1
from agents.settings import BiScaleSettings, DecodeSlackSettings, PrefillMPCSettings, load_settings
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.control.controllers import PlanContext


def grid_indices(context: PlanContext) -> list[int]:
    """The controllers' clocks as indices into the run's list."""
    return [context.clock_index(clock) for clock in context.scenario.clocks_mhz]


def prefill_policy(settings: PrefillMPCSettings, context: PlanContext) -> PhasePolicy:
    """The prefill controller for a run's clocks."""
    # Imported here, as below: compiling the policies takes longer than planning, which needs none of them.
    from agents import prefill_mpc

    return PhasePolicy(
        function=prefill_mpc.FORMS[settings.search],
        params=prefill_mpc.mpc_params(settings, grid_indices(context), context.clocks_mhz),
        on_arrival=settings.replan_on_arrival,
        on_overrun=True,
        on_idle=True,
    )


def decode_policy(settings: DecodeSlackSettings, context: PlanContext) -> PhasePolicy:
    """The decode controller for a run's clocks; it looks at every iteration, so it needs no decision inside one."""
    from agents import decode_slack

    return PhasePolicy(
        function=decode_slack.VARIANTS[settings.variant],
        params=decode_slack.slack_params(settings, grid_indices(context), context.clocks_mhz),
        on_idle=True,
        slack=settings.variant == "credit",
    )


class BiScale:
    """Both tiers.

    Args:
        preset: in ``configs/agents/``, or a YAML file.
        changes: settings to change, in groups, e.g. ``decode={"variant": "floored"}``.

    Raises:
        ConfigError: an unknown preset or setting, or a wrong value.
    """

    name = "biscale"

    def __init__(self, preset: str = "biscale", **changes: Any) -> None:
        self.settings = load_settings(BiScaleSettings, preset, changes)
        self.tier1 = Tier1(self.settings.tier1)
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
        """Tier 2's clock policies."""
        return prefill_policy(self.settings.prefill, context), decode_policy(self.settings.decode, context)
