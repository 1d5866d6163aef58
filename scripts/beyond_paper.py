"""What holds and what breaks in BiScale where its paper did not look.

    python scripts/beyond_paper.py replacement switching precision tight traces --seeds 10

A study is a list of cases: a controller with its settings on a scenario with its overrides. All cases are run over the
same traffic seeds and recorded under --out, so an interrupted study resumes; a table per study is printed and written
there as Markdown. docs/beyond/ has a page on each.
"""

from __future__ import annotations

import json as jsonlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from rich.table import Table

from agents.biscale import BiScale
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import ConfigError, load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.evaluation.faults import EvaluationError, RecordsError
from biscale_gym.evaluation.matrix import fault_messages, run_matrix
from biscale_gym.evaluation.records import Record, RecordStore, replace_file
from biscale_gym.evaluation.statistics import Interval, mean_interval
from biscale_gym.evaluation.summary import COMPARED, Summary, energy_ratios, quantile, summarise
from biscale_gym.profiles import SwitchingSettings

StudyName = Literal["replacement", "switching", "precision", "tight", "traces"]
PLANNED: tuple[str, ...] = ("distserve", "place-only", "biscale")
AFTER_S = 60.0
"""A request is near a change of the placement when it arrives within so long after it."""


class PrefillClocks(BiScale):
    """BiScale whose decode instances hold their base clocks."""

    name = "biscale, prefill clocks only"

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """The prefill policy alone."""
        return super().policies(context)[0], None


class DecodeClocks(BiScale):
    """BiScale whose prefill instances hold their base clocks."""

    name = "biscale, decode clocks only"

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """The decode policy alone."""
        return None, super().policies(context)[1]


@dataclass(frozen=True)
class Case:
    """One row of a study's table.

    Attributes:
        setting: what is varied, as the table names it.
        label: the controller, as the table names it.
        controller: its installed name, or ``module:Class``.
        scenario: preset.
        overrides: scenario settings replaced, dotted.
        settings: the controller's.
        trace: a recorded trace in place of the workload, which has no seeds.
        rate_rps: its mean rate, if not its own.
        against: the setting whose DistServe is the reference; its own if empty.
    """

    setting: str
    label: str
    controller: str
    scenario: str = "paper-67"
    overrides: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trace: str | None = None
    rate_rps: float | None = None
    against: str = ""

    def jobs(self, seeds: int) -> list[RunJob]:
        """A run per seed; a recorded trace is run once."""
        return [
            RunJob(
                scenario=self.scenario,
                controller=self.controller,
                seed=seed,
                trace=self.trace,
                rate_rps=self.rate_rps,
                overrides=self.overrides,
                controller_settings=self.settings,
            )
            for seed in range(1 if self.trace else seeds)
        ]


def name_of(job: RunJob) -> str:
    """What tells a job from all others; records keep their keys in another order."""
    return jsonlib.dumps(job.model_dump(mode="json"), sort_keys=True)


@dataclass(frozen=True)
class Row:
    """A case with its runs: what columns are read from."""

    case: Case
    summary: Summary
    store: RecordStore
    ratios: dict[str, Interval]
    """Joules of ``COMPARED`` over DistServe's, seed by seed."""
    tier2: Interval | None
    """Total joules over those of placement only in the same setting."""


Column = Callable[[Row], str]


@dataclass(frozen=True)
class Study:
    """Cases, and the columns that its table has beside the common ones."""

    cases: list[Case]
    columns: dict[str, Column] = field(default_factory=dict)


def planned(setting: str, names: Sequence[str] = PLANNED, **values: Any) -> list[Case]:
    """A case per controller with its defaults."""
    return [Case(setting, name, name, **values) for name in names]


# -- what is varied ----------------------------------------------------------------------------------------------------


