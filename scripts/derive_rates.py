"""Derive a scenario's rate: a share of the highest mean rate at which DistServe keeps the SLO on the validation split.

    python scripts/derive_rates.py --scenario paper-67 --share 0.67

A rate is kept where, pooled over the seeds, P99 TTFT and P99 TPOT lie within the SLO; requests that never finish are
infinitely late. Rates are scanned upward on a coarse grid, then between the highest kept one and its neighbour. Nothing
here looks at the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from biscale_gym.config import parsed_overrides
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import load_scenario


@dataclass(frozen=True)
class Kept:
    """What DistServe did at one rate, pooled over seeds."""

    rate_rps: float
    ttft_p99_s: float
    tpot_p99_s: float
    gpus: float
    placement: str
    kept: bool


def judge(scenario: str, overrides: dict[str, Any], rate_rps: float, seeds: int) -> Kept:
    """DistServe at one rate on the validation split."""
    slo = load_scenario(scenario, overrides).slo
    outcomes = [
        run(
            RunJob(
                scenario=scenario,
                controller="distserve",
                seed=seed,
                rate_rps=rate_rps,
                split="validation",
                overrides=overrides,
            )
        )
        for seed in range(seeds)
    ]
    missing = sum(int(outcome.row["requests_judged"]) - len(outcome.ttft_s) for outcome in outcomes)
    unfinished = sum(int(outcome.row["requests_in_flight"]) for outcome in outcomes)
    ttft = np.concatenate([*(outcome.ttft_s for outcome in outcomes), np.full(missing, np.inf)])
    tpot = np.concatenate([*(outcome.tpot_s for outcome in outcomes), np.full(unfinished, np.inf)])
    ttft_p99, tpot_p99 = (float(np.percentile(values, 99.0, method="lower")) for values in (ttft, tpot))
    return Kept(
        rate_rps,
        ttft_p99,
        tpot_p99,
        float(np.mean([float(outcome.row["gpus_used"]) for outcome in outcomes])),
        outcomes[0].provenance["placements"][0][1],
        ttft_p99 <= slo.ttft_s and tpot_p99 <= slo.tpot_s,
    )


def main(
    scenario: str = "paper-67",
    share: float = 0.67,
    lowest: float = 20.0,
    highest: float = 120.0,
    step: float = 5.0,
    fine: float = 1.0,
    seeds: int = 3,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),  # as biscale-gym compare names it
) -> None:
    """Print every rate judged, the highest kept one, and ``share`` of it.

    Args:
        scenario: Preset whose cluster, workload and SLO are used.
        share: Part of the capacity that becomes the scenario's rate.
        lowest: First rate of the scan, requests/s.
        highest: Last rate of the scan.
        step: Coarse step.
        fine: Fine step.
        seeds: Validation seeds that are pooled.
        set: A scenario setting to replace, as KEY=VALUE; may be given several times.
    """
    overrides = parsed_overrides(set)
    name = " ".join([scenario, *set])
    judged = [judge(scenario, overrides, float(rate), seeds) for rate in np.arange(lowest, highest + step / 2, step)]
    best = max((result.rate_rps for result in judged if result.kept), default=None)
    if best is not None:
        judged += [
            judge(scenario, overrides, float(rate), seeds)
            for rate in np.arange(best + fine, best + step - fine / 2, fine)
        ]
        best = max(result.rate_rps for result in judged if result.kept)
    table = Table("requests/s", "P99 TTFT s", "P99 TPOT s", "GPUs", "placement", "kept", title=f"DistServe on {name}")
    for result in sorted(judged, key=lambda result: result.rate_rps):
        figures = (result.rate_rps, result.ttft_p99_s, result.tpot_p99_s, result.gpus)
        table.add_row(*(f"{figure:.3g}" for figure in figures), result.placement, "yes" if result.kept else "no")
    Console().print(table)
    if best is None:
        raise SystemExit(f"DistServe keeps the SLO of {name} at no rate from {lowest} to {highest} requests/s")
    print(f"highest rate kept: {best:.4g} requests/s; {share:g} of it: {share * best:.4g}")


if __name__ == "__main__":
    tyro.cli(main)
