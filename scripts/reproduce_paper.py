"""The experiments of BiScale's paper (arXiv 2602.18755) on the modelled cluster, beside the paper's numbers.

    python scripts/reproduce_paper.py            # ten seeds and every switch; what docs/reproduction.md shows
    python scripts/reproduce_paper.py --quick    # two seeds, fewer loads, no switch: under three minutes

Runs DistServe, placement only and BiScale, and the top clock at BiScale's placements, on the paper's loads. A *switch*
is one difference between the paper's set-up and ours, thrown alone. Every finished run is kept in ``--out``: the same
command after an interrupt, or a kill, runs the rest.
"""

from __future__ import annotations

import json as json_
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console

from biscale_gym.config import nearest
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.evaluation.faults import EvaluationError, is_user_error, one_line
from biscale_gym.evaluation.matrix import Runner, fault_messages, run_matrix
from biscale_gym.evaluation.records import RecordStore, replace_file, without_nan
from biscale_gym.evaluation.statistics import Interval, mean_interval
from biscale_gym.evaluation.summary import Summary, energy_ratios, quantile, summarise
from biscale_gym.evaluation.tables import Grid, grids_markdown, print_grids
from biscale_gym.evaluation.windows import (
    IDLE,
    TARGETS,
    broken,
    clock_shares,
    mean_clock_shares,
    window_arrays,
    window_grids,
)

Floats = npt.NDArray[np.float64]

PHASES = ("prefill", "decode")
CONTROLLED = tuple(f"controlled-{rate_rps}" for rate_rps in (10, 25, 40, 55, 70, 85))
PRODUCTION = ("paper-67", "paper-85")
QUICK = ("controlled-10", "controlled-55", "paper-67")
SEEDS, QUICK_SEEDS = 10, 2
ROLES = ("distserve", "place-only", "biscale")
HELD = "max-clock"
"""Fourth role: BiScale's placements at the card's top clock."""

PAPER = {
    ("controlled", "place-only", "prefill"): (0.20, 0.31),
    ("controlled", "biscale", "prefill"): (0.27, 0.36),
    ("production-67", "place-only", "prefill"): (0.16, 0.29),
    ("production-67", "biscale", "prefill"): (0.28, 0.39),
    ("production-67", "place-only", "decode"): (0.37, 0.45),
    ("production-67", "biscale", "decode"): (0.44, 0.48),
}
"""Least and greatest share of DistServe's energy saved in the paper, by condition, controller and phase."""
PAPER_TIER_2 = {"prefill": "9 … 29 % (mean 15)", "decode": "−4 … 20 % (mean 6)"}


@dataclass(frozen=True)
class Variant:
    """A set-up: the paper's as shipped, or with one switch thrown.

    Attributes:
        name: of the switch.
        what: what it changes, one line.
        overrides: scenario settings replaced.
        reference: settings of the DistServe that savings are taken against.
        tier1: settings of placement only and of BiScale's tier 1.
        tier2: settings of BiScale's other groups.
        scenarios: where it is thrown.
    """

    name: str
    what: str
    overrides: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    tier1: dict[str, Any] = field(default_factory=dict)
    tier2: dict[str, dict[str, Any]] = field(default_factory=dict)
    scenarios: tuple[str, ...] = ("paper-67",)

    def job(self, role: str, scenario: str, seed: int) -> RunJob:
        """The run of one controller."""
        biscale = {**({"tier1": self.tier1} if self.tier1 else {}), **self.tier2}
        settings = {"distserve": self.reference, "place-only": self.tier1, "biscale": biscale}
        return RunJob(
            scenario=scenario,
            controller=role,
            seed=seed,
            overrides=self.overrides,
            controller_settings=settings.get(role, {"planner": "place-only"}),
        )