def replacement() -> Study:
    """What changing a placement costs, and what helps against it."""
    drain = {"cluster.replacement.mode": "drain"}
    quick = {"cluster.replacement.load_gb_per_s": 1e6, "cluster.replacement.start_s": 0.0}
    cases = planned("instant")
    against: dict[str, Any] = {"against": "instant"}
    tiers = PLANNED[1:]
    cases += planned("drain, load", tiers, overrides=drain, **against)
    cases += planned("drain, no load time", tiers, overrides=drain | quick, **against)
    powered = {"cluster.replacement.start_power_w": 100.0}
    cases += planned("drain, load at +100 W", ("biscale",), overrides=drain | powered, **against)

    def tier1(setting: str, **settings: Any) -> Case:
        return Case(setting, "biscale", "biscale", overrides=drain, settings={"tier1": settings}, **against)

    for share in (0.05, 0.1, 0.2, 0.4):
        cases.append(tier1(f"drain, keep_within {share:g}", keep_within=share))
    for rule in ("peak", "ewma", "oracle"):
        cases.append(tier1(f"drain, forecast {rule}", forecast=rule))
    cases.append(tier1("drain, margin 0.2", margin=0.2))
    cases.append(tier1("drain, margin 0.2, keep_within 0.2", margin=0.2, keep_within=0.2))
    for window_s in (100.0, 600.0, 900.0):
        cases += planned(
            f"drain, windows of {window_s:g} s", ("biscale",), overrides=drain | {"window_s": window_s}, **against
        )
    return Study(
        cases,
        {
            "changes/run": lambda row: f"{np.mean([len(changes_s(one)) for one in row.summary.records]):.1f}",
            "outages/run": lambda row: f"{np.mean([outages(one) for one in row.summary.records]):.1f}",
            "seeds within": seeds_within,
            "loading MJ": lambda row: f"{row.summary.mean('loading_energy_j') / 1e6:.3f}",
            "missed after a change, else": missed_after_changes,
        },
    )


def call_settings(median_ms: float) -> dict[str, float]:
    """A clock call of this median, with NVML's spread and settling time; 0: nothing takes time."""
    nvml = load_preset(SwitchingSettings, "switching", "nvml")
    changes = {"median_ms": median_ms} if median_ms else {"median_ms": 0.0, "sigma": 0.0, "settle_ms": 0.0}
    return nvml.model_copy(update=changes).model_dump()


def expected_job_s(call: dict[str, float], tp: int) -> float:
    """Mean time from asking an idle driver to a TP group's new clock: its calls and the settling, s."""
    return 1e-3 * (tp * call["median_ms"] * math.exp(call["sigma"] ** 2 / 2) + call["settle_ms"])


PREFILL_TP = {"paper-67": 2, "tight": 4}
"""What tier 1 mostly gives prefill there: that is how many calls the controller is told to expect."""

PROBED_MS = (20.0,)
"""Calls for which the study also takes tier 2 apart, under ``tight``."""


def switching() -> Study:
    """How long a clock call may take, for every form of tier 2."""
    cases: list[Case] = []
    for scenario in PREFILL_TP:
        cases += planned(scenario, PLANNED[:2], scenario=scenario)
        for median_ms in (0.0, 1.0, 5.0, 20.0, 50.0, 100.0, 200.0):
            cases += switched(scenario, median_ms, scenario == "tight" and median_ms in PROBED_MS)
    return Study(
        cases,
        {
            "changes/s": lambda row: f"{row.summary.mean('clock_changes') / counted_s(row):.1f}",
            "switching MJ": lambda row: f"{row.summary.mean('switching_energy_j') / 1e6:.3f}",
            "TTFT, TPOT within": lambda row: " ".join(
                f"{100 * row.summary.mean(f'{name}_attainment'):.2f} %" for name in ("ttft", "tpot")
            ),
        },
    )


