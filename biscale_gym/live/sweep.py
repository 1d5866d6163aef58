"""Points measured on live workers, one repeat at a time, and what lies between two workers.

Latency is the time from the end of the iteration before to its own end while the worker is never idle: what the batch
took and what scheduling, bookkeeping and messages took between two batches (``host_ms``), which no clock changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.workload import generated_demand
from biscale_gym.live import messages as m
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Died, Pool, WorkerProcess
from biscale_gym.live.profile_file import COLUMNS, engine, processor, provenance, system
from biscale_gym.live.profile_points import Point, SweepSettings, outputs_of, points_of
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Replay
from biscale_gym.live.vllm_adapter.model import FIRST_TOKEN_ID
from biscale_gym.traces import Trace

Kind = TypeVar("Kind")
REPLY_LIMIT_S = 120.0
HANDOVER_OUTPUT_TOKENS = 4
"""Requests of the hand-over measurement are alone in the system."""
TRIES = 3
"""Of a repeat in which the engine formed other batches than asked for."""


class Sweep:
    """Measures points on the CPU workers of a pool, whose clocks and power are emulated.

    Args:
        pool: its workers, up.
        context: of the scenario.
        sweep: what is measured.
        folder: for the records of the repeat at hand.
        seed: of prompts.

    Attributes:
        columns: of a row.
        mode: whether clocks are set, or observed only.
    """

    columns: Sequence[str] = COLUMNS
    mode = "control"

    def __init__(self, pool: Pool, context: PlanContext, sweep: SweepSettings, folder: Path, seed: int = 0) -> None:
        self._pool, self._context, self._sweep, self._folder, self._seed = pool, context, sweep, folder, seed
        self._rng = np.random.default_rng(seed)
        self._sent = 0
        self._waiting_for: set[str] = set()
        self._heard_s = time.monotonic()
        self._budget = context.scenario.cluster.batching.prefill_token_budget

    def clocks(self, asked_mhz: Sequence[int]) -> tuple[int, ...]:
        """What to measure at: the clocks asked for; of none, the scenario's top clock.

        Raises:
            LiveError: a clock that the devices do not have.
        """
        check_clocks(asked_mhz, self._context.clocks_mhz)
        return tuple(asked_mhz) or (self._context.scenario.top_clock_mhz,)

    def provenance(self, clocks_mhz: Sequence[int]) -> dict[str, Any]:
        """Where the numbers come from, for the file's first line.

        Args:
            clocks_mhz: that are measured at.
        """
        cluster, settings = self._context.scenario.cluster, self._pool.settings
        identity = {
            "device": f"{processor()}, one thread per worker",
            "engine": engine(settings),
            "driver": system(),
            "model": self._pool.dimensions.model_dump(mode="json"),
            "precision": "bf16",
            "kv_capacity_tokens": self._pool.workers[0].kv_capacity_tokens,
            "token_budget": self._budget,
            "emulates": {
                "hardware": cluster.hardware,
                "model": cluster.model,
                "precision": cluster.precision,
                "decode_precision": cluster.decode_precision,
                "clocks_mhz": list(self._context.clocks_mhz),
            },
        }
        return provenance(
            identity,
            power="absent: a CPU worker has no meter of its own",
            clocks="emulated: the batch is stretched, the rest is not",
            allreduce="none: a worker is one process, whatever TP it stands for",
        )

    def points(self, clocks_mhz: Sequence[int]) -> list[Point]:
        """What there is to measure."""
        first = self._pool.workers[0]
        tp = {worker.setup.phase: worker.setup.tp for worker in reversed(self._pool.workers)}
        limits = (self._budget, self._pool.settings.max_model_len, first.kv_capacity_tokens, first.block_tokens)
        return points_of(self._sweep, clocks_mhz, tp, *limits)

    def repeat(self, point: Point) -> list[dict[str, Any]]:
        """One repeat's rows: one per batch of the point.

        Raises:
            LiveError: the worker died or does not answer, or does not form the batch.
        """
        worker = next(each for each in self._pool.workers if each.setup.phase == point.phase)
        for _ in range(TRIES):
            records = self._records(worker, point)
            rows = self._decode_rows(point, records) if point.phase == "decode" else self._prefill_rows(point, records)
            if rows:
                return [{"tp": point.tp, "clock_mhz": point.clock_mhz, **row} for row in rows]
        raise LiveError(f"{worker.setup.name} does not form the batch of {point.key!r}")

    def _records(self, worker: WorkerProcess, point: Point) -> npt.NDArray[np.void]:
        """The worker's records of a run that holds the point's clock."""
        path = self._begin(worker, point.clock_mhz)
        if point.phase == "decode":
            self._serve(worker, point, outputs_of(point.count, point.tokens, self._budget, self._sweep))
        else:
            for _ in range(1 + self._prefill_samples):
                self._serve(worker, point, 1)
        self._end(worker)
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
        self._until(lambda: not self._waiting_for)

    # -- workers -------------------------------------------------------------------------------------------------------

    def _begin(self, worker: WorkerProcess, clock_mhz: int, token_budget: int | None = None) -> Path:
        """Begin a run that holds a clock; its records' file. Its time counts from ``_origin_s`` on."""
        path = self._folder / f"{worker.setup.name}.csv"
        worker.send(m.Run(None, self._context, path, clock_mhz, token_budget=token_budget))
        self._answer(m.Begun)
        self._origin_s = time.monotonic()
        worker.send(m.Go(self._origin_s))
        return path

    def _end(self, worker: WorkerProcess) -> m.Report:
        """End the run; what is still in flight is given up."""
        for name in self._waiting_for:
            worker.send(m.Abort(name))
        self._waiting_for.clear()
        worker.send(m.EndRun())
        return self._answer(m.Report)

    def _add(self, worker: WorkerProcess, prompt_tokens: int, output_tokens: int) -> None:
        name = f"profile.{self._sent}"
        self._sent += 1
        self._waiting_for.add(name)
        highest = self._pool.dimensions.vocabulary
        prompt = self._rng.integers(FIRST_TOKEN_ID, highest, prompt_tokens, dtype=np.int32)
        worker.send(m.Add(name, prompt, output_tokens, None, 0.0, 0.0))

    def _take(self, tokens: m.Tokens) -> None:
        """Count what an iteration brought."""
        self._waiting_for -= {output.request for output in tokens.outputs if output.finished}

    def _turn(self, timeout_s: float = 0.05) -> list[object]:
        """Hear the workers; what they said."""
        said: list[object] = []
        for _, message in self._pool.messages(timeout_s):
            if isinstance(message, Died):
                raise LiveError(f"the sweep ends: {message.why}")
            if isinstance(message, m.Tokens):
                self._take(message)
            if not isinstance(message, m.Alive):
                self._heard_s = time.monotonic()
            said.append(message)
        if time.monotonic() - self._heard_s > REPLY_LIMIT_S:
            raise LiveError(f"no answer from the workers for {REPLY_LIMIT_S:g} s")
        return said

    def _until(self, true: Callable[[], bool]) -> None:
        """Hear the workers until it is true."""
        self._heard_s = time.monotonic()
        while not true():
            self._turn()

    def _answer(self, kind: type[Kind]) -> Kind:
        """Hear the workers until one gives this answer."""
        self._heard_s = time.monotonic()
        while True:
            for message in self._turn():
                if isinstance(message, kind):
                    return message

    # -- records -------------------------------------------------------------------------------------------------------

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
        gap_s = self._sweep.handover_gap_s
        arrival_s = gap_s * np.arange(1.0, number + 1.0)
        prompts = self._rng.permutation(np.minimum(lengths, self._budget).astype(np.int64))
        trace = Trace(arrival_s, prompts, np.full(number, HANDOVER_OUTPUT_TOKENS), "handovers")
        scenario = self._context.scenario.model_copy(update={"duration_s": trace.duration_s + gap_s})
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


def check_clocks(asked_mhz: Sequence[int], known_mhz: Sequence[int]) -> None:
    """Refuse clocks that workers' devices do not have.

    Raises:
        LiveError: the first of them is named.
    """
    unknown = sorted(set(asked_mhz) - set(known_mhz))
    if unknown:
        known = ", ".join(map(str, known_mhz))
        raise LiveError(f"the workers' devices have no clock {unknown[0]} MHz; valid: {known}")
