"""A line through measurements of which some were disturbed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def rising_line(x: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and slope, neither negative: Theil and Sen's median of the slopes of all pairs, then the median rest.

    Args:
        x: float64[n], n at least 1.
        y: float64[n].
    """
    one, other = np.triu_indices(x.size, 1)
    apart = x[one] != x[other]
    slopes = (y[other] - y[one])[apart] / (x[other] - x[one])[apart]
    slope = max(0.0, float(np.median(slopes))) if slopes.size else 0.0
    return max(0.0, float(np.median(y - slope * x))), slope
