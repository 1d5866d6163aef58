"""How many instances of each class: the integer programme of tier 1.

    minimise    sum_c n_c * power_c
    subject to  sum_{c: TP_c >= p} n_c * gpus_c / p <= nodes * floor(gpus_per_node / p)      for every TP degree p
                sum_{c in phase} n_c * R_c >= demand                                         for each phase
                sum_{c in phase} n_c >= 1                                                    for each phase
                n_c integer >= 0

power_c = E_c * R_c are the watts of one instance at its greatest rate.

With ``unallocated_w`` the objective also counts that power for every GPU left over. A TP group lies on one node; as TP
degrees are powers of two, the constraints on places of p GPUs are exactly what makes the groups fit on the nodes,
largest first.

Solved exactly: by HiGHS, or on up to ``FEW_GPUS`` GPUs by :mod:`agents.fronts`, which is faster there. That needs nodes
that are whole places of every TP degree, so that the number of GPUs is the only limit.

Where no counts carry the demand, the ones that come nearest are taken: the least ratio of capacity to demand over the
two phases is made as great as possible, and among such counts power is least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from agents.errors import AgentError
from agents.fronts import FrontProgramme

Vector = NDArray[np.float64]

_RATE_TOLERANCE = 1e-9
"""Relative slack of the demand constraints: a placement is not refused for a rounding error."""

FEW_GPUS = 32
"""Up to so many, fronts take a fraction of the solver's time. They grow with the GPUs, the solver's work hardly."""


@dataclass(frozen=True)
class Counts:
    """A solution: instances per class, in the order of the classes given."""

    counts: tuple[int, ...]
    coverage: float
    """Least ratio of capacity to demand over both phases, at most 1 if ``feasible`` is False."""
    feasible: bool
    power_w: float
    """Value of the objective, W."""


@dataclass(frozen=True)
class Room:
    """The cluster that instances must fit on."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    def places(self, tp: Vector, gpus_each: Vector) -> LinearConstraint:
        """For every TP degree p: the groups of p GPUs or more take no more places of p GPUs than the nodes offer."""
        degrees = np.unique(tp)
        taken = np.array([np.where(tp >= p, gpus_each / p, 0.0) for p in degrees])
        return LinearConstraint(taken, ub=[self.nodes * (self.gpus_per_node // p) for p in degrees])


def judge_counts(
    counts: Sequence[int],
    is_prefill: Sequence[bool],
    gpus_each: Sequence[int],
    rate_rps: Sequence[float],
    power_w: Sequence[float],
    *,
    room: Room,
    demand_rps: float,
    unallocated_w: float = 0.0,
) -> Counts:
    """What given counts carry and draw, in the terms of :func:`choose_counts`, whose other arguments these are.

    That they fit the room is not checked.
    """
    number = np.asarray(counts, dtype=np.float64)
    prefill = np.asarray(is_prefill, dtype=bool)
    rate = np.asarray(rate_rps, dtype=np.float64)
    idle_gpus = room.gpus - np.asarray(gpus_each, dtype=np.float64) @ number
    capacity = np.vstack([prefill, ~prefill]).astype(np.float64) @ (number * rate)
    return Counts(
        counts=tuple(int(n) for n in counts),
        coverage=float((capacity / demand_rps).min()) if demand_rps > 0.0 else float("inf"),
        feasible=bool((capacity >= demand_rps * (1.0 - _RATE_TOLERANCE)).all()),
        power_w=float(np.asarray(power_w, dtype=np.float64) @ number + unallocated_w * idle_gpus),
    )


def choose_counts(
    is_prefill: Sequence[bool],
    tp: Sequence[int],
    gpus_each: Sequence[int],
    rate_rps: Sequence[float],
    power_w: Sequence[float],
    *,
    room: Room,
    demand_rps: float,
    unallocated_w: float = 0.0,
) -> Counts:
    """The cheapest counts that carry the demand, or those that come nearest.

    Args:
        is_prefill: phase of each class.
        tp: TP degree of each class, powers of two.
        gpus_each: GPUs of one instance of each class, a multiple of its TP degree.
        rate_rps: greatest mean rate R_c of one instance, requests/s.
        power_w: E_c * R_c of one instance, W.
        room: the cluster.
        demand_rps: what each phase must carry, margin included.
        unallocated_w: power counted for each GPU that no instance takes, W.

    Raises:
        AgentError: a phase has no class that carries load, or the cluster cannot hold one instance of each phase.
    """
    prefill = np.asarray(is_prefill, dtype=bool)
    size = np.asarray(gpus_each, dtype=np.float64)
    rate = np.asarray(rate_rps, dtype=np.float64)
    power = np.asarray(power_w, dtype=np.float64)
    demand = max(demand_rps, 0.0)
    for name, mask in (("prefill", prefill), ("decode", ~prefill)):
        if not (mask & (rate > 0.0)).any():
            raise AgentError(
                f"no {name} class carries any load within the SLO: relax the SLO, or add TP degrees or clocks"
            )
    phases = np.vstack([prefill, ~prefill])
    programme: FrontProgramme | SolverProgramme
    if room.gpus <= FEW_GPUS and room.gpus_per_node % max(tp) == 0:
        programme = FrontProgramme(phases, size.astype(np.int64), rate, room.gpus)
    else:
        programme = SolverProgramme(
            phases=phases.astype(np.float64),
            rate=rate,
            most=np.where(rate > 0.0, np.floor(room.gpus / size), 0.0),
            places=room.places(np.asarray(tp, dtype=np.float64), size),
        )
    # A GPU that an instance takes is one less that idles unallocated.
    cost = power - unallocated_w * size
    counts = programme.cheapest(cost, demand * (1.0 - _RATE_TOLERANCE))
    feasible = counts is not None
    if counts is None:
        coverage = programme.greatest_coverage(demand)
        if coverage is None:
            least = [int(size[mask & (rate > 0.0)].min()) for mask in (prefill, ~prefill)]
            raise AgentError(
                f"a prefill instance (at least {least[0]} GPUs) and a decode instance (at least {least[1]}) do not fit "
                f"on {room.nodes} nodes of {room.gpus_per_node} GPUs"
            )
        # A little below what was found: the second programme must not fail for a rounding error of the first.
        counts = programme.cheapest(cost, demand * coverage * (1.0 - 1e-6))
        if counts is None:
            raise AgentError(f"the solver lost the placement that carries {coverage:.3%} of {demand:.3f} requests/s")
    judged = judge_counts(
        [int(n) for n in counts],
        is_prefill,
        gpus_each,
        rate_rps,
        power_w,
        room=room,
        demand_rps=demand,
        unallocated_w=unallocated_w,
    )
    return replace(judged, feasible=feasible)


@dataclass(frozen=True)
class SolverProgramme:
    """One instance of the problem, for HiGHS: phases float64[2, c], rate and most float64[c]."""

    phases: Vector
    rate: Vector
    most: Vector
    places: LinearConstraint

    def cheapest(self, cost: Vector, demand: float) -> Vector | None:
        """Counts of least cost whose capacity reaches ``demand`` in both phases; None if there are none."""
        result = milp(
            cost,
            integrality=np.ones(cost.size),
            bounds=Bounds(0.0, self.most),
            constraints=[
                self.places,
                LinearConstraint(self.phases * self.rate, lb=demand),
                LinearConstraint(self.phases, lb=1.0),
            ],
            options={"mip_rel_gap": 0.0},
        )
        return None if result.x is None else np.round(result.x)

    def greatest_coverage(self, demand: float) -> float | None:
        """The greatest share of the demand, at most 1, carried in both phases; None if no counts fit at all."""
        classes = self.rate.size
        result = milp(
            np.append(np.zeros(classes), -1.0),
            integrality=np.append(np.ones(classes), 0.0),
            bounds=Bounds(0.0, np.append(self.most, 1.0)),
            constraints=[
                LinearConstraint(np.hstack([self.places.A, np.zeros((len(self.places.A), 1))]), ub=self.places.ub),
                LinearConstraint(np.hstack([self.phases * self.rate, -demand * np.ones((2, 1))]), lb=0.0),
                LinearConstraint(np.hstack([self.phases, np.zeros((2, 1))]), lb=1.0),
            ],
            options={"mip_rel_gap": 0.0},
        )
        return None if result.x is None else float(result.x[-1])
