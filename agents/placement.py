"""Tier 1: which instances serve the next window.

Class tables (:mod:`biscale_gym.planning.classes`) say what an instance of each phase, TP degree and clock carries
within the SLO and at what cost; an integer programme (:mod:`agents.milp`) takes the cheapest counts that carry the
forecast (:mod:`agents.forecast`) with a margin. If asked for, the present placement stays while it is nearly as good
(:mod:`agents.hysteresis`). Requests are routed in proportion to R_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agents.forecast import forecast_rps
from agents.hysteresis import present_counts, stays
from agents.milp import Counts, Room, choose_counts, judge_counts
from agents.settings import Tier1Settings
from biscale_gym.cluster.placement import PHASES, Placement
from biscale_gym.cluster.simulator import lowest_idle_power_w
from biscale_gym.control.controllers import PlanContext
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, fitting_degrees
from biscale_gym.planning.relaxation import usable_table


def measurement_of(context: PlanContext, settings: Tier1Settings) -> Measurement:
    """What class tables are measured with in this context."""
    scenario = context.scenario
    return Measurement(
        profile=context.profile,
        cluster=scenario.cluster,
        slo=scenario.slo,
        training=context.training,
        headroom=settings.headroom,
        quantile=settings.quantile,
        requests_per_probe=settings.requests_per_probe,
        warmup_s=settings.warmup_s,
        rate_tolerance=settings.rate_tolerance,
        seed=settings.seed,
        tpot_definition=scenario.tpot_definition,
    )


def grid_columns(context: PlanContext) -> tuple[Column, ...]:
    """Every phase and TP degree that fits memory, over the controllers' clocks."""
    cluster = context.scenario.cluster
    return tuple(
        Column(phase, tp, 1, tuple(context.scenario.clocks_mhz))
        for phase in PHASES
        for tp in fitting_degrees(context.profile, phase, cluster.gpus_per_node)
    )


@dataclass(frozen=True)
class Plan:
    """A placement, and how it came about.

    Attributes:
        placement: the instances.
        demand_rps: what each phase was to carry, margin included.
        solution: counts per class and whether they carry it.
    """

    placement: Placement
    demand_rps: float
    solution: Counts

    @property
    def note(self) -> str | None:
        """What a reader of the record must know; None if the demand is carried."""
        if self.solution.feasible:
            return None
        return (
            f"no placement carries {self.demand_rps:.2f} requests/s within the SLO: took the one that comes nearest, "
            f"{self.solution.coverage:.1%} ({self.placement.describe()})"
        )


def plan_counts(
    table: Sequence[InstanceClass],
    room: Room,
    rate_rps: float,
    margin: float,
    unallocated_w: float = 0.0,
    present: Placement | None = None,
    keep_within: float = 0.0,
) -> Plan:
    """The cheapest placement from a class table, prefill first, large instances first; or the present one.

    Args:
        table: rows of both phases.
        room: the cluster.
        rate_rps: forecast.
        margin: capacity above it, relative.
        unallocated_w: power counted for every GPU left over.
        present: the placement that serves now.
        keep_within: it stays while it carries the demand at no more than this relative excess over the least power.

    Raises:
        AgentError: a phase has no usable class, or one instance of each phase does not fit.
    """
    demand_rps = (1.0 + margin) * rate_rps
    is_prefill = [row.phase == "prefill" for row in table]
    gpus = [row.gpus for row in table]
    rates_rps = [row.rate_rps for row in table]
    powers_w = [row.power_w for row in table]
    solution = choose_counts(
        is_prefill,
        [row.tp for row in table],
        gpus,
        rates_rps,
        powers_w,
        room=room,
        demand_rps=demand_rps,
        unallocated_w=unallocated_w,
    )
    counts = None if present is None else present_counts(present, table)
    if present is not None and counts is not None:
        judged = judge_counts(
            counts,
            is_prefill,
            gpus,
            rates_rps,
            powers_w,
            room=room,
            demand_rps=demand_rps,
            unallocated_w=unallocated_w,
        )
        if stays(judged, solution, keep_within):
            return Plan(present, demand_rps, judged)
    chosen = [row for row, count in zip(table, solution.counts, strict=True) for _ in range(count)]
    chosen.sort(key=lambda row: (PHASES.index(row.phase), -row.gpus, -row.clock_mhz))
    return Plan(Placement(tuple(row.spec() for row in chosen)), demand_rps, solution)


class Tier1:
    """Plans windows; class tables are measured, or read from disk, once.

    Attributes:
        notes: what readers of a run's record must know, in the order in which it came up.
    """

    def __init__(self, settings: Tier1Settings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        if self.foresees:
            self.notes.append("tier 1 plans with the true rate of each window to come: a bound, not realisable")
        self._table: tuple[InstanceClass, ...] | None = None

    @property
    def foresees(self) -> bool:
        """Whether the true rate of the window to come is asked for."""
        return self.settings.forecast == "oracle"

    def table(self, context: PlanContext) -> tuple[InstanceClass, ...]:
        """The class table of this context's profile, training trace and SLO, which stay the same during a run."""
        if self._table is None:
            self._table, notes = usable_table(measurement_of(context, self.settings), grid_columns(context))
            self.notes.extend(notes)
        return self._table

    def plan(self, context: PlanContext) -> Placement:
        """The placement for the next window.

        Raises:
            AgentError: no class of a phase carries any load, one instance of each phase does not fit on the cluster, or
            the oracle is asked for in a run that does not show what comes.
        """
        cluster = context.scenario.cluster
        plan = plan_counts(
            self.table(context),
            Room(cluster.nodes, cluster.gpus_per_node),
            forecast_rps(self.settings, context),
            self.settings.margin,
            lowest_idle_power_w(context.profile) if self.settings.count_unallocated else 0.0,
            context.previous,
            self.settings.keep_within,
        )
        if plan.note is not None:
            self.notes.append(f"window {len(context.history_rps)}: {plan.note}")
        return plan.placement
