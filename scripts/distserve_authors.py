"""DistServe's goodputs on its authors' own setting, beside what their simulator gives.

    python scripts/distserve_authors.py

OPT-13B and OPT-66B on A100-80G with the linear coefficients that the authors publish (github.com/LLMServe/DistServe),
lengths as they sample them from ShareGPT, their SLOs and their P90. Three tables:

1. Goodput of every TP x PP of each phase alone.
2. Goodput of one prefill beside one decode instance, both notions of attainment, beside figures of the authors.
3. What the differences come from: runs as long as theirs, under each version of their code that could have made them.
4. The best configuration of the example in their README.
5. Pipelined prefill with one queue for all lanes, as theirs has, beside ours, where each lane has its own.

No joules: the authors publish no power, and the preset holds a placeholder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from biscale_gym.cluster.placement import PHASES, InstanceSpec, Placement
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.config import load_preset
from biscale_gym.evaluation.statistics import Interval, mean_interval
from biscale_gym.planning.classes import Column, Measurement, class_table, fitting_degrees
from biscale_gym.planning.probing import UnitOutcome, greatest_rate, serve_together
from biscale_gym.planning.units import ATTAINMENTS, Attainment, keeps, simulate_load
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.profiles.kernels import iteration_latency
from biscale_gym.profiles.settings import LinearSettings
from biscale_gym.traces import Trace
from biscale_gym.traces.generators import generate, load_workload

QUANTILE = 0.9
STAGES = (1, 2, 4)
WORKLOAD = "sharegpt-distserve"
CLOCK_MHZ = 1410
NODES = 4

SLOS = {  # simdistserve/benchmarks/figure11-abalation/01-run_abalation.sh @0152280, "See paper Table 1"
    "opt-13b": SloSettings(ttft_s=0.2, tpot_s=0.1),
    "opt-66b": SloSettings(ttft_s=0.4, tpot_s=0.1),
}
TOKEN_BUDGETS = {"opt-13b": 66_144, "opt-66b": 78_496}  # simdistserve/estimators/profile_data/max_num_tokens.csv


@dataclass(frozen=True)
class Published:
    """Attainment curves of the authors' simulator: per cent of requests within both SLOs, by rate per GPU.

    Attributes:
        label: as the tables name it.
        source: file and commit of github.com/LLMServe/DistServe.
        model: which.
        rates: per GPU [requests/s].
        requests: of a run with so many GPUs at such a rate per GPU.
        curves: by configuration: TP and PP of prefill, TP and PP of decode.
    """

    label: str
    source: str
    model: str
    rates: tuple[float, ...]
    requests: Callable[[int, float], int]
    curves: dict[str, tuple[float, ...]]


FIGURE_11 = "simdistserve/benchmarks/figure11-abalation"
EXAMPLE_REQUESTS = 300
EXAMPLE_CONFIGURATIONS = ("1111", "1112", "1121", "1211", "1212", "1221", "2111", "2112", "2121")
"""Of simdistserve/README.md @09804e8: OPT-13B, one node of 4 GPUs. Its answer: 2111 at 1.56 requests/s per GPU."""

PUBLISHED = (
    Published(
        "13B, 100 requests per GPU",
        f"{FIGURE_11}/visual/figure_11_distserve_high.html @0bba606",
        "opt-13b",
        (1.0, 2.0, 3.0, 4.0, 5.0),
        lambda gpus, _: 100 * gpus,
        {
            "1111": (90.0, 79.0, 70.0, 52.0, 37.0),
            "1112": (86.67, 68.0, 43.33, 10.0, 4.0),
            "1121": (86.67, 68.0, 38.33, 8.0, 4.0),
            "1211": (92.0, 87.67, 71.0, 51.67, 34.67),
            "1212": (91.25, 82.5, 64.75, 44.25, 16.25),
            "1221": (91.25, 53.75, 30.75, 20.0, 8.0),
            "2111": (98.33, 89.67, 81.33, 65.33, 49.0),
            "2112": (97.25, 86.0, 66.0, 36.25, 6.0),
            "2121": (97.25, 86.0, 66.0, 34.0, 5.75),
        },
    ),
    Published(
        "13B, 100 s",
        f"{FIGURE_11}/visual/figure_11_distserve_high.html @33c3d3b",
        "opt-13b",
        (1.0, 2.0, 3.0, 4.0, 5.0),
        lambda gpus, rate: round(100 * gpus * rate),
        {
            "1111": (90.0, 80.75, 48.0, 14.63, 6.6),
            "1112": (86.67, 65.67, 41.0, 5.67, 0.8),
            "1121": (86.67, 64.67, 12.67, 1.33, 0.73),
            "1211": (92.0, 64.0, 17.89, 9.08, 5.33),
            "1212": (91.25, 81.25, 43.25, 12.5, 2.95),
            "1221": (91.25, 33.25, 10.75, 4.69, 1.5),
            "2111": (98.33, 90.5, 67.33, 20.92, 8.33),
            "2112": (97.25, 85.88, 67.75, 43.25, 2.45),
            "2121": (97.25, 85.88, 40.08, 10.13, 1.15),
        },
    ),
    Published(
        "13B, 1,000 requests",
        f"{FIGURE_11}/scratch-202404191100-draw-abalation.ipynb @39bc91c",
        "opt-13b",
        (1.0, 2.0, 3.0, 4.0, 5.0),
        lambda _, __: 1000,
        {"4111": (100.0, 99.6, 96.9, 93.0, 81.8), "4211": (100.0, 100.0, 98.6, 95.6, 89.1)},
    ),
    Published(
        "66B, 25 requests per GPU",
        f"{FIGURE_11}/visual/figure_11_distserve_high.html @326c481",
        "opt-66b",
        (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
        lambda gpus, _: 25 * gpus,
        {
            "2112": (76.0, 72.0, 66.0, 53.0, 46.0, 35.0, 26.0),
            "2114": (74.67, 69.33, 57.33, 44.67, 30.67, 13.33, 7.33),
            "2121": (76.0, 72.0, 66.0, 53.0, 46.0, 35.0, 26.0),
            "2122": (74.67, 69.33, 57.33, 44.67, 30.67, 13.33, 7.33),
            "2141": (74.67, 69.33, 57.33, 44.67, 30.67, 12.67, 7.33),
            "2212": (76.67, 74.67, 69.33, 62.67, 54.0, 47.33, 35.33),
            "2214": (77.0, 73.5, 63.5, 54.5, 46.0, 35.0, 23.5),
            "2221": (76.67, 74.67, 69.33, 62.67, 54.0, 46.67, 33.33),
            "2222": (77.0, 73.5, 63.5, 54.5, 46.0, 35.0, 23.5),
            "2241": (77.0, 73.5, 63.5, 51.0, 33.5, 18.0, 10.5),
            "4112": (99.33, 99.33, 95.33, 88.0, 81.33, 77.33, 63.33),
            "4114": (99.5, 98.5, 93.5, 84.0, 77.0, 65.0, 51.5),
            "4121": (99.33, 99.33, 95.33, 88.0, 81.33, 77.33, 63.33),
            "4122": (99.5, 98.5, 93.5, 84.0, 77.0, 65.0, 51.5),
            "4141": (99.5, 98.5, 93.5, 84.0, 77.0, 65.0, 51.5),
        },
    ),
)


@dataclass(frozen=True)
class Version:
    """What of the authors' code changed between their figures.

    Attributes:
        label: as the table names it.
        decode_tp_of_prefill: decode is timed with prefill's TP whatever its own (until their pull request 32).
        inflated: prefill coefficients are 1.1 times the fitted ones, and every pass has a fixed overhead.
        capped: decode admits requests up to 50,000 tokens of context.
    """

    label: str
    decode_tp_of_prefill: bool
    inflated: bool
    capped: bool = True


FINAL = Version("final coefficients", False, True)
BEFORE_FIX = Version("final coefficients, decode with prefill's TP", True, True)
VERSIONS = (
    FINAL,
    BEFORE_FIX,
    Version("first coefficients", False, False),
    Version("first coefficients, decode with prefill's TP", True, False),
    Version("the same, decode without a cap on its context", True, False, False),
)
FIRST = VERSIONS[3]


def cluster_of(model: str, capped: bool = True) -> ClusterSettings:
    """The rules of the authors' simulator."""
    base = load_preset(ClusterSettings, "clusters", "simdistserve-a100")
    changed: dict[str, int] = {"prefill_token_budget": TOKEN_BUDGETS[model]}
    if not capped:
        changed["decode_kv_tokens"] = 10**9
    batching = base.batching.model_copy(update=changed)
    # Theirs counts what waits, which would fill a pipeline's lanes one after another.
    routing = base.routing.model_copy(update={"decode_load": "requests"})
    return base.model_copy(update={"model": model, "batching": batching, "routing": routing, "nodes": NODES})