SHIPPED = Variant("none", "as shipped", scenarios=(*CONTROLLED, *PRODUCTION))
TP2 = Variant(
    "tp2-prefill",
    "DistServe holds prefill to TP2, the paper's example",
    reference={"prefill_degrees": [2]},
    scenarios=(*CONTROLLED, *PRODUCTION),
)
BF16_RPS = 36.18
"""67 % of the highest rate that DistServe carries in bf16, found as scripts/derive_rates.py finds rates."""
BF16 = {"cluster.precision": "bf16", "rate_rps": BF16_RPS}
SWITCHES = (
    TP2,
    Variant("bf16", f"bf16 weights, {BF16_RPS:g} requests/s (67 % of what DistServe then carries)", BF16),
    Variant("bf16-tp2", "the same, DistServe holds prefill to TP2", BF16, reference={"prefill_degrees": [2]}),
    Variant("top-1830", "the card ends at 1,830 MHz, the top of the controllers' grid", {"top_clock_mhz": 1830}),
    Variant("distserve-windows", "DistServe plans every window anew", reference={"replan": True}),
    Variant("distserve-p90", "DistServe plans for P90, its authors' criterion", reference={"quantile": 0.9}),
    Variant("peak-60", "R is the greatest mean over 60 s of the last window", tier1={"forecast": "peak"}),
    Variant("peak-10", "R is the greatest mean over 10 s", tier1={"forecast": "peak", "peak_s": 10.0}),
    Variant("oracle", "R is the true mean of the coming window", tier1={"forecast": "oracle"}),
    Variant(
        "steady-windows",
        "every window starts on an idle cluster, its first 30 s not counted",
        {"window_start": "steady-state"},
        scenarios=PRODUCTION,
    ),
    Variant("no-margin", "α = 0: no capacity above the forecast", tier1={"margin": 0.0}),
    Variant(
        "no-headroom",
        "BiScale plans and controls for the whole SLO instead of 95 %",
        tier1={"headroom": 1.0},
        tier2={"prefill": {"headroom": 1.0}, "decode": {"headroom": 1.0}},
    ),
    Variant(
        "margin-15",
        "α = 0.15",
        tier1={"margin": 0.15},
        scenarios=("controlled-25", "paper-67"),
    ),
    Variant(
        "prefill-headroom-50",
        "the prefill controller aims at half the TTFT SLO",
        tier2={"prefill": {"headroom": 0.5}},
        scenarios=("controlled-25", "paper-67"),
    ),
    Variant("kv-unlimited", "KV memory of decode never ends", {"cluster.batching.decode_kv_tokens": 10_000_000}),
    Variant(
        "no-kv-guard",
        "decode does not go to the top clock as its KV memory fills",
        tier2={"decode": {"kv_high": 1.0, "kv_low": 1.0}},
        scenarios=("controlled-70", "controlled-85", "paper-67"),
    ),
    Variant("count-unallocated", "tier 1 counts the idle power of free GPUs", tier1={"count_unallocated": True}),
    Variant("costly-placement", "changing a placement drains and loads weights", {"cluster.replacement.mode": "drain"}),
    Variant("instant-clocks", "clock switching takes no time", {"cluster.switching": "instant"}),
    Variant("fitted", "controllers plan with a fitted profile, 2 % noise", {"prediction": {}}),
    Variant(
        "clocks-from-1110",
        "the controllers' lowest clock is 1,110 MHz",
        {"clocks_mhz": [1110, 1290, 1470, 1650, 1830]},
    ),
)


def chosen_switches(names: str) -> list[Variant]:
    """The switches named, comma-separated; ``all`` or ``none``.

    Raises:
        EvaluationError: there is no such switch; the nearest is named.
    """
    if names in ("all", "none"):
        return list(SWITCHES) if names == "all" else []
    known = {switch.name: switch for switch in SWITCHES}
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise EvaluationError(f"no switch {name!r}; {nearest(name, [*known, 'all', 'none'])}")
    return [known[name] for name in dict.fromkeys(asked)]


def jobs_for(scenarios: Sequence[str], switches: Sequence[Variant], seeds: int) -> list[RunJob]:
    """Every run that is needed, each once: first the paper's scenarios, then the switches."""
    jobs = [
        SHIPPED.job(role, scenario, seed) for scenario in scenarios for seed in range(seeds) for role in (*ROLES, HELD)
    ]
    jobs += [
        switch.job(role, scenario, seed)
        for switch in switches
        for scenario in switch.scenarios
        for seed in range(seeds)
        for role in ROLES
    ]
    return list({job.model_dump_json(): job for job in jobs}.values())


