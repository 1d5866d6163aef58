"""Records of one matrix brought together: means over seeds, pooled tails, ratios to DistServe.

A ratio compares runs of the same scenario, seed and trace. A controller keeps the SLO when the P99 of TTFT and the P99
of TPOT, each over the pooled requests of all its seeds, are within it; one that breaks it ranks below all that keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from biscale_gym.evaluation.records import Record, RecordStore
from biscale_gym.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    interquartile_mean,
    mean_interval,
    probability_of_improvement,
)

Floats = npt.NDArray[np.float64]

REFERENCE = "distserve"
COMPARED = ("prefill_energy_j", "decode_energy_j", "total_energy_j")
_NEVER_S = 1e9
_LABELS = {"scenario", "controller", "seed", "split", "record"}


@dataclass(frozen=True)
class Slo:
    """The latency targets of a scenario, seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Summary:
    """One controller on one scenario, over its seeds."""

    scenario: str
    controller: str
    trace: str
    split: str
    slo: Slo
    records: tuple[Record, ...]
    metrics: dict[str, Interval]
    """Every numeric metric of the rows: mean over seeds and its 95 % interval."""
    ratios: dict[str, Interval]
    """Joules of ``COMPARED`` over DistServe's, seed by seed; empty where DistServe did not run."""
    ttft_s: Floats
    """Pooled over seeds, sorted."""
    tpot_s: Floats

    @property
    def breaches(self) -> tuple[str, ...]:
        """Which targets the pooled P99 exceeds.

        A rejected or unfinished request has no latency, and counts here as later than any.
        """
        served = (("TTFT", "ttft", self.ttft_s, self.slo.ttft_s), ("TPOT", "tpot", self.tpot_s, self.slo.tpot_s))
        broken = [name for name, key, values, target in served if self._p99_s(key, values, target) > target]
        return tuple(broken or (("TTFT",) if not len(self.ttft_s) else ()))

    def _p99_s(self, key: str, values: Floats, target_s: float) -> float:
        judged = sum(int(record.row["requests_judged"]) for record in self.records)
        kept = sum(_kept(record, f"{key}_attainment") for record in self.records)
        unserved = judged - kept - int(np.sum(values > target_s))
        return quantile(np.append(values, np.full(unserved, _NEVER_S)), 0.99)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds."""
        return self.metrics[metric].value


def _kept(record: Record, attainment: str) -> int:
    judged = int(record.row["requests_judged"])
    return round(float(record.row[attainment]) * judged) if judged else 0


def quantile(values: Floats, q: float) -> float:
    """Linear-interpolation quantile; NaN of nothing."""
    return float(np.quantile(values, q)) if len(values) else float("nan")


def summarise(records: Sequence[Record], store: RecordStore) -> list[Summary]:
    """Summaries by scenario in the order of the records; within one, SLO kept before broken, then by total energy.

    Raises:
        RecordsError: a record's arrays are missing or altered.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((str(record.row["scenario"]), str(record.row["controller"])), []).append(record)
    scenarios = list(dict.fromkeys(scenario for scenario, _ in groups))
    summaries = [pooled(own, groups.get((scenario, REFERENCE), []), store) for (scenario, _), own in groups.items()]
    return sorted(summaries, key=lambda s: (scenarios.index(s.scenario), bool(s.breaches), s.mean("total_energy_j")))


def pooled(own: Sequence[Record], reference: Sequence[Record], store: RecordStore) -> Summary:
    """The runs of one row, named after the first of them, against DistServe's (``reference``, which may be none).

    Raises:
        RecordsError: a record's arrays are missing or altered.
    """
    first = own[0]
    numeric = [name for name, value in first.row.items() if name not in _LABELS and not isinstance(value, str)]
    metrics = {name: mean_interval(_column(own, name)) for name in numeric}
    ratios = {name: mean_interval(values) for name in COMPARED if len(values := energy_ratios(own, reference, name))}
    arrays = [store.arrays(record) for record in own]
    return Summary(
        scenario=str(first.row["scenario"]),
        controller=str(first.row["controller"]),
        trace=str(first.provenance["trace_name"]),
        split=str(first.row["split"]),
        slo=slo_of(first),
        records=tuple(own),
        metrics=metrics,
        ratios=ratios,
        ttft_s=np.sort(np.concatenate([one["ttft_s"] for one in arrays])),
        tpot_s=np.sort(np.concatenate([one["tpot_s"] for one in arrays])),
    )


def slo_of(record: Record) -> Slo:
    """The latency targets the run was held to."""
    return Slo(ttft_s=float(record.row["slo_ttft_s"]), tpot_s=float(record.row["slo_tpot_s"]))


def energy_ratios(own: Sequence[Record], reference: Sequence[Record], metric: str) -> Floats:
    """``metric`` over the reference's on the same seed, float64[seeds that both have]."""
    base = {record.row["seed"]: float(record.row[metric]) for record in reference}
    pairs = [(float(record.row[metric]), base[record.row["seed"]]) for record in own if record.row["seed"] in base]
    return np.array([ours / theirs for ours, theirs in pairs if theirs > 0.0])


@dataclass(frozen=True)
class Aggregate:
    """One controller over all scenarios and seeds, against DistServe."""

    controller: str
    ratio: Interval
    """Interquartile mean of total energy over DistServe's, bootstrapped within scenarios."""
    improvement: float
    """Probability that a run takes less total energy than one of DistServe's on the same scenario."""
    breaks_slo: bool
    """Whether the SLO is broken on any of the scenarios."""


def aggregate(summaries: Sequence[Summary]) -> list[Aggregate]:
    """What the matrix says as a whole; empty unless DistServe ran with at least two seeds."""
    reference = {s.scenario: s for s in summaries if s.controller == REFERENCE and len(s.records) > 1}
    names = dict.fromkeys(s.controller for s in summaries if s.controller != REFERENCE)
    aggregates = []
    for name in names:
        own = [s for s in summaries if s.controller == name and s.scenario in reference]
        strata = [energy_ratios(s.records, reference[s.scenario].records, "total_energy_j") for s in own]
        if not strata or min(map(len, strata)) < 2:
            continue
        ours = [_column(s.records, "total_energy_j") for s in own]
        theirs = [_column(reference[s.scenario].records, "total_energy_j") for s in own]
        ratio = bootstrap_interval(strata, interquartile_mean)
        aggregates.append(
            Aggregate(name, ratio, probability_of_improvement(ours, theirs), any(s.breaches for s in own))
        )
    return sorted(aggregates, key=lambda one: (one.breaks_slo, one.ratio.value))


def _column(records: Sequence[Record], metric: str) -> Floats:
    return np.array([float(record.row[metric]) for record in records])
