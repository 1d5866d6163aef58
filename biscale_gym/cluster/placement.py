"""Placement: which instances serve which phase, on which nodes, and how one placement turns into the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from biscale_gym.config import Settings, nearest

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class PlacementError(ValueError):
    """A placement that cannot be; the message names the instance and the nearest valid choice."""


@dataclass(frozen=True)
class InstanceSpec:
    """One instance: a TP group (``pp`` of them in a pipeline) serving one phase.

    Attributes:
        phase: "prefill" or "decode".
        tp: tensor-parallel degree.
        clock_mhz: locked SM clock at the start, and while no policy changes it.
        weight: share of requests relative to the phase's other instances; > 0.
        pp: pipeline stages. The engine runs an instance of pp stages as pp lanes of tp GPUs that share its weights'
            memory and take turns on its stages: up to pp batches are under way (docs/cluster.md, Pipelines).
    """

    phase: Phase
    tp: int
    clock_mhz: int
    weight: float = 1.0
    pp: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.tp * self.pp

    @property
    def kind(self) -> tuple[str, int, int]:
        """What must agree for an instance to go on under a new placement."""
        return (self.phase, self.tp, self.pp)


@dataclass(frozen=True)
class Placement:
    """The instances of a cluster, in order."""

    instances: tuple[InstanceSpec, ...]

    @property
    def gpus(self) -> int:
        """GPUs that the instances take."""
        return sum(spec.gpus for spec in self.instances)

    def of(self, phase: Phase) -> tuple[InstanceSpec, ...]:
        """The instances of one phase."""
        return tuple(spec for spec in self.instances if spec.phase == phase)

    def describe(self) -> str:
        """Short form, e.g. ``2×P TP2@1410 + 3×D TP4@1005``."""
        counts: dict[str, int] = {}
        for spec in self.instances:
            pipeline = f"·PP{spec.pp}" if spec.pp > 1 else ""
            label = f"{spec.phase[0].upper()} TP{spec.tp}{pipeline}@{spec.clock_mhz}"
            counts[label] = counts.get(label, 0) + 1
        return " + ".join(f"{count}×{label}" for label, count in counts.items())


class InstanceGroup(Settings):
    """``count`` equal instances as files write them; ``clock_mhz`` is a clock, or ``max``."""

    phase: Phase
    tp: Annotated[int, Field(ge=1)]
    clock_mhz: int | Literal["max"] = "max"
    count: Annotated[int, Field(ge=1)] = 1
    weight: Annotated[float, Field(gt=0)] = 1.0
    pp: Annotated[int, Field(ge=1)] = 1


def written_placement(groups: Sequence[InstanceGroup], top_clock_mhz: int) -> Placement:
    """The placement that a file writes down; ``max`` becomes ``top_clock_mhz``."""
    specs: list[InstanceSpec] = []
    for group in groups:
        clock = top_clock_mhz if group.clock_mhz == "max" else group.clock_mhz
        specs += [InstanceSpec(group.phase, group.tp, clock, group.weight, group.pp)] * group.count
    return Placement(tuple(specs))


@dataclass(frozen=True)
class Lane:
    """What the engine runs: one TP group of an instance on a node.

    Attributes:
        spec: the instance.
        node: where it is.
        number: of the lane within the instance, 0 to pp - 1; the lanes of an instance follow one another.
        one_node: whether all lanes of the instance are on the same node.
    """

    spec: InstanceSpec
    node: int
    number: int = 0
    one_node: bool = True


def check_placement(
    placement: Placement,
    degrees: Sequence[int],
    nodes: int,
    gpus_per_node: int,
    phases: Sequence[Phase] = PHASES,
) -> None:
    """Whether a placement can be on a cluster.

    Raises:
        PlacementError: a phase without an instance, an unknown TP degree, a non-positive weight, or too many GPUs.
    """
    for number, spec in enumerate(placement.instances):
        where = f"instance {number} ({spec.phase} TP{spec.tp})"
        if spec.phase not in PHASES:
            raise PlacementError(
                f"instance {number}: unknown phase {spec.phase!r}; {nearest(spec.phase, list(PHASES))}"
            )
        if spec.tp not in degrees:
            closest = min(degrees, key=lambda degree: abs(degree - spec.tp))
            raise PlacementError(
                f"{where}: TP {spec.tp} is not supported; the nearest is {closest} (valid: {list(degrees)})"
            )
        if spec.tp > gpus_per_node:
            raise PlacementError(f"{where}: a TP group must fit on one node of {gpus_per_node} GPUs")
        if spec.pp < 1:
            raise PlacementError(f"{where}: pp must be at least 1, got {spec.pp}")
        if not 0.0 < spec.weight < math.inf:
            raise PlacementError(f"{where}: the routing weight must be positive and finite, got {spec.weight}")
    for phase in phases:
        if not placement.of(phase):
            raise PlacementError(
                f"the placement {placement.describe() or '(empty)'} has no {phase} instance; add at least one"
            )
    if placement.gpus > nodes * gpus_per_node:
        raise PlacementError(
            f"the placement {placement.describe()} takes {placement.gpus} GPUs, the cluster has "
            f"{nodes} nodes of {gpus_per_node} = {nodes * gpus_per_node}"
        )


def _pack(lanes: list[InstanceSpec], free: list[int]) -> list[int] | None:
    """Nodes for lanes, best fit by decreasing TP; None where they do not fit. ``free`` is left as it was."""
    left = list(free)
    nodes = [0] * len(lanes)
    for index in sorted(range(len(lanes)), key=lambda index: -lanes[index].tp):
        able = [node for node in range(len(left)) if left[node] >= lanes[index].tp]
        if not able:
            return None
        node = min(able, key=lambda node: (left[node], node))
        left[node] -= lanes[index].tp
        nodes[index] = node
    return nodes


def _lanes_of(specs: Sequence[InstanceSpec]) -> list[InstanceSpec]:
    return [spec for spec in specs for _ in range(spec.pp)]


def _placed(specs: Sequence[InstanceSpec], nodes: Sequence[int]) -> list[Lane]:
    """The instances' lanes on their nodes, both in order."""
    lanes = []
    for spec in specs:
        own, nodes = nodes[: spec.pp], nodes[spec.pp :]
        lanes += [Lane(spec, node, number, len(set(own)) == 1) for number, node in enumerate(own)]
    return lanes


