"""Memory on large pages.

With many simulators taking turns, and a learner's work between them, time goes by the pages that each touches as well
as by the lines: of 4 KiB there are too many for the processor to remember where they lie.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

LINE_BYTES = 64
"""Of a cache line."""
_PAGE_BYTES = 2 << 20
_LEAST_BYTES = 4 << 20
"""From this size on numpy asks Linux for pages of 2 MiB; what is not touched takes no memory."""


_SPARE = 8
"""A block is by a part of so many larger than asked for: the next one asked for may be."""


def _of_whole_pages(count: int) -> npt.NDArray[np.uint8]:
    """Bytes that hold ``count`` from the beginning of a page of 2 MiB."""
    return np.empty(max(count, _LEAST_BYTES) + _PAGE_BYTES, np.uint8)


def _from_page(whole: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    first = -whole.ctypes.data % _PAGE_BYTES
    return whole[first : first + count]


def on_large_pages(count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes of any content that begin at a page of 2 MiB, where the system has such pages."""
    return _from_page(_of_whole_pages(count), count)


class Blocks:
    """Memory on large pages that is handed out again once no array refers to it.

    The system clears new pages before their first use: where simulators follow one another that takes a tenth of the
    time. What was ever handed out at once is kept.
    """

    def __init__(self) -> None:
        self._wholes: list[npt.NDArray[np.uint8]] = []

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes of any content, as of ``on_large_pages``; theirs while an array made of them is left."""
        for number in range(len(self._wholes)):
            # Arrays made of a block refer to the whole; without them only the list does, and the call that asks.
            if len(self._wholes[number]) >= count + _PAGE_BYTES and sys.getrefcount(self._wholes[number]) == _UNUSED:
                return _from_page(self._wholes[number], count)
        self._wholes.append(_of_whole_pages(count + count // _SPARE))
        return _from_page(self._wholes[-1], count)


_PROBE = [object()]
_UNUSED = sys.getrefcount(_PROBE[0])
"""What Python counts for a list's element that nothing else refers to."""
