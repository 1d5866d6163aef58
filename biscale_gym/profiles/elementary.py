"""Elementary functions in plain arithmetic: inlined, and in a loop of the compiler's vector instructions.

The C library's are calls, one number at a time, with everything spilled around them; and what they give differs from
system to system. Those here are within a unit or two of the last place, everywhere the same one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from biscale_gym._jit import inlined

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_EXPONENT_BITS = 52
_ROOT_OF_HALF = 0x3FE6A09E << 32
"""The bits of sqrt(1/2), the low half left out."""
_FRACTION = (1 << _EXPONENT_BITS) - 1


def _bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a double as an integer."""
    return types.int64(types.float64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(64)
    )


def _of_bits(typing_context: Any, bits: Any) -> Any:
    """The double that has these bits."""
    return types.float64(types.int64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


bits_of: Any = intrinsic(_bits_of)
of_bits: Any = intrinsic(_of_bits)


@inlined
def natural_log(value: float) -> float:
    """ln(value) of a positive, normal, finite number; after fdlibm's ``e_log.c`` (Sun Microsystems, 1993)."""
    # value = 2^exponent * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); ln(1 + f) = 2 artanh(s).
    above = bits_of(value) - _ROOT_OF_HALF
    exponent = np.float64(above >> _EXPONENT_BITS)
    f = of_bits((above & _FRACTION) + _ROOT_OF_HALF) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (
        6.666666666666735130e-01
        + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
    )
    even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    half = 0.5 * f * f
    return float(exponent * _LN2_HIGH - ((half - (s * (half + (odd + even)) + exponent * _LN2_LOW)) - f))
