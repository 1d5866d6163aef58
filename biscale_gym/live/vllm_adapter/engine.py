"""vLLM's engine in a worker's process, stepped by it.

Its scheduler is extended by two hooks, one before a scheduled batch is executed and one after, from which the governor
reads the batch and stretches it. KV goes from prefill to decode workers by vLLM's NixlConnector over shared memory and
loopback.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from biscale_gym.live.setups import Setup
from biscale_gym.live.vllm_adapter.cpu import make_fit
from biscale_gym.live.vllm_adapter.options import engine_options, environment
from biscale_gym.live.vllm_adapter.scheduler import Batch, batch_of, governed_scheduler, kv_usage, limits_of


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of one request.

    Attributes:
        request: its id.
        tokens: the new ones.
        finished: whether these are the last.
        failed: finished without having run to its length (its KV could not be fetched).
        kv_params: of a finished prompt: where its KV is.
    """

    request: str
    tokens: list[int]
    finished: bool
    failed: bool
    kv_params: dict[str, Any] | None


def _end_with_the_listener(failed: threading.ExceptHookArgs) -> None:
    """Tell of a thread that failed; end the process where it is NIXL's listener, for which vLLM would wait for ever."""
    threading.__excepthook__(failed)
    if failed.thread is not None and failed.thread.name == "nixl_handshake_listener":
        sys.stderr.flush()
        os._exit(1)


class Engine:
    """One vLLM engine in this process.

    Args:
        setup: of the worker.
    """

    def __init__(self, setup: Setup) -> None:
        os.environ.update(environment(setup))
        if setup.settings.engine == "cpu":
            make_fit()
        self._vllm: Any = import_module("vllm")
        threading.excepthook = _end_with_the_listener
        options = engine_options(setup)
        transfer = import_module("vllm.config").KVTransferConfig(**options.pop("kv_transfer_config"))
        arguments = import_module("vllm.engine.arg_utils").EngineArgs(
            **options,
            kv_transfer_config=transfer,
            async_scheduling=False,
            disable_log_stats=False,
            distributed_executor_backend="mp" if options.get("tensor_parallel_size", 1) > 1 else "uni",
            scheduler_cls=governed_scheduler(),
        )
        self._engine: Any = import_module("vllm.v1.engine.llm_engine").LLMEngine.from_engine_args(arguments)
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        # The scheduler knows requests by names of vLLM's own: ours, and something random after it.
        self._internal_names: dict[str, str] = {}
        self._own_names: dict[str, str] = {}
        self.block_tokens = int(self._scheduler.block_size)
        self.kv_capacity_tokens = limits_of(self._scheduler).kv_capacity_tokens
        self._token_budget = int(self._scheduler.max_num_scheduled_tokens)

    def hook(self, before: Callable[[Batch], None], after: Callable[[float], None]) -> None:
        """Call ``before`` when a batch is about to run, ``after`` with its seconds when it has run."""
        began_s = 0.0

        def starting(scheduled: Any) -> None:
            nonlocal began_s
            batch = batch_of(self._scheduler, scheduled)
            own = {self._own_names.get(name, name): count for name, count in batch.tokens.items()}
            before(replace(batch, tokens=own))
            began_s = time.perf_counter()

        self._scheduler.before = starting
        self._scheduler.after = lambda: after(time.perf_counter() - began_s)

    def unhook(self) -> None:
        """Call nobody any more."""
        self._scheduler.before = self._scheduler.after = None

    def limit(self, token_budget: int | None) -> None:
        """Let batches hold so many tokens at most, never more than the engine was started with; None: as it was."""
        self._scheduler.max_num_scheduled_tokens = min(token_budget or self._token_budget, self._token_budget)

    def add(self, request: str, prompt: list[int], output_tokens: int, kv_params: dict[str, Any] | None) -> None:
        """Queue a request for exactly ``output_tokens`` tokens."""
        parameters = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            min_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": kv_params} if kv_params else None,
        )
        internal = self._engine.add_request(request, {"prompt_token_ids": prompt}, parameters)
        self._internal_names[request], self._own_names[internal] = internal, request

    def abort(self, request: str) -> None:
        """Forget a request."""
        self._engine.abort_request([request])
        self._forget(request)

    def _forget(self, request: str) -> None:
        self._own_names.pop(self._internal_names.pop(request, request), None)

    @property
    def busy(self) -> bool:
        """Whether a step does anything: requests, or KV that is still to be fetched or freed."""
        return bool(self._scheduler.has_requests())

    def step(self) -> Iterator[Output]:
        """One iteration; yields what came of it."""
        for output in self._engine.step():
            (completion,) = output.outputs
            if output.finished:
                self._forget(output.request_id)
            reason = completion.finish_reason
            yield Output(
                output.request_id,
                list(completion.token_ids),
                bool(output.finished),
                bool(output.finished) and reason != "length",
                output.kv_transfer_params,
            )

    def computed_tokens(self, request: str) -> int:
        """Tokens of a queued or running request whose KV is there."""
        known = self._scheduler.requests.get(self._internal_names.get(request, request))
        return 0 if known is None else int(known.num_computed_tokens)

    @property
    def kv_used_tokens(self) -> int:
        """KV that is taken, in whole blocks."""
        return round(kv_usage(self._scheduler) * self.kv_capacity_tokens)

    def prompt_tokens_by_source(self) -> dict[str, int]:
        """Prompt tokens so far: computed here (``local_compute``), fetched (``external_kv_transfer``)."""
        return {
            metric.labels["source"]: int(metric.value)
            for metric in self._engine.get_metrics()
            if metric.name == "vllm:prompt_tokens_by_source"
        }

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown()
