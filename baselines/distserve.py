"""DistServe (OSDI 2024): for each phase the parallelism of greatest goodput per GPU, replicated to the demand.

Per phase every TP degree and number of pipeline stages that fits is simulated for its goodput, the greatest mean rate
within the SLO. The best per GPU is replicated ceil(rate / goodput) times. With high node affinity (fast links between
nodes) the phases are searched apart from each other; with low affinity both phases' instances share nodes, so that KV
never leaves one: what is simulated and replicated is then a unit of some prefill and some decode instances on the GPUs
of a node (per pipeline stage).

"Within the SLO" is said of each latency's quantile (``separate``), or of the share of requests that keep both SLOs
(``joint``). A phase alone cannot tell the latter. Units are simulated whole and can; where the phases are searched
apart, each gets half of the share that may fail, which is enough whichever requests fail in which phase.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from baselines.errors import BaselineError
from biscale_gym.cluster.placement import PHASES, InstanceSpec, Phase, Placement, PlacementError, layout
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import Settings, validate
from biscale_gym.control.controllers import PlanContext
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, fitting_degrees
from biscale_gym.planning.relaxation import usable_table, usable_units
from biscale_gym.planning.units import Attainment, MeasuredUnit, Unit, simulate_load


class DistServeSettings(Settings):
    """Settings of the search; docs/controllers.md says where each is from."""

    quantile: float = Field(default=0.99, gt=0.0, lt=1.0)
    """Share of the requests that must be within the SLO; the authors use 0.9."""
    attainment: Attainment = "separate"
    """``separate``: that share in TTFT and in TPOT, each on its own; ``joint``: in both."""
    headroom: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the SLO that the quantile may use."""
    node_affinity: Literal["high", "low"] = "high"
    """``high``: links between nodes are fast enough for KV; ``low``: prefill and decode share nodes."""
    pipeline_stages: tuple[int, ...] = (1,)
    """Numbers of pipeline stages that are searched; ``distserve-pp`` searches 1, 2 and 4."""
    prefill_degrees: tuple[int, ...] = ()
    """TP degrees that are searched for prefill; empty: all that fit."""
    decode_degrees: tuple[int, ...] = ()
    replan: bool = False
    """Plan every window anew, for the last one's rate; otherwise once, for the run's mean rate."""
    requests_per_probe: int = Field(default=10_000, ge=100)
    warmup_s: float = Field(default=30.0, ge=0.0)
    rate_tolerance: float = Field(default=0.02, gt=0.0, lt=0.5)
    seed: int = Field(default=2602, ge=0)


def goodput_per_gpu(row: InstanceClass) -> float:
    """Requests per second and GPU within the SLO."""
    return row.rate_rps / row.gpus


def best_per_gpu(rows: Iterable[InstanceClass]) -> InstanceClass:
    """The configuration of greatest goodput per GPU; the smaller of equals."""
    return max(rows, key=lambda row: (goodput_per_gpu(row), -row.gpus))


def _fits(rows: Sequence[tuple[InstanceClass, int]], cluster: ClusterSettings) -> Placement | None:
    """A placement of so many instances of each class; None if the cluster has no room for it."""
    placement = Placement(tuple(row.spec(weight=1.0) for row, count in rows for _ in range(count)))
    if placement.gpus > cluster.gpus:
        return None
    try:
        layout(placement, cluster.nodes, cluster.gpus_per_node)
    except PlacementError:
        return None
    return placement


