"""Routing, prefill and decode: a request's way through the cluster."""

from __future__ import annotations

import math

from reference.description import Phase
from reference.drivers import Drivers
from reference.parts import Instance, Iteration, Request


class Serving(Drivers):
    """The part of the cluster that moves requests."""

    # Routing.

    def could_hold(self, instance: Instance, request: Request) -> bool:
        """Whether the request's KV can ever fit."""
        need = request.prompt_tokens
        if instance.phase == "decode":
            need += request.output_tokens
        return need <= instance.kv_capacity

    def servable(self, request: Request, phase: Phase) -> bool:
        """Whether the placement has an instance of the phase, loaded or not, that can ever hold the request."""
        return any(
            instance.phase == phase and instance.in_placement() and self.could_hold(instance, request)
            for instance in self.instances
        )

    def decodes(self, request: Request) -> bool:
        """Whether decode has anything to do for the request."""
        return request.output_tokens > 1 or self.scenario.batching.decode_iterations == "output-length"

    def arrive(self, request: Request) -> None:
        """A request arrives."""
        phase = self.scenario.arrival_phase
        request.status = "in-flight"
        possible = phase == "decode" or self.servable(request, "prefill")
        if self.decodes(request):
            possible = possible and self.servable(request, "decode")
        one_token_only = phase == "decode" and not self.decodes(request)
        chosen = self.choose(request, phase) if possible and not one_token_only else None
        self.log("arrive", chosen, request.number)
        if phase == "decode":
            request.generated = 1
            request.first_token_s = self.now
        if not possible:
            self.reject(request)
        elif one_token_only:
            self.finish(request, None)
        elif chosen is None:
            self.common_queue[phase].append(request)
        else:
            self.enqueue(request, chosen)

    def route(self, request: Request, phase: Phase) -> None:
        """Send a request that is already in the system to an instance of the phase, or to the common queue."""
        chosen = self.choose(request, phase)
        if chosen is not None:
            self.enqueue(request, chosen)
        elif self.servable(request, phase):
            self.common_queue[phase].append(request)
        else:
            self.reject(request)

    def enqueue(self, request: Request, instance: Instance) -> None:
        """Join the instance's queue."""
        if instance.phase == "prefill":
            request.prefill_instance = instance.number
        else:
            request.decode_instance = instance.number
        instance.queue.append(request)
        policy = self.policy_of(instance)
        if instance.iteration is None:
            self.flag(instance)
        elif instance.phase == "prefill" and policy is not None and policy.on_arrival:
            instance.due_decisions.add("arrival")
            self.flag(instance)

    def choose(self, request: Request, phase: Phase) -> Instance | None:
        """The router's pick among active instances that can hold the request."""
        candidates = [
            instance
            for instance in self.instances
            if instance.phase == phase and instance.state == "active" and self.could_hold(instance, request)
        ]
        if not candidates:
            return None
        routing = self.scenario.routing
        router = routing.prefill if phase == "prefill" else routing.decode
        if router == "weighted-round-robin":
            chosen = min(candidates, key=lambda instance: instance.passed)
            chosen.passed += 1.0 / chosen.weight
            return chosen
        if router == "shortest-queue":
            return min(candidates, key=lambda instance: len(instance.queue))
        if router == "power-of-two":
            assert routing.two_candidates is not None
            candidates = [candidates[position] for position in routing.two_candidates(len(candidates))]
        return min(candidates, key=self.load)

    def load(self, instance: Instance) -> int:
        """Requests that least-loaded counts."""
        if instance.phase == "decode" and self.scenario.routing.decode_load == "waiting":
            return len(instance.queue)
        return len(instance.queue) + instance.requests_begun()

    def reject(self, request: Request) -> None:
        """No instance of the placement can ever hold the request."""
        request.status = "rejected"
        self.unsettled_requests -= 1
        self.log("reject", None, request.number)
        self.release_source(request)

    def finish(self, request: Request, instance: Instance | None) -> None:
        """The request has all its tokens."""
        request.status = "finished"
        self.unsettled_requests -= 1
        request.finish_s = self.now
        self.log("finish", instance, request.number)

    def release_source(self, request: Request) -> None:
        """Give back the KV that the prefill side holds, if any: prompts that wait for memory may now fit."""
        if request.source is not None and request.on_source:
            request.on_source = False
            request.source.kv_used -= request.prompt_tokens
            self.flag(request.source)

    # Prefill.

    def form_prefill_batch(self, instance: Instance) -> Iteration | None:
        """Take prompts (or chunks of them) from the head of the queue, within the token budget and the KV capacity."""
        batching = self.scenario.batching
        batch = Iteration([], [], b=0, kv=0, m=0, s2=0)

        def add(request: Request, tokens: int) -> None:
            end = request.prefilled_tokens + tokens
            batch.requests.append(request)
            batch.chunk_ends.append(end)
            batch.m += tokens
            batch.s2 += end**2 - request.prefilled_tokens**2
            instance.unfinished_prompt = request if end < request.prompt_tokens else None

        if instance.unfinished_prompt is not None:
            request = instance.unfinished_prompt
            add(request, min(request.prompt_tokens - request.prefilled_tokens, batching.prefill_token_budget))
        while instance.queue:
            request = instance.queue[0]
            room = batching.prefill_token_budget - batch.m
            if instance.kv_used + request.prompt_tokens > instance.kv_capacity:
                break
            if batching.chunked_prefill:
                if room == 0:
                    break
                tokens = min(room, request.prompt_tokens)
            else:
                if batch.requests and request.prompt_tokens > room:
                    break
                tokens = request.prompt_tokens
            instance.queue.pop(0)
            instance.kv_used += request.prompt_tokens
            request.source = instance
            request.on_source = True
            add(request, tokens)
        return batch if batch.requests else None

    def wake_prefill(self, instance: Instance) -> None:
        """Start a batch if one can be formed."""
        batch = self.form_prefill_batch(instance)
        if batch is not None:
            self.start(instance, batch)
        elif instance.state == "draining":
            self.retire(instance)
        elif instance.nothing_asked:
            instance.nothing_asked = False
            self.ask(instance, "idle", (0, 0, 0, 0))

    def end_prefill(self, instance: Instance, batch: Iteration) -> None:
        """The batch's tokens are computed; whole prompts have their first token and go to decode."""
        instance.prompt_tokens += batch.m
        for request, end in zip(batch.requests, batch.chunk_ends, strict=True):
            request.prefilled_tokens = end
            if end < request.prompt_tokens:
                continue
            request.generated = 1
            request.first_token_s = self.now
            instance.output_tokens += 1
            if not self.decodes(request):
                self.finish(request, instance)
                self.release_source(request)
            else:
                self.route(request, "decode")

    # Decode.

    def wake_decode(self, instance: Instance) -> None:
        """Join what was delivered, reserve, preempt, then start an iteration over whatever runs."""
        while instance.delivered:
            self.join(instance, instance.delivered.pop(0))
        self.reserve(instance)
        batching = self.scenario.batching
        if batching.preemption == "recompute" and batching.decode_admission == "current":
            while len(instance.running) > 1 and instance.kv_used + len(instance.running) > instance.kv_capacity:
                self.preempt(instance)
        if instance.running:
            recomputed = [request.kv_tokens() for request in instance.running if request.must_recompute]
            ordinary = [request.kv_tokens() for request in instance.running if not request.must_recompute]
            batch = Iteration(
                list(instance.running),
                [],
                b=len(ordinary),
                kv=sum(ordinary),
                m=sum(recomputed),
                s2=sum(tokens**2 for tokens in recomputed),
            )
            self.start(instance, batch)
        elif instance.state == "draining" and not instance.queue and not instance.in_transfer:
            self.retire(instance)
        elif instance.nothing_asked:
            instance.nothing_asked = False
            self.ask(instance, "idle", (0, 0, 0, 0))

    def reserve(self, instance: Instance) -> None:
        """Claim memory for requests at the head of the waiting queue, in order, until one does not fit."""
        batching = self.scenario.batching
        while instance.queue:
            request = instance.queue[0]
            tokens = request.kv_tokens()
            if batching.decode_admission == "full":
                tokens = request.prompt_tokens + request.output_tokens
            if instance.kv_used + tokens > instance.kv_capacity:
                return
            if request.must_recompute and instance.kv_used + tokens + len(instance.running) + 1 > instance.kv_capacity:
                return
            if instance.requests_begun() >= batching.max_decode_sequences:
                return
            instance.queue.pop(0)
            instance.kv_used += tokens
            request.claimed_tokens = tokens
            if request.must_recompute:
                self.join(instance, request)
                continue
            self.log("claim", instance, request.number)
            delivery_s = self.start_transfer(request, instance)
            if delivery_s > self.now:
                instance.in_transfer.append((delivery_s, request))
            else:
                self.deliver(instance, request)
                self.join(instance, instance.delivered.pop(0))

    def start_transfer(self, request: Request, decode: Instance) -> float:
        """Take both links for the transfer of a request's KV; the time of delivery in seconds."""
        prefill, transfer = request.source, self.scenario.transfer
        if prefill is None:
            return self.now
        if prefill.node == decode.node:
            pair_bytes_per_s = transfer.within_node_bytes_per_s
        else:
            pair_bytes_per_s = transfer.between_nodes_bytes_per_s
        start_s = max(self.now, prefill.link_free_s, decode.link_free_s)
        size = request.prompt_tokens * transfer.bytes_per_token
        end_s = start_s + size / (min(prefill.tp, decode.tp) * pair_bytes_per_s)
        prefill.link_free_s = decode.link_free_s = end_s
        return end_s + transfer.latency_s

    def deliver(self, instance: Instance, request: Request) -> None:
        """The request's KV is here."""
        request.delivered_s = self.now
        self.log("deliver", instance, request.number)
        instance.delivered.append(request)
        self.release_source(request)

    def join(self, instance: Instance, request: Request) -> None:
        """Become part of the running batch."""
        if math.isnan(request.decode_start_s):
            request.decode_start_s = self.now
        instance.running.append(request)
        self.log("join", instance, request.number)

    def preempt(self, instance: Instance) -> None:
        """The request that joined last gives its memory back and waits at the head of the queue."""
        request = instance.running.pop()
        instance.kv_used -= request.claimed_tokens
        request.must_recompute = True
        request.preemptions += 1
        instance.queue.insert(0, request)
        self.log("preempt", instance, request.number)

    def end_decode(self, instance: Instance, batch: Iteration) -> None:
        """Every request of the batch has one token more."""
        batching = self.scenario.batching
        for request in batch.requests:
            request.generated += 1
            request.must_recompute = False
            instance.output_tokens += 1
            if batching.decode_admission == "current":
                request.claimed_tokens += 1
                instance.kv_used += 1
        for request in batch.requests:
            last = request.output_tokens + (1 if batching.decode_iterations == "output-length" else 0)
            if request.generated >= last:
                instance.running.remove(request)
                instance.kv_used -= request.claimed_tokens
                self.finish(request, instance)

    # Both.

    def start(self, instance: Instance, batch: Iteration) -> None:
        """Ask the policy, then compute the batch at the clock in force."""
        self.ask(instance, "boundary", (batch.b, batch.kv, batch.m, batch.s2))
        self.enter_pipeline(instance, batch)
        self.price(instance, batch)
        batch.ends_s = self.now + batch.latency_s
        policy = self.policy_of(instance)
        if policy is not None and policy.overrun_margin is not None:
            batch.started_s = self.now
            batch.predicted_s = self.predict_s(policy, instance, batch)
            batch.overrun_s = self.now + batch.predicted_s * (1.0 + policy.overrun_margin)
        instance.nothing_asked = True
        instance.iteration = batch
        self.log(f"{instance.phase}-start", instance, len(batch.requests))
        for request in batch.requests:
            if instance.phase == "prefill" and request.prefilled_tokens == 0:
                request.prefill_start_s = self.now

    def enter_pipeline(self, instance: Instance, batch: Iteration) -> None:
        """Follow the pass from stage to stage: each computes one pass at a time, in the order in which they entered."""
        pipeline = instance.pipeline
        if pipeline is None:
            return
        computing_s = self.scenario.cost(instance.tp, instance.clock, batch.b, batch.kv, batch.m, batch.s2)[0]
        free_s = self.instances[pipeline.first_lane].stages_free_s
        here_s = self.now
        for stage in range(pipeline.stages):
            if stage > 0:
                here_s += pipeline.handover_s + pipeline.handover_s_per_token * (batch.b + batch.m)
            here_s = max(here_s, free_s[stage]) + computing_s / pipeline.stages
            free_s[stage] = here_s
        batch.waiting_s = here_s - self.now - computing_s

    def end(self, instance: Instance) -> None:
        """The iteration ends."""
        batch = instance.iteration
        assert batch is not None
        instance.iteration = None
        instance.iterations += 1
        self.log(f"{instance.phase}-end", instance, len(batch.requests))
        self.flag(instance)
        if instance.phase == "prefill":
            self.end_prefill(instance, batch)
        else:
            self.end_decode(instance, batch)

    def retire(self, instance: Instance) -> None:
        """A drained instance leaves; see the cluster."""
        raise NotImplementedError
