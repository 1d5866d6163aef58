"""``biscale-gym profile``: what iterations of a live worker take, point by point, and what lies between two workers.

A point is a batch (so many sequences of so many tokens) at a clock. It is measured again, in turn with all others,
until the 95 % interval of its repeats' median is narrow enough or it has had its most repeats: machines drift, and a
point that is repeated in one go would call the drift precision. Every repeat is a row, kept as soon as it is measured,
so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from biscale_gym.config import load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live.card_sweep import CardSweep
from biscale_gym.live.demand import prepared
from biscale_gym.live.pool import Pool
from biscale_gym.live.profile_file import (
    HANDOVER_COLUMNS,
    SERVICE_COLUMNS,
    ProfileFile,
    handovers_path,
    keep,
    service_path,
)
from biscale_gym.live.profile_points import Point, SweepSettings, done, widest_percent
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.sweep import Sweep

SERVICE_SEED = 1000


def give_cores(pool: Pool) -> None:
    """Give each worker that computes on a CPU a core of its own, where there are as many: two on one halve both.

    Only the engine's own thread is bound; a worker computes on one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if pool.settings.engine == "cpu" and len(cores) >= len(pool.workers):
        for worker, core in zip(pool.workers, cores, strict=False):
            os.sched_setaffinity(worker.pid, {core})


@dataclass(frozen=True)
class Summary:
    """A finished sweep.

    Attributes:
        points, rows: in the file.
        median_percent, widest_percent: half widths of the points' 95 % intervals.
        power: whether it was measured.
        mode: ``control``, or ``observe-only`` at the clock that the cards run.
        clocks_mhz: that were measured at.
    """

    points: int
    rows: int
    median_percent: float
    widest_percent: float
    power: bool
    mode: str
    clocks_mhz: tuple[int, ...]


def run_sweep(
    pool: Pool,
    context: PlanContext,
    sweep: SweepSettings,
    clocks_mhz: Sequence[int],
    path: Path,
    seed: int = 0,
    console: Console | None = None,
) -> Summary:
    """Measure until every point is done, going on with a file that is there, and then the hand-overs.

    Args:
        pool: workers, up.
        context: of the scenario.
        sweep: what is measured.
        clocks_mhz: at which clocks; empty: the scenario's top clock, or all of its clocks where cards have them.
        path: the CSV file.
        seed: of prompts.
        console: for the progress bar.

    Raises:
        LiveError, ProfileError, OSError: what is wrong.
    """
    measures = CardSweep if pool.settings.device.kind == "nvml" else Sweep
    with tempfile.TemporaryDirectory(prefix="biscale-profile-") as folder:
        measuring = measures(pool, context, sweep, Path(folder), seed)
        clocks_mhz = measuring.clocks(clocks_mhz)
        points = measuring.points(clocks_mhz)
        if not path.exists():
            handovers_path(path).unlink(missing_ok=True)
            service_path(path).unlink(missing_ok=True)
        file = ProfileFile(path, measuring.provenance(clocks_mhz), measuring.columns)
        repeats = file.repeats

        def left() -> list[Point]:
            return [point for point in points if not done(repeats.get(point.key, []), sweep)]

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("points", total=len(points))
            while remaining := left():
                progress.update(task, completed=len(points) - len(remaining))
                for point in remaining:
                    progress.update(task, description=point.key)
                    file.add(measuring.repeat(point))
                    if done(repeats[point.key], sweep):
                        progress.advance(task)
            progress.update(task, description="hand-overs", completed=len(points))
            keep(handovers_path(path), HANDOVER_COLUMNS, measuring.handovers())
            if sweep.service_s and measures is Sweep:
                progress.update(task, description="in service")
                keep(service_path(path), SERVICE_COLUMNS, measuring.service(SERVICE_SEED + seed))
    widths = [widest_percent(repeats[point.key]) for point in points]
    rows = sum(len(values) for values in repeats.values())
    return Summary(
        len(points), rows, float(np.median(widths)), max(widths), measures is CardSweep, measuring.mode, clocks_mhz
    )


def profile(
    scenario_name: str, preset: str, sweep_preset: str, clocks_mhz: Sequence[int], path: Path, seed: int
) -> Summary:
    """Start workers and sweep.

    Args:
        scenario_name: its placement says which workers there are, its cluster what they emulate.
        preset: of live settings, or a file.
        sweep_preset: in ``configs/profiling``, or a file.
        clocks_mhz: to measure at; empty: the scenario's top clock of CPU workers, all its clocks of cards.
        path: the CSV file.
        seed: of prompts.

    Raises:
        ConfigError, LiveError, ProfileError, OSError: what is wrong.
    """
    scenario = load_scenario(scenario_name)
    settings = load_preset(LiveSettings, "live", preset)
    sweep = load_preset(SweepSettings, "profiling", sweep_preset)
    _, context = prepared(scenario, None, seed)
    with tempfile.TemporaryDirectory(prefix="biscale-model-") as folder, Pool(scenario, settings, Path(folder)) as pool:
        give_cores(pool)
        return run_sweep(pool, context, sweep, clocks_mhz, path, seed, Console(stderr=True))
