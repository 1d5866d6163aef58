"""Tune BiScale's own settings on the validation split, with a stated budget; write them as a preset.

    python scripts/tune_biscale.py --trials 40 --seeds 3 --write configs/agents/biscale-tuned.yaml

A trial is one choice of settings, run on every scenario and traffic seed of the validation split. Among the trials
whose joint attainment is, on every scenario, at least that of BiScale's defaults on the same requests, the one of least
total energy wins: the mean over scenarios and seeds of its joules over the defaults'. The defaults are trial 0, so the
tuned settings are never worse than they are on what they were tuned on. Optuna's TPE proposes the trials from a seed;
runs are recorded under --out, so an interrupted search goes on as if it had not been.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from agents.settings import BiScaleSettings, load_settings
from biscale_gym.config import ConfigError
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.evaluation.faults import EvaluationError, RecordsError
from biscale_gym.evaluation.matrix import Runner, fault_messages, run_matrix
from biscale_gym.evaluation.records import RecordStore, replace_file
from biscale_gym.evaluation.statistics import Floats

if TYPE_CHECKING:
    import optuna

SETTLED = 1e-9
"""Attainments this close are the same: they are shares of the same requests."""
PENALTY = 10.0
"""What a missing unit of attainment adds to the value of a trial that Optuna is told; such a trial never wins."""
IDLE_CLOCKS_MHZ = (750, 885, 1110, 1470)


def proposed(trial: optuna.Trial) -> dict[str, Any]:
    """The settings of a trial: what the paper leaves open or a careful operator would turn.

    Class tables depend on none of them, so no trial measures new ones.
    """
    kv_high = trial.suggest_float("decode.kv_high", 0.75, 0.97, step=0.01)
    kv_gap = trial.suggest_float("decode.kv_gap", 0.01, 0.25, step=0.01)
    forecast = trial.suggest_categorical("tier1.forecast", ("last-window", "peak", "ewma"))
    tier1: dict[str, Any] = {
        "margin": trial.suggest_float("tier1.margin", 0.0, 0.3, step=0.01),
        "keep_within": trial.suggest_float("tier1.keep_within", 0.0, 0.2, step=0.01),
        "count_unallocated": trial.suggest_categorical("tier1.count_unallocated", (False, True)),
        "forecast": forecast,
    }
    if forecast == "ewma":
        tier1["ewma_weight"] = trial.suggest_float("tier1.ewma_weight", 0.2, 0.9, step=0.05)
    if forecast == "peak":
        tier1["peak_s"] = trial.suggest_float("tier1.peak_s", 30.0, 150.0, step=30.0)
    settings = {
        "tier1": tier1,
        "prefill": {
            "headroom": trial.suggest_float("prefill.headroom", 0.8, 1.0, step=0.01),
            "idle_clock_mhz": trial.suggest_categorical("prefill.idle_clock_mhz", IDLE_CLOCKS_MHZ),
        },
        "decode": {
            "headroom": trial.suggest_float("decode.headroom", 0.8, 1.0, step=0.01),
            "kv_high": kv_high,
            "kv_low": kv_high - kv_gap,
            "idle_clock_mhz": trial.suggest_categorical("decode.idle_clock_mhz", IDLE_CLOCKS_MHZ),
        },
    }
    return {group: {name: _short(value) for name, value in own.items()} for group, own in settings.items()}


def defaults() -> dict[str, Any]:
    """BiScale's defaults as parameters of ``proposed``."""
    own = BiScaleSettings()
    return {
        "decode.kv_high": own.decode.kv_high,
        "decode.kv_gap": round(own.decode.kv_high - own.decode.kv_low, 2),
        "tier1.margin": own.tier1.margin,
        "tier1.keep_within": own.tier1.keep_within,
        "tier1.count_unallocated": own.tier1.count_unallocated,
        "tier1.forecast": own.tier1.forecast,
        "prefill.headroom": own.prefill.headroom,
        "prefill.idle_clock_mhz": own.prefill.idle_clock_mhz,
        "decode.headroom": own.decode.headroom,
        "decode.idle_clock_mhz": own.decode.idle_clock_mhz,
    }


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


@dataclass(frozen=True)
class Trial:
    """A choice of settings and what it gave.

    Attributes:
        number: 0 is BiScale's defaults.
        settings: by group.
        energy_j, attainment: total joules and joint attainment, float64[scenarios, seeds].
    """

    number: int
    settings: dict[str, Any]
    energy_j: Floats
    attainment: Floats

    def ratio(self, base: Trial) -> float:
        """Mean of total joules over the defaults'."""
        return float(np.mean(self.energy_j / base.energy_j))

    def shortfall(self, base: Trial) -> float:
        """By how much attainment is below the defaults', on the scenario where that is most; 0 if nowhere."""
        return max(0.0, float(np.max(np.mean(base.attainment - self.attainment, axis=1))))

    def keeps(self, base: Trial) -> bool:
        """Whether attainment is at least the defaults' on every scenario."""
        return self.shortfall(base) <= SETTLED

    def value(self, base: Trial) -> float:
        """What Optuna minimises; whatever falls short is worse than the defaults."""
        return self.ratio(base) if self.keeps(base) else max(1.0, self.ratio(base)) + PENALTY * self.shortfall(base)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial of least energy among those that keep the defaults' attainment; the first of equals."""
    base = trials[0]
    return min((trial for trial in trials if trial.keeps(base)), key=lambda trial: trial.ratio(base))