class Results:
    """What the records say, by variant, scenario and role."""

    def __init__(self, summaries: Sequence[Summary], store: RecordStore) -> None:
        self.summaries = summaries
        self.store = store
        self._by_name = {(summary.scenario, summary.controller): summary for summary in summaries}
        self._windows: dict[str, dict[str, Floats]] = {}

    def of(self, variant: Variant, scenario: str, role: str) -> Summary | None:
        """The runs of one role; None where there are none."""
        job = variant.job(role, scenario, 0)
        return self._by_name.get((job.scenario_name, job.controller_name))

    def has(self, variant: Variant, scenario: str) -> bool:
        """Whether all three controllers ran."""
        return all(self.of(variant, scenario, role) is not None for role in ROLES)

    def windows(self, summary: Summary) -> list[dict[str, Floats]]:
        """Figures of every seed's windows."""
        for record in summary.records:
            if record.id not in self._windows:
                self._windows[record.id] = window_arrays(self.store.arrays(record))
        return [self._windows[record.id] for record in summary.records]

    def saving(self, variant: Variant, scenario: str, role: str, metric: str, against: str = "distserve") -> Floats:
        """Share of the reference's joules that is saved, per seed that both have, float64[seeds]."""
        own, base = self.of(variant, scenario, role), self.of(variant, scenario, against)
        if own is None or base is None:
            return np.zeros(0)
        return 1.0 - energy_ratios(own.records, base.records, metric)

    def window_savings(self, variant: Variant, scenario: str, role: str, phase: str) -> Floats:
        """The same window by window: the mean over the seeds, float64[windows]."""
        own, base = self.of(variant, scenario, role), self.of(variant, scenario, "distserve")
        assert own is not None
        assert base is not None
        theirs = dict(zip((r.row["seed"] for r in base.records), self.windows(base), strict=True))
        metric = f"{phase}_energy_j"
        each = np.array(
            [
                1.0 - one[metric] / theirs[record.row["seed"]][metric]
                for record, one in zip(own.records, self.windows(own), strict=True)
                if record.row["seed"] in theirs
            ]
        )
        return np.asarray(each.mean(axis=0))


def savings(results: Results, variant: Variant = SHIPPED) -> list[dict[str, Any]]:
    """The paper's rows with ours, shares of DistServe's joules: the range over the loads, or over the windows.

    Controlled: the least and the greatest of the loads' mean savings over the seeds. Production: of the windows'.
    """
    rows = []
    for (condition, controller, phase), (paper_low, paper_high) in PAPER.items():
        if condition == "controlled":
            loads = [scenario for scenario in CONTROLLED if results.has(variant, scenario)]
            metric = f"{phase}_energy_j"
            each = [float(np.mean(results.saving(variant, one, controller, metric))) for one in loads]
        else:
            there = results.has(variant, "paper-67")
            each = results.window_savings(variant, "paper-67", controller, phase).tolist() if there else []
        if each:
            rows.append(
                {
                    "condition": condition,
                    "controller": controller,
                    "phase": phase,
                    "saving_low": min(each),
                    "saving_high": max(each),
                    "paper_low": paper_low,
                    "paper_high": paper_high,
                }
            )
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------


def percent(interval: Interval) -> str:
    """A mean share with its interval."""
    if np.isnan(interval.value):
        return "–"
    half = "" if np.isnan(interval.low) else f" ± {100.0 * (interval.high - interval.value):.1f}"
    return f"{100.0 * interval.value:.1f}{half} %".replace("-", "−")


def span(low: float, high: float) -> str:
    """A range of shares."""
    return f"{100.0 * low:.1f} … {100.0 * high:.1f} %".replace("-", "−")


def mean_of(values: Floats) -> Interval:
    """Mean with its interval; NaN of nothing."""
    return mean_interval(values) if len(values) else Interval(*[float("nan")] * 3)


def paper_grid(results: Results) -> Grid:
    """The paper's ranges beside ours, and beside ours against TP2 prefill where that was run."""
    ours, held = savings(results), savings(results, TP2)
    second = {(row["condition"], row["controller"], row["phase"]): row for row in held}
    rows = []
    for row in ours:
        other = second.get((row["condition"], row["controller"], row["phase"]))
        rows.append(
            [
                f"{row['condition']}, {row['phase']}, {row['controller']}",
                f"{100 * row['paper_low']:.0f} … {100 * row['paper_high']:.0f} %",
                span(row["saving_low"], row["saving_high"]),
                "–" if other is None else span(other["saving_low"], other["saving_high"]),
            ]
        )
    header = ["saved of DistServe's energy", "the paper", "here", "here, DistServe with TP2 prefill"]
    return Grid(
        "Beside the paper: range over the loads (controlled) or the windows (production)",
        header,
        rows,
        [False] * len(rows),
    )


