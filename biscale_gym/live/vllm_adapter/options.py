"""What an engine is started with, in a worker's process or as a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biscale_gym.cluster.placement import Phase
from biscale_gym.live.settings import LiveSettings

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

FETCHED = "external_kv_transfer"
"""The source of prompt tokens whose KV was fetched."""


def engine_options(
    phase: Phase, model: Path, settings: LiveSettings, token_budget: int, max_sequences: int
) -> dict[str, Any]:
    """Of an engine on CPUs, by the names that vLLM's ``EngineArgs`` has for them.

    Args:
        phase: prefill engines offer KV, decode engines fetch it.
        model: folder of the model.
        settings: of workers.
        token_budget: tokens of a batch.
        max_sequences: sequences of a batch.
    """
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max_sequences,
        "max_num_batched_tokens": token_budget,
        "num_gpu_blocks_override": settings.kv_blocks,
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "NixlConnector",
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[phase],
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"kv_lease_duration": settings.kv_lease_s},
        },
    }
