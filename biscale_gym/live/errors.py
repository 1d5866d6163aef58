"""What can go wrong with live serving; every message says what to do about it."""

from __future__ import annotations


class LiveError(ValueError):
    """Live serving that cannot be set up, or that broke down."""


class DeviceError(LiveError):
    """GPUs that cannot be opened, read or set."""


class DevicePermissionError(DeviceError):
    """The driver lets this process read, but not set clocks."""


class DeviceBusyError(DeviceError):
    """Another controller holds one of the GPUs.

    Attributes:
        holder_lives: whether its process does; otherwise its watchdog is about to let go.
    """

    def __init__(self, message: str, holder_lives: bool) -> None:
        super().__init__(message)
        self.holder_lives = holder_lives
