"""What BiScale loses when its predictions are wrong.

    python scripts/prediction_error.py

For each size of error, several draws of a predicted profile (biscale_gym.profiles.prediction) plan and control the same
traffic; the cluster stays the true one. Prints the prediction's own errors, and joules and SLO attainment beside those
of a controller that knows the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from biscale_gym.control.rollout import RunJob, RunOutcome, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.profiles import load_profile
from biscale_gym.profiles.prediction import PredictionSettings, predicted_profile, prediction_errors

CONTROLLERS = ("place-only", "biscale")
COLUMNS = (
    "asked error",
    "latency error prefill / decode",
    "controller",
    "total MJ",
    "against the truth known",
    "within both",
    "P99 TTFT, TPOT ms",
)


@dataclass(frozen=True)
class Level:
    """One size of error: None is the truth."""

    error: float | None

    def label(self) -> str:
        """As the table names it."""
        return "truth known" if self.error is None else f"{self.error:.0%}"

    def settings(self, draw: int) -> dict[str, Any] | None:
        """The scenario's ``prediction``."""
        return None if self.error is None else {"error": self.error, "seed": draw}


def mean_errors(scenario: str, level: Level, draws: int) -> str:
    """Mean latency errors of the predicted profiles over TP degrees and draws, per phase."""
    settings = load_scenario(scenario)
    cluster = settings.cluster
    truth = load_profile(cluster.hardware, cluster.model, cluster.precision)
    clocks = sorted({*settings.clocks_mhz, settings.top_clock_mhz})
    errors = [
        error
        for draw in range(draws)
        for error in prediction_errors(
            truth, predicted_profile(truth, PredictionSettings.model_validate(level.settings(draw)), clocks)
        )
    ]
    return " / ".join(
        f"{np.mean([e.latency_percent for e in errors if e.phase == phase]):.1f} %" for phase in ("prefill", "decode")
    )


def main(
    scenario: str = "paper-67",
    errors: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3),
    draws: int = 3,
    seeds: int = 3,
) -> None:
    """Print the table.

    Args:
        scenario: whose workload, SLO and cluster.
        errors: mean absolute relative errors of predicted latency, beside what the fit itself has.
        draws: predicted profiles per error.
        seeds: traffic seeds per profile, counted from 0.
    """
    levels = [Level(None), *map(Level, errors)]
    outcomes: dict[tuple[Level, str], list[RunOutcome]] = {}
    planned = [
        (level, controller, draw, seed)
        for level in levels
        for draw in range(1 if level.error is None else draws)
        for controller in CONTROLLERS
        for seed in range(seeds)
    ]
    for level, controller, draw, seed in track(planned, description="runs"):
        prediction = level.settings(draw)
        job = RunJob(
            scenario=scenario,
            controller=controller,
            seed=seed,
            overrides={} if prediction is None else {"prediction": prediction},
        )
        outcomes.setdefault((level, controller), []).append(run(job))
    table = Table(*COLUMNS)
    for level in levels:
        shown = "–" if level.error is None else mean_errors(scenario, level, draws)
        for controller in CONTROLLERS:
            own, exact = outcomes[level, controller], outcomes[levels[0], controller]
            joules = np.mean([float(one.row["total_energy_j"]) for one in own])
            change = joules / np.mean([float(one.row["total_energy_j"]) for one in exact]) - 1.0
            within = np.mean([float(one.row["joint_attainment"]) for one in own])
            p99_ms = [
                1e3 * float(np.nanquantile(np.concatenate([getattr(one, name) for one in own]), 0.99))
                for name in ("ttft_s", "tpot_s")
            ]
            table.add_row(
                level.label(),
                shown,
                controller,
                f"{joules / 1e6:.3f}",
                f"{100 * change:+.1f} %",
                f"{100 * within:.2f} %",
                f"{p99_ms[0]:.0f}, {p99_ms[1]:.1f}",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    tyro.cli(main)