def layout(placement: Placement, nodes: int, gpus_per_node: int) -> list[Lane]:
    """The placement's lanes on nodes, in the placement's order.

    Raises:
        PlacementError: the TP groups do not fit on the nodes.
    """
    chosen = _pack(_lanes_of(placement.instances), [gpus_per_node] * nodes)
    if chosen is None:
        raise PlacementError(
            f"the TP groups of {placement.describe()} do not fit on {nodes} nodes of {gpus_per_node} GPUs"
        )
    return _placed(placement.instances, chosen)


@dataclass(frozen=True)
class Transition:
    """From the running lanes to a new placement.

    Attributes:
        keep: (running lane's number, its new spec) of lanes that go on.
        leave: running lanes that drain.
        start: new lanes.
    """

    keep: tuple[tuple[int, InstanceSpec], ...]
    leave: tuple[int, ...]
    start: tuple[Lane, ...]


def transition(running: Sequence[tuple[int, Lane]], placement: Placement, nodes: int, gpus_per_node: int) -> Transition:
    """Keep as many running instances as the nodes allow, each with all of its lanes or not at all.

    Args:
        running: (number, lane) of the lanes that serve now.
        placement: what shall serve.
        nodes: nodes of the cluster.
        gpus_per_node: GPUs of each.

    Raises:
        PlacementError: the new placement does not fit even on empty nodes.
    """
    wanted = list(placement.instances)
    places = dict(running)
    # By the number of an instance's first lane.
    present = {number: lane.spec for number, lane in running if lane.number == 0}
    keep: dict[int, InstanceSpec] = {}
    for same_clock in (True, False):
        for first, old in present.items():
            if first in keep:
                continue
            for spec in wanted:
                if spec.kind == old.kind and (not same_clock or spec.clock_mhz == old.clock_mhz):
                    keep[first] = spec
                    wanted.remove(spec)
                    break
    while True:
        kept = {first + lane: spec for first, spec in keep.items() for lane in range(spec.pp)}
        free = [gpus_per_node] * nodes
        for number in kept:
            free[places[number].node] -= places[number].spec.tp
        chosen = _pack(_lanes_of(wanted), free)
        if chosen is not None:
            break
        if not keep:
            raise PlacementError(
                f"the TP groups of {placement.describe()} do not fit on {nodes} nodes of {gpus_per_node} GPUs"
            )
        # Make room where a node is nearly free: give up the smallest TP group there.
        dropped = min(kept, key=lambda number: (-free[places[number].node], places[number].spec.tp, number))
        wanted.append(keep.pop(dropped - places[dropped].number))
    leave = tuple(number for number, _ in running if number not in kept)
    return Transition(tuple(sorted(kept.items(), key=lambda item: item[0])), leave, tuple(_placed(wanted, chosen)))