def switched(scenario: str, median_ms: float, apart: bool) -> list[Case]:
    """BiScale's forms with calls of one duration; ``apart``: also by phase, by decision and by the queue of calls."""
    call = call_settings(median_ms)
    told: dict[str, Any] = {"prefill": {"switch_time_s": expected_job_s(call, PREFILL_TP[scenario])}}
    floored = {**told, "decode": {"variant": "floored", "switch_time_s": expected_job_s(call, 2)}}
    common: dict[str, Any] = {
        "setting": f"{scenario}, {median_ms:g} ms",
        "scenario": scenario,
        "overrides": {"cluster.switching": call},
        "against": scenario,
    }
    cases = [Case(label="biscale", controller="biscale", **common)]
    if apart:
        # A driver serves one instance of its node at a time: four nodes have four.
        nodes = {"overrides": {**common["overrides"], "cluster.nodes": 4, "cluster.gpus_per_node": 4}}
        seldom = {"prefill": {"replan_on_arrival": False}}
        fast = {"prefill": {"idle_clock_mhz": load_scenario(scenario).clocks_mhz[-1]}}
        early = {"prefill": {"headroom": 0.85}}
        cases += [
            Case(label="biscale, prefill told", controller="biscale", settings=told, **common),
            Case(label="biscale, prefill told, decode floored", controller="biscale", settings=floored, **common),
            Case(label="prefill clocks only", controller="beyond_paper:PrefillClocks", **common),
            Case(label="decode clocks only", controller="beyond_paper:DecodeClocks", **common),
            Case(label="biscale, no replan on arrival", controller="biscale", settings=seldom, **common),
            Case(label="biscale, prefill idles at 1,830 MHz", controller="biscale", settings=fast, **common),
            Case(label="biscale, prefill headroom 0.85", controller="biscale", settings=early, **common),
            Case(label="biscale, 4 nodes of 4", controller="biscale", **common | nodes),
        ]
    return cases


PRECISIONS: dict[str, tuple[dict[str, str], float]] = {
    "fp8": ({}, 59.63),
    "bf16": ({"cluster.precision": "bf16"}, 36.18),
    "bf16 prefill, fp8 decode": ({"cluster.precision": "bf16", "cluster.decode_precision": "fp8"}, 36.18),
    "fp8 prefill, bf16 decode": ({"cluster.decode_precision": "bf16"}, 30.82),
}
"""Overrides by name, and 67 % of what DistServe then carries: python scripts/derive_rates.py --scenario paper-67
--lowest 10 --highest 100 --step 10 --set KEY=VALUE ..."""


def precision() -> Study:
    """Weights in fp8, in bf16, and in one precision per phase."""
    cases: list[Case] = []
    for scenario in ("controlled-40", "controlled-25", "controlled-10"):
        for name, (overrides, _) in PRECISIONS.items():
            setting = f"{scenario.removeprefix('controlled-')}/s, {name}"
            cases += planned(setting, ("distserve", "biscale"), scenario=scenario, overrides=overrides)
    for name, (overrides, rate_rps) in PRECISIONS.items():
        cases += planned(
            f"67 %: {rate_rps:g}/s, {name}", ("distserve", "biscale"), overrides=overrides | {"rate_rps": rate_rps}
        )
    return Study(cases, PLACEMENT_COLUMNS)


def tight() -> Study:
    """SLOs from loose to tight on paper-67's load, and the scenario ``tight`` at its own."""
    cases: list[Case] = []
    for ttft_ms in (1000, 600, 250):
        for tpot_ms in (150, 100, 50, 30):
            slo = {"slo.ttft_s": ttft_ms / 1e3, "slo.tpot_s": tpot_ms / 1e3}
            cases += planned(f"{ttft_ms}, {tpot_ms} ms", overrides=slo)
    cases += planned("tight: 250, 40 ms", scenario="tight")
    # What breaks TTFT at 250 ms, and TPOT at 150.
    quick = {"slo.ttft_s": 0.25, "slo.tpot_s": 0.1}
    told_s = expected_job_s(load_preset(SwitchingSettings, "switching", "nvml").model_dump(), 4)
    probes: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("instant switching", {"cluster.switching": "instant"}, {}),
        ("prefill told", {}, {"prefill": {"switch_time_s": told_s}}),
        ("prefill headroom 0.9", {}, {"prefill": {"headroom": 0.9}}),
    )
    for change, overrides, settings in probes:
        cases.append(
            Case("250, 100 ms", f"biscale, {change}", "biscale", overrides=quick | overrides, settings=settings)
        )
    slow = {"slo.ttft_s": 0.6, "slo.tpot_s": 0.15}
    probes = (
        ("margin 0.2", {}, {"margin": 0.2}),
        ("oracle", {}, {"forecast": "oracle"}),
        ("4,096 sequences", {"cluster.batching.max_decode_sequences": 4096}, {}),
    )
    for change, overrides, settings in probes:
        both = (("place-only", settings), ("biscale", {"tier1": settings}))
        cases += [
            Case("600, 150 ms", f"{name}, {change}", name, overrides=slow | overrides, settings=own)
            for name, own in both
        ]
    return Study(cases, PLACEMENT_COLUMNS)