def load_grid(results: Results, scenarios: Sequence[str]) -> Grid:
    """One row per load and controller: savings, what tier 2 adds, tails."""
    rows, warned = [], []
    for scenario in scenarios:
        for role in ROLES:
            summary = results.of(SHIPPED, scenario, role)
            if summary is None:
                continue
            cells = [scenario, role]
            for phase in PHASES:
                metric = f"{phase}_energy_j"
                per_token = summary.metrics[f"{phase}_j_per_token"]
                half = "" if np.isnan(per_token.low) else f" ± {per_token.high - per_token.value:.4f}"
                saving = mean_of(results.saving(SHIPPED, scenario, role, metric))
                on_top = mean_of(results.saving(SHIPPED, scenario, role, metric, "place-only"))
                cells += [
                    f"{per_token.value:.4f}{half}",
                    "–" if role == "distserve" else percent(saving),
                    percent(on_top) if role == "biscale" else "–",
                ]
            tails = (1e3 * quantile(summary.ttft_s, 0.99), 1e3 * quantile(summary.tpot_s, 0.99))
            breaks = sum(int(broken(one, summary.slo).any(axis=1).sum()) for one in results.windows(summary))
            windows = sum(len(one["start_s"]) for one in results.windows(summary))
            cells += [f"{tails[0]:.0f}, {tails[1]:.1f}", f"{breaks} of {windows}"]
            rows.append(cells)
            warned.append(bool(summary.breaches))
    header = ["scenario", "controller"]
    for phase, token in zip(PHASES, ("prompt", "output"), strict=True):
        header += [f"J/{token} token", f"{phase} saved", "tier 2 of it"]
    return Grid("Every load", [*header, "P99 TTFT, TPOT ms (all seeds)", "windows that break the SLO"], rows, warned)


def tier_2_grid(results: Results, scenarios: Sequence[str]) -> Grid:
    """What BiScale takes off placement only, over all scenarios."""
    rows = []
    for phase in PHASES:
        each = [
            float(np.mean(values))
            for scenario in scenarios
            if len(values := results.saving(SHIPPED, scenario, "biscale", f"{phase}_energy_j", "place-only"))
        ]
        if each:
            ours = f"{span(min(each), max(each))} (mean {100 * float(np.mean(each)):.1f})".replace("-", "−")
            rows.append([phase, PAPER_TIER_2[phase], ours])
    return Grid(
        "Tier 2 on top of tier 1: saved of placement only's energy, range over the scenarios",
        ["phase", "the paper", "here"],
        rows,
        [False] * len(rows),
    )


@dataclass(frozen=True)
class Kept:
    """What BiScale breaks that the top clock at the same placements keeps, in one scenario.

    Attributes:
        runs, windows: how many there are.
        biscale_runs, biscale_windows: of BiScale's, how many break a target.
        faults: where BiScale breaks a target that the top clock keeps, one line each.
    """

    scenario: str
    runs: int
    windows: int
    biscale_runs: int
    biscale_windows: int
    run_faults: tuple[str, ...]
    window_faults: tuple[str, ...]


def kept(results: Results, scenario: str) -> Kept | None:
    """BiScale against the top clock at its placements; None where one of the two did not run.

    Raises:
        EvaluationError: the two were not at the same placements.
    """
    own, held = results.of(SHIPPED, scenario, "biscale"), results.of(SHIPPED, scenario, HELD)
    if own is None or held is None:
        return None
    others = {
        record.row["seed"]: (record, windows)
        for record, windows in zip(held.records, results.windows(held), strict=True)
    }
    slo_s = (own.slo.ttft_s, own.slo.tpot_s)
    runs = windows = broken_runs = broken_windows = 0
    run_faults: list[str] = []
    window_faults: list[str] = []
    for record, mine in zip(own.records, results.windows(own), strict=True):
        if record.row["seed"] not in others:
            continue
        other, theirs = others[record.row["seed"]]
        if _sizes(record) != _sizes(other):
            raise EvaluationError(f"{record.name} and {other.name} were not at the same placements")
        where = f"{scenario} seed {record.row['seed']}"
        whole = {name: np.array([float(record.row[name])]) for name in _JUDGED}
        theirs_whole = {name: np.array([float(other.row[name])]) for name in _JUDGED}
        breaks, theirs_break = broken(whole, own.slo)[0], broken(theirs_whole, own.slo)[0]
        runs += 1
        broken_runs += bool(breaks.any())
        run_faults += [_fault(where, whole, 0, t, slo_s[t]) for t in np.flatnonzero(breaks & ~theirs_break).tolist()]
        breaks, theirs_break = broken(mine, own.slo), broken(theirs, own.slo)
        windows += len(breaks)
        broken_windows += int(breaks.any(axis=1).sum())
        window_faults += [
            _fault(f"{where} window {w}", mine, w, t, slo_s[t]) for w, t in np.argwhere(breaks & ~theirs_break).tolist()
        ]
    return Kept(scenario, runs, windows, broken_runs, broken_windows, tuple(run_faults), tuple(window_faults))


