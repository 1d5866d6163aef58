"""Class tables: how much load an instance of each kind carries within the SLO, and what a request then costs.

R_c is the greatest mean rate of one instance of class c within the SLO, E_c its joules per request at that rate.

A class is a phase, a TP degree (and pipeline stages) and a clock. Tables belong to a profile, a training trace, an SLO
and batching rules: they are measured once, by simulation, and kept on disk under the hash of all of these; windows
change only the demand.

A *column* is the classes that differ in the clock alone. Columns are independent and are measured in parallel
processes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from biscale_gym.cluster.placement import InstanceSpec, Phase
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.config import load_preset
from biscale_gym.metrics import TpotDefinition
from biscale_gym.planning import table_cache
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.probe_trace import delayed, probe_trace
from biscale_gym.planning.probing import ProbeOutcome, greatest_rate, serve_alone
from biscale_gym.profiles import Profile
from biscale_gym.profiles.settings import TransferSettings
from biscale_gym.traces.trace import Trace

log = logging.getLogger(__name__)

CACHE_KIND = "class-tables"


@dataclass(frozen=True)
class InstanceClass:
    """One row of a class table.

    Attributes:
        phase, tp, pp, clock_mhz: what the class is.
        rate_rps: R_c, greatest mean rate of one instance within the SLO; 0 if none is.
        joules_per_request: E_c, J at that rate, idle time between iterations included.
    """

    phase: Phase
    tp: int
    pp: int
    clock_mhz: int
    rate_rps: float
    joules_per_request: float

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.pp

    @property
    def power_w(self) -> float:
        """Mean power of one instance at its greatest rate, E_c * R_c."""
        return self.rate_rps * self.joules_per_request

    def spec(self, weight: float | None = None) -> InstanceSpec:
        """An instance of this class; its routing weight is R_c unless given."""
        return InstanceSpec(self.phase, self.tp, self.clock_mhz, self.rate_rps if weight is None else weight, self.pp)


@dataclass(frozen=True)
class Measurement:
    """What a table is measured with, apart from the classes.

    Attributes:
        profile: what iterations cost, as the planner believes.
        cluster: batching rules and KV limits.
        slo: of TTFT and TPOT.
        training: demand to plan with; never the trace that is evaluated.
        headroom: share of the SLO that the quantile may use.
        quantile: of latency.
        requests_per_probe: least number of requests in a simulation.
        warmup_s: uncounted start of a simulation.
        rate_tolerance: relative width at which bisection stops.
        seed: of thinning, common to all classes.
        tpot_definition: see ``metrics.tpot_s``.
    """

    profile: Profile
    cluster: ClusterSettings
    slo: SloSettings
    training: Trace
    headroom: float
    quantile: float
    requests_per_probe: int
    warmup_s: float
    rate_tolerance: float
    seed: int
    tpot_definition: TpotDefinition = "per-decode-token"

    def limit_s(self, phase: Phase) -> float:
        """Greatest latency that passes."""
        return self.headroom * (self.slo.ttft_s if phase == "prefill" else self.slo.tpot_s)


@dataclass(frozen=True)
class Column:
    """Classes that differ in the clock alone."""

    phase: Phase
    tp: int
    pp: int
    clocks_mhz: tuple[int, ...]


def fitting_degrees(profile: Profile, phase: Phase, gpus_per_node: int, pp: int = 1) -> tuple[int, ...]:
    """TP degrees with which an instance holds the model and some KV on one node's GPUs (per pipeline stage)."""
    return tuple(
        tp
        for tp in profile.tensor_parallel_degrees
        if tp <= gpus_per_node and profile.kv_capacity_for(phase, tp, pp) // pp > 0
    )