WORKLOADS = {"azure-conv-like": 6.7, "sharegpt-like": 73.03, "lognormal-poisson": 64.99}
"""67 % of what DistServe carries of a workload within paper-67's SLO: python scripts/derive_rates.py
--scenario paper-67 --lowest 10 --highest 100 --step 10 --set workload=NAME"""


def traces(folder: Path) -> Study:
    """Other traffic, each at 67 % of what DistServe carries of it; recorded traces where they are at hand."""
    cases: list[Case] = []
    for scenario in ("paper-67", "code", "agentic"):
        cases += planned(scenario, scenario=scenario)
    # Silences of minutes between bursts: is it the forecast that fails, or planning every window at all?
    probes: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("planned once", {"window_s": load_scenario("code").duration_s}, {}),
        ("oracle", {}, {"forecast": "oracle"}),
        ("forecast peak", {}, {"forecast": "peak"}),
        ("forecast ewma", {}, {"forecast": "ewma", "ewma_weight": 0.1}),
    )
    for change, overrides, tier1 in probes:
        settings = {"tier1": tier1}
        cases.append(Case("code", f"biscale, {change}", "biscale", "code", overrides=overrides, settings=settings))
    for workload, rate_rps in WORKLOADS.items():
        cases += planned(workload, overrides={"workload": workload, "rate_rps": rate_rps})
    files: tuple[tuple[str, str, str, float | None], ...] = (
        ("azure-2023-conv", "AzureLLMInferenceTrace_conv.csv", "paper-67", None),
        ("mooncake-conversation", "mooncake_conversation_trace.jsonl", "agentic", load_scenario("agentic").rate_rps),
    )
    for name, file, scenario, thinned_rps in files:
        if (folder / file).is_file():
            trace = str(folder / file)
            cases += planned(f"{name} (recorded)", scenario=scenario, trace=trace, rate_rps=thinned_rps)
        else:
            message = f"left out: no {folder / file}; biscale-gym trace fetch {name} --folder {folder}"
            print(message, file=sys.stderr)
    cases += planned("diurnal", scenario="diurnal")
    night = {"training_s": 1800.0}
    half = "diurnal, trained on half an hour"
    cases += planned(half, ("biscale",), scenario="diurnal", overrides=night, against="diurnal")
    return Study(cases, {"requests": lambda row: f"{row.summary.mean('requests_judged'):,.0f}", **PLACEMENT_COLUMNS})


# -- what is read off the runs -----------------------------------------------------------------------------------------


def instances(described: str) -> Counter[tuple[str, str]]:
    """Instances by phase and TP degree of a placement as records describe it; the clocks are left out."""
    counts: Counter[tuple[str, str]] = Counter()
    for count, phase, tp in re.findall(r"(\d+)×([PD]) TP(\d+)", described):
        counts[phase, tp] += int(count)
    return counts


def changes_s(record: Record) -> list[float]:
    """When a run's instances changed: a change of clocks or weights alone costs nothing."""
    placements = record.provenance["placements"]
    return [float(at_s) for (_, before), (at_s, after) in pairwise(placements) if instances(before) != instances(after)]


def outages(record: Record) -> int:
    """Changes at which no instance of a phase stays: while the new ones load, it serves nobody."""
    placements = [instances(described) for _, described in record.provenance["placements"]]
    return sum(
        any(not any(kept[0] == phase for kept in before & after) for phase in ("P", "D"))
        for before, after in pairwise(placements)
    )


def seeds_within(row: Row) -> str:
    """How many seeds keep both P99s on their own: one bad run among five may not show in the pooled tail."""
    slo, rows = row.summary.slo, [record.row for record in row.summary.records]
    kept = sum(float(one["ttft_p99_s"]) <= slo.ttft_s and float(one["tpot_p99_s"]) <= slo.tpot_s for one in rows)
    return f"{kept} of {len(rows)}"


def arrivals_s(record: Record) -> npt.NDArray[np.float64]:
    """Arrivals of the run's judged requests, generated anew: float64[requests judged]."""
    job = RunJob.model_validate(record.job)
    scenario = load_scenario(job.scenario, job.overrides)
    requests = requests_for(scenario, scenario.cluster.profile(), job.played_split, job.seed, job.trace, job.rate_rps)
    arrival_s = requests.evaluated.arrival_s
    return arrival_s[(arrival_s >= scenario.warmup_s) & (arrival_s <= requests.end_s)]


