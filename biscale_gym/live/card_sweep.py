"""Points measured on workers whose clocks and joules are NVIDIA cards'.

A card's energy counter steps some ten times a second, so a repeat is a window of like batches, seconds long: mean power
is what lies between two steps of the counter, latency the mean time of the batches between them. Prompts are queued
without end, in a run whose token budget is the point's, so that each batch holds the point's prompts and no others;
decode sequences run until the window is over. Cards draw power while they wait: idleness is a point at every clock.

Clocks are locked for the length of a repeat by the worker's own device, and given back after it. Where they may not be
set, every point is measured at the clock that the cards run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.control.controllers import PlanContext
from biscale_gym.live import messages as m
from biscale_gym.live import nvml
from biscale_gym.live.devices import Meter
from biscale_gym.live.errors import LiveError
from biscale_gym.live.nvml_device import TOLERANCE_MHZ
from biscale_gym.live.pool import Pool, WorkerProcess, clock_mode
from biscale_gym.live.profile_file import CARD_COLUMNS, engine, provenance, system
from biscale_gym.live.profile_points import Point, SweepSettings, points_of
from biscale_gym.live.records import read_records
from biscale_gym.live.sweep import TRIES, Sweep, check_clocks
from biscale_gym.profiles.iterations import POWER

AHEAD = 8
"""Batches of prompts that are queued behind the running one."""
COUNTER_LIMIT_S = 2.0
"""Energy counters step far more often."""
METER_PAUSE_S = 0.01
LEAST_ITERATIONS = 2
ITERATION_S = 0.01
"""Decode sequences must have room for a window of iterations this long; a faster engine's window may end early."""


class _Unfit(Exception):
    """A repeat that measured something else than its point; the message says what."""


@dataclass(frozen=True)
class _Window:
    """Between two readings of a group's energy counters, each at a step of its own.

    Attributes:
        first, last: of each card.
    """

    first: tuple[Meter, ...]
    last: tuple[Meter, ...]

    @property
    def begin_s(self) -> float:
        """On ``time.monotonic``'s scale."""
        return min(meter.time_s for meter in self.first)

    @property
    def end_s(self) -> float:
        """Likewise."""
        return max(meter.time_s for meter in self.last)

    @property
    def power_w(self) -> float:
        """Mean of the whole group."""
        pairs = zip(self.first, self.last, strict=True)
        return sum((after.energy_j - before.energy_j) / (after.time_s - before.time_s) for before, after in pairs)