_JUDGED = tuple(f"{name}_{what}" for name in TARGETS for what in ("p99_s", "attainment"))


def _fault(where: str, figures: Mapping[str, Floats], at: int, target: int, slo_s: float) -> str:
    name = TARGETS[target]
    p99_ms, within = 1e3 * figures[f"{name}_p99_s"][at], figures[f"{name}_attainment"][at]
    return f"{where}: P99 {name.upper()} {p99_ms:.1f} ms of {1e3 * slo_s:g}, {100 * within:.2f} % within"


def _sizes(record: Any) -> list[Counter[str]]:
    """Instances of every window by phase and TP degree, without their clocks."""
    return [
        Counter({kind: sum(int(n) for n, k in parts if k == kind) for kind in {k for _, k in parts}})
        for parts in (
            [(part.split("×")[0], part.split("×")[1].split("@")[0]) for part in str(placement).split(" + ")]
            for _, placement in record.provenance["placements"]
        )
    ]


def kept_grid(each: Sequence[Kept]) -> Grid:
    """The check as a table."""
    rows = [
        [
            one.scenario,
            f"{one.biscale_runs} of {one.runs}",
            str(len(one.run_faults)),
            f"{one.biscale_windows} of {one.windows}",
            str(len(one.window_faults)),
        ]
        for one in each
    ]
    header = [
        "scenario",
        "runs in which BiScale breaks the SLO",
        "where the top clock keeps it",
        "windows in which BiScale breaks it",
        "where the top clock keeps it",
    ]
    return Grid(
        "BiScale against the top clock at the same placements",
        header,
        rows,
        [bool(one.run_faults or one.window_faults) for one in each],
    )


def clock_grids(results: Results, scenarios: Sequence[str]) -> Iterable[Grid]:
    """Per scenario: share of each phase's GPU time at each clock, and without work."""
    for scenario in scenarios:
        shares = {
            role: mean_clock_shares([clock_shares(results.store.arrays(record)) for record in summary.records])
            for role in ROLES
            if (summary := results.of(SHIPPED, scenario, role)) is not None
        }
        clocks = sorted({clock for own in shares.values() for phase in own.values() for clock in phase} - {IDLE})
        rows = [
            [role, phase, *(f"{100 * own[phase].get(clock, 0.0):.1f} %" for clock in (*clocks, IDLE))]
            for role, own in shares.items()
            for phase in PHASES
        ]
        header = ["controller", "phase", *(f"{clock} MHz" for clock in clocks), "no work"]
        yield Grid(f"{scenario}: share of GPU time working at each clock", header, rows, [False] * len(rows))


