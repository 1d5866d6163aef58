"""What vLLM's CPU engine needs of the process that it runs in."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any


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


def make_fit() -> None:
    """What vLLM's CPU engine needs of the process that it runs in; before the engine is made."""
    _without_progress_threads()
    _honest_llvmlite()
    _allow_amx()


def cpu_worker() -> type:
    """VLLM's worker for CPUs, in a process that has been made fit for it."""
    make_fit()
    worker: Any = import_module("vllm.v1.worker.cpu_worker").CPUWorker
    return type("CpuWorker", (worker,), {"__doc__": "vLLM's worker for CPUs."})
