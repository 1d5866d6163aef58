"""What an engine is started with, in a worker's process or as a server."""

from __future__ import annotations

from typing import Any

from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import Setup

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
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
_ON_CPUS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


def environment(setup: Setup, in_process: bool = True) -> dict[str, str]:
    """Of an engine's process, set before vLLM is imported.

    Args:
        setup: of the instance.
        in_process: whether the process steps the engine itself; a server has it in one of its own.
    """
    own = _ON_CPUS
    if setup.settings.engine == "cuda":
        # CUDA counts cards as NVML does when it is told to go by the bus.
        gpus = ",".join(map(str, setup.device.gpus))
        own = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus, "NCCL_SOCKET_IFNAME": "lo"}
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process))}
    return _ENVIRONMENT | own | processes | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(setup.port)}


def preload(settings: LiveSettings) -> tuple[str, ...]:
    """What takes long to import, and may be imported before a worker's cards are known."""
    if settings.engine == "cuda":
        return ()
    return (
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
    )


PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
"""A prompt whose KV a decode worker will fetch."""

FETCHED = "external_kv_transfer"
"""The source of prompt tokens whose KV was fetched."""


def engine_options(setup: Setup) -> dict[str, Any]:
    """Of an engine, by the names that vLLM's ``EngineArgs`` has for them.

    Prefill engines offer KV, decode engines fetch it. An engine on CPUs is one process in bf16, whatever TP degree and
    precision it stands for.
    """
    settings = setup.settings
    options: dict[str, Any] = {
        "model": str(setup.model),
        "load_format": "auto" if settings.weights else "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": settings.engine == "cpu",
        "dtype": "bfloat16",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": setup.max_sequences,
        "max_num_batched_tokens": setup.token_budget,
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "NixlConnector",
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[setup.phase],
            "kv_buffer_device": settings.engine,
            "kv_connector_extra_config": {"kv_lease_duration": settings.kv_lease_s},
        },
    }
    if settings.kv_blocks is not None:
        options["num_gpu_blocks_override"] = settings.kv_blocks
    if settings.engine == "cuda":
        options |= {"tensor_parallel_size": setup.tp, "gpu_memory_utilization": settings.gpu_memory}
        options |= {"quantization": "fp8"} if setup.precision == "fp8" else {}
    return options