def profile_of(model: str, inflated: bool = True) -> Profile:
    """The authors' coefficients, the final ones or those before they were inflated."""
    profile = load_profile("a100-80g-linear", model, "bf16")
    if inflated:
        return profile
    linear = profile.hardware.linear
    assert linear is not None
    values = linear.model_dump()
    values.update(prefill_extra_ms=0.0, engine_ms=0.0, engine_ms_per_token=0.0)
    for coefficients in values["coefficients"][model].values():
        coefficients["prefill"] = {name: value / 1.1 for name, value in coefficients["prefill"].items()}
    hardware = profile.hardware.model_copy(update={"linear": LinearSettings.model_validate(values)})
    return replace(profile, hardware=hardware)


def placement_of(configuration: str, version: Version = FINAL) -> Placement:
    """One prefill and one decode instance: TP and PP of prefill, TP and PP of decode."""
    prefill_tp, prefill_pp, decode_tp, decode_pp = map(int, configuration)
    if version.decode_tp_of_prefill:
        decode_tp = prefill_tp
    return Placement(
        (
            InstanceSpec("prefill", prefill_tp, CLOCK_MHZ, pp=prefill_pp),
            InstanceSpec("decode", decode_tp, CLOCK_MHZ, pp=decode_pp),
        )
    )