def nominal_prefill_s(measurement: Measurement) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Delay of every training request by a prefill of its prompt alone, at the least TP that fits and the top clock.

    Returns:
        float64[requests], s.
    """
    profile, training = measurement.profile, measurement.training
    degrees = fitting_degrees(profile, "prefill", measurement.cluster.gpus_per_node)
    if not degrees:
        return np.zeros(len(training))
    prompts = training.prompt_tokens.astype(np.float64)
    milliseconds = profile.latency_ms(
        degrees[0], profile.top_clock_mhz, prefill_tokens=prompts, sum_len_sq=prompts * prompts
    )
    return np.asarray(1e-3 * milliseconds, dtype=np.float64)


def measure_column(measurement: Measurement, column: Column) -> tuple[InstanceClass, ...]:
    """Measure a column from its top clock downward, each clock's search beginning at the last one's rate.

    Returns:
        A row per clock, ascending. Rates are made non-decreasing in the clock by isotonic regression: what one random
        trace says against that is noise.
    """
    training = measurement.training
    if column.phase == "decode":
        training = delayed(training, nominal_prefill_s(measurement))
    limit_s = measurement.limit_s(column.phase)

    def passes(seen: ProbeOutcome) -> bool:
        return seen.latency_s <= limit_s

    # Far too low costs a few quick probes, far too high a few slow ones.
    guess_rps = max(training.rate_rps / 8.0, 0.1)
    rates: list[float] = []
    joules: list[float] = []
    for clock_mhz in sorted(column.clocks_mhz, reverse=True):
        spec = InstanceSpec(column.phase, column.tp, clock_mhz, pp=column.pp)

        def probe(rate_rps: float, spec: InstanceSpec = spec) -> ProbeOutcome:
            trace = probe_trace(training, rate_rps, measurement.requests_per_probe, measurement.seed)
            return serve_alone(
                measurement.profile,
                measurement.cluster,
                spec,
                trace,
                quantile=measurement.quantile,
                warmup_s=measurement.warmup_s,
                tpot_definition=measurement.tpot_definition,
            )

        rate_rps, outcome = greatest_rate(probe, passes, guess_rps, measurement.rate_tolerance)
        rates.append(rate_rps)
        joules.append(outcome.joules_per_request if outcome is not None else 0.0)
        if outcome is None:
            # A slower clock cannot carry what this one could not.
            missing = len(column.clocks_mhz) - len(rates)
            rates += [0.0] * missing
            joules += [0.0] * missing
            break
        guess_rps = rate_rps
    ascending = np.asarray(rates[::-1])
    carries = ascending > 0.0
    if carries.any():
        ascending[carries] = isotonic_regression(ascending[carries]).x
    return tuple(
        InstanceClass(column.phase, column.tp, column.pp, clock, float(rate), energy)
        for clock, rate, energy in zip(sorted(column.clocks_mhz), ascending, joules[::-1], strict=True)
    )


def source_digest() -> str:
    """Digest of the sources that a measurement depends on."""
    package = Path(__file__).parents[1]
    here = Path(__file__).parent
    return table_cache.source_digest(
        package / "traces",
        package / "profiles",
        package / "cluster",
        package / "metrics.py",
        *(here / f"{name}.py" for name in ("classes", "probing", "probe_trace", "units")),
    )


def measurement_key(measurement: Measurement, sources: str, what: dict[str, Any]) -> str:
    """Content hash of everything that figures of ``what`` depend on, the SLO apart."""
    cluster = measurement.cluster
    return table_cache.content_key(
        {
            "sources": sources,
            "profile": measurement.profile.hash,
            "batching": cluster.batching.model_dump(mode="json"),
            "routing": cluster.routing.model_dump(mode="json"),
            "gpus_per_node": cluster.gpus_per_node,
            "serving_overhead_ms": cluster.serving_overhead_ms,
            "transfer": load_preset(TransferSettings, "transfer", cluster.transfer).model_dump(mode="json"),
            "training": measurement.training.hash,
            "quantile": measurement.quantile,
            "requests_per_probe": measurement.requests_per_probe,
            "warmup_s": measurement.warmup_s,
            "rate_tolerance": measurement.rate_tolerance,
            "seed": measurement.seed,
            "tpot_definition": measurement.tpot_definition,
            **what,
        }
    )


def column_key(measurement: Measurement, column: Column, sources: str) -> str:
    """Content hash of everything that a column's rows depend on."""
    what = {
        "limit_s": measurement.limit_s(column.phase),
        "column": [column.phase, column.tp, column.pp, *sorted(column.clocks_mhz)],
    }
    return measurement_key(measurement, sources, what)


