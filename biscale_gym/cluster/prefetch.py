"""Asking the processor for memory ahead of its use.

Requests live for seconds and many simulators may take turns: what an event touches has often left the caches since it
was last used. A prefetch changes no result and never fails, wherever it points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.types import Array
from numba.extending import intrinsic
from numba.np import arrayobj

from biscale_gym._jit import inlined
from biscale_gym.cluster.state import REQUEST, State

_REQUEST_BYTES = REQUEST.itemsize
_make_array: Any = arrayobj.make_array


def _prefetch(typing_context: Any, array: Any, byte: Any) -> Any:
    """Load the cache line that holds a byte of an array, counted from the array's start, in the background."""
    if not isinstance(array, Array):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [args[1]])
        flag = ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        call = builder.module.declare_intrinsic("llvm.prefetch", [address.type], fnty=function)
        # To be read, wanted in every cache, data.
        builder.call(call, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


prefetch: Any = intrinsic(_prefetch)


@inlined
def prefetch_request(st: State, r: int) -> None:
    """The record of request r, which may lie across two lines; of none (-1), the first's, which is soon at hand."""
    at = np.int64(max(r, 0)) * _REQUEST_BYTES
    prefetch(st.req, at)
    prefetch(st.req, at + _REQUEST_BYTES - 1)
