"""What a sweep measures: points, and when enough repeats of one are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.stats import t as student

from biscale_gym.cluster.placement import Phase
from biscale_gym.config import Settings

Count = Annotated[int, Field(ge=1)]
CONFIDENCE = 0.95


class SweepSettings(Settings):
    """What is measured (presets in ``configs/profiling``).

    Attributes:
        decode_batches, decode_contexts: sequences, and tokens of each; every pair that fits into the worker's KV.
        prefill_counts, prefill_lengths: prompts, and tokens of each; every pair within the token budget.
        chunked_lengths: single prompts above the token budget, whose chunks are points of their own; none on GPUs, as
            an energy counter cannot tell them apart.
        warmup_iterations: of a repeat, not counted.
        iterations: of a repeat, averaged into its row; on GPUs at least so many.
        warmup_s: of a repeat on GPUs: how long its batch or idleness lasts before it counts.
        window_s: of a repeat on GPUs: how long it counts, of the energy counter too.
        least_repeats, most_repeats: of a point.
        precision_percent: half width of the 95 % interval of the repeats' median at which a point is done, in latency
            and in power where it is measured.
        handovers: requests, one at a time, that measure what lies between client, prefill and decode worker.
        handover_gap_s: between two of them.
        service_s: how long CPU workers serve a trace of the scenario's workload, of another seed than any that is
            evaluated: its iterations tell how much slower batches are in service than in a sweep; 0: not at all.
    """

    decode_batches: Annotated[tuple[Count, ...], Field(min_length=2)]
    decode_contexts: Annotated[tuple[Count, ...], Field(min_length=2)]
    prefill_counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    prefill_lengths: Annotated[tuple[Count, ...], Field(min_length=2)]
    chunked_lengths: tuple[Count, ...] = ()
    warmup_iterations: Annotated[int, Field(ge=1)]
    iterations: Annotated[int, Field(ge=2)]
    warmup_s: Annotated[float, Field(ge=0)] = 0.5
    window_s: Annotated[float, Field(gt=0)] = 2.0
    least_repeats: Annotated[int, Field(ge=2)]
    most_repeats: Annotated[int, Field(ge=2)]
    precision_percent: Annotated[float, Field(gt=0)]
    handovers: Count
    handover_gap_s: Annotated[float, Field(gt=0)] = 0.4
    service_s: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class Point:
    """One batch at one clock: ``count`` sequences (decode) or prompts (prefill) of ``tokens`` tokens each; or idleness.

    Attributes:
        tp: of the worker that is measured.
    """

    phase: Phase | Literal["idle"]
    count: int
    tokens: int
    clock_mhz: int
    tp: int

    @property
    def label(self) -> str:
        """As the file names it, whatever clock and TP degree, and its first chunk, which decides when it is done."""
        return "idle" if self.phase == "idle" else f"{self.phase} {self.count}x{self.tokens}"

    @property
    def key(self) -> str:
        """Unique among a sweep's points."""
        return key_of(self.label, self.tp, self.clock_mhz)

    def chunks(self, budget: int) -> list[tuple[int, float]]:
        """Tokens and sum of squares of the batches of a prefill point."""
        if self.count * self.tokens <= budget:
            return [(self.count * self.tokens, float(self.count * self.tokens**2))]
        ends = [*range(budget, self.tokens, budget), self.tokens]
        return [(end - start, float(end**2 - start**2)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def key_of(label: str, tp: float, clock_mhz: float) -> str:
    """Of a point's label at a TP degree and a clock."""
    return f"{label} TP{tp:g} @{clock_mhz:g}"


def points_of(
    sweep: SweepSettings,
    clocks_mhz: Sequence[int],
    tp: Mapping[Phase, int],
    budget: int,
    max_model_len: int,
    kv_capacity_tokens: int,
    block_tokens: int,
) -> list[Point]:
    """Every point that a worker can hold, prefill first.

    Args:
        sweep: what is asked for.
        clocks_mhz: to measure at.
        tp: of the worker that is measured, by phase.
        budget: tokens of a prefill batch.
        max_model_len: longest prompt plus output.
        kv_capacity_tokens: of a worker.
        block_tokens: of a KV block.
    """
    prefill = {(count, length) for count in sweep.prefill_counts for length in sweep.prefill_lengths}
    prefill = {(count, length) for count, length in prefill if count * length <= budget and length < max_model_len}
    prefill |= {(1, length) for length in sweep.chunked_lengths if budget < length < max_model_len}
    decode: list[tuple[int, int]] = []
    for batch in sweep.decode_batches:
        for context in sweep.decode_contexts:
            most = context + outputs_of(batch, context, budget, sweep)
            if most <= max_model_len and batch * -(-most // block_tokens) * block_tokens <= kv_capacity_tokens:
                decode.append((batch, context))
    points: list[Point] = []
    for clock in clocks_mhz:
        points += [Point("prefill", count, length, clock, tp["prefill"]) for count, length in sorted(prefill)]
        points += [Point("decode", batch, context, clock, tp["decode"]) for batch, context in decode]
    return points


def outputs_of(batch: int, context: int, budget: int, sweep: SweepSettings) -> int:
    """Tokens that a sequence makes so that all run together for long enough: the first starts chunks earlier."""
    return -(-batch * context // budget) + 2 + sweep.warmup_iterations + sweep.iterations


def done(repeats: Sequence[Sequence[float]], sweep: SweepSettings) -> bool:
    """Whether a point with these repeats needs no further one.

    Args:
        repeats: the measured quantities of each: latency, power, or both.
        sweep: its repeats and precision.
    """
    if len(repeats) < sweep.least_repeats:
        return False
    return len(repeats) >= sweep.most_repeats or widest_percent(repeats) <= sweep.precision_percent


def widest_percent(repeats: Sequence[Sequence[float]]) -> float:
    """The half width of the interval that is widest of the repeats' quantities."""
    return max(half_width_percent(values) for values in zip(*repeats, strict=True))


def half_width_percent(values: Sequence[float]) -> float:
    """Of the 95 % interval of the median of at least two independent repeats, in percent of it.

    The median's standard error is sqrt(π/2) times the mean's, with the spread from the median absolute deviation
    (× 1.4826, as of a normal distribution), so that one repeat which another program disturbed does not count;
    Student's t for the few repeats.
    """
    found = np.asarray(values)
    median = float(np.median(found))
    spread = 1.4826 * float(np.median(np.abs(found - median)))
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, found.size - 1))
    return 100 * quantile * math.sqrt(math.pi / 2 / found.size) * spread / median
