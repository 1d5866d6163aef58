"""Tier 1 from load curves: which instances serve the next window, and how much of the load each takes.

BiScale's class tables hold one clock and one rate per class, and its programme adds up capacities. But where clocks
follow the load, an instance draws a fixed part and little more per request until it is nearly full, and a GPU that no
instance takes idles at almost the power of one that waits. So the load itself is part of the choice:

    minimise    sum_i (W_i(r_i) + price * r_i * missed_i(r_i)) + w_idle * GPUs left over
    subject to  sum of r_i over the instances of a phase = its load, for each phase;  GPUs <= cluster

with the measured curves W, missed of :mod:`biscale_gym.planning.curves` and the price in joules that a late request is
worth. Loads are in mean requests per second, as the curves are: prompts may be shorter today than in the training
demand, and outputs longer. Those of instances are whole shares of the forecast (1 / ``shares``), which makes it a
shortest path over (GPUs, shares): exact up to that division. Requests are routed in proportion to the loads chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.errors import AgentError
from biscale_gym.cluster.placement import PHASES, InstanceSpec, Phase, Placement
from biscale_gym.planning.curves import LoadCurve

Vector = NDArray[np.float64]

UNSERVED_PRICE = 1e6
"""Joules that a request beyond a curve's end costs: only the least overload is taken where nothing carries the load."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class LoadedInstance:
    """An instance and its share of the phase's requests."""

    tp: int
    share: int


@dataclass(frozen=True)
class LoadPlan:
    """Instances of both phases, and what they are expected to do.

    Attributes:
        instances: by phase.
        cost_w: value of the objective, W.
        carries: whether no instance is beyond the end of its curve.
    """

    instances: dict[Phase, tuple[LoadedInstance, ...]]
    cost_w: float
    carries: bool

    def placement(self, start_mhz: dict[Phase, int]) -> Placement:
        """The placement, prefill first, large instances first; weights are the shares."""
        specs = []
        for phase in PHASES:
            for one in sorted(self.instances[phase], key=lambda one: (-one.tp, -one.share)):
                specs.append(InstanceSpec(phase, one.tp, start_mhz[phase], float(one.share)))
        return Placement(tuple(specs))


def instance_costs(
    curve: LoadCurve, load_rps: float, shares: int, price_j: float, forecast_error: float = 0.0
) -> Vector:
    """Expected cost rate of one instance at 1 to ``shares`` shares of a forecast, float64[shares], W.

    The forecast's relative error is taken as normal, by Gauss-Hermite quadrature of ``len(_NODES)`` points.
    """
    certain = load_rps * np.arange(1, shares + 1) / shares
    if forecast_error <= 0.0:
        return _certain_costs(curve, certain, price_j)
    return np.asarray(
        sum(
            weight * _certain_costs(curve, certain * max(0.0, 1.0 + forecast_error * node), price_j)
            for node, weight in zip(_NODES, _WEIGHTS, strict=True)
        )
    )


def _certain_costs(curve: LoadCurve, loads: Vector, price_j: float) -> Vector:
    power_w, missed = curve.at(loads)
    last = curve.points[-1]
    beyond = ~np.isfinite(power_w)
    power_w[beyond], missed[beyond] = last.power_w, last.missed
    late_rps = loads * missed
    unserved_rps = np.where(beyond, loads - last.load_rps, 0.0)
    return power_w + price_j * late_rps + UNSERVED_PRICE * unserved_rps


@dataclass(frozen=True)
class _Phase:
    """Least cost of a phase by (GPUs, shares), and the last instance of the optimum there."""

    cost: Vector
    tp: NDArray[np.int64]
    share: NDArray[np.int64]

    def instances(self, gpus: int, shares: int) -> tuple[LoadedInstance, ...]:
        """The optimum's instances on exactly so many GPUs."""
        found = []
        while shares > 0:
            one = LoadedInstance(int(self.tp[gpus, shares]), int(self.share[gpus, shares]))
            found.append(one)
            gpus, shares = gpus - one.tp, shares - one.share
        return tuple(found)


def _solve_phase(costs: dict[int, Vector], gpus: int, shares: int) -> _Phase:
    cost = np.full((gpus + 1, shares + 1), np.inf)
    cost[0, 0] = 0.0
    last_tp = np.zeros((gpus + 1, shares + 1), np.int64)
    last_share = np.zeros((gpus + 1, shares + 1), np.int64)
    for used in range(1, gpus + 1):
        for tp, own in costs.items():
            if tp > used:
                continue
            before = cost[used - tp]
            for share in range(1, shares + 1):
                reached = before[: shares + 1 - share] + own[share - 1]
                better = np.flatnonzero(reached < cost[used, share:])
                cost[used, share + better] = reached[better]
                last_tp[used, share + better] = tp
                last_share[used, share + better] = share
    return _Phase(cost, last_tp, last_share)


