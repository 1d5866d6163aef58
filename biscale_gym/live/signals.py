"""Signals that end a process become exceptions, so that ``with`` blocks close their devices."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""SIGINT raises KeyboardInterrupt already."""


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise ``SystemExit``; main thread only, former handlers come back after it."""
    former = {number: signal.signal(number, _leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
