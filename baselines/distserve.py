"""DistServe (OSDI 2024): for each phase the parallelism of greatest goodput per GPU, replicated to the demand.

Per phase every TP degree and number of pipeline stages that fits is simulated for its goodput, the greatest mean rate
within the SLO. The best per GPU is replicated ceil(rate / goodput) times. With high node affinity (fast links between
nodes) the phases are searched apart from each other; with low affinity both phases' instances share nodes, so that KV
never leaves one: what is searched and replicated is then a unit of some prefill and some decode instances on the GPUs
of a node (per pipeline stage).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field

from baselines.errors import BaselineError
from biscale_gym.cluster.placement import PHASES, Phase, Placement, PlacementError, layout
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import Settings, validate
from biscale_gym.control.controllers import PlanContext
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, fitting_degrees
from biscale_gym.planning.relaxation import usable_table


class DistServeSettings(Settings):
    """Settings of the search; docs/controllers.md says where each is from."""

    quantile: float = Field(default=0.99, gt=0.0, lt=1.0)
    """Of TTFT and TPOT, each on its own, that must be within the SLO; the authors use 0.9."""
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


def replicate_units(
    table: Sequence[InstanceClass], cluster: ClusterSettings, rate_rps: float
) -> tuple[Placement, float]:
    """The best unit of prefill and decode instances that share nodes, replicated to the rate within the nodes.

    A unit has one number of pipeline stages; each stage takes ``a`` prefill and ``b`` decode groups on one node. Its
    goodput is the lesser of the phases'.

    Returns:
        The placement, and the share of the rate that it carries, at most 1.

    Raises:
        BaselineError: no unit fits on a node.
    """
    best: tuple[float, int, tuple[tuple[InstanceClass, int], ...], float, int] | None = None
    rows = {phase: [row for row in table if row.phase == phase and row.rate_rps > 0.0] for phase in PHASES}
    for prefill, decode in itertools.product(rows["prefill"], rows["decode"]):
        if prefill.pp != decode.pp or prefill.pp > cluster.nodes:
            continue
        for a in range(1, cluster.gpus_per_node // prefill.tp + 1):
            for b in range(1, (cluster.gpus_per_node - a * prefill.tp) // decode.tp + 1):
                per_node = a * prefill.tp + b * decode.tp
                goodput = min(a * prefill.rate_rps, b * decode.rate_rps)
                value = goodput / (per_node * prefill.pp)
                if best is None or (value, -per_node) > best[:2]:
                    room = cluster.nodes // prefill.pp * (cluster.gpus_per_node // per_node)
                    best = value, -per_node, ((prefill, a), (decode, b)), goodput, room
    if best is None:
        raise BaselineError(
            f"no prefill and decode instance within the SLO share a node of {cluster.gpus_per_node} GPUs; "
            "node_affinity: high places them on different nodes"
        )
    _, _, unit, goodput, room = best
    units = min(max(1, math.ceil(rate_rps / goodput)), room)
    specs = [row.spec(weight=1.0) for row, count in unit for _ in range(count * units)]
    return Placement(tuple(specs)), min(1.0, units * goodput / rate_rps)


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

    def table(self, context: PlanContext) -> tuple[InstanceClass, ...]:
        """Goodput of every configuration."""
        if self._table is None:
            scenario, settings = context.scenario, self.settings
            measurement = Measurement(
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
            self._table, notes = usable_table(measurement, self.columns(context))
            self.notes.extend(notes)
        return self._table

    def plan(self, context: PlanContext) -> Placement:
        """The replicated configurations.

        Raises:
            BaselineError: no configuration meets the SLO, or nothing fits on the cluster.
        """
        rate_rps = context.last_rate_rps if self.replans else context.mean_rate_rps
        search = replicate if self.settings.node_affinity == "high" else replicate_units
        placement, share = search(self.table(context), context.scenario.cluster, rate_rps)
        if share < 1.0:
            self.notes.append(
                f"window {len(context.history_rps)}: the cluster carries {share:.1%} of {rate_rps:.2f} requests/s "
                f"within the SLO ({placement.describe()})"
            )
        return placement

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Clocks are held."""
        return None, None


class DistServePP(DistServe):
    """DistServe searching pipeline stages too, as its authors do.

    A row of its own: BiScale's classes have no pipeline, and pipelines without bubbles (docs/cluster.md) flatter it.
    """

    name = "distserve-pp"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"pipeline_stages": (1, 2, 4), **settings})
