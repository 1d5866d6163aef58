"""How far the model is from live workers once it has been calibrated on them.

    .venv-live/bin/python scripts/sim_to_real.py --json -

Profiles the CPU workers, replays one seeded trace live, first with clocks held at the top, then under BiScale's tier 2
with emulated clocks, and replays it in the modelled cluster under the calibrated profile. Latencies of the workers are
measured; clocks, power and so joules are those of an emulated card on both sides. Rounds of the profile lie before,
between and after the live runs, so that they meet the same machine. Prints the errors; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from rich.table import Table

from biscale_gym.calibration.calibrate import Calibration, calibrate
from biscale_gym.calibration.report import table as table_of_errors
from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.placement import written_placement
from biscale_gym.config import load_preset
from biscale_gym.control.controllers import PlanContext, make_controller
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.simulate import StatedPlacement
from biscale_gym.control.workload import Requests
from biscale_gym.evaluation.faults import is_user_error, one_line
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Pool
from biscale_gym.live.profile_points import SweepSettings
from biscale_gym.live.profiling import give_cores, run_sweep
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Outcome, Replay
from biscale_gym.live.settings import LiveSettings
from biscale_gym.metrics import tpot_s, ttft_s
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

FloatArray = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 99)
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Side:
    """One of the two: live or modelled.

    Attributes:
        ttft_ms, tpot_ms: by percentile, of finished requests.
        requests: finished.
        iterations: by phase.
        energy_j: of all instances, modelled on both sides.
        seconds: that the joules are counted over.
    """

    ttft_ms: dict[int, float]
    tpot_ms: dict[int, float]
    requests: int
    iterations: dict[str, int]
    energy_j: float
    seconds: float


def latencies_ms(ledger: RequestLedger, overhead_s: float) -> tuple[dict[int, float], dict[int, float]]:
    """Percentiles of TTFT and TPOT of the finished requests."""

    def percentiles(values_s: FloatArray) -> dict[int, float]:
        kept = values_s[ledger.finished & np.isfinite(values_s)]
        return {percent: 1e3 * float(np.percentile(kept, percent)) for percent in PERCENTILES}

    return percentiles(ttft_s(ledger, overhead_s)), percentiles(tpot_s(ledger))


def live_side(outcome: Outcome, folder: Path) -> Side:
    """What a live run measured."""
    ttft_ms, tpot_ms = latencies_ms(outcome.requests, 0.0)
    iterations = {phase: len(records_of(folder, phase)) for phase in PHASES}
    finished = int(outcome.requests.finished.sum())
    return Side(ttft_ms, tpot_ms, finished, iterations, outcome.energy_j, outcome.end_s)


def records_of(folder: Path, phase: str) -> npt.NDArray[np.void]:
    """The records of a phase's workers."""
    return np.concatenate([read_records(path) for path in sorted(folder.glob(f"{phase}-*.csv"))])


def modelled_scenario(scenario_name: str, duration_s: float, calibration: Calibration) -> ScenarioSettings:
    """The scenario on the calibrated cluster; an emulated clock switches in the same time whenever it does."""
    given = load_scenario(scenario_name, {"duration_s": duration_s})
    switching = given.cluster.switching_settings().model_copy(update={"sigma": 0.0})
    changes = {f"cluster.{name}": value for name, value in calibration.cluster.items()}
    changes |= {
        "duration_s": duration_s,
        "warmup_s": 0.0,
        "cluster.switching": switching.model_dump(),
        "cluster.decode_precision": None,
        "window_s": duration_s,
    }
    return load_scenario(scenario_name, changes)


