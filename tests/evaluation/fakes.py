"""A runner that answers at once: a few seeded numbers in place of a simulated cluster."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from biscale_gym.config import ConfigError
from biscale_gym.control.rollout import RunJob, RunOutcome

SLO = {"ttft_s": 0.6, "tpot_s": 0.1}
NOTES: dict[str, list[str]] = {
    "distserve": [],
    "place-only": [],
    "biscale": ["window 3: least violation taken"],
    "reckless": [],
    "max-clock": [],
}
SAVINGS = {"distserve": 1.0, "place-only": 0.75, "biscale": 0.65, "reckless": 0.5, "max-clock": 1.25}


def outcome_of(job: RunJob, requests: int = 400, samples: int = 50) -> RunOutcome:
    """What ``job`` gives: energies scaled by the controller, latencies that only ``reckless`` lets break the SLO."""
    rng = np.random.default_rng(job.seed)
    factor = SAVINGS[job.controller]
    prefill, decode, idle, switching, unallocated = factor * rng.normal(1.0, 0.01, 5) * [2e6, 4e6, 5e5, 2e4, 3e5]
    slower = 6.0 if job.controller == "reckless" else 1.0 / np.sqrt(factor)
    ttft_s = slower * rng.lognormal(-2.2, 0.45, requests)
    tpot_s = rng.lognormal(-3.3, 0.2, requests) / np.sqrt(factor)
    tails = {
        f"{name}_p{q}_s": float(np.quantile(values, q / 100))
        for name, values in (("ttft", ttft_s), ("tpot", tpot_s))
        for q in (50, 90, 99)
    }
    row: dict[str, float | int | str] = {
        "scenario": job.scenario_name,
        "controller": job.controller_name,
        "seed": job.seed,
        "split": job.played_split,
        "prefill_energy_j": float(prefill),
        "decode_energy_j": float(decode),
        "idle_energy_j": float(idle),
        "switching_energy_j": float(switching),
        "loading_energy_j": float(0.5 * switching),
        "unallocated_energy_j": float(unallocated),
        "total_energy_j": float(prefill + decode + unallocated),
        "prefill_j_per_token": float(prefill / 1e6),
        "decode_j_per_token": float(decode / 1e6),
        **tails,
        "joint_attainment": float(np.mean((ttft_s <= SLO["ttft_s"]) & (tpot_s <= SLO["tpot_s"]))),
        "ttft_attainment": float(np.mean(ttft_s <= SLO["ttft_s"])),
        "tpot_attainment": float(np.mean(tpot_s <= SLO["tpot_s"])),
        "requests_judged": requests,
        "requests_arrived": requests,
        "requests_finished": requests,
        "requests_in_flight": 0,
        "requests_rejected": 0,
        "gpus_used": 16.0,
        "slo_ttft_s": SLO["ttft_s"],
        "slo_tpot_s": SLO["tpot_s"],
    }
    return RunOutcome(
        row=row,
        action_digest=f"{job.controller}-{job.seed}",
        provenance={
            "config_hash": "c0ffee",
            "trace_name": "fake",
            "trace_hash": "beef",
            "placements": [[0.0, "3×P TP2@1110 + 2×D TP4@930"]],
            "notes": NOTES[job.controller],
        },
        timeline=_timeline(rng, samples),
        windows=_windows(factor, float(prefill), float(decode)),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def _timeline(rng: np.random.Generator, samples: int) -> dict[str, np.ndarray]:
    labels = ["prefill 0 TP2", "prefill 1 TP2", "prefill 2 TP4", "decode 3 TP4", "decode 4 TP4"]
    shape = (samples, len(labels))
    walk = np.abs(np.cumsum(rng.normal(0.0, 1.0, shape), axis=0))
    return {
        "time_s": np.linspace(0.0, 1800.0, samples),
        "clock_mhz": rng.choice([750.0, 1110.0, 1470.0, 1830.0], shape),
        "queue": np.floor(walk),
        "batch": np.floor(4 * walk),
        "power_w": 400.0 + 30.0 * walk,
        "label": np.array(labels),
    }


def _windows(factor: float, prefill_j: float, decode_j: float) -> dict[str, np.ndarray]:
    """Two windows; ``reckless`` (the least factor) breaks TTFT in the second."""
    late_s = 0.9 if factor == SAVINGS["reckless"] else 0.5
    return {
        "prefill_energy_j": prefill_j * np.array([0.25, 0.75]),
        "decode_energy_j": decode_j * np.array([0.5, 0.5]),
        "start_s": np.array([30.0, 900.0]),
        "end_s": np.array([900.0, 1800.0]),
        "prefill_j_per_token": factor * np.array([2.0, 4.0]),
        "decode_j_per_token": factor * np.array([6.0, 8.0]),
        "ttft_p99_s": np.array([0.4, late_s]),
        "tpot_p99_s": np.array([0.05, 0.09]),
        "ttft_attainment": np.array([1.0, 0.995]),
        "tpot_attainment": np.array([1.0, 1.0]),
    }


def run(job: RunJob) -> RunOutcome:
    """Answers, or does what the job's overrides ask for; leaves a mark per run in ``mark_in``."""
    ask = job.overrides
    if "mark_in" in ask:
        (Path(ask["mark_in"]) / f"{job.controller}-{job.seed}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if ask.get("fail") == job.controller:
        raise ConfigError("no such clock 123; nearest 135")
    if ask.get("break") == job.controller:
        raise ZeroDivisionError("a bug")
    if ask.get("die") == job.controller:
        os._exit(9)
    if ask.get("hang") == job.controller:
        child = subprocess.Popen(["sleep", "60"])
        Path(ask["child_in"]).write_text(str(child.pid))
        time.sleep(60.0)
    time.sleep(ask.get("pause_s", 0.0))
    return outcome_of(job)


def refuse(job: RunJob) -> RunOutcome:
    """Fails as a broken trace does, whatever the job."""
    raise ConfigError("trace.csv:3: lengths must be positive")


def run_otherwise(job: RunJob) -> RunOutcome:
    """Answers with another energy than ``run``."""
    outcome = outcome_of(job)
    return replace(outcome, row={**outcome.row, "total_energy_j": 1.0})


def run_slowly(job: RunJob) -> RunOutcome:
    """Takes a while."""
    time.sleep(0.3)
    return outcome_of(job)
