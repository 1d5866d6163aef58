"""What ``biscale-gym sweep`` does."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from biscale_gym.sweeps.agents import logged_in, run_at_wandb
from biscale_gym.sweeps.settings import SweepError, SweepSettings, load_sweep
from biscale_gym.sweeps.study import TABLE, Trial, TrialFunction, run_study, words

RESULTS = Path("results/sweep")
TRIAL = "biscale_gym.training.commands:trial"
_SHOWN = 10


def sweep_from(
    config: str,
    agent: int | None,
    optuna: bool,
    out: Path | None,
    seed: int,
    project: str,
    function: str = TRIAL,
) -> int:
    """Runs a sweep: at W&B with a login, else (or if asked) by Optuna on this machine.

    Optuna's trials are W&B runs of one group where the file's command says ``--wandb``: offline ones without a login.

    Args:
        config: preset of ``configs/sweeps`` or YAML file.
        agent: trials to run now; None: as many as the file says, or none at W&B.
        optuna: run it here even with a login.
        out: Optuna's folder; None: ``results/sweep`` and the sweep's name.
        seed: of Optuna's proposals.
        project: at W&B, where the file names none.
        function: what Optuna's trials call, as ``module:function`` (``study.TrialFunction``).

    Raises:
        ConfigError, SweepError: something is not as it must be.
    """
    sweep = load_sweep(config)
    if not optuna and logged_in():
        return run_at_wandb(sweep, project, agent)
    if not optuna:
        print("no W&B login: Optuna runs the sweep here", file=sys.stderr)
    tracked = project if "--wandb" in sweep.command else None
    if tracked is not None:
        os.environ.setdefault("WANDB_RUN_GROUP", sweep.name)
    folder = out if out is not None else RESULTS / sweep.name
    messages = Console(stderr=True)

    def say(message: str) -> None:
        messages.print(message, markup=False, highlight=False, soft_wrap=True)

    try:
        found = run_study(sweep, find_function(function), folder, agent, seed, tracked, say)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on")
        return 130
    _show(sweep, found, folder)
    return 0 if any(trial.value is not None for trial in found) else 1


def find_function(name: str) -> TrialFunction:
    """The function ``module:function``.

    Raises:
        SweepError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SweepError(f"no function {name!r} for the trials ({error}); expected module:function") from error
    if not inspect.isfunction(found):
        raise SweepError(f"{name!r} is no function")
    function: TrialFunction = found
    return function


def _show(sweep: SweepSettings, found: list[Trial], folder: Path) -> None:
    table = Table(title=f"{sweep.name}: the best of {len(found)} trials", title_justify="left")
    for heading in ("trial", sweep.metric.name, *sweep.parameters):
        table.add_column(heading, overflow="fold")
    for trial in found[:_SHOWN]:
        value = "failed" if trial.value is None else f"{trial.value:.6g}"
        table.add_row(str(trial.number), value, *(word.partition("=")[2] for word in words(trial.settings)))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    if found and found[0].value is not None:
        best = f"biscale-gym train {sweep.preset} --set {' '.join(map(shlex.quote, words(found[0].settings)))}"
        console.print(best, markup=False, highlight=False, soft_wrap=True)
    console.print(f"every trial: {folder / TABLE}", markup=False, highlight=False, soft_wrap=True)
