"""A sweep run on this machine by Optuna, without a network and without an account.

Trials are asked for and told one at a time and kept in ``study.db``. What a trial proposes depends only on the sweep's
seed, the trial's number and the trials before it, so a sweep that was interrupted goes on as if it had not been; a
trial that was under way is taken up again with its settings, in its folder.
"""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biscale_gym.config import config_hash, nearest
from biscale_gym.evaluation.faults import is_user_error, one_line
from biscale_gym.sweeps.settings import Parameter, SweepError, SweepSettings

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

TrialFunction = Callable[[str, dict[str, Any], Path, str | None], Mapping[str, float]]
"""(training preset, settings to replace, the trial's folder, W&B project) to the figures of the run's summary.

It goes on with what it finds in the folder. ``KeyboardInterrupt`` ends the sweep and leaves the trial to be resumed.
"""

DATABASE, TABLE, FIGURES = "study.db", "trials.csv", "trial.json"
_TOO_MANY_FAILURES = 3


@dataclass(frozen=True)
class Trial:
    """A trial that is done.

    Attributes:
        number: counted from 0.
        settings: dotted setting of training to value.
        value: of the metric; None: the trial failed.
        figures: everything that it returned.
    """

    number: int
    settings: dict[str, Any]
    value: float | None
    figures: dict[str, float]


