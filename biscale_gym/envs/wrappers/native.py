"""What wrappers need to know of the environment below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.envs import cluster_layout, layout
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.layout import Entry

MHZ = 2000.0
"""An observation gives clocks in this unit (``layout.py``)."""


@dataclass(frozen=True)
class Native:
    """Of an environment of one instance or of a cluster; S: numbers in an action, a slot each.

    Attributes:
        clocks_mhz: float64[clocks], what an action's indices mean, ascending.
        per_slot: whether an action is an array (MultiDiscrete).
        present: int64[S], where an observation says that a slot is taken; -1: it always is.
        targets: int64[S], where it holds the clock last asked for.
        slacks: a row of entries per slot, where it holds slacks of requests.
        size: of an observation.
    """

    clocks_mhz: NDArray[np.float64]
    per_slot: bool
    present: NDArray[np.int64]
    targets: NDArray[np.int64]
    slacks: tuple[NDArray[np.int64], ...]
    size: int

    @property
    def slots(self) -> int:
        """Numbers in an action."""
        return len(self.targets)

    def targets_mhz(self, observations: NDArray[Any]) -> NDArray[np.float64]:
        """The clocks last asked for: from [..., size] to float64[..., S], whole MHz; 0 in an empty slot."""
        return np.rint(observations[..., self.targets].astype(np.float64) * MHZ)

    def least_slack(self, observations: NDArray[Any]) -> NDArray[np.float64]:
        """The least slack of any request, in the observation's unit: from [..., size] to float64[...]."""
        least = np.full(observations.shape[:-1], np.inf)
        for present, entries in zip(self.present, self.slacks, strict=True):
            own = observations[..., entries].min(axis=-1).astype(np.float64)
            least = np.minimum(least, own if present < 0 else np.where(observations[..., present] > 0.0, own, np.inf))
        return np.where(np.isfinite(least), least, 0.0)


def _at(entries: list[Entry], start: int, wanted: str) -> list[int]:
    """Positions of the entries whose name begins with ``wanted``."""
    found: list[int] = []
    for entry in entries:
        if entry.name.startswith(wanted):
            found.extend(range(start, start + entry.size))
        start += entry.size
    return found


def setting_of(env: Any, wrapper: str) -> Any:
    """What holds ``env_id``, ``scenario`` and ``settings`` of the environment below: its setting, or itself.

    Raises:
        EnvironmentUsageError: it is none of this package's.
    """
    setting = getattr(env.unwrapped, "setting", env.unwrapped)
    if not hasattr(setting, "env_id"):
        raise EnvironmentUsageError(f"{wrapper} wraps the environments of biscale_gym, not {env.unwrapped}")
    return setting


def native(env: Any, wrapper: str) -> Native:
    """What a wrapper reads in the observations and actions of the environment below.

    Raises:
        EnvironmentUsageError: no environment of clocks.
    """
    setting = setting_of(env, wrapper)
    clocks_mhz = np.array(setting.scenario.clocks_mhz, dtype=np.float64)
    if hasattr(setting, "phase"):
        entries = layout.entries(setting.phase, len(clocks_mhz))
        return Native(
            clocks_mhz,
            per_slot=False,
            present=np.array([-1]),
            targets=np.array(_at(entries, 0, "target")),
            slacks=(np.array(_at(entries, 0, "slack")),),
            size=layout.size(setting.phase, len(clocks_mhz)),
        )
    if not setting.env_id.startswith("BiScale/Cluster-"):
        raise EnvironmentUsageError(f"{wrapper} wraps environments whose actions are clocks, not {setting.env_id}")
    starts = [cluster_layout.slot_start(slot) for slot in range(cluster_layout.SLOTS)]
    phases = ["prefill" if slot < cluster_layout.SLOTS_PER_PHASE else "decode" for slot in range(len(starts))]
    of_slots = [cluster_layout.slot_entries(phase) for phase in phases]  # type: ignore[arg-type]
    pairs = list(zip(of_slots, starts, strict=True))
    return Native(
        clocks_mhz,
        per_slot=True,
        present=np.array([_at(entries, start, "present")[0] for entries, start in pairs]),
        targets=np.array([_at(entries, start, "target")[0] for entries, start in pairs]),
        slacks=tuple(np.array(_at(entries, start, "slack")) for entries, start in pairs),
        size=cluster_layout.SIZE,
    )


def with_own_observations(env: Any, space: Any, wrapper: str) -> Native:
    """``native``, where observations arrive as the environment makes them.

    Args:
        env: single or vector.
        space: of one observation, as it arrives.
        wrapper: who asks.

    Raises:
        EnvironmentUsageError: a wrapper below has changed them, or no environment of clocks.
    """
    told = native(env, wrapper)
    if space.shape != (told.size,):
        raise EnvironmentUsageError(
            f"{wrapper} reads the environment's own observation of {told.size} numbers, a wrapper below it makes "
            f"{space.shape} of them; put {wrapper} further inside"
        )
    return told
