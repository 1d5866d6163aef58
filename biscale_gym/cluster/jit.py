"""How the engine is compiled.

The state is a tuple of arrays that the caller keeps alive, and the engine allocates nothing, so its functions are compiled without
reference counting: numba would otherwise count every array of the tuple up and down at every call (measured: 12 times slower).
A function compiled so must not create an array.
"""

from __future__ import annotations

from typing import Any

from numba import njit

engine_jit: Any = njit(cache=True, _nrt=False, error_model="numpy")
"""For functions on the engine's state."""

inline_jit: Any = njit(cache=True, _nrt=False, error_model="numpy", forceinline=True)
"""The same, inlined into the caller: for the parts that run in every iteration."""
