"""``NvmlDevice``: the cards of one instance, their clocks set and their power read from a thread beside the engine.

A clock call blocks for milliseconds and the driver serves one at a time per node, so calls never lie in the engine's
path: the thread carries out the clock last asked for, on all cards of the group back to back. The same thread samples
telemetry and passes the caller's beats on to the watchdog.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from biscale_gym.live import nvml
from biscale_gym.live.counter import EnergyCounter
from biscale_gym.live.devices import (
    COUNTER_BACK,
    NOTHING,
    OVERRIDDEN,
    WATCHDOG_DIED,
    Meter,
    Mode,
    Reading,
    Source,
    Spent,
    Work,
    check_clock,
)
from biscale_gym.live.errors import DeviceError
from biscale_gym.live.locks import GpuLock, clock_calls
from biscale_gym.live.watchdog import Watchdog

SETTLE_S = 0.02
"""A new clock shows within 1 ms of the call's return; read later than this, a card must run at it."""
CONTRARY_SAMPLES = 3
"""So many samples in a row that contradict the locked clock are somebody else's doing."""
TOLERANCE_MHZ = 15
"""One step of the card: what the driver may round to."""
JOIN_LIMIT_S = 5.0


class NvmlDevice:
    """The cards of one tensor-parallel group.

    Args:
        gpus: NVML indices.
        mode: ``observe-only`` reads and sets nothing, and needs no permission.
        sample_s: period of the telemetry.
        watchdog_s: silence of the caller (``ask_clock``, ``iteration`` and ``idle`` break it) after which the
            watchdog gives the clocks back.

    Raises:
        DeviceError: no such card, no driver, cards of different clocks.
        DevicePermissionError: this process may not set clocks.
        DeviceBusyError: another controller holds a card; its pid is named.
    """

    source: Source = "measured"

    def __init__(
        self, gpus: Sequence[int], mode: Mode = "control", sample_s: float = 0.05, watchdog_s: float = 10.0
    ) -> None:
        self.mode = mode
        self._sample_s, self._watchdog_s = sample_s, watchdog_s
        self._watchdog: Watchdog | None = None
        self._closed = False
        with contextlib.ExitStack() as opened:
            self._open(gpus, opened)
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name=f"clocks of GPUs {list(gpus)}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _open(self, indices: Sequence[int], opened: contextlib.ExitStack) -> None:
        opened.enter_context(nvml.session())
        self._gpus = nvml.open_gpus(indices)
        first = self._gpus[0]
        self.clocks_mhz = first.clocks_mhz
        for gpu in self._gpus[1:]:
            if gpu.clocks_mhz != self.clocks_mhz:
                raise DeviceError(
                    f"GPU {gpu.index} ({gpu.name}) has other clocks than GPU {first.index} ({first.name}); "
                    "the cards of a group move together"
                )
        self._counters = [EnergyCounter() for _ in self._gpus]
        self._condition = threading.Condition()
        self._asked: int | None = None  # what the thread has still to bring about
        self._locked = False
        self._target_mhz = self._in_force_mhz = self.clocks_mhz[-1]
        self._set_s = self._beat_s = self._passed_on_s = time.monotonic()
        self._contrary = 0
        self._flags: set[str] = set()
        self._fault: DeviceError | None = None
        self._stopping = False
        self._sample()
        if self.mode == "control":
            locks = [opened.enter_context(contextlib.closing(GpuLock(gpu.index, gpu.uuid))) for gpu in self._gpus]
            self._lock_descriptors = [lock.descriptor for lock in locks]
            # A known state to start from, and the call that shows whether this process may set clocks.
            self._give_back()
            self._start_watchdog()

    def _start_watchdog(self) -> None:
        self._watchdog = Watchdog([gpu.index for gpu in self._gpus], self._watchdog_s, self._lock_descriptors)

    # -- the caller's side ---------------------------------------------------------------------------------------------

    @property
    def watchdog_pid(self) -> int | None:
        """Of the watchdog process; None in ``observe-only``."""
        return None if self._watchdog is None else self._watchdog.pid

    @property
    def target_mhz(self) -> int:
        """Clock last asked for; the top clock before that, and after clocks were lost to somebody else."""
        return self._target_mhz

    @property
    def clock_mhz(self) -> int:
        """Clock in force: the locked one; unlocked the top clock, to which the driver boosts; observed if observing."""
        if self.mode == "control":
            return self._in_force_mhz
        observed_mhz = self._reading.clock_mhz
        return min(self.clocks_mhz, key=lambda clock: abs(clock - observed_mhz))

    def _beat(self) -> None:
        self._beat_s = time.monotonic()
        if self._fault is not None:
            raise self._fault

    def ask_clock(self, clock_mhz: int) -> None:
        """Ask for a clock; returns at once.

        Raises:
            DeviceError: no such clock (the nearest is named), or an earlier call to the driver failed.
        """
        self._beat()
        if clock_mhz == self._target_mhz:
            return
        check_clock(clock_mhz, self.clocks_mhz)
        with self._condition:
            self._target_mhz = clock_mhz
            if self.mode == "control":
                self._asked = clock_mhz
                self._condition.notify()

    def iteration(self, work: Work, computed_s: float) -> Spent:
        """An iteration has been computed; a real card has taken its time already.

        Raises:
            DeviceError: an earlier call to the driver failed.
        """
        self._beat()
        return Spent(computed_s, self.clock_mhz, self._reading.power_w * computed_s)

    def idle(self) -> None:
        """Nothing runs, and the caller is alive."""
        self._beat()

    def reading(self, work: Work = NOTHING) -> Reading:
        """The last telemetry; measured, whatever runs."""
        return self._reading

    def meters(self) -> tuple[Meter, ...]:
        """Of each card, in the order of ``gpus``."""
        return self._meters

    def close(self) -> None:
        """Give the clocks back; if the driver does not let go within seconds, the watchdog goes on trying.

        Raises:
            DeviceError: the clocks could not be given back from here.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(JOIN_LIMIT_S)
        with self._opened:
            given_back = False
            try:
                if self._thread.is_alive():
                    raise DeviceError("the driver does not answer; the watchdog goes on trying to give the clocks back")
                if self.mode == "control":
                    self._give_back()
                given_back = True
            finally:
                if self._watchdog is not None:
                    self._watchdog.end(given_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._stopping or self._asked is not None, max(0.0, due_s - time.monotonic())
                )
                if self._stopping:
                    return
                asked, self._asked = self._asked, None
            try:
                self._keep_watched()
                if asked is not None:
                    self._move(asked)
            except DeviceError as fault:
                self._fail(fault)
                return
            if time.monotonic() >= due_s:
                # A card that cannot be read leaves the last reading to age, which callers look at.
                with contextlib.suppress(DeviceError):
                    self._sample()
                due_s = time.monotonic() + self._sample_s

    def _keep_watched(self) -> None:
        """Pass a new beat on; a watchdog that has ended is replaced, and the clocks are the driver's until then."""
        if self._watchdog is None or self._beat_s == self._passed_on_s:
            return
        self._passed_on_s = self._beat_s
        if not self._watchdog.beat():
            self._watchdog.end()
            self._lost(WATCHDOG_DIED)
            self._give_back()
            self._start_watchdog()

    def _move(self, clock_mhz: int) -> None:
        with clock_calls():
            for gpu in self._gpus:
                gpu.lock_clock(clock_mhz)
        self._set_s, self._contrary = time.monotonic(), 0
        self._locked, self._in_force_mhz = True, clock_mhz

    def _give_back(self) -> None:
        with clock_calls():
            for gpu in self._gpus:
                gpu.reset_clock()
        self._locked, self._in_force_mhz = False, self.clocks_mhz[-1]

    def _fail(self, fault: DeviceError) -> None:
        """A call failed halfway through the group: no card stays behind at a lower clock, and the caller is told."""
        for gpu in self._gpus:
            with contextlib.suppress(DeviceError):
                gpu.reset_clock()
        self._fault = fault

    def _lost(self, flag: str) -> None:
        """The locked clock is not in force any more; the next clock asked for is set anew."""
        with self._condition:
            self._flags.add(flag)
            self._locked, self._contrary = False, 0
            self._target_mhz = self._in_force_mhz = self.clocks_mhz[-1]
            self._asked = None

    def _sample(self) -> None:
        now_s = time.monotonic()
        clocks_mhz = [gpu.clock_mhz() for gpu in self._gpus]
        watts = [gpu.power_w() for gpu in self._gpus]
        joules = [
            counter.read(gpu.energy_mj(), power_w, now_s)
            for gpu, counter, power_w in zip(self._gpus, self._counters, watts, strict=True)
        ]
        if any(counter.went_back for counter in self._counters):
            self._flags.add(COUNTER_BACK)
        if self._locked and now_s - self._set_s > SETTLE_S:
            self._contrary = self._contrary + 1 if self._contradicted(clocks_mhz) else 0
            if self._contrary == CONTRARY_SAMPLES:
                self._lost(OVERRIDDEN)
        self._meters = tuple(Meter(counter.stepped_s, counter.energy_j) for counter in self._counters)
        self._reading = Reading(now_s, max(clocks_mhz), sum(watts), sum(joules), frozenset(self._flags))

    def _contradicted(self, clocks_mhz: Sequence[int]) -> bool:
        """Whether a card runs above the locked clock, or below it without the driver having a reason of its own."""
        locked_mhz = self._in_force_mhz
        return any(
            clock > locked_mhz + TOLERANCE_MHZ or (clock < locked_mhz - TOLERANCE_MHZ and not gpu.slowed())
            for gpu, clock in zip(self._gpus, clocks_mhz, strict=True)
        )