def missed_after_changes(row: Row) -> str:
    """Share of requests that miss an SLO among those that arrive soon after a change, and among all others."""
    near: list[npt.NDArray[np.bool_]] = []
    missed: list[npt.NDArray[np.bool_]] = []
    slo = row.summary.slo
    for record in row.summary.records:
        arrays = row.store.arrays(record)
        arrival_s, ttft_s, tpot_s = arrivals_s(record), arrays["ttft_s"], arrays["tpot_s"]
        if not arrival_s.size == ttft_s.size == tpot_s.size:
            return "not all were served"
        missed.append((ttft_s > slo.ttft_s) | (tpot_s > slo.tpot_s))
        close = np.zeros(arrival_s.size, dtype=bool)
        for at_s in changes_s(record):
            close |= (arrival_s >= at_s) & (arrival_s < at_s + AFTER_S)
        near.append(close)
    close, late = np.concatenate(near), np.concatenate(missed)
    return ", ".join(f"{100 * late[mask].mean():.2f} %" if mask.any() else "–" for mask in (close, ~close))


def counted_s(row: Row) -> float:
    """Length of the counted part of a run, s."""
    first = row.summary.records[0].row
    return float(first["total_energy_j"]) / float(first["mean_power_w"])


def usual_placement(row: Row) -> str:
    """The instances that served the most windows, over all seeds."""
    seen = Counter(
        tuple(sorted(instances(described).items(), key=lambda item: (item[0][0] != "P", item[0][1])))
        for record in row.summary.records
        for _, described in record.provenance["placements"]
    )
    [(counts, windows)] = seen.most_common(1)
    shown = " + ".join(f"{count}×{phase} TP{tp}" for (phase, tp), count in counts)
    total = sum(seen.values())
    return shown if windows == total else f"{shown} ({100 * windows / total:.0f} %)"


PLACEMENT_COLUMNS: dict[str, Column] = {
    "GPUs": lambda row: f"{row.summary.mean('gpus_used'):.1f}",
    "usual placement": usual_placement,
}


def percent(ratio: Interval | None) -> str:
    """A ratio as a change with its 95 % interval."""
    if ratio is None:
        return "–"
    half = "" if math.isnan(ratio.high) else f" ± {100 * (ratio.high - ratio.value):.1f}"
    return f"{100 * (ratio.value - 1):+.1f}{half} %".replace("-", "−")


def megajoules(interval: Interval) -> str:
    """Joules in MJ with their 95 % interval."""
    half = "" if math.isnan(interval.high) else f" ± {(interval.high - interval.value) / 1e6:.3f}"
    return f"{interval.value / 1e6:.3f}{half}"


COMMON_COLUMNS: dict[str, Column] = {
    "setting": lambda row: row.case.setting,
    "controller": lambda row: f"{row.case.label} ✗" if row.summary.breaches else row.case.label,
    "total MJ": lambda row: megajoules(row.summary.metrics["total_energy_j"]),
    **{
        f"{name.partition('_')[0]} Δ": lambda row, name=name: percent(row.ratios.get(name))  # type: ignore[misc]
        for name in COMPARED
    },
    "Δ to place-only": lambda row: percent(row.tier2),
    "P99 TTFT, TPOT ms": lambda row: ", ".join(
        f"{1e3 * quantile(values, 0.99):,.1f}" for values in (row.summary.ttft_s, row.summary.tpot_s)
    ),
    "within both": lambda row: f"{100 * row.summary.mean('joint_attainment'):.2f} %",
}


def rows_of(cases: Sequence[Case], seeds: int, records: dict[str, Record], store: RecordStore) -> list[Row]:
    """A row per case whose runs are all there.

    Args:
        cases: of one study.
        seeds: per case.
        records: by ``name_of`` their jobs.
        store: of their arrays.
    """

    def found(case: Case) -> list[Record]:
        own = [records.get(name_of(job)) for job in case.jobs(seeds)]
        return [record for record in own if record is not None]

    by_name = {(case.setting, case.label): found(case) for case in cases}
    rows = []
    for case in cases:
        own = by_name[case.setting, case.label]
        if len(own) < len(case.jobs(seeds)):
            continue
        reference = by_name.get((case.against or case.setting, "distserve"), [])
        ratios = {} if case.label == "distserve" else {name: energy_ratios(own, reference, name) for name in COMPARED}
        held = by_name.get((case.setting, "place-only"), by_name.get((case.against, "place-only"), []))
        against_held = energy_ratios(own, held, "total_energy_j")
        tier2 = case.label not in PLANNED[:2] and len(against_held)
        rows.append(
            Row(
                case,
                summarise(own, store)[0],
                store,
                {name: mean_interval(values) for name, values in ratios.items() if len(values)},
                mean_interval(against_held) if tier2 else None,
            )
        )
    return rows


