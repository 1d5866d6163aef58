"""What a user of an environment can do wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class EnvironmentUsageError(ValueError):
    """A call that the environment cannot serve; the message says what to do instead."""


def refused_action(action: Any, clocks_mhz: Sequence[int]) -> EnvironmentUsageError:
    """The error for an action (one index, or an array of them) that is no index of a clock."""
    top = len(clocks_mhz) - 1
    indices = np.atleast_1d(np.asarray(action))
    outside = (indices < 0) | (indices > top)
    wrong = indices[outside][0] if outside.any() else action
    return EnvironmentUsageError(
        f"action {wrong} is no clock index; the nearest is {min(max(int(wrong), 0), top)}; "
        f"valid: 0 to {top} ({list(clocks_mhz)} MHz)"
    )


def no_render_mode(metadata: Mapping[str, Any]) -> EnvironmentUsageError:
    """The error for ``render`` of an environment that was made without a render mode."""
    return EnvironmentUsageError(
        f"render: this environment was made without a render_mode; make it with one of {metadata['render_modes']}"
    )
