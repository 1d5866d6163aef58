"""An energy counter that only ever goes forward."""

from __future__ import annotations


class EnergyCounter:
    """Joules since the first reading of a card's millijoule counter.

    The counter starts again at zero when the driver is reloaded or the card is reset. What was drawn in between is
    then unknown: it is taken as the last power times the elapsed time, and counted in ``went_back``.

    Attributes:
        energy_j: joules so far.
        stepped_s: when it was first read at its present value: cards move it less often than it is read.
        went_back: how often the counter fell.
    """

    def __init__(self) -> None:
        self.energy_j = self.stepped_s = 0.0
        self.went_back = 0
        self._last_mj: int | None = None
        self._last_s = 0.0
        self._last_w = 0.0

    def read(self, counter_mj: int, power_w: float, now_s: float) -> float:
        """Take in a reading [mJ], the power [W] and the time [s] it was taken at; returns ``energy_j``."""
        if self._last_mj is not None:
            if counter_mj >= self._last_mj:
                self.energy_j += 1e-3 * (counter_mj - self._last_mj)
            else:
                self.went_back += 1
                self.energy_j += self._last_w * (now_s - self._last_s)
        if counter_mj != self._last_mj:
            self.stepped_s = now_s
        self._last_mj, self._last_s, self._last_w = counter_mj, now_s, power_w
        return self.energy_j
