"""Faults told apart: one of the input is a line for its author, one of the code keeps its traceback."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

_OUR_PACKAGES = ("biscale_gym", "agents", "baselines")


class EvaluationError(ValueError):
    """A comparison that cannot be run as asked; the message names the place and the nearest valid choice."""


class RecordsError(ValueError):
    """A records file that cannot be read or written: altered, unreadable, or on a full disk."""


def is_user_error(error: BaseException) -> bool:
    """Whether the message is meant for the user: a package's own ``ValueError``, or a file that the system refuses."""
    if isinstance(error, OSError):
        return True
    own = type(error).__module__.partition(".")[0] in _OUR_PACKAGES
    return isinstance(error, ValueError) and own


def one_line(error: BaseException) -> str:
    """The error's message on a single line; an error without one gives its type."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


@dataclass(frozen=True)
class Fault:
    """A failed run, in a form that crosses a process border: ``detail`` holds the traceback if the code is to blame."""

    message: str
    by_user: bool
    detail: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """The fault that ``error`` stands for."""
        if is_user_error(error):
            return cls(one_line(error), by_user=True)
        return cls(
            f"{type(error).__name__}: {one_line(error)}",
            by_user=False,
            detail="".join(traceback.format_exception(error)),
        )