def as_json(name: str, row: Row, cells: dict[str, str]) -> dict[str, Any]:
    """A row for programs: means with their intervals, pooled tails, and the table's own cells."""

    def ends(interval: Interval) -> list[float | None]:
        return [None if math.isnan(value) else value for value in (interval.value, interval.low, interval.high)]

    summary = row.summary
    return {
        "study": name,
        "setting": row.case.setting,
        "controller": row.case.label,
        "jobs": [record.id for record in summary.records],
        "seeds": len(summary.records),
        "breaks_slo": list(summary.breaches),
        "ttft_p99_s": quantile(summary.ttft_s, 0.99),
        "tpot_p99_s": quantile(summary.tpot_s, 0.99),
        "over_distserve": {key: ends(value) for key, value in row.ratios.items()},
        "over_place_only": None if row.tier2 is None else ends(row.tier2),
        "metrics": {key: ends(value) for key, value in summary.metrics.items()},
        "cells": cells,
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the pages have it."""
    lines = [header, ["---", "---", *["--:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(
    studies: tyro.conf.Positional[tuple[StudyName, ...]],
    seeds: int = 5,
    workers: int = 2,
    out: Path = Path("results/beyond"),
    json: Path | None = None,
    recorded: Path = Path("data/traces"),
) -> None:
    """Run studies and print their tables.

    Args:
        studies: Which.
        seeds: Traffic seeds per case, counted from 0.
        workers: Processes.
        out: Folder of records and of a Markdown table per study; a run that it holds is not run again.
        json: File for all rows with their intervals.
        recorded: Where recorded traces are; `biscale-gym trace fetch` puts them there.
    """
    if not studies:
        raise SystemExit("beyond_paper: name a study: replacement, switching, precision, tight, traces")
    if seeds < 1:
        raise SystemExit(f"beyond_paper: --seeds {seeds}: at least 1 is needed")
    made: dict[str, Callable[[], Study]] = {
        "replacement": replacement,
        "switching": switching,
        "precision": precision,
        "tight": tight,
        "traces": lambda: traces(recorded),
    }
    store, messages, listed = RecordStore(out), Console(stderr=True), []
    failed = False
    for name in studies:
        study = made[name]()
        jobs = {name_of(job): job for case in study.cases for job in case.jobs(seeds)}
        messages.print(f"{name}: {len(study.cases)} cases, {len(jobs)} runs", highlight=False)
        try:
            result = run_matrix(list(jobs.values()), store, workers, run, messages)
            records = {name_of(RunJob.model_validate(record.job)): record for record in result.records}
            rows = rows_of(study.cases, seeds, records, store)
        except (ConfigError, EvaluationError, RecordsError) as error:
            raise SystemExit(f"beyond_paper: {error}") from error
        for message in fault_messages(result.faults):
            messages.print(f"beyond_paper: {message}", markup=False, highlight=False, soft_wrap=True)
        failed |= bool(result.faults) or result.interrupted
        if not rows:
            continue
        columns = COMMON_COLUMNS | study.columns
        cells = [{key: column(row) for key, column in columns.items()} for row in rows]
        table = Table(*columns, title=f"{name}, {seeds} seeds")
        for line, row in zip(cells, rows, strict=True):
            table.add_row(*line.values(), style="red" if row.summary.breaches else None)
        Console(width=220).print(table)
        replace_file(out / f"{name}.md", markdown(list(columns), [list(line.values()) for line in cells]))
        listed += [as_json(name, row, line) for row, line in zip(rows, cells, strict=True)]
        if result.interrupted:
            break
    if json is not None:
        replace_file(json, jsonlib.dumps({"rows": listed}, indent=1) + "\n")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