def _shared(costs: dict[int, Vector], degrees: Sequence[int], shares: int) -> tuple[float, tuple[LoadedInstance, ...]]:
    """Least cost of a phase with given instances, each serving something, and their shares."""
    cost = np.full(shares + 1, np.inf)
    cost[0] = 0.0
    taken = np.zeros((len(degrees), shares + 1), np.int64)
    for number, tp in enumerate(degrees):
        own = costs[tp]
        reached = np.full(shares + 1, np.inf)
        for share in range(1, shares + 1):
            added = cost[: shares + 1 - share] + own[share - 1]
            better = np.flatnonzero(added < reached[share:])
            reached[share + better] = added[better]
            taken[number, share + better] = share
        cost = reached
    left, found = shares, []
    for number in reversed(range(len(degrees))):
        found.append(LoadedInstance(degrees[number], int(taken[number, left])))
        left -= int(taken[number, left])
    return float(cost[shares]), tuple(found)


def _kept(
    costs: dict[Phase, dict[int, Vector]], present: Placement, gpus: int, unallocated_w: float, shares: int
) -> LoadPlan | None:
    """The instances that serve now, with the best shares for the load; None if a curve is missing."""
    instances: dict[Phase, tuple[LoadedInstance, ...]] = {}
    cost_w = unallocated_w * (gpus - present.gpus)
    for phase in PHASES:
        degrees = [spec.tp for spec in present.of(phase)]
        if len(degrees) > shares or any(spec.pp > 1 or spec.tp not in costs[phase] for spec in present.of(phase)):
            return None
        phase_w, instances[phase] = _shared(costs[phase], degrees, shares)
        cost_w += phase_w
    return LoadPlan(instances, cost_w, carries=False)


def plan_load(
    curves: Sequence[LoadCurve],
    gpus: int,
    loads_rps: Mapping[Phase, float],
    price_j: float,
    unallocated_w: float,
    shares: int = 24,
    present: Placement | None = None,
    keep_within: float = 0.0,
    forecast_error: float = 0.0,
) -> LoadPlan:
    """The cheapest instances and shares for a load; or the present instances with new shares.

    Args:
        curves: of every kind of instance of both phases.
        gpus: of the cluster, nodes of which hold whole instances of every TP degree.
        loads_rps: forecast of the window's mean load of each phase, in mean requests per second.
        price_j: joules that a request outside its SLO counts.
        unallocated_w: power of a GPU that no instance takes.
        shares: into how many parts a load is divided.
        present: the placement that serves now.
        keep_within: its instances stay while their cost is within this share of the optimum's: an instance that is
            given up draws its power until its last request is served.
        forecast_error: relative standard deviation of the forecast's error.

    Raises:
        AgentError: a phase has no curve, or one instance of each does not fit.
    """
    costs: dict[Phase, dict[int, Vector]] = {phase: {} for phase in PHASES}
    ends_rps = {(curve.phase, curve.tp): curve.points[-1].load_rps for curve in curves}

    def told(plan: LoadPlan) -> LoadPlan:
        carried = [
            one.share * loads_rps[phase] / shares <= ends_rps[phase, one.tp]
            for phase in PHASES
            for one in plan.instances[phase]
        ]
        return replace(plan, carries=all(carried))

    for curve in curves:
        if curve.tp <= gpus:
            load_rps = loads_rps[curve.phase]
            costs[curve.phase][curve.tp] = instance_costs(curve, load_rps, shares, price_j, forecast_error)
    solved: dict[Phase, _Phase] = {}
    for phase in PHASES:
        if not costs[phase]:
            raise AgentError(f"no {phase} instance fits on {gpus} GPUs")
        solved[phase] = _solve_phase(costs[phase], gpus, shares)
    prefill, decode = solved["prefill"].cost[:, shares], solved["decode"].cost[:, shares]
    best = (np.inf, 0, 0)
    for p in range(1, gpus):
        for d in range(1, gpus - p + 1):
            best = min(best, (float(prefill[p] + decode[d] + unallocated_w * (gpus - p - d)), p, d))
    cost_w, p, d = best
    if not np.isfinite(cost_w):
        raise AgentError(f"an instance of each phase does not fit on {gpus} GPUs")
    if present is not None and keep_within > 0.0:
        kept = _kept(costs, present, gpus, unallocated_w, shares)
        if kept is not None and kept.cost_w <= (1.0 + keep_within) * cost_w:
            return told(kept)
    best_instances: dict[Phase, tuple[LoadedInstance, ...]] = {
        "prefill": solved["prefill"].instances(p, shares),
        "decode": solved["decode"].instances(d, shares),
    }
    return told(LoadPlan(best_instances, cost_w, carries=False))
