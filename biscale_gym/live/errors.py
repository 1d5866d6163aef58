"""What can go wrong with live serving; every message says what to do about it."""

from __future__ import annotations


class LiveError(ValueError):
    """Live serving that cannot be set up, or that broke down."""


class DeviceError(LiveError):
    """GPUs that cannot be opened, read or set."""


class DevicePermissionError(DeviceError):
    """The driver lets this process read, but not set clocks."""


class DeviceBusyError(DeviceError):
    """Another controller holds one of the GPUs."""