def known(model: str, configuration: str, version: Version = FINAL) -> bool:
    """Whether the model has coefficients for all of the configuration's TP degrees."""
    degrees = profile_of(model).tensor_parallel_degrees
    return all(spec.tp in degrees for spec in placement_of(configuration, version).instances)


def gpus_of(configuration: str) -> int:
    """GPUs that the authors count."""
    prefill_tp, prefill_pp, decode_tp, decode_pp = map(int, configuration)
    return prefill_tp * prefill_pp + decode_tp * decode_pp


def label_of(configuration: str) -> str:
    """E.g. ``TP2 + TP1·PP2``."""
    parts = (configuration[:2], configuration[2:])
    return " + ".join(f"TP{part[0]}" + (f"·PP{part[1]}" if part[1] != "1" else "") for part in parts)


def measurement_of(model: str, seed: int, requests: int) -> Measurement:
    """Long runs at a steady load, judged as the authors judge."""
    return Measurement(
        profile=profile_of(model),
        cluster=cluster_of(model),
        slo=SLOS[model],
        training=generate(load_workload(WORKLOAD), 5.0, requests / 2.5, seed),
        headroom=1.0,
        quantile=QUANTILE,
        requests_per_probe=requests,
        warmup_s=30.0,
        rate_tolerance=0.02,
        seed=seed,
        tpot_definition="per-output-token",
    )


def crossing(rates: Sequence[float], shares: Sequence[float], target: float = 100.0 * QUANTILE) -> float:
    """Where a falling curve meets the target, linear between its points; 0: it begins below, inf: it never does."""
    if shares[0] < target:
        return 0.0
    for (x0, y0), (x1, y1) in zip(
        zip(rates, shares, strict=True), zip(rates[1:], shares[1:], strict=False), strict=False
    ):
        if y1 < target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return math.inf


