"""What a result depends on besides its configuration: processor, package versions, revision of the code.

Floating-point results repeat to the last bit where the processor's features and the compilers' versions are the same;
elsewhere only to rounding (see ``validate``).
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biscale_gym._version import __version__

_ARITHMETIC = ("cpu", "cpu_features", "numba", "llvmlite", "numpy")


@cache
def fingerprint() -> dict[str, Any]:
    """Processor, versions and git revision of this process, as plain values for a record."""
    import llvmlite.binding as llvm

    enabled = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    return {
        "biscale_gym": __version__,
        "cpu": llvm.get_host_cpu_name(),
        "cpu_features": hashlib.sha256(",".join(enabled).encode()).hexdigest()[:16],
        "python": platform.python_version(),
        **{name: version(name) for name in ("numba", "llvmlite", "numpy", "scipy")},
        **_git_state(Path(__file__).resolve().parents[1]),
    }


def dirty_diff(limit_characters: int = 1_000_000) -> str:
    """What the clone has changed since its revision, as a patch; empty for an installed package.

    A patch of more than ``limit_characters`` ends there.
    """
    clone = Path(__file__).resolve().parents[1]
    if not (clone / ".git").exists():
        return ""
    try:
        diff = _git(clone, "diff", "HEAD")
    except (OSError, UnicodeDecodeError, subprocess.SubprocessError):
        return ""
    return f"{diff[:limit_characters]}\n" if diff else ""


def same_arithmetic(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two fingerprints promise the same results bit for bit."""
    return all(ours.get(key) == theirs.get(key) for key in _ARITHMETIC)


def arithmetic_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Why they do not, one ``key: recorded -> here`` each."""
    return [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in _ARITHMETIC if ours.get(key) != theirs.get(key)]


def _git_state(clone: Path) -> dict[str, Any]:
    """Revision of the clone the package runs from; None for an installed package, even inside another repository."""
    unknown: dict[str, Any] = {"git_revision": None, "git_dirty": None}
    if not (clone / ".git").exists():
        return unknown
    try:
        revision = _git(clone, "rev-parse", "HEAD")
        return {"git_revision": revision, "git_dirty": bool(_git(clone, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return unknown


def _git(clone: Path, *arguments: str) -> str:
    command = ["git", "-C", str(clone), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
