"""What BiScale's decode rules cost and keep.

    python scripts/decode_variants.py --seeds 5

Runs BiScale with each variant of its decode rule on the same traffic. Prints decode joules with their change against
`paper` (means over traffic seeds, Student's 95 % interval), P50 and P99 of TPOT over all requests, the share of
requests later than the SLO, and how often a decode instance that runs something is seen at the lowest clock.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agents.settings import DecodeSlackSettings
from biscale_gym.control.rollout import RunJob, RunOutcome, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.evaluation.statistics import Floats, mean_interval

VARIANTS: tuple[str, ...] = get_args(DecodeSlackSettings.model_fields["variant"].annotation)
COLUMNS = ("scenario", "variant", "decode MJ", "against paper", "P50 TPOT ms", "P99 TPOT ms", "late", "at lowest clock")


def outcomes(scenario: str, variant: str, seeds: int) -> list[RunOutcome]:
    """A run per seed."""
    settings = {"decode": {"variant": variant}}
    jobs = [
        RunJob(scenario=scenario, controller="biscale", seed=seed, controller_settings=settings)
        for seed in range(seeds)
    ]
    return [run(job) for job in jobs]


def decode_mj(runs: list[RunOutcome]) -> Floats:
    """Decode megajoules of each run."""
    return 1e-6 * np.array([float(one.row["decode_energy_j"]) for one in runs])


def at_lowest_clock(run: RunOutcome, lowest_mhz: int) -> float:
    """Share of the timeline's samples of decode instances with a batch that are at the controllers' lowest clock."""
    timeline = run.timeline
    decode = np.array([label.startswith("decode") for label in timeline["label"]])
    clock_mhz = timeline["clock_mhz"][:, decode][timeline["batch"][:, decode] > 0]
    return float(np.mean(clock_mhz == lowest_mhz))


def shown(values: Floats, form: str) -> str:
    """Mean and half the width of its interval."""
    interval = mean_interval(values)
    return f"{interval.value:{form}} ± {interval.high - interval.value:{form.lstrip('+')}}"


def main(scenario: str = "paper-67,paper-85,tight", seeds: int = 5) -> None:
    """Print a table.

    Args:
        scenario: comma-separated presets.
        seeds: traffic seeds, counted from 0.
    """
    cells = [(name, variant) for name in scenario.split(",") for variant in VARIANTS]
    runs = {cell: outcomes(*cell, seeds) for cell in track(cells, console=Console(stderr=True), transient=True)}
    table = Table(*COLUMNS)
    for name, variant in cells:
        these = runs[name, variant]
        mj, paper_mj = decode_mj(these), decode_mj(runs[name, VARIANTS[0]])
        tpot_s = np.concatenate([one.tpot_s for one in these])
        table.add_row(
            name,
            variant,
            shown(mj, ".3f"),
            "" if variant == VARIANTS[0] else shown(100.0 * (mj / paper_mj - 1.0), "+.1f") + " %",
            f"{1e3 * np.quantile(tpot_s, 0.5):.1f}",
            f"{1e3 * np.quantile(tpot_s, 0.99):.1f}",
            f"{100.0 * np.mean(tpot_s > float(these[0].row['slo_tpot_s'])):.2f} %",
            f"{100.0 * np.mean([at_lowest_clock(one, load_scenario(name).clocks_mhz[0]) for one in these]):.1f} %",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    tyro.cli(main)
