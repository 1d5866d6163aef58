"""The ledger: what happened to every request and every instance, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.state import ACTIVE, BUCKETS, DRAINING, EXPECTED, FINISHED, LOADING, PREFILL, REJECTED, State

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RequestLedger:
    """One entry per request of the trace; times are NaN where they have not come (yet).

    Attributes:
        arrival_s, prefill_start_s, first_token_s, delivered_s, finish_s: float64[R], seconds.
        prompt_tokens, output_tokens: int64[R].
        prefill_instance, decode_instance: int64[R], -1 where none.
        preemptions: int64[R].
        finished, rejected: bool[R].
    """

    arrival_s: FloatArray
    prefill_start_s: FloatArray
    first_token_s: FloatArray
    delivered_s: FloatArray
    finish_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    prefill_instance: IntArray
    decode_instance: IntArray
    preemptions: IntArray
    finished: npt.NDArray[np.bool_]
    rejected: npt.NDArray[np.bool_]

    def take(self, chosen: npt.NDArray[np.bool_]) -> RequestLedger:
        """The chosen requests alone."""
        return RequestLedger(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def arrived(self, start_s: float, end_s: float) -> RequestLedger:
        """The requests that arrive in [start_s, end_s)."""
        return self.take((self.arrival_s >= start_s) & (self.arrival_s < end_s))

    @staticmethod
    def joined(parts: Sequence[RequestLedger], instances: Sequence[int]) -> RequestLedger:
        """Ledgers of clusters that served one after another; instances are numbered on.

        Args:
            parts: one ledger per cluster.
            instances: how many instances each cluster had.
        """
        values = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(parts[0])
        }
        before = np.repeat(np.cumsum([0, *instances[:-1]]), [len(part.arrival_s) for part in parts])
        for name in ("prefill_instance", "decode_instance"):
            values[name] = np.where(values[name] >= 0, values[name] + before, -1)
        return RequestLedger(**values)


@dataclass(frozen=True)
class InstanceLedger:
    """One entry per instance that ever was, up to ``now_s``.

    Attributes:
        is_prefill: bool[I].
        tp: int64[I].
        energy_j, time_s: float64[I, 4], by bucket (state.BUCKETS).
        iterations, prompt_tokens, output_tokens, clock_changes: int64[I].
        unallocated_j: joules of GPUs that belong to no instance.
    """

    now_s: float
    is_prefill: npt.NDArray[np.bool_]
    tp: IntArray
    energy_j: FloatArray
    time_s: FloatArray
    iterations: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    clock_changes: IntArray
    unallocated_j: float

    def since(self, earlier: InstanceLedger) -> InstanceLedger:
        """What was booked after an earlier reading; instances that came later count from their start."""

        def rest(name: str) -> npt.NDArray[Any]:
            later: npt.NDArray[Any] = getattr(self, name).copy()
            before = getattr(earlier, name)
            later[: len(before)] -= before
            return later

        return InstanceLedger(
            now_s=self.now_s,
            is_prefill=self.is_prefill,
            tp=self.tp,
            energy_j=rest("energy_j"),
            time_s=rest("time_s"),
            iterations=rest("iterations"),
            prompt_tokens=rest("prompt_tokens"),
            output_tokens=rest("output_tokens"),
            clock_changes=rest("clock_changes"),
            unallocated_j=self.unallocated_j - earlier.unallocated_j,
        )

    @staticmethod
    def joined(parts: Sequence[InstanceLedger]) -> InstanceLedger:
        """What several readings booked together, one after another: an entry per reading and instance."""
        arrays = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(parts[0])
            if field.name not in ("now_s", "unallocated_j")
        }
        return InstanceLedger(now_s=parts[-1].now_s, unallocated_j=sum(part.unallocated_j for part in parts), **arrays)

    def phase_energy_j(self, prefill: bool, bucket: str | None = None) -> float:
        """Joules of a phase's instances, in one bucket or in all."""
        rows = self.energy_j[self.is_prefill == prefill]
        return float(rows.sum() if bucket is None else rows[:, BUCKETS.index(bucket)].sum())


def read_requests(state: State) -> RequestLedger:
    """Copy the requests' ledger out of the engine's state."""
    arrivals = state.arrivals
    arrived = int(state.glob[0]["next_arrival"])
    req = state.req[:arrived]

    def column(name: str, before: float) -> Any:
        """Of requests yet to arrive: ``before``."""
        whole = np.full(len(arrivals), before)
        whole[:arrived] = req[name]
        return whole

    return RequestLedger(
        arrival_s=arrivals["arrival_s"].copy(),
        prefill_start_s=column("prefill_start_s", np.nan),
        first_token_s=column("first_token_s", np.nan),
        delivered_s=column("delivered_s", np.nan),
        finish_s=column("finish_s", np.nan),
        prompt_tokens=arrivals["prompt"].astype(np.int64),
        output_tokens=arrivals["output"].astype(np.int64),
        prefill_instance=column("prefill_instance", -1),
        decode_instance=column("decode_instance", -1),
        preemptions=column("preemptions", 0),
        finished=column("status", EXPECTED) == FINISHED,
        rejected=column("status", EXPECTED) == REJECTED,
    )


def read_instances(state: State) -> InstanceLedger:
    """The instances' ledger up to now. What is not booked yet is added to the copy, so that reading changes nothing."""
    glob = state.glob[0]
    now_s = float(glob["now_s"])
    inst = state.inst[: int(glob["instances"])].copy()
    present = np.flatnonzero(np.isin(inst["status"], (LOADING, ACTIVE, DRAINING)))
    elapsed_s = np.maximum(0.0, now_s - inst["last_s"][present])
    bucket = inst["bucket"][present]
    inst["energy_j"][present, bucket] += inst["power_w"][present] * elapsed_s
    inst["time_s"][present, bucket] += elapsed_s
    free = max(0, int(glob["gpus"] - glob["gpus_allocated"]))
    unallocated_j = glob["unallocated_j"] + free * glob["unallocated_w_per_gpu"] * (now_s - glob["unallocated_last_s"])
    return InstanceLedger(
        now_s=now_s,
        is_prefill=inst["phase"] == PREFILL,
        tp=inst["tp"],
        energy_j=inst["energy_j"],
        time_s=inst["time_s"],
        iterations=inst["iterations"],
        prompt_tokens=inst["prompt_tokens"],
        output_tokens=inst["output_tokens"],
        clock_changes=inst["clock_changes"],
        unallocated_j=float(unallocated_j),
    )
