"""Exact copies of an environment in the middle of an episode, to go back to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from biscale_gym.cluster.simulator import Simulator, Snapshot
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.errors import EnvironmentUsageError


@dataclass(frozen=True)
class EnvSnapshot:
    """What ``snapshot()`` returns; ``restore()`` of the same environment goes back to it, any number of times.

    Attributes:
        owner: the environment.
        simulator, state: the episode's simulator, and everything in it that running changes; None where there is none.
        generator: state of the environment's random generator.
        parts: the environment's own attributes, copied.
    """

    owner: object
    simulator: Simulator | None
    state: Snapshot | None
    generator: dict[str, Any]
    parts: dict[str, Any]


class Snapshots:
    """``snapshot()`` and ``restore()`` for a Gymnasium environment that holds a simulator in ``_simulator``."""

    _changing: ClassVar[tuple[str, ...]]
    """Attributes that ``reset`` and ``step`` change, beside the simulator and the random generator."""
    _simulator: Simulator | None
    episode: Episode | None
    np_random: np.random.Generator

    def snapshot(self) -> EnvSnapshot:
        """An exact copy of everything that decides how the episode, and those after it, go on.

        Raises:
            EnvironmentUsageError: before the first reset.
        """
        if self.episode is None:
            raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
        simulator = self._simulator
        state = None if simulator is None else simulator.snapshot()
        parts = {name: copy.copy(getattr(self, name)) for name in self._changing}
        return EnvSnapshot(self, simulator, state, dict(self.np_random.bit_generator.state), parts)

    def restore(self, snapshot: EnvSnapshot) -> None:
        """Go back to a snapshot of this environment, over the borders of episodes too.

        Raises:
            EnvironmentUsageError: it is another environment's.
        """
        if snapshot.owner is not self:
            raise EnvironmentUsageError("restore: the snapshot is another environment's; play that one, or reset this")
        if snapshot.simulator is not None and snapshot.state is not None:
            snapshot.simulator.restore(snapshot.state)
        self._simulator = snapshot.simulator
        self.np_random.bit_generator.state = snapshot.generator
        for name, value in snapshot.parts.items():
            setattr(self, name, copy.copy(value))