def _load_column(key: str) -> tuple[InstanceClass, ...] | None:
    rows = table_cache.load(CACHE_KIND, key)
    try:
        return None if rows is None else tuple(InstanceClass(**row) for row in rows)
    except TypeError:
        log.warning("class table %s has rows of another form: measured again", key)
        return None


def _measure_and_store(measurement: Measurement, column: Column, key: str) -> tuple[InstanceClass, ...]:
    rows = measure_column(measurement, column)
    about = {
        "profile": f"{measurement.profile.model_name} {measurement.profile.for_phase(column.phase).precision}",
        "training": measurement.training.name,
        "column": f"{column.phase} TP{column.tp} PP{column.pp}",
    }
    table_cache.store(CACHE_KIND, key, [asdict(row) for row in rows], about)
    return rows


def default_workers() -> int:
    """Processors that this process may use; 1 inside a worker that must not have children of its own."""
    if multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def class_table(
    measurement: Measurement,
    columns: Sequence[Column],
    workers: int | None = None,
    on_column: Callable[[int, int], None] | None = None,
) -> tuple[InstanceClass, ...]:
    """The rows of all columns, from disk where they have been measured before.

    Args:
        measurement: what to measure with.
        columns: what to measure.
        workers: processes; the processors at hand if None, in this process if 1.
        on_column: called with (columns done, columns in all) as they come.

    Raises:
        PlanningError: no columns are given.
    """
    if not columns:
        raise PlanningError("no class fits: the model needs more memory than any TP degree on one node offers")
    sources = source_digest()
    keys = [column_key(measurement, column, sources) for column in columns]
    tables = [_load_column(key) for key in keys]

    def take(number: int, rows: tuple[InstanceClass, ...]) -> None:
        tables[number] = rows
        if on_column is not None:
            on_column(sum(table is not None for table in tables), len(columns))

    if any(table is None for table in tables):
        _refuse_while_starting()
        with table_cache.exclusively(CACHE_KIND, table_cache.content_key({"columns": keys})):
            # Somebody else may have measured them while this process waited.
            tables = [_load_column(key) if table is None else table for key, table in zip(keys, tables, strict=True)]
            missing = [number for number, table in enumerate(tables) if table is None]
            used = min(default_workers() if workers is None else workers, len(missing))
            if used > 1:
                _measure_in_processes(measurement, columns, keys, missing, used, take)
            for number in missing:
                if tables[number] is None:
                    take(number, _measure_and_store(measurement, columns[number], keys[number]))
    return tuple(row for table in tables if table is not None for row in table)


def _refuse_while_starting() -> None:
    """In a worker that, starting, runs its parent's unguarded script again: it must not wait for the parent's lock."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise PlanningError("a worker process ran the script that started it; guard it: if __name__ == '__main__':")


def _measure_in_processes(
    measurement: Measurement,
    columns: Sequence[Column],
    keys: Sequence[str],
    missing: Sequence[int],
    workers: int,
    take: Callable[[int, tuple[InstanceClass, ...]], None],
) -> None:
    """Measure columns in freshly started processes; what they cannot do is left to the caller."""
    # The costly columns first: many GPUs carry many requests.
    order = sorted(missing, key=lambda number: -columns[number].tp * columns[number].pp)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {
                pool.submit(_measure_and_store, measurement, columns[number], keys[number]): number for number in order
            }
            for future in as_completed(futures):
                take(futures[future], future.result())
    except BrokenProcessPool:
        # A script without a main guard, or read from standard input, cannot be started again by its children.
        log.warning("worker processes cannot be started from this program: class tables are measured in this process")