def switch_grid(results: Results, switches: Sequence[Variant], scenarios: Sequence[str]) -> Grid:
    """One row per switch and scenario: what is saved, and whether the SLO is kept."""
    rows, warned = [], []
    bases = [(SHIPPED, scenario) for scenario in scenarios if any(scenario in switch.scenarios for switch in switches)]
    for variant, scenario in [*bases, *((switch, one) for switch in switches for one in switch.scenarios)]:
        if not results.has(variant, scenario):
            continue
        summaries = [results.of(variant, scenario, role) for role in ROLES]
        cells = [f"{variant.name}: {variant.what}", scenario]
        for phase in PHASES:
            metric = f"{phase}_energy_j"
            cells += [percent(mean_of(results.saving(variant, scenario, role, metric))) for role in ROLES[1:]]
            cells.append(percent(mean_of(results.saving(variant, scenario, "biscale", metric, "place-only"))))
        cells.append(percent(mean_of(results.saving(variant, scenario, "biscale", "total_energy_j"))))
        breakers = [f"{s.controller.split()[0]} ({', '.join(s.breaches)})" for s in summaries if s and s.breaches]
        cells.append(", ".join(breakers) or "–")
        rows.append(cells)
        warned.append(bool(breakers))
    header = ["switch", "scenario"]
    for phase in PHASES:
        header += [f"{phase}: place-only", f"{phase}: BiScale", "tier 2 of it"]
    return Grid(
        "Switches, each alone: saved of DistServe's energy",
        [*header, "total: BiScale", "breaks the SLO"],
        rows,
        warned,
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def write_figures(results: Results, scenarios: Sequence[str], folder: Path) -> list[Path]:
    """Energy per token over the loads, and the placements chosen; PNG and SVG.

    Raises:
        DrawingError: matplotlib is not installed.
    """
    from biscale_gym.drawing import drawing, save
    from biscale_gym.evaluation.plots import write_plots

    shipped = [summary for summary in results.summaries if summary.scenario in scenarios]
    shown = [summary for summary in shipped if summary.controller in ROLES]
    files = write_plots(shown, results.store, folder, ("windows", "clocks"))
    with drawing(folder):
        loads = [scenario for scenario in CONTROLLED if scenario in scenarios and results.has(SHIPPED, scenario)]
        if loads:
            files += save(energy_figure(results, loads), folder / "controlled-energy")
        for scenario in scenarios:
            if results.has(SHIPPED, scenario):
                files += save(placement_figure(results, scenario), folder / f"{scenario}-placements")
    return files


def energy_figure(results: Results, loads: Sequence[str]) -> Any:
    """Joules per token of each phase over the controlled loads, with 95 % intervals."""
    import matplotlib.pyplot as plt

    from biscale_gym.drawing import COLOURS

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    rates_rps = [float(load.rpartition("-")[2]) for load in loads]
    for panel, phase, token in zip(panels, PHASES, ("prompt", "output"), strict=True):
        for number, role in enumerate(sorted(ROLES)):
            summaries = [results.of(SHIPPED, load, role) for load in loads]
            values = [one.metrics[f"{phase}_j_per_token"] for one in summaries if one is not None]
            errors = [np.nan_to_num(one.high - one.value) for one in values]
            panel.errorbar(
                rates_rps, [one.value for one in values], errors, marker="o", markersize=4, capsize=3,
                color=COLOURS[number], label=role,
            )  # fmt: skip
        panel.set_title(f"{phase} GPUs")
        panel.set_xlabel("load (requests/s)")
        panel.set_ylabel(f"joules per {token} token")
        panel.set_ylim(bottom=0.0)
        panel.grid(color="#E8E8E8")
    panels[1].legend(frameon=False)
    return figure


def placement_figure(results: Results, scenario: str) -> Any:
    """GPUs by phase, TP degree and base clock in every window of the first seed, a panel per planner."""
    import matplotlib.pyplot as plt

    planned = {
        role: [str(placement) for _, placement in summary.records[0].provenance["placements"]]
        for role in ("distserve", "biscale")
        if (summary := results.of(SHIPPED, scenario, role)) is not None
    }
    kinds = sorted({kind for each in planned.values() for one in each for kind in gpus_by_kind(one)}, key=_kind_order)
    colours = dict(zip(kinds, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(kinds))), strict=True))
    widths = [max(1, len(each)) for each in planned.values()]
    figure, panels = plt.subplots(
        1, len(planned), figsize=(5.5 + 0.9 * sum(widths), 4.0), sharey=True, squeeze=False, layout="constrained",
        width_ratios=[width + 1 for width in widths],
    )  # fmt: skip
    for panel, (role, each) in zip(panels[0], planned.items(), strict=True):
        base: Floats = np.zeros(len(each))
        for kind in kinds:
            gpus = np.array([gpus_by_kind(one).get(kind, 0) for one in each], dtype=np.float64)
            panel.bar(range(len(each)), gpus, 0.7, bottom=base, color=colours[kind], edgecolor="white", label=kind)
            base = base + gpus
        panel.set_title(role)
        panel.set_xticks(range(len(each)), [f"window {n}" for n in range(len(each))] if len(each) > 1 else ["the run"])
    figure.suptitle(f"{scenario}, seed 0: GPUs by phase, TP degree and base clock (MHz)", fontsize=11)
    panels[0][0].set_ylabel("GPUs")
    panels[0][0].set_ylim(0, 16.5)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    return figure