def model_side(
    scenario: ScenarioSettings, controller: str, trace: Trace, training: Trace, seed: int, believed: Profile
) -> Side:
    """The same trace under the same policies in the modelled cluster.

    Args:
        scenario: calibrated.
        controller: whose clock policies run on the scenario's placement.
        trace: as it was replayed live.
        training: what policies may learn from.
        seed: of the cluster.
        believed: the profile that the live policies believed in.
    """
    profile = scenario.cluster.profile()
    placement = written_placement(scenario.placement, scenario.top_clock_mhz)
    stated = StatedPlacement(placement, controller, make_controller(controller).policies)
    requests = Requests(trace, training, scenario.rate_rps, scenario.duration_s)
    rollout = Rollout(stated, scenario, requests, seed, profile, believed=believed)
    counted = rollout.run(count_drain=True)
    ledger = rollout.ledger()
    ttft_ms, tpot_ms = latencies_ms(ledger, 1e-3 * scenario.cluster.serving_overhead_ms)
    energy = counted.energy
    iterations = {phase: int(energy.iterations[energy.is_prefill == (phase == "prefill")].sum()) for phase in PHASES}
    joules = float(energy.energy_j.sum() + energy.unallocated_j)
    return Side(ttft_ms, tpot_ms, int(ledger.finished.sum()), iterations, joules, counted.seconds)