def replicate(table: Sequence[InstanceClass], cluster: ClusterSettings, rate_rps: float) -> tuple[Placement, float]:
    """The best configuration of each phase, as often as the rate needs it.

    Where that does not fit on the cluster, the configurations and counts (one configuration per phase) that carry the
    greatest share of the rate, with the fewest GPUs among equals.

    Returns:
        The placement, and the share of the rate that it carries, at most 1.

    Raises:
        BaselineError: a phase has no configuration within the SLO, or the cluster cannot hold one instance of each.
    """
    usable = {phase: [row for row in table if row.phase == phase and row.rate_rps > 0.0] for phase in PHASES}
    for phase, rows in usable.items():
        if not rows:
            raise BaselineError(
                f"no {phase} configuration meets the SLO at any rate: relax it, or allow other TP degrees"
            )
    best = [best_per_gpu(usable[phase]) for phase in PHASES]
    placement = _fits([(row, max(1, math.ceil(rate_rps / row.rate_rps))) for row in best], cluster)
    if placement is not None:
        return placement, 1.0
    found: tuple[float, int, Placement] | None = None
    for pair in itertools.product(usable["prefill"], usable["decode"]):
        for most_prefill in range(1, cluster.gpus // pair[0].gpus + 1):
            most_decode = (cluster.gpus - most_prefill * pair[0].gpus) // pair[1].gpus
            # More than the rate needs is never better.
            counts = [
                min(most, math.ceil(rate_rps / row.rate_rps))
                for row, most in zip(pair, (most_prefill, most_decode), strict=True)
            ]
            if min(counts) < 1:
                continue
            share = min(1.0, *(row.rate_rps * n / rate_rps for row, n in zip(pair, counts, strict=True)))
            gpus = sum(row.gpus * n for row, n in zip(pair, counts, strict=True))
            if found is not None and (share, -gpus) <= (found[0], -found[1]):
                continue
            placement = _fits(list(zip(pair, counts, strict=True)), cluster)
            if placement is not None:
                found = share, gpus, placement
    if found is None:
        raise BaselineError(f"{cluster.gpus} GPUs do not hold one prefill and one decode instance")
    return found[2], found[0]


def units_on_nodes(columns: Sequence[Column], cluster: ClusterSettings) -> tuple[Unit, ...]:
    """Every unit of prefill and decode instances whose stages each fit on one node."""
    found = []
    of = {phase: [column for column in columns if column.phase == phase] for phase in PHASES}
    for prefill, decode in itertools.product(of["prefill"], of["decode"]):
        if prefill.pp != decode.pp or prefill.pp > cluster.nodes:
            continue
        first, second = (InstanceSpec(one.phase, one.tp, one.clocks_mhz[-1], pp=one.pp) for one in (prefill, decode))
        for prefills in range(1, cluster.gpus_per_node // prefill.tp + 1):
            for decodes in range(1, (cluster.gpus_per_node - prefills * prefill.tp) // decode.tp + 1):
                found.append(Unit(first, prefills, second, decodes))
    return tuple(found)


def replicate_units(
    measured: Sequence[MeasuredUnit], cluster: ClusterSettings, rate_rps: float
) -> tuple[Placement, float]:
    """The unit of greatest goodput per GPU, the smaller of equals, as often as the rate needs it and the nodes allow.

    Returns:
        The placement, and the share of the rate that it carries, at most 1.

    Raises:
        BaselineError: there is no unit within the SLO.
    """
    usable = [one for one in measured if one.rate_rps > 0.0]
    if not usable:
        raise BaselineError(
            f"no prefill and decode instance within the SLO share a node of {cluster.gpus_per_node} GPUs; "
            "node_affinity: high places them on different nodes"
        )
    # Equal but for rounding is equal.
    best = max(usable, key=lambda one: (round(one.rate_rps / one.unit.gpus, 9), -one.unit.gpus))
    room = cluster.nodes // best.unit.pp * (cluster.gpus_per_node // best.unit.gpus_per_node)
    count = min(max(1, math.ceil(rate_rps / best.rate_rps)), room)
    specs = best.unit.prefills * count * (best.unit.prefill,) + best.unit.decodes * count * (best.unit.decode,)
    return Placement(specs), min(1.0, count * best.rate_rps / rate_rps)


class DistServe:
    """The published planner, planned once for the run's mean rate; clocks stay at the card's top.

    Args:
        settings: values of :class:`DistServeSettings`.

    Raises:
        ConfigError: an unknown setting, or a wrong value.
    """

    name = "distserve"

    def __init__(self, **settings: Any) -> None:
        self.settings = validate(DistServeSettings, settings, "controller 'distserve'")
        self.replans = self.settings.replan
        self.notes: list[str] = []
        self._table: tuple[InstanceClass, ...] | None = None
        self._units: tuple[MeasuredUnit, ...] | None = None

    def columns(self, context: PlanContext) -> tuple[Column, ...]:
        """Every configuration that is searched and leaves room for the other phase.

        Raises:
            BaselineError: none of the TP degrees that a phase is held to fits.
        """
        cluster, settings = context.scenario.cluster, self.settings
        searched = {"prefill": settings.prefill_degrees, "decode": settings.decode_degrees}

        def degrees(phase: Phase) -> list[tuple[int, int]]:
            found = [
                (tp, pp)
                for pp in settings.pipeline_stages
                for tp in fitting_degrees(context.profile, phase, cluster.gpus_per_node, pp)
                if tp * pp < cluster.gpus
            ]
            chosen = [(tp, pp) for tp, pp in found if not searched[phase] or tp in searched[phase]]
            if not chosen:
                raise BaselineError(
                    f"{phase}_degrees {list(searched[phase])}: none of them fits; "
                    f"those that do: {sorted({tp for tp, _ in found})}"
                )
            return chosen

        return tuple(
            Column(phase, tp, pp, (context.scenario.top_clock_mhz,)) for phase in PHASES for tp, pp in degrees(phase)
        )

    def measurement(self, context: PlanContext) -> Measurement:
        """What goodput is measured with."""
        scenario, settings = context.scenario, self.settings
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

    def table(self, context: PlanContext) -> tuple[InstanceClass, ...]:
        """Goodput of every configuration of either phase, for high node affinity."""
        if self._table is None:
            measurement = self.measurement(context)
            if self.settings.attainment == "joint":
                # Whichever requests fail: no more fail one SLO or the other than both shares together.
                measurement = replace(measurement, quantile=0.5 * (1.0 + self.settings.quantile))
            self._table, notes = usable_table(measurement, self.columns(context))
            self.notes.extend(notes)
        return self._table

    def units(self, context: PlanContext) -> tuple[MeasuredUnit, ...]:
        """Goodput of every unit, for low node affinity."""
        if self._units is None:
            units = units_on_nodes(self.columns(context), context.scenario.cluster)
            self._units, notes = usable_units(self.measurement(context), units, self.settings.attainment)
            self.notes.extend(notes)
        return self._units

    def plan(self, context: PlanContext) -> Placement:
        """The replicated configurations.

        Raises:
            BaselineError: no configuration meets the SLO, or nothing fits on the cluster.
        """
        rate_rps = context.last_rate_rps if self.replans else context.mean_rate_rps
        cluster = context.scenario.cluster
        if self.settings.node_affinity == "high":
            placement, share = replicate(self.table(context), cluster, rate_rps)
        else:
            placement, share = replicate_units(self.units(context), cluster, rate_rps)
        window = f"window {len(context.history_rps)}"
        if share < 1.0:
            self.notes.append(
                f"{window}: the cluster carries {share:.1%} of {rate_rps:.2f} requests/s within the SLO "
                f"({placement.describe()})"
            )
        if self.settings.attainment == "joint":
            outcome = simulate_load(self.measurement(context), placement, cluster.nodes, rate_rps)
            self.notes.append(
                f"{window}: {outcome.within_both:.1%} of the training requests keep both SLOs at {rate_rps:.2f} "
                f"requests/s, {self.settings.quantile:.1%} were asked for"
            )
        return placement

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Clocks are held."""
        return None, None


class DistServePP(DistServe):
    """DistServe searching pipeline stages too, as its authors do.

    A row of its own, because BiScale's classes have no pipeline.
    """

    name = "distserve-pp"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"pipeline_stages": (1, 2, 4), **settings})
