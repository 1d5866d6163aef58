"""Wall-clock stamps as written in the Azure traces, parsed a column at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = 40
"""Bytes kept of a stamp; a full one with nanoseconds and offset has 35."""

_DATE_AND_TIME = 19  # length of "2024-05-10 00:00:00"
_OFFSET = 6  # length of "+00:00"


def parse_stamps(stamps: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Nanoseconds since 1970 UTC of ``2024-05-10 00:00:00[.f{1,9}][Z|+hh:mm]``; stamps without an offset count as UTC.

    Args:
        stamps: bytes[n] of width ``WIDTH``.

    Returns:
        int64[n]; the least int64 (NaT) where a stamp is not of that form.
    """
    if stamps.size == 0:
        return np.zeros(0, dtype=np.int64)
    letters = np.ascontiguousarray(stamps, dtype=f"S{WIDTH}").view(np.uint8).reshape(stamps.size, WIDTH).copy()
    offset_ns, sound = _take_offsets(letters)
    # numpy also reads words ("now") and bare dates as times; a stamp here has both date and time of day.
    sound &= (letters[:, 4] == ord("-")) & (letters[:, 13] == ord(":")) & (letters[:, 16] == ord(":"))
    fraction = letters[:, _DATE_AND_TIME:]
    sound &= ((fraction == 0) | (fraction == ord(".")) | ((fraction >= ord("0")) & (fraction <= ord("9")))).all(axis=1)
    letters[~sound] = 0
    bare = letters.view(f"S{WIDTH}").reshape(stamps.size)
    bare[~sound] = b"NaT"
    try:
        parsed = bare.astype("datetime64[ns]")
    except ValueError:
        parsed = np.array([_one(stamp) for stamp in bare], dtype="datetime64[ns]")
    nanoseconds = parsed.astype(np.int64)
    return np.where(np.isnat(parsed), nanoseconds, nanoseconds - offset_ns)


def _take_offsets(letters: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Cut the offsets off the rows of ``letters`` (uint8[n, WIDTH]); their nanoseconds, and where they are sound."""
    rows = np.arange(letters.shape[0])
    tail = letters[:, _DATE_AND_TIME:]
    signs = (tail == ord("+")) | (tail == ord("-")) | (tail == ord("Z"))
    has_offset = signs.any(axis=1)
    offset_ns = np.zeros(rows.size, dtype=np.int64)
    sound = np.ones(rows.size, dtype=np.bool_)
    if not has_offset.any():
        return offset_ns, sound
    start = np.where(has_offset, np.argmax(signs, axis=1) + _DATE_AND_TIME, WIDTH)
    padded = np.pad(letters, ((0, 0), (0, _OFFSET + 1)))
    sign, h1, h2, colon, m1, m2, end = (padded[rows, np.minimum(start + i, WIDTH)] for i in range(_OFFSET + 1))
    zulu = has_offset & (sign == ord("Z"))
    numeric = has_offset & ~zulu
    digits = np.stack([h1, h2, m1, m2]).astype(np.int64) - ord("0")
    well_formed = ((digits >= 0) & (digits <= 9)).all(axis=0) & (colon == ord(":")) & (end == 0)
    minutes = digits[0] * 600 + digits[1] * 60 + digits[2] * 10 + digits[3]
    minutes = np.where(sign == ord("-"), -minutes, minutes)
    offset_ns[numeric] = minutes[numeric] * 60_000_000_000
    sound[numeric] = well_formed[numeric]
    sound[zulu] = h1[zulu] == 0
    letters[np.arange(WIDTH)[None, :] >= start[:, None]] = 0
    return offset_ns, sound


def _one(stamp: bytes) -> np.datetime64:
    try:
        return np.datetime64(stamp.decode("ascii"), "ns")
    except ValueError:
        return np.datetime64("NaT", "ns")
