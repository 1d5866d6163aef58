"""A simulator as one short row of machine words, so that a compiled loop reaches it in a quarter of a microsecond.

Handing the state's sixteen arrays to a compiled function from Python takes numba some 60 µs of type checks, a hundred
times what an iteration takes. A *handle* holds the address and the shape of every array, and the addresses of the two
clock policies; compiled code puts the state together again from it. Rows of handles make lanes: a vector environment
steps any number of simulators in one call.

A handle does not keep the arrays alive. Whoever makes one keeps the state and the policies, and makes it anew when
either is replaced.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from numba.np import arrayobj

from biscale_gym.cluster.policy import POLICY_SIGNATURE, POLICY_TYPE
from biscale_gym.cluster.state import State, empty_state

Handle = npt.NDArray[np.int64]

HANDLE_TYPE = types.int64[::1]
_typeof: Any = numba.typeof
_make_array: Any = arrayobj.make_array
_populate_array: Any = arrayobj.populate_array
_create_struct: Any = cgutils.create_struct_proxy

STATE_TYPE: Any = _typeof(empty_state(1, 1, 1, 1))
_ARRAYS = STATE_TYPE.types

PREFILL_POLICY = sum(1 + array.ndim for array in _ARRAYS)
"""Where the prefill policy's two addresses lie in a handle; decode's follow."""
DECODE_POLICY = PREFILL_POLICY + 2
SIZE = DECODE_POLICY + 2


def policy_addresses(function: Any) -> tuple[int, int]:
    """Addresses of a compiled policy: its C entry, and its own entry, through which it may raise.

    Raises:
        TypeError: not compiled for ``policy.POLICY_SIGNATURE``.
    """
    try:
        return _addresses(function)
    except (AttributeError, NumbaError, TypeError) as error:
        raise TypeError(f"{function!r} is not compiled for the signature of clock policies") from error


@lru_cache(maxsize=64)
def _addresses(function: Any) -> tuple[int, int]:
    compiled = function.get_compile_result(POLICY_SIGNATURE)
    library, description = compiled.library, compiled.fndesc
    return (
        library.get_pointer_to_function(description.llvm_cfunc_wrapper_name),
        library.get_pointer_to_function(description.llvm_func_name),
    )


def handle_of(state: State, prefill_policy: Any, decode_policy: Any) -> Handle:
    """int64[SIZE] for a state and its two compiled policies.

    Raises:
        TypeError: a policy is not compiled for ``policy.POLICY_SIGNATURE``.
    """
    words: list[int] = []
    arrays: tuple[npt.NDArray[Any], ...] = state
    for array in arrays:
        # Its array interface, which tells the address as well, spells out a record's fields every time.
        words += [array.ctypes.data, *array.shape]
    words += [*policy_addresses(prefill_policy), *policy_addresses(decode_policy)]
    return np.array(words, dtype=np.int64)


def _words(context: Any, builder: Any, handle: Any) -> Any:
    """Reader of a handle's words by position, in generated code."""
    data = _make_array(HANDLE_TYPE)(context, builder, handle).data
    intp = context.get_value_type(types.intp)
    return lambda at: builder.load(builder.gep(data, [intp(at)]))


def _state_at(typing_context: Any, handle: Any) -> Any:
    """The state that a handle describes; its arrays are views that own nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = _words(context, builder, args[0])
        intp = context.get_value_type(types.intp)
        parts = []
        at = 0
        for array_type in _ARRAYS:
            array = _make_array(array_type)(context, builder)
            item = intp(context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
            data = builder.inttoptr(word(at), array.data.type)
            shape = [word(at + 1 + axis) for axis in range(array_type.ndim)]
            strides = [item]
            for extent in reversed(shape[1:]):
                strides.insert(0, builder.mul(strides[0], extent))
            _populate_array(array, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
            parts.append(array._getvalue())
            at += 1 + array_type.ndim
        return context.make_tuple(builder, STATE_TYPE, parts)

    return STATE_TYPE(handle), generate


state_at: Any = intrinsic(_state_at)


def _policy_intrinsic(position: int, name: str) -> Any:
    def at(typing_context: Any, handle: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = _words(context, builder, args[0])
            pointer = context.get_value_type(types.voidptr)
            policy = _create_struct(POLICY_TYPE)(context, builder)
            policy.c_addr = builder.inttoptr(word(position), pointer)
            policy.jit_addr = builder.inttoptr(word(position + 1), pointer)
            policy.py_addr = context.get_constant_null(types.voidptr)
            return policy._getvalue()

        return POLICY_TYPE(handle), generate

    at.__doc__ = f"The {name} policy that a handle names, as a first-class function."
    return intrinsic(at)


prefill_policy_at = _policy_intrinsic(PREFILL_POLICY, "prefill")
decode_policy_at = _policy_intrinsic(DECODE_POLICY, "decode")
