"""Memory on large pages.

With many simulators taking turns, and a learner's work between them, time goes by the pages that each touches as well
as by the lines: of 4 KiB there are too many for the processor to remember where they lie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LINE_BYTES = 64
"""Of a cache line."""
_PAGE_BYTES = 2 << 20
_LEAST_BYTES = 4 << 20
"""From this size on numpy asks Linux for pages of 2 MiB; what is not touched takes no memory."""


def on_large_pages(count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes of any content that begin at a page of 2 MiB, where the system has such pages."""
    whole = np.empty(max(count, _LEAST_BYTES) + _PAGE_BYTES, np.uint8)
    first = -whole.ctypes.data % _PAGE_BYTES
    return whole[first : first + count]