def one_queue_ttft_s(profile: Profile, spec: InstanceSpec, trace: Trace) -> np.ndarray[Any, np.dtype[np.float64]]:
    """TTFT of a prefill pipeline as the authors simulate it: its first stage, whenever free, takes all that waits."""
    vector = profile.compile(spec.tp, [CLOCK_MHZ], 1)
    free_s = [0.0] * spec.pp
    out_s = np.zeros(len(trace))
    first = 0
    while first < len(trace):
        here_s = max(float(trace.arrival_s[first]), free_s[0])
        last = int(np.searchsorted(trace.arrival_s, here_s, side="right"))
        prompts = trace.prompt_tokens[first:last].astype(np.float64)
        pass_s = iteration_latency(vector, 0, 0.0, 0.0, prompts.sum(), (prompts**2).sum())
        for stage in range(spec.pp):
            here_s = free_s[stage] = max(here_s, free_s[stage]) + pass_s / spec.pp
        out_s[first:last] = here_s
        first = last
    return out_s - trace.arrival_s


def queues(seeds: int) -> list[dict[str, Any]]:
    """Share of requests within TTFT, per cent, at the rates of the published run of TP4 x PP2 prefill."""
    published, configuration, version = PUBLISHED[2], "4211", VERSIONS[-1]
    profile, gpus = profile_of(published.model, version.inflated), gpus_of(configuration)
    ours = curve(published, configuration, version, seeds).mean(axis=0)
    spec, limit_s = placement_of(configuration).of("prefill")[0], SLOS[published.model].ttft_s
    rows = []
    for rate, theirs, lanes in zip(published.rates, published.curves[configuration], ours, strict=True):
        traces = [trace_of(published.requests(gpus, rate), rate * gpus, seed) for seed in range(seeds)]
        kept = [(one_queue_ttft_s(profile, spec, trace) <= limit_s).mean() for trace in traces]
        rows.append(
            {
                "rps_per_gpu": rate,
                "theirs_percent": theirs,
                "lanes_percent": float(lanes),
                "one_queue_percent": 100.0 * float(np.mean(kept)),
            }
        )
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """Quartiles that are values themselves: no interpolation towards an infinite one."""
    return [float(np.quantile(values, share, method="nearest")) for share in (0.25, 0.5, 0.75)]


def phase_goodputs(seeds: int, requests: int) -> list[dict[str, Any]]:
    """Goodput per GPU of every configuration of each phase alone, a row each with its mean and interval."""
    rows = []
    for model in SLOS:
        columns = [
            Column(phase, tp, pp, (CLOCK_MHZ,))
            for phase in PHASES
            for pp in STAGES
            for tp in fitting_degrees(profile_of(model), phase, 8, pp)
        ]
        tables = [class_table(measurement_of(model, seed, requests), columns, workers=1) for seed in range(seeds)]
        for column, measured in zip(columns, zip(*tables, strict=True), strict=True):
            per_gpu = mean_interval(np.array([row.rate_rps / row.gpus for row in measured]))
            rows.append(
                {
                    "model": model,
                    "phase": column.phase,
                    "tp": column.tp,
                    "pp": column.pp,
                    "rps_per_gpu": asdict(per_gpu),
                }
            )
    return rows


def steady_goodput(measurement: Measurement, configuration: str, attainment: Attainment) -> float:
    """Requests per second and GPU that one prefill beside one decode instance carries, steadily."""
    placement, gpus = placement_of(configuration), gpus_of(configuration)
    rate_rps, _ = greatest_rate(
        lambda rate: simulate_load(measurement, placement, NODES, rate),
        lambda outcome: keeps(outcome, measurement, attainment),
        0.5 * gpus,
        measurement.rate_tolerance,
    )
    return rate_rps / gpus


def trace_of(requests: int, rate_rps: float, seed: int) -> Trace:
    """So many requests, as a run of the authors has."""
    trace = generate(load_workload(WORKLOAD), rate_rps, (requests + 6.0 * math.sqrt(requests) + 10.0) / rate_rps, seed)
    return trace.take(np.arange(requests, dtype=np.int64), trace.name)


