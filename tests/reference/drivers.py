"""Clocks: asking the policy, the node's driver, and what a change does to a running iteration."""

from __future__ import annotations

import math

from reference.description import Policy
from reference.parts import ClockRequest, Instance, Iteration, Node, Request
from reference.state import State


class Drivers(State):
    """The part of the cluster that changes clocks."""

    def policy_of(self, instance: Instance) -> Policy | None:
        """The policy of the instance's phase, or None where the placement's clock is held."""
        return self.scenario.prefill_policy if instance.phase == "prefill" else self.scenario.decode_policy

    def ask(self, instance: Instance, reason: str, load: tuple[int, int, int, int]) -> None:
        """Ask the phase's policy, if any, about the batch ``load`` = (b, K, m, S2), and act on its answer."""
        policy = self.policy_of(instance)
        if policy is None or (reason == "idle" and not policy.on_idle):
            return
        iteration = instance.iteration
        answer = policy.function(
            {
                "instance": instance.number,
                "phase": instance.phase,
                "reason": reason,
                "now": self.now,
                "clock": instance.clock,
                "target": instance.target,
                "b": load[0],
                "K": load[1],
                "m": load[2],
                "S2": load[3],
                "work_left": 1.0 if iteration is None else (iteration.ends_s - self.now) / iteration.latency_s,
                "queue": len(instance.queue),
                "queue_tokens": sum(request.prompt_tokens for request in instance.queue),
                "in_transfer": len(instance.in_transfer),
                "delivered": len(instance.delivered),
                "kv_used": instance.kv_used,
                "iterations": instance.iterations,
                "slacks_s": [self.slack_s(request) for request in instance.running],
            }
        )
        if not 0 <= answer < self.scenario.clocks:
            raise ValueError(f"instance {instance.number}: policy answered clock {answer} of {self.scenario.clocks}")
        self.log("ask", instance, answer)
        self.request_clock(instance, answer)

    def slack_s(self, request: Request) -> float:
        """What a running request may lose and still meet its TPOT, if its output ended here."""
        decoded = request.generated - 1
        if self.scenario.batching.decode_iterations == "output-length":
            decoded -= 1  # one iteration more than tokens that TPOT divides by
        return request.first_token_s + decoded * self.scenario.tpot_slo_s - self.now

    def request_clock(self, instance: Instance, clock: int) -> None:
        """Hand a clock to the node's driver, unless it is the one last asked for."""
        if clock == instance.target:
            return
        instance.target = clock
        node = self.nodes[instance.node]
        pending = [entry for entry in node.requests if entry.instance is instance]
        if clock == instance.commanded:
            if pending:
                node.requests.remove(pending[0])
        elif pending:
            pending[0].clock = clock
        else:
            node.requests.append(ClockRequest(instance, clock))
        self.run_driver(node)

    def run_driver(self, node: Node) -> None:
        """Do what is due at the node, until nothing is: clocks that land, calls that return, calls that begin."""
        while True:
            for instance in self.instances:
                while instance.node == node.number and instance.landings and instance.landings[0][0] <= self.now:
                    self.land(instance, instance.landings.pop(0)[1])
            if node.serving is not None and node.driver_free_s <= self.now:
                node.serving.calls_running = False
                node.serving = None
            elif node.serving is None and node.requests:
                self.begin_calls(node, node.requests.pop(0))
            else:
                return

    def begin_calls(self, node: Node, entry: ClockRequest) -> None:
        """Start one instance's calls, one per GPU, one after another."""
        instance = entry.instance
        returns_s = []
        at_s = self.now
        for _ in range(instance.tp):
            at_s += self.scenario.switching.draw()
            returns_s.append(at_s)
        # A TP group runs at its slowest rank: the first lowered rank slows it, only the last raised one speeds it up.
        rises = entry.clock > instance.commanded
        lands_s = (returns_s[-1] if rises else returns_s[0]) + self.scenario.switching.settle_s
        instance.landings.append((lands_s, entry.clock))
        instance.commanded = entry.clock
        instance.calls_running = True
        node.serving = instance
        node.driver_free_s = returns_s[-1] + self.scenario.switching.settle_s

    def land(self, instance: Instance, clock: int) -> None:
        """Put a clock in force; the work left of a running iteration goes on at the new pace and power."""
        if clock == instance.clock:
            return
        instance.clock = clock
        instance.clock_changes += 1
        self.log("clock", instance, clock)
        iteration = instance.iteration
        if iteration is not None:
            share_left = (iteration.ends_s - self.now) / iteration.latency_s
            self.rescale_prediction(instance, share_left)
            self.price(instance, iteration)
            iteration.ends_s = self.now + share_left * iteration.latency_s

    def price(self, instance: Instance, iteration: Iteration) -> None:
        """What the iteration costs at the clock in force; while a pass waits in its pipeline, its GPUs are idle."""
        load = (iteration.b, iteration.kv, iteration.m, iteration.s2)
        computing_s, power_w = self.scenario.cost(instance.tp, instance.clock, *load)
        idle_w = self.scenario.idle_power(instance.tp, instance.clock)
        iteration.latency_s = computing_s + iteration.waiting_s
        iteration.power_w = (computing_s * power_w + iteration.waiting_s * idle_w) / iteration.latency_s

    def predict_s(self, policy: Policy, instance: Instance, iteration: Iteration) -> float:
        """What the iteration is believed to last at the clock in force."""
        load = (iteration.b, iteration.kv, iteration.m, iteration.s2)
        return (policy.predict or self.scenario.cost)(instance.tp, instance.clock, *load)[0] + iteration.waiting_s

    def rescale_prediction(self, instance: Instance, share_left: float) -> None:
        """What is left of the iteration is now predicted for the new clock."""
        iteration, policy = instance.iteration, self.policy_of(instance)
        assert iteration is not None
        if policy is None or policy.overrun_margin is None or iteration.overrun_s == math.inf:
            return
        iteration.predicted_done_s += (iteration.share_left - share_left) * iteration.predicted_s
        iteration.share_left = share_left
        iteration.predicted_s = self.predict_s(policy, instance, iteration)
        total_s = iteration.predicted_done_s + share_left * iteration.predicted_s
        iteration.overrun_s = max(self.now, iteration.started_s + total_s * (1.0 + policy.overrun_margin))