def run_study(
    sweep: SweepSettings,
    function: TrialFunction,
    out: Path,
    count: int | None = None,
    seed: int = 0,
    project: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """Runs trials until there are ``run_cap`` (or the whole grid), or ``count`` more; returns all, the best first.

    Raises:
        SweepError: Optuna is missing, the folder holds another sweep or one that is being run, the metric is not among
            the figures, nothing says how many trials, or three in a row failed.
        Exception: what a trial raised, if the fault is the input's.
    """
    if sweep.early_terminate is not None:
        raise SweepError("early_terminate: only W&B's agents follow it; remove it for Optuna")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        study = _study(sweep, out, seed)
        total = _total(sweep, len(_done(study)), count)
        failures = 0
        while len(_done(study)) < total and failures < _TOO_MANY_FAILURES:
            number, settings = _next(sweep, study, seed)
            folder = out / f"trial-{number:04d}"
            say(f"trial {number}: {' '.join(words(settings))}")
            value = _run(sweep, function, settings, folder, project, study, number, say)
            failures = 0 if value is not None else failures + 1
            _write_table(sweep, study, out)
        if failures:
            raise SweepError(f"{failures} trials in a row failed; {out / TABLE} and the trials' folders tell more")
        return trials(sweep, study, out)


def trials(sweep: SweepSettings, study: optuna.Study, out: Path) -> list[Trial]:
    """The trials that are done, the best first, those that failed last."""
    sign = 1.0 if sweep.metric.goal == "minimize" else -1.0
    found = [
        Trial(one.number, _decoded(sweep, one.params), one.value, _figures(out / f"trial-{one.number:04d}"))
        for one in _done(study)
    ]
    return sorted(found, key=lambda one: (one.value is None, sign * one.value if one.value is not None else 0.0))


def _run(
    sweep: SweepSettings,
    function: TrialFunction,
    settings: dict[str, Any],
    folder: Path,
    project: str | None,
    study: optuna.Study,
    number: int,
    say: Callable[[str], None],
) -> float | None:
    """One trial, told to the study; None if it failed."""
    from optuna.trial import TrialState

    try:
        figures = {name: float(value) for name, value in function(sweep.preset, settings, folder, project).items()}
        if sweep.metric.name not in figures:
            raise SweepError(
                f"no figure {sweep.metric.name!r} to optimise; {nearest(sweep.metric.name, list(figures))}"
            )
    except Exception as error:
        study.tell(number, state=TrialState.FAIL)
        if is_user_error(error):
            raise
        say(f"trial {number} failed: {type(error).__name__}: {one_line(error)}")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    value = figures[sweep.metric.name]
    if not math.isfinite(value):
        study.tell(number, state=TrialState.FAIL)
        say(f"trial {number} failed: {sweep.metric.name} is {value}")
        return None
    study.tell(number, value)
    say(f"trial {number}: {sweep.metric.name} {value:.6g}")
    return value


def _study(sweep: SweepSettings, out: Path, seed: int) -> optuna.Study:
    """The folder's study; a grid's trials are all enqueued at its beginning."""
    try:
        import optuna
    except ImportError as error:
        raise SweepError("sweeps on this machine need optuna: pip install 'biscale-gym[train]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(out / DATABASE).resolve()}"
    study = optuna.create_study(storage=storage, study_name="sweep", direction=sweep.metric.goal, load_if_exists=True)
    searched = sweep.model_dump(mode="json", include={"command", "method", "metric", "parameters"})
    identity = config_hash({**searched, "seed": seed})
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", identity)
    elif found != identity:
        raise SweepError(f"{out} holds another sweep, or this one with another seed; choose another --out")
    if sweep.method == "grid":
        names = list(sweep.parameters)
        combinations = itertools.product(*(_encoded(one) for one in sweep.parameters.values()))
        for values in itertools.islice(combinations, len(study.get_trials(deepcopy=False)), None):
            study.enqueue_trial(dict(zip(names, values, strict=True)))
    return study


def _next(sweep: SweepSettings, study: optuna.Study, seed: int) -> tuple[int, dict[str, Any]]:
    """The trial that was under way, else a new one: its number and its settings."""
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import TrialState

    for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if set(one.params) == set(sweep.parameters):
            return one.number, _decoded(sweep, one.params)
        study.tell(one.number, state=TrialState.FAIL)  # it died before it knew its settings
    started = len(study.get_trials(deepcopy=False)) - len(
        study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    )
    drawn = int(np.random.SeedSequence([seed, started]).generate_state(1)[0])
    study.sampler = RandomSampler(seed=drawn) if sweep.method == "random" else TPESampler(seed=drawn)
    trial = study.ask({name: _distribution(one) for name, one in sweep.parameters.items()})
    return trial.number, _decoded(sweep, trial.params)


def _distribution(parameter: Parameter) -> BaseDistribution:
    """A parameter's range in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices is not None:
        return CategoricalDistribution(_encoded(parameter))
    assert parameter.min is not None
    assert parameter.max is not None
    if parameter.kind == "int_uniform":
        return IntDistribution(int(parameter.min), int(parameter.max))
    logarithmic = parameter.kind == "log_uniform_values"
    step = None if parameter.q is None else float(parameter.q)
    return FloatDistribution(float(parameter.min), float(parameter.max), log=logarithmic, step=step)


def _encoded(parameter: Parameter) -> list[str]:
    """Choices as JSON text: Optuna keeps text as it is, and lists not at all."""
    return [json.dumps(choice) for choice in parameter.choices or ()]


def _decoded(sweep: SweepSettings, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's settings, in the order of the file."""
    return {
        name: json.loads(drawn[name]) if parameter.choices is not None else drawn[name]
        for name, parameter in sweep.parameters.items()
        if name in drawn
    }


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))


def _total(sweep: SweepSettings, done: int, count: int | None) -> int:
    """How many trials there shall have been at the end."""
    caps = [cap for cap in (sweep.run_cap, sweep.grid_size if sweep.method == "grid" else None) if cap is not None]
    if count is None and not caps:
        raise SweepError("how many trials? Give --agent N, or run_cap in the sweep's file")
    return min([*caps, *([] if count is None else [done + count])])


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them after ``--set``."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]


def _figures(folder: Path) -> dict[str, float]:
    path = folder / FIGURES
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_table(sweep: SweepSettings, study: optuna.Study, out: Path) -> None:
    """Every trial so far, as CSV, the best first."""
    found = trials(sweep, study, out)
    names = list(dict.fromkeys(name for one in found for name in one.figures))
    with (out / TABLE).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["trial", sweep.metric.name, *sweep.parameters, *(n for n in names if n != sweep.metric.name)])
        for one in found:
            figures = [one.figures.get(name, "") for name in names if name != sweep.metric.name]
            value = "failed" if one.value is None else one.value
            writer.writerow([one.number, value, *(one.settings.get(name, "") for name in sweep.parameters), *figures])


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder; a second process would take up the first one's trial."""
    with (out / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"{out}: another process runs this sweep") from error
        yield