def iteration_errors(folder: Path, scenario: ScenarioSettings) -> dict[str, dict[str, float]]:
    """By phase: live iterations against the calibrated profile's latency for the same batch at the same clock.

    Only iterations that follow another one at once: of those the time from end to end is known, as the profile has it.
    ``bias_percent`` is the sum's error, ``median_percent`` the median's.
    """
    profile = scenario.cluster.profile()
    found = {}
    for phase in PHASES:
        tp = next(group.tp for group in scenario.placement if group.phase == phase)
        records = records_of(folder, phase)
        period_ms = 1e3 * np.diff(records["end_s"], prepend=np.nan)
        duration_ms = 1e3 * records["duration_s"]
        back_to_back = period_ms - duration_ms < 2.0
        told = np.empty(len(records))
        for clock in np.unique(records["clock_mhz"]):
            here = records["clock_mhz"] == clock
            work = (records[name][here] for name in ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq"))
            told[here] = profile.latency_ms(tp, int(clock), *work)
        kept = back_to_back if back_to_back.any() else np.ones(len(records), bool)
        real_ms = np.where(back_to_back, period_ms, duration_ms)[kept]
        found[phase] = {
            "iterations": int(kept.sum()),
            "bias_percent": 100 * float(told[kept].sum() / real_ms.sum() - 1),
            "median_percent": 100 * float(np.median(told[kept] / real_ms) - 1),
        }
    return found


def percent(modelled: float, live: float) -> float:
    """Error of the model."""
    return 100.0 * (modelled / live - 1.0)


def compared(live: Side, model: Side) -> dict[str, Any]:
    """Both sides and the model's error in percent, by figure."""

    def row(one: float, other: float) -> dict[str, float]:
        return {"live": round(one, 4), "model": round(other, 4), "error_percent": round(percent(other, one), 2)}

    figures: dict[str, Any] = {}
    for name in ("ttft_ms", "tpot_ms"):
        ours, theirs = getattr(live, name), getattr(model, name)
        figures[name] = {f"p{at}": row(ours[at], theirs[at]) for at in PERCENTILES}
    figures["iterations"] = {phase: row(live.iterations[phase], model.iterations[phase]) for phase in PHASES}
    figures["modelled_energy_j"] = row(live.energy_j, model.energy_j)
    figures["mean_power_w"] = row(live.energy_j / live.seconds, model.energy_j / model.seconds)
    figures["requests"] = {"live": live.requests, "model": model.requests}
    return figures


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """Figures of all controllers."""
    made = Table(title="model against live workers")
    for column in ("controller", "figure", "live", "model", "error %"):
        made.add_column(column, justify="left" if column in ("controller", "figure") else "right")
    for controller, found in figures.items():
        flat = [
            (f"{name} {at}", values)
            for name in ("ttft_ms", "tpot_ms", "iterations")
            for at, values in found[name].items()
        ]
        flat += [(name, found[name]) for name in ("modelled_energy_j", "mean_power_w")]
        for name, values in flat:
            made.add_row(
                controller, name, f"{values['live']:,.1f}", f"{values['model']:,.1f}", f"{values['error_percent']:+.1f}"
            )
    return made


def replayed(
    pool: Pool, trace: Trace, controller: str, context: PlanContext, believed: Profile, folder: Path, seed: int
) -> tuple[Outcome, list[float]]:
    """A live run under policies that believe in a calibrated profile, and the machine's load before and after."""
    before = os.getloadavg()[0]
    outcome = Replay(pool, trace, controller, replace(context, profile=believed), folder, seed).run()
    return outcome, [round(before, 2), round(os.getloadavg()[0], 2)]


def main(
    csv: Path | None = None,
    scenario: str = "live-smoke",
    workers: str = "cpu",
    sweep: str = "sim-to-real",
    controllers: str = "max-clock,biscale",
    duration_s: float = 75.0,
    seed: int = 0,
    form: str = "best",
    out: Path = Path("results/sim-to-real"),
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Profile, calibrate, replay live and in the model, compare.

    Args:
        csv: a profile to calibrate on in place of a new one.
        scenario: whose workload, SLOs and placement.
        workers: preset of live settings.
        sweep: preset of what a round of the profile measures; its least repeats are those of a round.
        controllers: whose clock policies run, one after another.
        duration_s: of the trace.
        seed: of the trace.
        form: of the calibrated profile.
        out: folder of profile, calibration and records.
        json_file: file for the figures; without it, or with -, they are the last line on standard output.
    """
    console = Console(stderr=json_file == "-", width=120)
    settings = load_scenario(scenario, {"duration_s": duration_s})
    live_settings = load_preset(LiveSettings, "live", workers)
    if live_settings.device.kind != "emulated":
        raise LiveError(
            f"{workers}: joules are compared with an emulated card's; these workers' would be measured ones"
        )
    points = load_preset(SweepSettings, "profiling", sweep)
    trace, context = prepared(settings, None, seed)
    names = [name.strip() for name in controllers.split(",")]
    path = out / "profile.csv" if csv is None else csv
    out.mkdir(parents=True, exist_ok=True)
    if csv is None:
        path.unlink(missing_ok=True)
    lives: dict[str, tuple[Outcome, list[float], Profile]] = {}

    with Pool(settings, live_settings, out) as pool:
        give_cores(pool)
        clocks_mhz = (min(settings.clocks_mhz), settings.top_clock_mhz)

        def profile_round(number: int) -> None:
            if csv is None:
                repeats = number * points.least_repeats
                upto = points.model_copy(update={"least_repeats": repeats, "most_repeats": repeats})
                run_sweep(pool, context, upto, clocks_mhz, path, seed + number, console)

        profile_round(1)
        for number, name in enumerate(names, start=1):
            so_far = calibrate(path, out / "calibration", form)
            believed = modelled_scenario(scenario, duration_s, so_far).cluster.profile()
            lives[name] = (*replayed(pool, trace, name, context, believed, out / name, seed), believed)
            profile_round(1 + number)

    calibration = calibrate(path, out / "calibration", form)
    modelled = modelled_scenario(scenario, duration_s, calibration)
    figures: dict[str, dict[str, Any]] = {}
    for name, (outcome, load, believed) in lives.items():
        live = live_side(outcome, out / name)
        model = model_side(modelled, name, trace, context.training, seed, believed)
        figures[name] = {
            **compared(live, model),
            "iteration_errors": iteration_errors(out / name, modelled),
            "client_lag_p99_ms": round(1e3 * float(np.nanpercentile(outcome.lag_s, 99)), 3),
            "load_average": load,
        }
    console.print(table_of_errors(calibration))
    console.print(table(figures))
    text = json.dumps(
        {
            "scenario": scenario,
            "seed": seed,
            "requests": len(trace),
            "form": calibration.form,
            "power": calibration.power,
            "fit_errors": [asdict(error) for error in calibration.errors],
            "controllers": figures,
        }
    )
    if json_file in (None, "-"):
        sys.stdout.write(text + "\n")
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except Exception as fault:
        if not is_user_error(fault):
            raise
        sys.exit(f"sim_to_real: {one_line(fault)}")
