"""An independent simulator of the cluster in `docs/cluster.md`: plain classes, no arrays, slow and obvious.

It is written from that page alone, and is what the compiled engine is tested against. Describe a run with a
:class:`Scenario`, give it to :func:`simulate`, compare records, ledgers and the list of events.
"""

from __future__ import annotations

from dataclasses import dataclass

from reference.cluster import Cluster
from reference.description import (
    Batching,
    Border,
    CostFunction,
    Decision,
    Event,
    IdlePowerFunction,
    InstanceSpec,
    NewInstance,
    Phase,
    Pipeline,
    Policy,
    RequestSpec,
    Routing,
    Scenario,
    Switching,
    Transfer,
)
from reference.parts import BUCKETS, Instance, Request

__all__ = [
    "BUCKETS",
    "Batching",
    "Border",
    "CostFunction",
    "Decision",
    "Event",
    "IdlePowerFunction",
    "Instance",
    "InstanceSpec",
    "NewInstance",
    "Phase",
    "Pipeline",
    "Policy",
    "Request",
    "RequestSpec",
    "Result",
    "Routing",
    "Scenario",
    "Switching",
    "Transfer",
    "simulate",
]


@dataclass(frozen=True)
class Result:
    """What a run leaves: requests and instances carry their own records, in the order of their numbers.

    Of an instance, read ``joules`` and ``seconds`` (by bucket), ``iterations``, ``prompt_tokens``, ``output_tokens``,
    ``clock_changes``, ``active_from_s`` and ``gone_s``; of a request, its times, instances, ``preemptions``, status.
    """

    requests: list[Request]
    instances: list[Instance]
    events: list[Event]
    unallocated_joules: float
    unallocated_gpu_seconds: float
    end_s: float

    def total_joules(self) -> float:
        """Every joule of the run."""
        return self.unallocated_joules + sum(sum(instance.joules.values()) for instance in self.instances)

    def count(self, status: str) -> int:
        """Requests whose status is finished, in-flight, rejected or not-arrived."""
        return sum(request.status == status for request in self.requests)


def simulate(scenario: Scenario) -> Result:
    """Run a scenario to its end.

    Raises:
        ValueError: the placement does not fit its nodes, or a policy answers a clock that does not exist.
    """
    cluster = Cluster(scenario)
    for node in cluster.nodes:
        used = sum(instance.tp for instance in cluster.instances if instance.node == node.number)
        if used > node.gpus:
            raise ValueError(f"node {node.number} has {node.gpus} GPUs, its instances take {used}")
    cluster.run()
    return Result(
        cluster.requests,
        cluster.instances,
        cluster.events,
        cluster.unallocated_joules,
        cluster.unallocated_gpu_seconds,
        cluster.now,
    )
