"""vLLM's scheduler: what it holds, what it has scheduled, and the hooks around its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from biscale_gym.cluster.placement import Phase
from biscale_gym.live.devices import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """What the scheduler chose to run next.

    Attributes:
        work: of the batch.
        tokens: by request id, tokens computed for it in this batch.
    """

    work: Work
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class Held:
    """A request that an engine's scheduler holds, as the scheduler knows it.

    Attributes:
        name: its id.
        prompt_tokens: of its prompt.
        computed_tokens: of prompt and output, those whose KV is there or is being computed.
        made: output tokens so far.
        output_tokens: how many it will make.
        arrived_s: at this server, seconds since the epoch.
        told: what the client said of it beside the request.
    """

    name: str
    prompt_tokens: int
    computed_tokens: int
    made: int
    output_tokens: int
    arrived_s: float
    told: dict[str, Any]


def held_requests(scheduler: Any) -> Iterator[Held]:
    """A scheduler's requests that are not finished, in order of arrival (finished ones may still hold KV)."""
    for name, request in list(scheduler.requests.items()):  # the list: in another thread requests come and go
        if not request.is_finished():
            yield Held(
                name,
                int(request.num_prompt_tokens),
                int(request.num_computed_tokens),
                int(request.num_output_tokens),
                int(request.max_tokens),
                float(request.arrival_time),
                (request.sampling_params and request.sampling_params.extra_args) or {},
            )


def finished_requests(scheduler: Any, names: Iterable[str]) -> set[str]:
    """Which of these requests have ended."""
    known = scheduler.requests
    return {name for name in names if name not in known or known[name].is_finished()}


def batch_of(scheduler: Any, scheduled: Any) -> Batch:
    """What a scheduler has just scheduled."""
    tokens: dict[str, int] = {}
    batch, kv_tokens, prefill_tokens, sum_len_sq = 0, 0, 0, 0.0
    for request, count in scheduled.num_scheduled_tokens.items():
        end = int(scheduler.requests[request].num_computed_tokens)  # this batch's included
        tokens[request] = count
        if count == 1 and end > 1:
            batch += 1
            kv_tokens += end
        else:
            prefill_tokens += count
            sum_len_sq += float(end) ** 2 - float(end - count) ** 2
    return Batch(Work(float(batch), float(kv_tokens), float(prefill_tokens), sum_len_sq), tokens)


def kv_usage(scheduler: Any) -> float:
    """Share of the KV blocks that is taken."""
    return float(scheduler.kv_cache_manager.usage)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine was started with.

    Attributes:
        phase: what its part in KV transfer says of it; None: it has both.
        kv_capacity_tokens: of its KV blocks.
        token_budget, max_sequences: of a batch.
        chunked: whether prompts may be cut.
    """

    phase: Phase | None
    kv_capacity_tokens: int
    token_budget: int
    max_sequences: int
    chunked: bool


def limits_of(scheduler: Any) -> Limits:
    """Of the engine that a scheduler belongs to."""
    transfer, batching = scheduler.vllm_config.kv_transfer_config, scheduler.scheduler_config
    roles: dict[str, Phase] = {"kv_producer": "prefill", "kv_consumer": "decode"}
    return Limits(
        roles.get(transfer.kv_role) if transfer is not None else None,
        int(scheduler.kv_cache_config.num_blocks) * int(scheduler.block_size),
        int(batching.max_num_batched_tokens),
        int(batching.max_num_seqs),
        bool(batching.enable_chunked_prefill),
    )


def governed_scheduler() -> type:
    """A subclass of vLLM's scheduler with hooks around every batch.

    It is no ``AsyncScheduler``: vLLM schedules a batch only after the one before it has run, so that its clock can be
    chosen for it and, where it is emulated, its end be put off.
    """
    scheduler: Any = import_module("vllm.v1.core.sched.scheduler").Scheduler

    class GovernedScheduler(scheduler):  # type: ignore[misc]
        """vLLM's scheduler, which tells of a batch before it runs, after it has run, and when its tokens are booked."""

        before: Callable[[Any], None] | None = None
        after: Callable[[], None] | None = None
        booked: Callable[[], None] | None = None

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            scheduled = super().schedule(*args, **kwargs)
            if self.before is not None:
                self.before(scheduled)
            return scheduled

        def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
            if self.after is not None:
                self.after()
            outputs = super().update_from_output(*args, **kwargs)
            if self.booked is not None:
                self.booked()
            return outputs

    return GovernedScheduler
