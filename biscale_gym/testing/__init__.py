"""Checks of environments, for the tests of whoever changes, wraps or writes one.

    from biscale_gym.testing import check_environment

    def test_my_environment():
        check_environment("my_package:Mine/Env-v0", scenario="smoke", episode_s=5.0)

Every check takes an id that ``gymnasium.make`` knows and the settings to make it with, and raises an ``AssertionError``
that names the first step and the entry that is wrong. They hold for environments with a ``simulator``, those of this
project and others built on its cluster model.
"""

from biscale_gym.testing.checks import (
    check_conservation,
    check_environment,
    check_reset_equals_fresh,
    check_same_across_processes,
    check_snapshot,
    check_vector_equals_single,
)

__all__ = [
    "check_conservation",
    "check_environment",
    "check_reset_equals_fresh",
    "check_same_across_processes",
    "check_snapshot",
    "check_vector_equals_single",
]