def search(
    evaluate: Callable[[int, dict[str, Any]], Trial],
    count: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[Trial]:
    """``count`` trials besides the defaults, which are the first.

    Args:
        evaluate: from a number and settings to the trial.
        count: how many are proposed.
        seed: of Optuna's proposals.
        say: told every trial's line.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=False))
    study.enqueue_trial(defaults())
    trials: list[Trial] = []
    for number in range(count + 1):
        asked = study.ask()
        trials.append(evaluate(number, proposed(asked)))
        base = trials[0]
        study.tell(asked, trials[-1].value(base))
        kept = "" if trials[-1].keeps(base) else f", attainment {100 * trials[-1].shortfall(base):.3f} points short"
        say(f"trial {number}: {100 * (trials[-1].ratio(base) - 1):+.2f} %{kept}")
    return trials


def evaluator(
    scenarios: Sequence[str], seeds: int, store: RecordStore, workers: int, runner: Runner, messages: Console
) -> Callable[[int, dict[str, Any]], Trial]:
    """Runs a trial's settings on the validation split.

    Raises (the returned function):
        EvaluationError: a run failed or was interrupted.
    """

    def evaluate(number: int, settings: dict[str, Any]) -> Trial:
        jobs = [
            RunJob(scenario=scenario, controller="biscale", controller_settings=settings, seed=seed, split="validation")
            for scenario in scenarios
            for seed in range(seeds)
        ]
        result = run_matrix(jobs, store, workers, runner, messages)
        if result.interrupted:
            raise KeyboardInterrupt
        if result.faults:
            raise EvaluationError("; ".join(fault_messages(result.faults)))

        def column(metric: str) -> Floats:
            return np.array([float(record.row[metric]) for record in result.records]).reshape(len(scenarios), seeds)

        return Trial(number, settings, column("total_energy_j"), column("joint_attainment"))

    return evaluate


def preset(best: Trial, told: str) -> str:
    """The settings as a preset of configs/agents, with how they were found."""
    settings = load_settings(BiScaleSettings, "biscale", best.settings).model_dump(mode="json")
    comment = "".join(f"# {line}\n" for line in told.splitlines())
    return comment + yaml.safe_dump(settings, sort_keys=False)


def account(trials: Sequence[Trial], scenarios: Sequence[str], command: str) -> str:
    """How the best trial was found, in a few lines."""
    base, best = trials[0], best_of(trials)
    seeds = base.energy_j.shape[1]
    runs = len(trials) * base.energy_j.size
    hours = sum(load_scenario(name).duration_s for name in scenarios) * seeds * len(trials) / 3600.0
    lines = [
        "BiScale with settings tuned on the validation split, for docs/leaderboard.md:",
        f"    {command}",
        f"Budget: {len(trials)} trials (0 is the defaults) x {len(scenarios)} scenarios x {seeds} traffic seeds"
        f" = {runs} runs, {hours:.0f} simulated hours. Optuna's TPE; least total energy",
        "among the trials whose joint attainment is on every scenario at least the defaults'.",
        f"Trial {best.number}: {100 * (best.ratio(base) - 1):+.2f} % total energy against the defaults, on validation:",
    ]
    for number, name in enumerate(scenarios):
        ratio = float(np.mean(best.energy_j[number] / base.energy_j[number]))
        lines.append(
            f"    {name}: {100 * (ratio - 1):+.2f} %, within both SLOs {100 * best.attainment[number].mean():.3f} %"
            f" (defaults {100 * base.attainment[number].mean():.3f} %)"
        )
    return "\n".join(lines)


def main(
    trials: int = 40,
    seeds: int = 3,
    scenario: str = "paper-67,paper-85,tight",
    seed: int = 0,
    out: Path = Path("results/tuning"),
    workers: int = 2,
    write: Path | None = None,
) -> None:
    """Search and print what was found.

    Args:
        trials: Proposals besides the defaults.
        seeds: Traffic seeds of the validation split, counted from 0.
        scenario: Comma-separated presets, each as important as the others.
        seed: Of Optuna's proposals.
        out: Folder of the records; a run that it holds is not run again.
        workers: Processes.
        write: File of the preset. A new preset is part of every run's address: records made before it are run again.
    """
    if trials < 1 or seeds < 1:
        raise SystemExit(f"tune_biscale: --trials {trials} --seeds {seeds}: at least 1 of each is needed")
    scenarios, messages = [name.strip() for name in scenario.split(",") if name.strip()], Console(stderr=True)
    evaluate = evaluator(scenarios, seeds, RecordStore(out), workers, run, messages)
    found = search(evaluate, trials, seed, lambda line: messages.print(line, highlight=False))
    told = account(found, scenarios, f"python scripts/tune_biscale.py {shlex.join(sys.argv[1:])}".rstrip())
    best = best_of(found)
    table = Table("setting", "default", "tuned")
    default = load_settings(BiScaleSettings, "biscale", {}).model_dump()
    for group, own in best.settings.items():
        for name, value in own.items():
            table.add_row(f"{group}.{name}", str(default[group][name]), str(value))
    Console().print(table)
    print(told)
    if write is not None:
        replace_file(write, preset(best, told))


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ConfigError, EvaluationError, RecordsError) as error:
        raise SystemExit(f"tune_biscale: {error}") from error
