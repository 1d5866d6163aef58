"""The multiplier of the Lagrangian."""

from __future__ import annotations

import pytest

from biscale_gym.training.constraint import Multiplier
from biscale_gym.training.settings import ConstraintSettings


def test_it_rises_while_too_many_are_late_and_falls_while_few_are() -> None:
    multiplier = Multiplier(
        ConstraintSettings(penalty=1.0, limit=0.01, learning_rate=0.1, most_excess=2.0, highest=1.3)
    )
    multiplier.update(violations=15, completed=1000)
    assert multiplier.late_share == 0.015
    assert multiplier.value == pytest.approx(1.05)
    multiplier.update(violations=1000, completed=1000)
    assert multiplier.value == pytest.approx(1.25)  # an excess counts as at most most_excess
    multiplier.update(violations=1000, completed=1000)
    assert multiplier.value == 1.3
    multiplier.update(violations=0, completed=0)
    assert multiplier.value == 1.3  # nothing was learnt
    for _ in range(20):
        multiplier.update(violations=0, completed=10)
    assert multiplier.value == 0.0