def gpus_by_kind(placement: str) -> dict[str, int]:
    """GPUs of each kind of instance in a placement's short form: ``{"P TP2@1110": 6}`` of ``3×P TP2@1110``."""
    found: dict[str, int] = {}
    for part in placement.split(" + "):
        count, kind = part.split("×")
        found[kind] = found.get(kind, 0) + int(count) * int(kind.partition("TP")[2].partition("@")[0].partition("·")[0])
    return found


def _kind_order(kind: str) -> tuple[bool, int, int]:
    size, _, clock = kind.partition("TP")[2].partition("@")
    return kind.startswith("D"), int(size.partition("·")[0]), int(clock)


# -- the whole ---------------------------------------------------------------------------------------------------------


def reproduce(
    scenarios: Sequence[str],
    switches: Sequence[Variant],
    seeds: int,
    out: Path,
    workers: int,
    plots: bool,
    json: str | None,
    runner: Runner = run,
) -> int:
    """Run what ``out`` does not hold yet, write report and figures; the exit status is that of ``biscale-gym compare``.

    Raises:
        EvaluationError, RecordsError: what cannot be run, read or written.
    """
    messages = Console(stderr=True)
    console = messages if json == "-" else Console(width=None if sys.stdout.isatty() else 200)
    jobs = jobs_for(scenarios, switches, seeds)
    store = RecordStore(out)
    result = run_matrix(jobs, store, workers, runner, messages)
    for message in fault_messages(result.faults):
        messages.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    if result.interrupted:
        messages.print(f"interrupted: {len(result.records)} of {len(jobs)} runs are recorded; the same command goes on")
        return 130
    if not result.records:
        return 2 if all(fault.by_user for _, fault in result.faults) else 1
    results = Results(summarise(result.records, store), store)
    checks = [one for scenario in scenarios if (one := kept(results, scenario)) is not None]
    brief = [paper_grid(results), tier_2_grid(results, scenarios), load_grid(results, scenarios), kept_grid(checks)]
    if switches:
        brief.append(switch_grid(results, switches, scenarios))
    shipped = [s for s in results.summaries if s.scenario in scenarios and s.controller in ROLES]
    details = [*window_grids(shipped, store), *clock_grids(results, scenarios)]
    faults = [fault for check in checks for fault in (*check.run_faults, *check.window_faults)]
    lines = "".join(f"- {fault}\n" for fault in faults)
    report = grids_markdown(brief) + (f"\nBiScale breaks what the top clock keeps:\n\n{lines}" if faults else "")
    replace_file(out / "report.md", f"{report}\n{grids_markdown(details)}")
    if plots:
        write_figures(results, scenarios, out / "plots")
    print_grids(brief, console)
    for fault in faults:
        console.print(
            f"BiScale breaks what the top clock keeps: {fault}", markup=False, highlight=False, soft_wrap=True
        )
    messages.print(f"records, report and figures: {out}", markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        rows = [without_nan(row) for row in result.rows()]
        text = json_.dumps({"rows": rows, "savings": savings(results)}, indent=2, allow_nan=False) + "\n"
        if json == "-":
            sys.stdout.write(text)
        else:
            replace_file(Path(json), text)
    return 1 if result.faults else 0


def main(
    quick: bool = False,
    seeds: int | None = None,
    switches: str | None = None,
    out: Path = Path("results/reproduction"),
    json: str | None = None,
    workers: int = 2,
    plots: bool = True,
) -> int:
    """The paper's experiments, beside the paper's numbers.

    Args:
        quick: Three loads, two seeds and no switch, unless they are asked for.
        seeds: Traffic seeds, counted from 0; 10, or 2 with --quick.
        switches: Comma-separated; all (the default, without --quick) or none.
        out: Folder of records, report and figures; a run that it holds is not run again.
        json: File for the runs' rows and the savings beside the paper's as JSON; - prints them.
        workers: Processes.
        plots: Draw the figures.
    """
    count = (QUICK_SEEDS if quick else SEEDS) if seeds is None else seeds
    if count < 1:
        raise EvaluationError(f"--seeds {count}: at least 1 is needed")
    thrown = chosen_switches(("none" if quick else "all") if switches is None else switches)
    return reproduce(QUICK if quick else (*CONTROLLED, *PRODUCTION), thrown, count, out, workers, plots, json)


if __name__ == "__main__":
    try:
        status = tyro.cli(main)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)
