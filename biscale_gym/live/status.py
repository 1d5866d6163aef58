"""What a worker says of itself at any moment: a block of memory that it writes and its parent reads.

The worker writes at every batch boundary, some microseconds; nobody waits for anybody. A count before and after the
numbers tells a reader that it was interrupted in its reading.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from biscale_gym.live.devices import Reading, Spent, Work
from biscale_gym.live.governor import Load

SLACK_PERCENTS = (0, 5, 50)
"""Ranks of the slack in ``Status.deadline_s``."""


class Status(NamedTuple):
    """A worker at its last batch boundary; times on ``time.monotonic``'s scale unless said otherwise.

    Attributes:
        time_s: of the boundary.
        running: 1 if a batch began there, 0 if there was nothing to run. It stays 1 from one batch to the next.
        clock_mhz, target_mhz: in force, asked for.
        power_w: of the instance's GPUs while this batch runs, or while idle.
        energy_j: of its GPUs in this run, up to ``energy_s``; from then on they draw ``drawn_w``.
        energy_s, drawn_w: of the beginning of the batch, or of its end, once that is past.
        busy_j, busy_s: of iterations that have ended, in this run.
        iterations, prompt_tokens, output_tokens, clock_changes: so far in this run.
        kv_used_tokens: KV taken.
        requests: in the batch.
        batch, kv_tokens, prefill_tokens, sum_len_sq: of it (``devices.Work``).
        oldest_arrival_s: of the batch's requests, from the start of the run; infinite without any.
        routed: requests that had reached the worker in this run; later ones are in none of these numbers.
        queue_requests, queue_tokens: behind the batch.
        first_waiting_s: arrival of the first of them, from the start of the run; infinite without any.
        least_deadline_s, p5_deadline_s, p50_deadline_s: of the batch's saved-up TPOT slack: when it is used up, from
            the start of the run (decode).
    """

    time_s: float = 0.0
    running: float = 0.0
    clock_mhz: float = 0.0
    target_mhz: float = 0.0
    power_w: float = 0.0
    energy_j: float = 0.0
    energy_s: float = 0.0
    drawn_w: float = 0.0
    busy_j: float = 0.0
    busy_s: float = 0.0
    iterations: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    clock_changes: float = 0.0
    kv_used_tokens: float = 0.0
    requests: float = 0.0
    batch: float = 0.0
    kv_tokens: float = 0.0
    prefill_tokens: float = 0.0
    sum_len_sq: float = 0.0
    oldest_arrival_s: float = float("inf")
    routed: float = 0.0
    queue_requests: float = 0.0
    queue_tokens: float = 0.0
    first_waiting_s: float = float("inf")
    least_deadline_s: float = 0.0
    p5_deadline_s: float = 0.0
    p50_deadline_s: float = 0.0

    @property
    def deadlines_s(self) -> tuple[float, float, float]:
        """By ``SLACK_PERCENTS``."""
        return self.least_deadline_s, self.p5_deadline_s, self.p50_deadline_s

    @property
    def work_terms(self) -> tuple[float, float, float, float]:
        """The batch, as ``profiles.kernels.iteration_latency`` takes it."""
        return self.batch, self.kv_tokens, self.prefill_tokens, self.sum_len_sq

    def energy_at_j(self, time_s: float) -> float:
        """Joules up to a later time, if nothing changes until then."""
        return self.energy_j + self.drawn_w * max(0.0, time_s - self.energy_s)


_FORMAT = struct.Struct(f"={len(Status._fields)}d")
_COUNT = struct.Struct("=q")
BLOCK_BYTES = 2 * _COUNT.size + _FORMAT.size
_TRIES = 1000


def write_status(block: Any, status: Status) -> None:
    """By the one writer of a block."""
    (count,) = _COUNT.unpack_from(block, 0)
    _COUNT.pack_into(block, 0, count + 1)
    _FORMAT.pack_into(block, 2 * _COUNT.size, *status)
    _COUNT.pack_into(block, _COUNT.size, count + 1)


def clear_status(block: Any) -> None:
    """Before a new writer: nothing is known."""
    struct.pack_into(f"={BLOCK_BYTES}x", block, 0)


def read_status(block: Any) -> Status | None:
    """The last whole status; all zero before the first. None: the writer has died while it wrote."""
    for _ in range(_TRIES):
        (after,) = _COUNT.unpack_from(block, _COUNT.size)
        status = Status(*_FORMAT.unpack_from(block, 2 * _COUNT.size))
        (before,) = _COUNT.unpack_from(block, 0)
        if before == after:
            return status if after else Status()
    return None


class StatusWriter:
    """A worker's side of its block during one run.

    Args:
        block: shared memory of ``BLOCK_BYTES`` bytes.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._status = Status()
        self._began_j = 0.0
        self._busy_j = self._busy_s = 0.0
        self._iterations = self._prompt_tokens = self._output_tokens = self._clock_changes = 0
        self._target_mhz: int | None = None

    def go(self, began_j: float) -> None:
        """The run begins; joules count from the device's reading."""
        self._began_j = began_j

    def boundary(self, load: Load, now_s: float, reading: Reading, target_mhz: int) -> None:
        """A batch begins, or (``load.work`` is empty) there is none.

        Args:
            load: what the governor is shown.
            now_s: from the start of the run.
            reading: of the device, running this batch.
            target_mhz: of the device.
        """
        if self._target_mhz is not None and target_mhz != self._target_mhz:
            self._clock_changes += 1
        self._target_mhz = target_mhz
        work = load.work
        self._show(
            Status(
                reading.time_s,
                float(not work.empty),
                reading.clock_mhz,
                target_mhz,
                reading.power_w,
                reading.energy_j - self._began_j,
                reading.time_s,
                reading.power_w,
                self._busy_j,
                self._busy_s,
                self._iterations,
                self._prompt_tokens,
                self._output_tokens,
                self._clock_changes,
                load.kv_used_tokens,
                load.requests,
                work.batch,
                work.kv_tokens,
                work.prefill_tokens,
                work.sum_len_sq,
                load.oldest_arrival_s,
                load.routed,
                load.queue_requests,
                load.queue_tokens,
                next((prompt.arrival_s for prompt in load.waiting if prompt.done == 0), float("inf")),
                *(now_s + slack_s for slack_s in ranked(load.slack_s)),
            )
        )

    def _show(self, status: Status) -> None:
        self._status = status
        write_status(self._block, status)

    def ended(self, work: Work, spent: Spent, reading: Reading) -> None:
        """A batch has run; ``reading`` is of the device, running nothing."""
        self._busy_j += spent.energy_j
        self._busy_s += spent.duration_s
        self._iterations += 1
        self._prompt_tokens += int(work.prefill_tokens)
        self._output_tokens += int(work.batch)
        energy_j = reading.energy_j - self._began_j
        self._show(self._status._replace(energy_j=energy_j, energy_s=reading.time_s, drawn_w=reading.power_w))


def ranked(values: Sequence[float]) -> tuple[float, ...]:
    """The values of ``SLACK_PERCENTS``, ranked as the modelled engine does; zeros of none."""
    ascending = sorted(values)
    if not ascending:
        return (0.0,) * len(SLACK_PERCENTS)
    return tuple(ascending[percent * (len(ascending) - 1) // 100] for percent in SLACK_PERCENTS)
