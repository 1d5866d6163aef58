"""Our savings beside the paper's, and what of the difference comes from the reference that they are taken against.

    python scripts/beside_paper.py --seeds 10

Prints, for the scenario, the saving of placement only and of BiScale per phase against four references at full clock:
DistServe as planned, DistServe on a card whose top clock is the grid's, and prefill on TP2, as in the paper's example,
with decode on TP2 or TP4, just as many instances as keep the SLO.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from biscale_gym.control.rollout import RunJob, RunOutcome, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.evaluation.statistics import mean_interval

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Reference:
    """What a saving is taken against."""

    label: str
    controller: str
    settings: dict[str, Any]
    overrides: dict[str, Any]


def stated(label: str, prefill_tp: int, prefills: int, decode_tp: int, decodes: int) -> Reference:
    """A placement written down, at the top clock."""
    instances = [
        {"phase": "prefill", "tp": prefill_tp, "count": prefills},
        {"phase": "decode", "tp": decode_tp, "count": decodes},
    ]
    return Reference(label, "max-clock", {"planner": "given", "instances": instances}, {})


def references(scenario: str) -> list[Reference]:
    """The references, the planned one first."""
    grid_top_mhz = load_scenario(scenario).clocks_mhz[-1]
    return [
        Reference("DistServe", "distserve", {}, {}),
        Reference(f"DistServe at {grid_top_mhz} MHz", "distserve", {}, {"top_clock_mhz": grid_top_mhz}),
        stated("3 × TP2 prefill, 3 × TP2 decode", 2, 3, 2, 3),
        stated("3 × TP2 prefill, 2 × TP4 decode", 2, 3, 4, 2),
    ]


def energy_j(outcomes: list[RunOutcome]) -> NDArray[np.float64]:
    """Joules per seed and phase."""
    return np.array([[float(outcome.row[f"{phase}_energy_j"]) for phase in PHASES] for outcome in outcomes])


def p99_ms(outcomes: list[RunOutcome]) -> tuple[float, float]:
    """P99 of TTFT and TPOT over the pooled requests."""
    ttft, tpot = (np.concatenate([getattr(o, name) for o in outcomes]) for name in ("ttft_s", "tpot_s"))
    return 1e3 * float(np.quantile(ttft, 0.99)), 1e3 * float(np.nanquantile(tpot, 0.99))


def percent(values: NDArray[np.float64]) -> str:
    """Mean with its 95 % interval."""
    interval = mean_interval(100.0 * values)
    return f"{interval.value:+.1f} ± {interval.high - interval.value:.1f} %"


def main(scenario: str = "paper-67", seeds: int = 10, workers: int = 2) -> None:
    """Print the table.

    Args:
        scenario: whose workload, SLO and cluster.
        seeds: traffic seeds, counted from 0.
        workers: processes.
    """
    runs = [
        *references(scenario),
        Reference("place-only", "place-only", {}, {}),
        Reference("BiScale", "biscale", {}, {}),
    ]
    jobs = [
        RunJob(
            scenario=scenario,
            controller=one.controller,
            seed=seed,
            controller_settings=one.settings,
            overrides=one.overrides,
        )
        for one in runs
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(workers) as pool:
        outcomes: Iterator[RunOutcome] = iter(list(track(pool.map(run, jobs), total=len(jobs), description="runs")))
    by_run = {one.label: [next(outcomes) for _ in range(seeds)] for one in runs}
    table = Table(
        "against", "P99 TTFT / TPOT ms", *(f"{name} {phase}" for name in ("place-only", "BiScale") for phase in PHASES)
    )
    for one in references(scenario):
        base = energy_j(by_run[one.label])
        ttft_ms, tpot_ms = p99_ms(by_run[one.label])
        savings = [
            percent(energy_j(by_run[name])[:, column] / base[:, column] - 1.0)
            for name in ("place-only", "BiScale")
            for column in range(len(PHASES))
        ]
        table.add_row(one.label, f"{ttft_ms:.0f} / {tpot_ms:.1f}", *savings)
    Console(width=140).print(table)


if __name__ == "__main__":
    tyro.cli(main)
