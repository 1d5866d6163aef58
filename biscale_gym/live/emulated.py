"""``EmulatedDevice``: the clock and the power meter of a card, for a worker that computes on a CPU.

An iteration is stretched by what the profile says the clock does to this batch: its latency at the clock in force over
its latency at the top clock. Energy is the profile's power for this batch and clock, times the measured seconds. So
queues, batches and transfers are real, while every joule and every clock is ``modelled``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from biscale_gym.live.devices import NOTHING, Meter, Mode, Reading, Source, Spent, Work, check_clock
from biscale_gym.profiles import Profile, SwitchingSettings
from biscale_gym.profiles.kernels import idle_power_w, iteration_cost


class EmulatedDevice:
    """One emulated tensor-parallel group.

    Args:
        profile: of the card that is emulated.
        tp: cards of the group.
        clocks_mhz: ascending clocks that can be asked for.
        switching: how long a clock takes to come into force: the median call for every card in turn, then settling.
        now_s, sleep: the time, and how it passes.

    Raises:
        ProfileError: a TP degree or a clock that the hardware does not have.
    """

    source: Source = "modelled"
    mode: Mode = "control"

    def __init__(
        self,
        profile: Profile,
        tp: int,
        clocks_mhz: Sequence[int],
        switching: SwitchingSettings,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clocks_mhz = tuple(clocks_mhz)
        self._model = profile.compile(tp, self.clocks_mhz, 1024)
        self._tp = tp
        self._switch_s = 1e-3 * (tp * switching.median_ms + switching.settle_ms)
        self._now_s, self._sleep = now_s, sleep
        self._clock = self._target = len(self.clocks_mhz) - 1
        self._effect_s = 0.0
        self._energy_j = 0.0
        self._cost(Work(), 0)  # compiled before the first batch
        self._cost(Work(prefill_tokens=1.0, sum_len_sq=1.0), 0)
        self._booked_s = now_s()

    @property
    def target_mhz(self) -> int:
        """Clock last asked for; the top clock before that."""
        return self.clocks_mhz[self._target]

    @property
    def clock_mhz(self) -> int:
        """Clock in force."""
        self._book_idle(self._now_s())
        return self.clocks_mhz[self._clock]

    def ask_clock(self, clock_mhz: int) -> None:
        """Ask for a clock, which is in force after the switching time.

        Raises:
            DeviceError: no such clock; the nearest is named.
        """
        if clock_mhz == self.clocks_mhz[self._target]:
            return
        check_clock(clock_mhz, self.clocks_mhz)
        now_s = self._now_s()
        self._book_idle(now_s)
        self._target = self.clocks_mhz.index(clock_mhz)
        self._effect_s = now_s + self._switch_s

    def _cost(self, work: Work, clock: int) -> tuple[float, float]:
        """Latency [s] of an iteration on the emulated cards, and their power [W]."""
        if work.empty:
            return 1.0, self._tp * idle_power_w(self._model, clock)
        latency_s, power_w = iteration_cost(
            self._model, clock, work.batch, work.kv_tokens, work.prefill_tokens, work.sum_len_sq
        )
        return latency_s, self._tp * power_w

    def _book_idle(self, until_s: float) -> None:
        """Book idle power up to a time, a clock that comes into force before it included."""
        while self._booked_s < until_s:
            end_s = until_s
            if self._clock != self._target:
                end_s = min(until_s, max(self._booked_s, self._effect_s))
            self._energy_j += self._cost(Work(), self._clock)[1] * (end_s - self._booked_s)
            self._booked_s = end_s
            if self._clock != self._target and end_s >= self._effect_s:
                self._clock = self._target

    def iteration(self, work: Work, computed_s: float) -> Spent:
        """Stretch the iteration that was computed in the last ``computed_s`` seconds, and book its energy."""
        computed_at_s = self._now_s()
        start_s = max(self._booked_s, computed_at_s - computed_s)
        self._book_idle(start_s)
        top_latency_s = self._cost(work, len(self.clocks_mhz) - 1)[0]
        at_s, left, before_j = start_s, computed_at_s - start_s, self._energy_j
        while True:  # ``left``: seconds of computing at the top clock that are still to be accounted for
            latency_s, power_w = self._cost(work, self._clock)
            stretch = 1.0 if work.empty else latency_s / top_latency_s
            end_s = at_s + left * stretch
            if self._clock == self._target or end_s <= self._effect_s:
                break
            change_s = max(at_s, self._effect_s)
            self._energy_j += power_w * (change_s - at_s)
            left -= (change_s - at_s) / stretch
            at_s, self._clock = change_s, self._target
        if end_s > computed_at_s:
            self._sleep(end_s - computed_at_s)
        # What the sleep really took is what the batch waited for.
        self._booked_s = max(at_s, self._now_s())
        self._energy_j += power_w * (self._booked_s - at_s)
        return Spent(self._booked_s - start_s, self.clocks_mhz[self._clock], self._energy_j - before_j)

    def idle(self) -> None:
        """Nothing runs."""
        self._book_idle(self._now_s())

    def reading(self, work: Work = NOTHING) -> Reading:
        """Clock, power while ``work`` runs (this is called between iterations), energy so far."""
        now_s = self._now_s()
        self._book_idle(now_s)
        return Reading(now_s, self.clocks_mhz[self._clock], self._cost(work, self._clock)[1], self._energy_j)

    def meters(self) -> tuple[Meter, ...]:
        """The group's, which steps all the time."""
        now = self.reading()
        return (Meter(now.time_s, now.energy_j),)

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
