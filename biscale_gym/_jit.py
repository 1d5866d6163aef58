"""How hot code is compiled, and where the result is cached.

The engine's state is a tuple of arrays that the caller keeps alive, and hot code allocates nothing, so it is compiled
without reference counting: numba would otherwise count every array of the tuple up and down at every call (measured: 12
times slower). A function compiled so must not create an array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config as numba_config

from biscale_gym.config import cache_root

_COMPILED_PARTS = ("biscale_gym/profiles", "biscale_gym/cluster", "biscale_gym/envs", "agents", "baselines")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_numba_config: Any = numba_config
_njit: Any = numba.njit


def _sources_digest() -> str:
    top = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(Path(__file__).read_bytes() + numba.__version__.encode())
    for part in _COMPILED_PARTS:
        for source in sorted((top / part).glob("*.py")):
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


# Numba notices a change of the file that a function is in, but not of the files it calls into: after an edit of the
# model, a cached engine would silently go on with the old one. Naming the folder by the sources' content rules that
# out. Numba's version is in it as well, because one version wipes what another has cached (.venv and .venv-live). A
# folder that the user chose ($NUMBA_CACHE_DIR) stays the parent.
_parent = Path(_numba_config.CACHE_DIR) if _numba_config.CACHE_DIR else cache_root() / "numba"
_numba_config.CACHE_DIR = str(_parent / _sources_digest())


compiled: Callable[[FunctionT], FunctionT] = _njit(cache=True, _nrt=False, error_model="numpy")
"""For functions on the engine's state and on compiled profiles."""

inlined: Callable[[FunctionT], FunctionT] = _njit(cache=True, _nrt=False, error_model="numpy", forceinline=True)
"""The same, inlined into the caller: for the parts that run in every iteration."""


INDEX = (1 << 32) - 1
"""``x & INDEX`` is ``x`` for every index there is, and the compiler sees that it is not negative: numba asks that at
each use of an index otherwise, to count negative ones from the end."""


def compiled_as(signature: Any) -> Callable[[FunctionT], FunctionT]:
    """As ``compiled``, for one signature: a first-class function."""
    decorator: Callable[[FunctionT], FunctionT] = _njit(signature, cache=True, _nrt=False, error_model="numpy")
    return decorator


def parallel_as(signature: Any) -> Callable[[FunctionT], FunctionT]:
    """As ``compiled_as``, its ``prange`` loops on numba's threads."""
    decorator: Callable[[FunctionT], FunctionT] = _njit(
        signature, cache=True, _nrt=False, error_model="numpy", parallel=True
    )
    return decorator
