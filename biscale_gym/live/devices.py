"""The GPUs of one instance, as a worker uses them: one protocol for real cards and for emulated ones.

A worker asks for a clock before a batch runs, reports the batch after it has run, and reads what was spent. All GPUs
of an instance (its tensor-parallel group) move together. Every number says whether it was ``measured`` on a card or
``modelled``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from biscale_gym.live.errors import DeviceError

Source = Literal["measured", "modelled"]
Mode = Literal["control", "observe-only"]

OVERRIDDEN = "clock-overridden"
"""Another process set or gave back the clocks that this one had locked."""
COUNTER_BACK = "energy-counter-back"
"""The energy counter went backwards (driver reloaded, GPU reset); the gap is bridged with the last power."""
WATCHDOG_DIED = "watchdog-died"
"""The watchdog process ended; it is started anew, and until then no clock is lowered."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one iteration computes, in the terms of ``profiles.kernels.iteration_cost``.

    Attributes:
        batch: decode sequences.
        kv_tokens: their KV tokens in total.
        prefill_tokens: prompt tokens.
        sum_len_sq: sum over prompts of length², or end² − start² for a chunk.
    """

    batch: float = 0.0
    kv_tokens: float = 0.0
    prefill_tokens: float = 0.0
    sum_len_sq: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is computed: the engine only moves KV, or waits for it."""
        return self.batch == 0.0 and self.prefill_tokens == 0.0


NOTHING = Work()


@dataclass(frozen=True, slots=True)
class Spent:
    """What one iteration took.

    Attributes:
        duration_s: from its start to its end, an emulated clock's stretching included.
        clock_mhz: clock in force at its end.
        energy_j: of all GPUs of the group. Measured: last sampled power times duration, as the cards' energy counters
            step more slowly than iterations do; sums are read off ``Reading.energy_j``.
    """

    duration_s: float
    clock_mhz: int
    energy_j: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Telemetry of the group.

    Attributes:
        time_s: when it was taken, on ``time.monotonic``'s scale.
        clock_mhz: highest SM clock of the group.
        power_w: of all its GPUs.
        energy_j: of all its GPUs since the device was opened.
        flags: everything unusual since it was opened: ``OVERRIDDEN``, ``COUNTER_BACK``, ``WATCHDOG_DIED``.
    """

    time_s: float
    clock_mhz: int
    power_w: float
    energy_j: float
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Meter:
    """One GPU's energy counter at its last step; mean power is what lies between two of its steps.

    Attributes:
        time_s: of the step, on ``time.monotonic``'s scale, as exactly as it is sampled.
        energy_j: since the device was opened.
    """

    time_s: float
    energy_j: float


def check_clock(clock_mhz: int, clocks_mhz: tuple[int, ...]) -> None:
    """Refuse a clock that is not listed.

    Raises:
        DeviceError: the nearest clock is named.
    """
    if clock_mhz not in clocks_mhz:
        closest = min(clocks_mhz, key=lambda clock: abs(clock - clock_mhz))
        raise DeviceError(f"the device has no clock {clock_mhz} MHz; the nearest is {closest} MHz")


class Device(Protocol):
    """The GPUs of one instance.

    Attributes:
        source: where its numbers come from.
        mode: in ``observe-only`` asking for a clock does nothing.
        clocks_mhz: ascending clocks that can be asked for.
    """

    source: Source
    mode: Mode
    clocks_mhz: tuple[int, ...]

    @property
    def target_mhz(self) -> int:
        """Clock last asked for; the top clock before that."""
        ...

    @property
    def clock_mhz(self) -> int:
        """Clock in force, as far as is known."""
        ...

    def ask_clock(self, clock_mhz: int) -> None:
        """Ask for a clock; returns at once.

        Raises:
            DeviceError: no such clock (the nearest is named), or an earlier call to the driver failed.
        """
        ...

    def iteration(self, work: Work, computed_s: float) -> Spent:
        """An iteration has just been computed, in ``computed_s``; an emulated clock may make it last longer.

        Raises:
            DeviceError: an earlier call to the driver failed.
        """
        ...

    def idle(self) -> None:
        """Nothing runs, and the caller is alive."""
        ...

    def reading(self, work: Work = NOTHING) -> Reading:
        """The last telemetry; of an emulated card, while ``work`` runs on it."""
        ...

    def meters(self) -> tuple[Meter, ...]:
        """Of each GPU, or of an emulated group as a whole."""
        ...

    def close(self) -> None:
        """Give the clocks back; further calls do nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
