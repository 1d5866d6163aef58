"""The state of a run, its log of events and its energy meter."""

from __future__ import annotations

from reference.description import Event, Phase, Scenario
from reference.parts import Instance, Node, Request


class State:
    """What every part of the simulator reads and writes."""

    def __init__(self, scenario: Scenario) -> None:
        """The moment before the first event: every instance of the placement is active and idle."""
        self.scenario = scenario
        self.now = 0.0
        self.events: list[Event] = []
        self.requests = [Request(number, spec) for number, spec in enumerate(scenario.requests)]
        self.instances = [Instance(number, spec) for number, spec in enumerate(scenario.instances)]
        self.nodes = [
            Node(number, min(scenario.gpus_per_node, scenario.gpus - number * scenario.gpus_per_node))
            for number in range(scenario.nodes)
        ]
        for instance in self.instances:
            instance.state = "active"
            instance.active_from_s = 0.0
        self.next_arrival = 0
        self.unsettled_requests = len(self.requests)
        self.borders = sorted(scenario.borders, key=lambda border: border.time_s)
        self.common_queue: dict[Phase, list[Request]] = {"prefill": [], "decode": []}
        self.flagged: list[Instance] = []
        self.unallocated_joules = 0.0
        self.unallocated_gpu_seconds = 0.0

    def log(self, kind: str, instance: Instance | None, detail: int) -> None:
        """Append to the chronological list of events."""
        self.events.append((self.now, kind, -1 if instance is None else instance.number, detail))

    def flag(self, instance: Instance) -> None:
        """Have the instance woken at the end of this instant."""
        if instance not in self.flagged:
            self.flagged.append(instance)

    def power_w(self, instance: Instance) -> float:
        """What all GPUs of an instance draw at this moment."""
        if not instance.has_gpus():
            return 0.0
        if instance.iteration is not None:
            return instance.tp * instance.iteration.power_w
        idle_w = self.scenario.idle_power(instance.tp, instance.clock)
        return instance.tp * (idle_w + (instance.start_power_w if instance.state == "loading" else 0.0))

    def advance_to(self, time_s: float) -> None:
        """Let time pass: nothing changes on the way, so energy is power times time."""
        elapsed_s = time_s - self.now
        free_gpus = self.scenario.gpus
        for instance in self.instances:
            if instance.has_gpus():
                free_gpus -= instance.tp
                instance.joules[instance.bucket()] += self.power_w(instance) * elapsed_s
                instance.seconds[instance.bucket()] += elapsed_s
        # With `instant` re-placement old and new instances may together exceed the cluster for a while.
        free_gpus = max(0, free_gpus)
        self.unallocated_joules += free_gpus * self.scenario.idle_power(1, 0) * elapsed_s
        self.unallocated_gpu_seconds += free_gpus * elapsed_s
        self.now = time_s