def curve(
    published: Published, configuration: str, version: Version, seeds: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Our attainment in per cent for runs as long as the authors': float64[seeds, rates]."""
    model, gpus = published.model, gpus_of(configuration)
    profile, cluster = profile_of(model, version.inflated), cluster_of(model, version.capped)
    placement = placement_of(configuration, version)
    return np.array(
        [
            [
                100.0
                * serve_together(
                    profile,
                    cluster,
                    placement,
                    trace_of(published.requests(gpus, rate), rate * gpus, seed),
                    slo=SLOS[model],
                    quantile=QUANTILE,
                    warmup_s=0.0,
                    tpot_definition="per-output-token",
                ).within_both
                for rate in published.rates
            ]
            for seed in range(seeds)
        ]
    )


def unit_goodputs(seeds: int, requests: int, short_seeds: int) -> list[dict[str, Any]]:
    """Every configuration with published figures: theirs, ours in runs as long as theirs, ours steadily."""
    rows = []
    steady: dict[tuple[str, str], dict[str, Interval]] = {}
    for published in PUBLISHED:
        measurements = [measurement_of(published.model, seed, requests) for seed in range(seeds)]
        for configuration, theirs in track(published.curves.items(), published.label, console=Console(stderr=True)):
            key = (published.model, configuration)
            if known(*key) and key not in steady:
                steady[key] = {
                    attainment: mean_interval(
                        np.array([steady_goodput(one, configuration, attainment) for one in measurements])
                    )
                    for attainment in ATTAINMENTS
                }
            ours = {
                version.label: curve(published, configuration, version, short_seeds)
                for version in VERSIONS
                if known(published.model, configuration, version)
            }
            rows.append(
                {
                    "set": published.label,
                    "model": published.model,
                    "configuration": configuration,
                    "theirs_rps_per_gpu": crossing(published.rates, theirs),
                    "short_rps_per_gpu_quartiles": {
                        label: quartiles([crossing(published.rates, one) for one in values.tolist()])
                        for label, values in ours.items()
                    },
                    "steady_rps_per_gpu": {name: asdict(interval) for name, interval in steady.get(key, {}).items()},
                    "theirs_percent": list(theirs),
                    "ours_percent": {label: values.mean(axis=0).tolist() for label, values in ours.items()},
                    "ours_percent_sd": {label: values.std(axis=0, ddof=1).tolist() for label, values in ours.items()},
                }
            )
    return rows


def causes(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far our attainment is from the authors' under each version, in points: mean, and root mean square."""
    rows = list(rows)
    found = []
    for published in PUBLISHED:
        for version in VERSIONS:
            own = [row for row in rows if row["set"] == published.label and version.label in row["ours_percent"]]
            theirs = np.array([row["theirs_percent"] for row in own])
            difference = np.array([row["ours_percent"][version.label] for row in own]) - theirs
            noise = np.array([row["ours_percent_sd"][version.label] for row in own])
            found.append(
                {
                    "set": published.label,
                    "version": version.label,
                    "configurations": len(own),
                    "mean_points": float(difference.mean()),
                    "rms_points": float(np.sqrt((difference**2).mean())),
                    "run_to_run_points": float(np.sqrt((noise**2).mean())),
                }
            )
    return found


def example(seeds: int) -> list[dict[str, Any]]:
    """Goodput of the README's configurations in its runs of 300 requests, both P90 apart: quartiles over seeds."""
    model, judged = "opt-13b", measurement_of("opt-13b", 0, EXAMPLE_REQUESTS)
    rows = []
    for configuration in EXAMPLE_CONFIGURATIONS:
        placement, gpus = placement_of(configuration, BEFORE_FIX), gpus_of(configuration)

        def goodput(seed: int, placement: Placement = placement, gpus: int = gpus) -> float:
            def probe(rate_rps: float) -> UnitOutcome:
                return serve_together(
                    judged.profile,
                    judged.cluster,
                    placement,
                    trace_of(EXAMPLE_REQUESTS, rate_rps, seed),
                    slo=SLOS[model],
                    quantile=QUANTILE,
                    warmup_s=0.0,
                    tpot_definition="per-output-token",
                )

            return greatest_rate(probe, lambda outcome: keeps(outcome, judged, "separate"), gpus, 0.02)[0] / gpus

        found = quartiles([goodput(seed) for seed in range(seeds)])
        rows.append({"configuration": configuration, "rps_per_gpu_quartiles": found})
    return rows


def figure(value: float) -> str:
    """A goodput for people."""
    return "–" if value == 0.0 else "above" if math.isinf(value) else f"{value:.2f}"


def with_interval(values: dict[str, float] | None) -> str:
    """Mean with half the width of its interval."""
    if values is None:
        return "no such TP"
    return f"{values['value']:.2f} ± {values['high'] - values['value']:.2f}"


def show(
    console: Console,
    phases: list[dict[str, Any]],
    units: list[dict[str, Any]],
    causes: list[dict[str, Any]],
    example: list[dict[str, Any]],
    queues: list[dict[str, Any]],
) -> None:
    """The tables."""
    by_phase = Table("model", "TP", "PP", "prefill", "decode", title="goodput of a phase alone, requests/s per GPU")
    for model in SLOS:
        keys = sorted({(row["tp"], row["pp"]) for row in phases if row["model"] == model})
        for tp, pp in keys:
            cells = {
                row["phase"]: with_interval(row["rps_per_gpu"])
                for row in phases
                if (row["model"], row["tp"], row["pp"]) == (model, tp, pp)
            }
            by_phase.add_row(model, str(tp), str(pp), cells.get("prefill", "–"), cells.get("decode", "–"))
    console.print(by_phase)
    made_by = {
        one["set"]: min((row for row in causes if row["set"] == one["set"]), key=lambda row: row["rms_points"])[
            "version"
        ]
        for one in causes
    }
    beside = Table(
        "figures",
        "prefill + decode",
        "theirs",
        "ours, their run: quartiles",
        "steady joint",
        "steady separate",
        title="goodput of one prefill beside one decode instance, requests/s per GPU (their run: the nearest version)",
    )
    for row in units:
        beside.add_row(
            row["set"],
            label_of(row["configuration"]),
            figure(row["theirs_rps_per_gpu"]),
            ", ".join(figure(value) for value in row["short_rps_per_gpu_quartiles"][made_by[row["set"]]]),
            *(with_interval(row["steady_rps_per_gpu"].get(name)) for name in ("joint", "separate")),
        )
    console.print(beside)
    fit = Table(
        "figures", "version of their code", "mean", "rms", "run to run", title="our attainment less theirs, points"
    )
    for row in causes:
        figures = (row["mean_points"], row["rms_points"], row["run_to_run_points"])
        fit.add_row(row["set"], row["version"], *(f"{value:.1f}" for value in figures))
    console.print(fit)
    small = Table("prefill + decode", "quartiles over seeds", title="the README's example, requests/s per GPU")
    for row in example:
        small.add_row(
            label_of(row["configuration"]), ", ".join(f"{value:.2f}" for value in row["rps_per_gpu_quartiles"])
        )
    console.print(small)
    shares = Table(
        "requests/s per GPU", "theirs", "a queue per lane", "one queue", title="TP4·PP2 + TP1: per cent kept"
    )
    for row in queues:
        shares.add_row(*(f"{row[key]:.1f}" for key in row))
    console.print(shares)


def main(seeds: int = 5, requests: int = 10_000, short_seeds: int = 40, json_file: str | None = None) -> None:
    """Print the tables.

    Args:
        seeds: Workload seeds of the steady goodputs.
        requests: Least number of requests of a steady run.
        short_seeds: Seeds of the runs that are as short as the authors'.
        json_file: File for the figures as JSON; - prints them, and the tables go to standard error.
    """
    phases = phase_goodputs(seeds, requests)
    units = unit_goodputs(seeds, requests, short_seeds)
    differences = causes(units)
    examples = example(short_seeds)
    figures = {
        "phases": phases,
        "units": units,
        "causes": differences,
        "example": examples,
        "queues": queues(short_seeds),
    }
    show(Console(stderr=json_file == "-", width=140), **figures)
    text = json.dumps(figures, indent=2) + "\n"
    if json_file == "-":
        print(text, end="")
    elif json_file:
        Path(json_file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
