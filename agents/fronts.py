"""The integer programme of tier 1 on a few GPUs: by phase and number of GPUs, every rate and cost worth having.

A front holds the combinations of instances on exactly g GPUs that no other combination on g GPUs beats in both rate and
cost; rates beyond the demand count as the demand. The front of g follows from those of fewer GPUs, one instance more at
a time, and as a part of an undominated combination is itself undominated, nothing is lost: the search is exact. Fronts
stay small (under a hundred entries on 16 GPUs), where a general solver spends most of its time before it branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Front:
    """Undominated combinations on one number of GPUs, by falling rate and cost.

    Attributes:
        rate, cost: float64[k] of the combination.
        added: int64[k], class of its last instance.
        before: int64[k], position of what it was added to in that class's GPUs fewer's front.
    """

    rate: Vector
    cost: Vector
    added: Whole
    before: Whole


def build_fronts(size: Whole, rate: Vector, cost: Vector, gpus: int, demand: float) -> list[Front]:
    """The fronts of 0 to ``gpus`` GPUs of one phase.

    Args:
        size: int64[c], GPUs of one instance of each class.
        rate: float64[c], requests/s of one instance; classes without any are left out.
        cost: float64[c] of one instance.
        gpus: of the cluster.
        demand: requests/s; more than that is worth nothing.
    """
    nothing = np.zeros(1, np.int64)
    fronts = [Front(np.zeros(1), np.zeros(1), nothing, nothing)]
    usable = np.flatnonzero(rate > 0.0)
    for total in range(1, gpus + 1):
        parts = [(c, fronts[total - size[c]]) for c in usable if size[c] <= total]
        if not parts:
            none = np.zeros(0)
            fronts.append(Front(none, none, none.astype(np.int64), none.astype(np.int64)))
            continue
        reached = np.concatenate([np.minimum(front.rate + rate[c], demand) for c, front in parts])
        spent = np.concatenate([front.cost + cost[c] for c, front in parts])
        added = np.concatenate([np.full(front.rate.size, c) for c, front in parts])
        before = np.concatenate([np.arange(front.rate.size) for _, front in parts])
        order = np.lexsort((spent, -reached))
        cheaper = np.ones(order.size, dtype=bool)
        cheaper[1:] = spent[order][1:] < np.minimum.accumulate(spent[order])[:-1]
        kept = order[cheaper]
        fronts.append(Front(reached[kept], spent[kept], added[kept], before[kept]))
    return fronts


def _counts(fronts: list[Front], size: Whole, gpus: int) -> Vector:
    """Instances per class of a front's first combination, the one of greatest rate."""
    counts = np.zeros(size.size)
    position = 0
    while gpus > 0:
        front = fronts[gpus]
        added = front.added[position]
        counts[added] += 1.0
        position = front.before[position]
        gpus -= int(size[added])
    return counts


@dataclass(frozen=True)
class FrontProgramme:
    """One instance of the problem, where GPUs are all that limits the counts.

    Attributes:
        phases: bool[2, c], classes of prefill and of decode.
        size: int64[c], GPUs of an instance.
        rate: float64[c], requests/s of an instance.
        gpus: of the cluster.
    """

    phases: NDArray[np.bool_]
    size: Whole
    rate: Vector
    gpus: int

    def _both(self, cost: Vector, demand: float) -> list[list[Front]]:
        return [
            build_fronts(self.size, np.where(phase, self.rate, 0.0), cost, self.gpus, demand) for phase in self.phases
        ]

    def cheapest(self, cost: Vector, demand: float) -> Vector | None:
        """Counts of least cost whose rate reaches ``demand`` in both phases; None if there are none."""
        both = self._both(cost, demand)
        least = [
            [front.cost[0] if front.rate.size and front.rate[0] >= demand else np.inf for front in fronts[1:]]
            for fronts in both
        ]
        total, prefill, decode = min(
            (
                (least[0][p - 1] + least[1][d - 1], p, d)
                for p in range(1, self.gpus)
                for d in range(1, self.gpus - p + 1)
            ),
            default=(np.inf, 0, 0),
        )
        if np.isinf(total):
            return None
        return _counts(both[0], self.size, prefill) + _counts(both[1], self.size, decode)

    def greatest_coverage(self, demand: float) -> float | None:
        """The greatest share of the demand, at most 1, carried in both phases; None if no counts fit at all."""
        both = self._both(np.zeros(self.rate.size), demand)
        most = [
            np.maximum.accumulate([front.rate[0] if front.rate.size else -np.inf for front in fronts[1:]])
            for fronts in both
        ]
        share = max((min(most[0][p - 1], most[1][self.gpus - p - 1]) for p in range(1, self.gpus)), default=-np.inf)
        return None if np.isinf(share) else float(share / demand)
