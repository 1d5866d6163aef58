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
_LOG2_E = 1.4426950408889634
_ROUNDER = 1.5 * 2.0**52
_EXPONENT_BITS = 52
_BITS_OF_ONE = 1023 << 52
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
    """ln(value) of a positive, normal, finite number: whole powers of two, and the Taylor series of the rest."""
    # value = 2^exponent * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); with s = f / (2 + f)
    # ln(1 + f) = 2 artanh(s) = 2 s + s R = f - half + s (half + R), where what is added to f is small.
    above = bits_of(value) - _ROOT_OF_HALF
    exponent = np.float64(above >> _EXPONENT_BITS)
    f = of_bits((above & _FRACTION) + _ROOT_OF_HALF) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (2.0 / 3.0 + w * (2.0 / 7.0 + w * (2.0 / 11.0 + w * (2.0 / 15.0 + w * (2.0 / 19.0)))))
    even = w * (2.0 / 5.0 + w * (2.0 / 9.0 + w * (2.0 / 13.0 + w * (2.0 / 17.0 + w * (2.0 / 21.0)))))
    half = 0.5 * f * f
    return float(exponent * _LN2_HIGH - ((half - (s * (half + (odd + even)) + exponent * _LN2_LOW)) - f))


@inlined
def exponential(value: float) -> float:
    """e^value of a number between -700 and 700: 2^k times the Taylor series of what is left, at most ln(2)/2."""
    # Added to so great a number, one is rounded to a whole number, which then are the sum's lowest bits.
    rounded = value * _LOG2_E + _ROUNDER
    k = rounded - _ROUNDER
    x = (value - k * _LN2_HIGH) - k * _LN2_LOW
    series = 1.0 / 6227020800.0
    series = series * x + 1.0 / 479001600.0
    series = series * x + 1.0 / 39916800.0
    series = series * x + 1.0 / 3628800.0
    series = series * x + 1.0 / 362880.0
    series = series * x + 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    power_of_two = of_bits((bits_of(rounded) << _EXPONENT_BITS) + _BITS_OF_ONE)
    return float((1.0 + (x + x * x * series)) * power_of_two)


@inlined
def cosine_of_turns(turns: float) -> float:
    """cos(2 pi turns), of turns from 0 to 1: the Taylor series of the sine of the angle to the nearest zero."""
    x = (abs(turns - 0.5) - 0.25) * (2.0 * np.pi)
    z = x * x
    series = 1.0 / 51090942171709440000.0
    series = series * z - 1.0 / 121645100408832000.0
    series = series * z + 1.0 / 355687428096000.0
    series = series * z - 1.0 / 1307674368000.0
    series = series * z + 1.0 / 6227020800.0
    series = series * z - 1.0 / 39916800.0
    series = series * z + 1.0 / 362880.0
    series = series * z - 1.0 / 5040.0
    series = series * z + 1.0 / 120.0
    series = series * z - 1.0 / 6.0
    return float(x + x * z * series)
