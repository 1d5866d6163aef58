"""What a user of an environment can do wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EnvironmentUsageError(ValueError):
    """A call that the environment cannot serve; the message says what to do instead."""


def refused_action(action: Any, clocks_mhz: Sequence[int]) -> EnvironmentUsageError:
    """The error for an action that is no index of a clock."""
    top = len(clocks_mhz) - 1
    nearest = min(max(int(action), 0), top)
    return EnvironmentUsageError(
        f"action {action} is no clock index; the nearest is {nearest}; valid: 0 to {top} ({list(clocks_mhz)} MHz)"
    )
