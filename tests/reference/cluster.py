"""The event loop, and changes of placement."""

from __future__ import annotations

import math

from reference.description import Border
from reference.parts import Instance
from reference.serving import Serving


class Cluster(Serving):
    """A run: it looks at every entity for the time of the next event, goes there, and handles the instant."""

    def run(self) -> None:
        """Run to ``until_s``, or until every request is finished or rejected, or until nothing more can happen."""
        until_s = self.scenario.until_s
        for instance in self.instances:
            self.flag(instance)
        self.handle_instant()
        while until_s is not None or self.unsettled_requests > 0:
            next_s = self.next_event_s()
            if next_s == math.inf or (until_s is not None and next_s > until_s):
                break
            self.advance_to(next_s)
            self.handle_instant()
        if until_s is not None:
            self.advance_to(until_s)

    def next_event_s(self) -> float:
        """The earliest time at which anything happens."""
        times_s = [math.inf]
        if self.borders:
            times_s.append(self.borders[0].time_s)
        if self.next_arrival < len(self.requests):
            times_s.append(self.requests[self.next_arrival].arrival_s)
        for node in self.nodes:
            if node.serving is not None:
                times_s.append(node.driver_free_s)
        for instance in self.instances:
            if instance.landings:
                times_s.append(instance.landings[0][0])
            if instance.in_transfer:
                times_s.append(instance.in_transfer[0][0])
            if instance.iteration is not None:
                times_s.append(instance.iteration.ends_s)
                times_s.append(instance.iteration.overrun_s)
            if instance.state == "loading":
                times_s.append(instance.loaded_s)
        return min(times_s)

    def handle_instant(self) -> None:
        """Everything that happens now, kind by kind, in the specified order."""
        while self.borders and self.borders[0].time_s <= self.now:
            self.change_placement(self.borders.pop(0))
        while True:
            for node in self.nodes:
                self.run_driver(node)
            for instance in self.instances:
                while instance.in_transfer and instance.in_transfer[0][0] <= self.now:
                    self.flag(instance)
                    self.deliver(instance, instance.in_transfer.pop(0)[1])
            for instance in self.instances:
                self.handle_timers(instance)
            self.handle_arrivals()
            while self.flagged:
                self.wake(self.flagged.pop(0))
            if self.next_event_s() > self.now:
                return

    def handle_timers(self, instance: Instance) -> None:
        """An iteration that ends or overruns, or weights that are loaded."""
        iteration = instance.iteration
        if iteration is not None and iteration.ends_s <= self.now:
            self.end(instance)
        elif iteration is not None and iteration.overrun_s <= self.now:
            iteration.overrun_s = math.inf
            instance.due_decisions.add("overrun")
            self.flag(instance)
        elif instance.state == "loading" and instance.loaded_s <= self.now:
            self.activate(instance)
            self.empty_common_queues()

    def handle_arrivals(self) -> None:
        """All arrivals of the instant, in the trace's order."""
        while self.next_arrival < len(self.requests) and self.requests[self.next_arrival].arrival_s <= self.now:
            self.arrive(self.requests[self.next_arrival])
            self.next_arrival += 1

    def wake(self, instance: Instance) -> None:
        """Let an instance that computes nothing find work; let one that computes take the decision that is due."""
        due, instance.due_decisions = instance.due_decisions, set()
        iteration = instance.iteration
        if iteration is not None:
            if due:
                reason = "overrun" if "overrun" in due else "arrival"
                self.ask(instance, reason, (iteration.b, iteration.kv, iteration.m, iteration.s2))
            return
        if not instance.works():
            return
        if instance.phase == "prefill":
            self.wake_prefill(instance)
        else:
            self.wake_decode(instance)

    def change_placement(self, border: Border) -> None:
        """Drain what leaves, bring in what is new, and route again what had not begun."""
        returned = []
        waiting = {instance.number for instance in self.instances if instance.state == "waiting-for-gpus"}
        for number in sorted(border.drain):
            instance = self.instances[number]
            if instance.state == "active":
                instance.state = "draining"
                returned += [(request, instance.phase) for request in instance.queue]
                instance.queue.clear()
                self.flag(instance)
            elif instance.in_placement():
                self.retire(instance)
        for new in border.new:
            instance = Instance(len(self.instances), new.spec)
            instance.load_s, instance.start_power_w = new.load_s, new.start_power_w
            self.instances.append(instance)
            if self.scenario.replacement == "instant":
                self.activate(instance)
        for instance in self.instances:
            instance.weight = border.weights.get(instance.number, instance.weight)
        for number in sorted(border.clocks):
            instance, clock = self.instances[number], border.clocks[number]
            if number in waiting:
                instance.clock = instance.target = instance.commanded = clock
            else:
                self.request_clock(instance, clock)
        self.empty_common_queues()
        for request, phase in returned:
            self.route(request, phase)
        self.hand_out_gpus()

    def empty_common_queues(self) -> None:
        """Route whatever waits for an active instance once more."""
        for phase, queue in self.common_queue.items():
            waiting, queue[:] = list(queue), []
            for request in waiting:
                self.route(request, phase)

    def activate(self, instance: Instance) -> None:
        """The instance may take requests from now on; it starts level with the least served of its phase."""
        served = [other.passed for other in self.instances if other.phase == instance.phase and other.state == "active"]
        instance.passed = min(served, default=0.0)
        instance.state = "active"
        instance.active_from_s = self.now
        self.flag(instance)

    def retire(self, instance: Instance) -> None:
        """The instance gives its GPUs back; KV that it still holds for transfer is in host memory from now on."""
        instance.state = "gone"
        instance.gone_s = self.now
        instance.landings.clear()
        instance.calls_running = False
        node = self.nodes[instance.node]
        node.requests = [entry for entry in node.requests if entry.instance is not instance]
        self.hand_out_gpus()

    def hand_out_gpus(self) -> None:
        """Instances that wait for GPUs take free ones of their node, in order, and begin to load."""
        for node in self.nodes:
            here = [instance for instance in self.instances if instance.node == node.number]
            free = node.gpus - sum(instance.tp for instance in here if instance.has_gpus())
            for instance in here:
                if instance.state == "waiting-for-gpus":
                    if instance.tp > free:
                        break
                    free -= instance.tp
                    instance.state = "loading"
                    instance.loaded_s = self.now + instance.load_s