class CardSweep(Sweep):
    """Measures points on workers with NVIDIA cards.

    Of each TP degree one worker per phase is measured; a phase that has none of the degree is measured on the other
    phase's. Both phases must have weights of one precision, as a profile has.

    Args:
        pool, context, sweep, folder, seed: as of ``Sweep``.

    Raises:
        LiveError: the workers' weights differ in precision, the points hold chunked prompts, or a worker is dead.
        DeviceError: the cards cannot be read.
    """

    columns: Sequence[str] = CARD_COLUMNS

    def __init__(self, pool: Pool, context: PlanContext, sweep: SweepSettings, folder: Path, seed: int = 0) -> None:
        super().__init__(pool, context, sweep, folder, seed)
        if sweep.chunked_lengths:
            raise LiveError(
                "chunked_lengths: an energy counter cannot tell the chunks of a prompt apart; leave them out"
            )
        precisions = {str(worker.setup.precision) for worker in pool.workers}
        self._made: dict[str, int] = {}
        self._precision = "bf16" if pool.settings.engine == "cpu" else "/".join(sorted(precisions))
        if "/" in self._precision:
            raise LiveError(f"a profile has one precision, the workers have {self._precision}: set decode_precision")
        self._workers: dict[tuple[int, Phase], WorkerProcess] = {}
        for tp in sorted({worker.setup.tp for worker in pool.workers}):
            alike = [worker for worker in pool.workers if worker.setup.tp == tp]
            for phase in PHASES:
                self._workers[tp, phase] = next((each for each in alike if each.setup.phase == phase), alike[0])
        measured = {worker.setup.name: worker for worker in self._workers.values()}.values()
        with nvml.session():
            self._cards = nvml.open_gpus([gpu for worker in measured for gpu in worker.setup.device.gpus])
            self._driver = nvml.driver_version()
        for worker in measured:  # whether clocks may be set shows when a device is opened
            self._begin(worker, context.scenario.top_clock_mhz)
            self._end(worker)
        self.mode = clock_mode(measured)
        self._own_mhz: int | None = None
        if self.mode == "observe-only":
            self._own_mhz = self._observed_clock(list(measured))

    # -- what is measured ----------------------------------------------------------------------------------------------

    def clocks(self, asked_mhz: Sequence[int]) -> tuple[int, ...]:
        """What to measure at: the clocks asked for, of none all of the scenario's; the cards' own if only observed.

        Raises:
            LiveError: a clock that the cards do not have, or clocks where none may be set.
        """
        if self._own_mhz is not None:
            if asked_mhz:
                raise LiveError(
                    "no clock may be set here (observe-only); without --clocks every point is measured at the "
                    f"{self._own_mhz} MHz that the cards run"
                )
            return (self._own_mhz,)
        chosen = tuple(asked_mhz) or self._context.clocks_mhz
        for card in self._cards:
            check_clocks(chosen, card.clocks_mhz)
        return chosen

    def points(self, clocks_mhz: Sequence[int]) -> list[Point]:
        """What there is to measure, idleness included."""
        found: list[Point] = []
        for (tp, phase), worker in self._workers.items():
            # One of an engine's KV blocks stays empty.
            capacity = worker.kv_capacity_tokens - worker.block_tokens
            limits = (self._budget, self._pool.settings.max_model_len, capacity, worker.block_tokens)
            every = points_of(self._sweep, clocks_mhz, dict.fromkeys(PHASES, tp), *limits)
            least = (self._sweep.warmup_s + self._sweep.window_s) / ITERATION_S
            for point in every:
                fits = point.phase == phase and point.count <= worker.setup.max_sequences
                if fits and (phase == "prefill" or self._outputs(worker, point) >= least):
                    found.append(point)
        degrees = sorted({tp for tp, _ in self._workers})
        return found + [Point("idle", 0, 0, clock, tp) for tp in degrees for clock in clocks_mhz]

    def provenance(self, clocks_mhz: Sequence[int]) -> dict[str, Any]:
        """Where the numbers come from, for the file's first line."""
        cluster, settings = self._context.scenario.cluster, self._pool.settings
        dimensions = self._pool.dimensions.model_dump(mode="json")
        identity = {
            "device": ", ".join(sorted({card.name for card in self._cards})),
            "engine": engine(settings),
            "driver": f"NVIDIA {self._driver}, {system()}",
            "hardware": cluster.hardware,
            "model": cluster.model if settings.model is None else dimensions,
            "precision": self._precision,
            "token_budget": self._budget,
            "clocks": "control" if self._own_mhz is None else f"observe-only at {self._own_mhz} MHz",
        }
        locked = "locked through NVML on all cards of a group; the top clock is the driver's own"
        observed = (
            f"observed only, none was set: the column holds the {self._own_mhz} MHz that the cards run under a light "
            "load; the driver lowers them where the board's limit binds"
        )
        group = any(tp > 1 for tp, _ in self._workers) and settings.engine == "cuda"
        return provenance(
            identity,
            power="measured: energy counters, between two of their steps",
            clocks=locked if self._own_mhz is None else observed,
            allreduce="measured: a group's cards exchange as they serve" if group else "none: a worker is one process",
            model_config=dimensions,
            weights="made up" if settings.weights is None else str(settings.weights),
            gpus={worker.setup.name: list(worker.setup.device.gpus) for worker in self._workers.values()},
            kv_capacity_tokens={worker.setup.name: worker.kv_capacity_tokens for worker in self._workers.values()},
        )

    # -- measuring -----------------------------------------------------------------------------------------------------

    def repeat(self, point: Point) -> list[dict[str, Any]]:
        """One repeat's row.

        Raises:
            LiveError: the worker died or does not answer, or the point cannot be measured.
        """
        worker = self._worker(point)
        why = ""
        for _ in range(TRIES):
            try:
                return [self._row(worker, point)]
            except _Unfit as unfit:
                why = str(unfit)
        raise LiveError(f"{worker.setup.name} cannot measure {point.key!r}: {why}")

    def _worker(self, point: Point) -> WorkerProcess:
        return self._workers[point.tp, "decode" if point.phase == "idle" else point.phase]

    def _observed_clock(self, workers: Sequence[WorkerProcess]) -> int:
        """The clock that the cards run while nothing slows them.

        Raises:
            LiveError: they run at different ones.
        """
        clocks: set[int] = set()
        for worker in workers:
            clock_mhz, context = self._context.scenario.top_clock_mhz, min(self._sweep.decode_contexts)
            records, window = self._run(worker, Point("decode", 1, context, clock_mhz, worker.setup.tp))
            clocks.add(round(float(np.median(records["clock_mhz"][self._within(records, window)]))))
        if max(clocks) - min(clocks) > TOLERANCE_MHZ:
            told = ", ".join(f"{clock} MHz" for clock in sorted(clocks))
            raise LiveError(f"no clock may be set here, and the cards run at different ones: {told}")
        return max(clocks)

    def _within(self, records: npt.NDArray[np.void], window: _Window) -> npt.NDArray[np.intp]:
        """Iterations that end within the window."""
        end_s = records["end_s"] + self._origin_s
        return np.flatnonzero((end_s > window.begin_s) & (end_s <= window.end_s))

    def _row(self, worker: WorkerProcess, point: Point) -> dict[str, Any]:
        records, window = self._run(worker, point)
        row: dict[str, Any] = dict.fromkeys(CARD_COLUMNS, 0) | {"tp": point.tp, "clock_mhz": point.clock_mhz}
        row |= {POWER: round(window.power_w / point.tp, 3), "point": point.label}
        if point.phase == "idle":
            return row
        chosen = self._checked(records, window, point)
        end_s, own = records["end_s"], records[chosen]
        period_ms = 1e3 * float(end_s[chosen[-1]] - end_s[chosen[0] - 1]) / chosen.size
        host_ms = max(0.0, period_ms - 1e3 * float(own["duration_s"].mean()))
        row |= {"latency_ms": round(period_ms, 5), "host_ms": round(host_ms, 5)}
        if point.phase == "decode":
            return row | {"batch": point.count, "kv_tokens": round(float(own["kv_tokens"].mean()))}
        return row | {"prefill_tokens": point.count * point.tokens, "sum_len_sq": point.count * point.tokens**2}

    def _checked(self, records: npt.NDArray[np.void], window: _Window, point: Point) -> npt.NDArray[np.intp]:
        """The window's iterations, once all that touch it are the point's.

        Raises:
            LiveError: the cards' own clock has changed.
            _Unfit: some are not, at the point's clock.
        """
        end_s = records["end_s"] + self._origin_s
        touching = (end_s > window.begin_s) & (end_s - records["duration_s"] < window.end_s)
        if point.phase == "decode":
            alike = (records["batch"] == point.count) & (records["prefill_tokens"] == 0)
        else:
            tokens, squares = point.count * point.tokens, point.count * point.tokens**2
            alike = (records["prefill_tokens"] == tokens) & (records["sum_len_sq"] == squares) & (records["batch"] == 0)
        chosen = self._within(records, window)
        if chosen.size < LEAST_ITERATIONS or chosen[0] == 0 or end_s[-1] < window.end_s:
            raise _Unfit(f"{chosen.size} iterations in {window.end_s - window.begin_s:.2f} s")
        if not alike[touching].all():
            raise _Unfit("the engine forms other batches")
        found_mhz = float(np.median(records["clock_mhz"][chosen]))
        if self._own_mhz is None and (records["clock_mhz"][chosen] != point.clock_mhz).any():
            raise _Unfit(f"the clock in force is {found_mhz:g} MHz")
        if self._own_mhz is not None and found_mhz > self._own_mhz + TOLERANCE_MHZ:
            raise LiveError(
                f"the cards ran at {self._own_mhz} MHz, and now at {found_mhz:g} MHz: who sets their clocks?"
            )
        return chosen

    def _run(self, worker: WorkerProcess, point: Point) -> tuple[npt.NDArray[np.void], _Window]:
        """A run of a point's batches: its records, and the window in which they count.

        Raises:
            _Unfit: the cards' telemetry tells of something unusual.
        """
        prefill = point.phase == "prefill"
        path = self._begin(worker, point.clock_mhz, point.count * point.tokens if prefill else None)
        self._feeding, self._point = worker, point
        self._made = {}
        self._iterations, self._together_s = 0, time.monotonic()
        self._room = self._outputs(worker, point)
        for _ in range(AHEAD if prefill else 1):
            self._feed(point.count)
        try:
            window = self._window(worker)
        except _Unfit:
            self._end(worker)
            raise
        report = self._end(worker)
        if report.flags:
            raise _Unfit(", ".join(sorted(report.flags)))
        return read_records(path), window

    def _end(self, worker: WorkerProcess) -> m.Report:
        self._made = {}  # what is still said of its requests feeds nothing any more
        return super()._end(worker)

    def _outputs(self, worker: WorkerProcess, point: Point) -> int:
        """Tokens that each sequence can make before its context or the KV is full."""
        if point.phase != "decode":
            return 1
        blocks = (worker.kv_capacity_tokens // worker.block_tokens - 1) // point.count
        return min(self._pool.settings.max_model_len, blocks * worker.block_tokens) - point.tokens

    def _feed(self, count: int) -> None:
        for _ in range(count):
            self._made[f"profile.{self._sent}"] = 0
            self._add(self._feeding, self._point.tokens, self._room)

    def _take(self, tokens: m.Tokens) -> None:
        super()._take(tokens)
        own = [output for output in tokens.outputs if output.request in self._made]
        if not own:
            return
        for output in own:
            self._made[output.request] += len(output.tokens)
        prefill = self._point.phase == "prefill"
        if prefill or len(own) == self._point.count:  # what prompts a batch held, its record tells
            self._iterations += 1
            if self._iterations == 1:
                self._together_s = time.monotonic()
        if prefill:
            self._feed(len(own))

    @property
    def _nearly_over(self) -> bool:
        """Whether decode sequences are about to end."""
        if self._point.phase != "decode":
            return False
        return self._room - max(self._made.values()) <= max(3, self._room // 10)

    def _window(self, worker: WorkerProcess) -> _Window:
        """From the counters' first steps after the warm-up to their first when enough is measured.

        Raises:
            _Unfit: the counters do not step.
        """
        sweep, busy = self._sweep, self._point.phase != "idle"
        self._await(busy * sweep.warmup_iterations, sweep.warmup_s)
        first = self._stepped(worker)
        self._iterations, self._together_s = 0, time.monotonic()
        self._await(busy * sweep.iterations, sweep.window_s)
        last = self._stepped(worker)
        if any(after.time_s <= before.time_s for before, after in zip(first, last, strict=True)):
            raise _Unfit("an energy counter did not step")
        return _Window(first, last)

    def _await(self, iterations: int, seconds: float) -> None:
        """Until there were so many like batches, for so long, or the sequences are about to end."""

        def over() -> bool:
            enough = self._iterations >= iterations and time.monotonic() - self._together_s >= seconds
            return enough or self._nearly_over

        self._until(over)

    def _stepped(self, worker: WorkerProcess) -> tuple[Meter, ...]:
        """The cards' counters once all have stepped from now on; as they are if the sequences are about to end."""
        now_s = time.monotonic()
        while True:
            worker.send(m.ReadMeters())
            meters = self._answer(m.Meters).meters
            if self._nearly_over or min(meter.time_s for meter in meters) >= now_s:
                return meters
            if time.monotonic() > now_s + COUNTER_LIMIT_S:
                raise _Unfit(f"an energy counter did not step for {COUNTER_LIMIT_S:g} s")
            self._turn(METER_PAUSE_S)
