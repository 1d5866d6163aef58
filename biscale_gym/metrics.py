"""What is read off a ledger: latencies, SLO attainment, joules; for environments, evaluation and live workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger
from biscale_gym.cluster.settings import SloSettings

FloatArray = npt.NDArray[np.float64]
TpotDefinition = Literal["per-decode-token", "per-output-token"]

_QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def ttft_s(requests: RequestLedger, overhead_s: float = 0.0) -> FloatArray:
    """Time to first token of every request: float64[R], NaN where there is none (yet)."""
    return requests.first_token_s - requests.arrival_s + overhead_s


def tpot_s(requests: RequestLedger, definition: TpotDefinition = "per-decode-token") -> FloatArray:
    """Time per output token: (last token − first token) / (output tokens − 1); float64[R].

    NaN for requests of one output token, which have none, and for unfinished ones. ``per-output-token`` divides by the
    output tokens instead, as some simulators do.
    """
    span_s = requests.finish_s - requests.first_token_s
    if definition == "per-output-token":
        return span_s / requests.output_tokens
    decoded = requests.output_tokens - 1
    return np.where(decoded > 0, span_s / np.maximum(decoded, 1), np.nan)


@dataclass(frozen=True)
class Counted:
    """The part of a run that counts.

    Attributes:
        start_s, end_s: requests that arrive in [start_s, end_s] are judged; joules and tokens of [start_s, end_s) are
            counted.
        energy: the instances' ledger between the two times.
        gaps: [from, to) of what lies between the two times and does not count, ascending.
    """

    start_s: float
    end_s: float
    energy: InstanceLedger
    gaps: tuple[tuple[float, float], ...] = ()

    @property
    def seconds(self) -> float:
        """Counted time."""
        return self.end_s - self.start_s - sum(to_s - from_s for from_s, to_s in self.gaps)

    def judges(self, arrival_s: FloatArray) -> npt.NDArray[np.bool_]:
        """Which arrivals, float64[R], are judged."""
        judged = (arrival_s >= self.start_s) & (arrival_s <= self.end_s)
        for from_s, to_s in self.gaps:
            judged &= (arrival_s < from_s) | (arrival_s >= to_s)
        return judged


@dataclass(frozen=True)
class Measurement:
    """Figures of one run, and the latencies behind them.

    Attributes:
        row: figure by name; units in the names.
        ttft_s: float64[judged requests with a first token].
        tpot_s: float64[judged requests with a TPOT].
    """

    row: dict[str, float | int]
    ttft_s: FloatArray
    tpot_s: FloatArray


def attained(
    ttft: FloatArray, tpot: FloatArray, requests: RequestLedger, slo: SloSettings
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which requests keep the TTFT and the TPOT SLO; rejected and unfinished ones keep neither what they lack."""
    ttft_kept = np.nan_to_num(ttft, nan=np.inf) <= slo.ttft_s
    one_token = (requests.output_tokens == 1) & ~np.isnan(requests.first_token_s)
    tpot_kept = one_token | (np.nan_to_num(tpot, nan=np.inf) <= slo.tpot_s)
    return ttft_kept, tpot_kept


def _share(mask: npt.NDArray[np.bool_]) -> float:
    return float(mask.mean()) if mask.size else float("nan")


def _per(amount: float, count: float) -> float:
    return amount / count if count else float("nan")


def measure(
    requests: RequestLedger,
    counted: Counted,
    slo: SloSettings,
    definition: TpotDefinition = "per-decode-token",
    overhead_s: float = 0.0,
) -> Measurement:
    """Every figure of a table's row that is read off the ledger (definitions: docs/evaluation.md)."""
    all_ttft, all_tpot = ttft_s(requests, overhead_s), tpot_s(requests, definition)
    judged = counted.judges(requests.arrival_s)
    ttft_kept, tpot_kept = attained(all_ttft, all_tpot, requests, slo)
    ttft_kept, tpot_kept = ttft_kept[judged], tpot_kept[judged]
    ttft = all_ttft[judged & ~np.isnan(all_ttft)]
    tpot = all_tpot[judged & ~np.isnan(all_tpot)]
    energy = counted.energy
    seconds = counted.seconds
    prefill_j, decode_j = energy.phase_energy_j(True), energy.phase_energy_j(False)
    total_j = prefill_j + decode_j + energy.unallocated_j

    def both(bucket: str) -> float:
        return energy.phase_energy_j(True, bucket) + energy.phase_energy_j(False, bucket)

    prompt_tokens = int(energy.prompt_tokens[energy.is_prefill].sum())
    output_tokens = int(energy.output_tokens[~energy.is_prefill].sum())
    good = int((ttft_kept & tpot_kept).sum())
    gpu_seconds = float((energy.time_s.sum(axis=1) * energy.tp).sum())
    row: dict[str, float | int] = {
        "prefill_energy_j": prefill_j,
        "decode_energy_j": decode_j,
        "idle_energy_j": both("idle"),
        "switching_energy_j": both("switching"),
        "loading_energy_j": both("loading"),
        "unallocated_energy_j": energy.unallocated_j,
        "total_energy_j": total_j,
        "prefill_j_per_token": _per(prefill_j, prompt_tokens),
        "decode_j_per_token": _per(decode_j, output_tokens),
        "mean_power_w": _per(total_j, seconds),
    }
    for name, values in (("ttft", ttft), ("tpot", tpot)):
        for quantile, percent in _QUANTILES.items():
            row[f"{name}_{quantile}_s"] = float(np.percentile(values, percent)) if values.size else float("nan")
    row |= {
        "joint_attainment": _share(ttft_kept & tpot_kept),
        "ttft_attainment": _share(ttft_kept),
        "tpot_attainment": _share(tpot_kept),
        "goodput_rps": _per(good, seconds),
        "requests_judged": int(judged.sum()),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefill_iterations": int(energy.iterations[energy.is_prefill].sum()),
        "decode_iterations": int(energy.iterations[~energy.is_prefill].sum()),
        "clock_changes": int(energy.clock_changes.sum()),
        "gpus_used": _per(gpu_seconds, seconds),
    }
    return Measurement(row, ttft, tpot)
