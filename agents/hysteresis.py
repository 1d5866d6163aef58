"""Whether the present placement stays although another would draw less: a change costs what the objective leaves out.

Draining, loading weights and starting up take time and joules, and queues move; a placement that still carries the
demand at nearly the optimum's power is worth keeping.
"""

from __future__ import annotations

from collections.abc import Sequence

from agents.milp import Counts
from biscale_gym.cluster.placement import Placement
from biscale_gym.planning.classes import InstanceClass


def present_counts(present: Placement, table: Sequence[InstanceClass]) -> tuple[int, ...] | None:
    """Instances of each row's class in a placement; None if one of its instances is of no class of the table."""
    numbers = {(row.phase, row.tp, row.pp, row.clock_mhz): number for number, row in enumerate(table)}
    counts = [0] * len(table)
    for spec in present.instances:
        number = numbers.get((spec.phase, spec.tp, spec.pp, spec.clock_mhz))
        if number is None:
            return None
        counts[number] += 1
    return tuple(counts)


def stays(present: Counts, optimum: Counts, keep_within: float) -> bool:
    """Whether the present counts are kept: they carry the demand, at ``1 + keep_within`` times the least power or less.

    Args:
        present: the present placement, judged for the demand to come.
        optimum: the best placement for that demand.
        keep_within: relative; 0 keeps nothing.
    """
    return keep_within > 0.0 and present.feasible and present.power_w <= (1.0 + keep_within) * optimum.power_w
