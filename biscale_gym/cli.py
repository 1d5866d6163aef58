"""The command ``biscale-gym``.

A fault of the input ends in one line on standard error and exit status 2. What a command needs is imported when it
runs, so that ``--help`` is immediate.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 150

_DEFAULT_PROJECT = "biscale-gym"
Project = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[PROJECT]",
        instance_from_str=lambda given: given[0] if given else _DEFAULT_PROJECT,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: ["none" if value is None else value],
    ),
]
"""A W&B project: an option without a value stands for the usual one."""

app = tyro.extras.SubcommandApp()
trace_app = tyro.extras.SubcommandApp()


@app.command
def compare(
    scenario: str,
    controllers: str,
    seeds: int = 1,
    trace: str | None = None,
    rate: float | None = None,
    split: str | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    randomisation: str | None = None,
    out: Path = Path("results/compare"),
    json: str | None = None,
    workers: int = 2,
    plots: bool = True,
    wandb: Project = None,
    tensorboard: bool = False,
) -> int:
    """Run controllers against each other; print joules and SLO attainment side by side.

    Args:
        scenario: Scenario presets or YAML files, comma-separated.
        controllers: Controller names or module:Class, comma-separated; settings follow in brackets, as in
            learned[prefill=results/train/mine/best].
        seeds: How many seeds, counted from 0.
        trace: A recorded trace in place of the scenario's workload, at its native rate.
        rate: Mean arrivals per second to scale the workload to.
        split: Part to play (train, validation, test); without it test, or all of a recorded trace.
        set: A scenario setting to replace, as KEY=VALUE (cluster.precision=bf16); may be given several times.
        randomisation: Preset of a family of hardware; every seed draws one, controllers know the nominal one only.
        out: Folder of records, tables and plots; a run that it holds is not run again.
        json: File for the rows as JSON; - prints them.
        workers: Processes.
        plots: Draw energy bars, latency distributions and timelines.
        wandb: Record the comparison at Weights & Biases, in this project; offline without a key.
        tensorboard: Record it in TensorBoard's event files.
    """
    from biscale_gym.config import parsed_overrides
    from biscale_gym.control.controllers import make_controller, split_names
    from biscale_gym.control.rollout import run
    from biscale_gym.evaluation import compare as comparing
    from biscale_gym.evaluation.matrix import jobs_of
    from biscale_gym.evaluation.tracked import track
    from biscale_gym.tracking import check_installed

    check_installed(wandb, tensorboard)
    tables, messages = _consoles(json)
    names = split_names(controllers)
    jobs = jobs_of(_names(scenario), names, seeds, trace, rate, split, parsed_overrides(set), randomisation)
    for job in jobs[: len(names)]:
        make_controller(job.controller, job.controller_settings)
    comparison = comparing.compare(jobs, out, workers, plots, run, messages)
    comparing.report(comparison, tables, messages, len(jobs))
    if comparison.result.records:
        messages.print(f"records, tables and plots: {out}", markup=False, highlight=False, soft_wrap=True)
        _write_json(json, comparing.rows_json(comparison.result.rows()))
        if (wandb is not None or tensorboard) and not comparison.result.interrupted:
            track(comparison, out, wandb, tensorboard)
    return comparison.exit_status


@app.command
def simulate(placement: Path, trace: Path, policy: str, json: str = "-", seed: int = 0) -> int:
    """Run one trace through one stated placement under one clock policy.

    Args:
        placement: YAML with the instances, the model and the batching preset.
        trace: A recorded trace in any supported format.
        policy: Name of a controller whose clock policies run, or hold for the clocks of the file.
        json: File for the row as JSON; - prints it.
        seed: Seed of the run.
    """
    from biscale_gym.control.simulate import simulate_file
    from biscale_gym.evaluation import compare as comparing

    outcome = simulate_file(placement, trace, policy, seed)
    _write_json(json, comparing.rows_json([{**outcome.row, "record": None}]))
    return 0


@app.command
def validate(records: tyro.conf.Positional[Path], record: tyro.conf.Positional[str | None] = None) -> int:
    """Run records again and compare them with what they say; exit status 1 if one does not hold.

    Args:
        records: A records.jsonl file or the folder that holds it.
        record: Id of one record (its first digits are enough); all of them without it.
    """
    from biscale_gym.control.rollout import run
    from biscale_gym.evaluation.records import find_records
    from biscale_gym.evaluation.validate import validate_record

    held = True
    for one in find_records(records, record):
        verdict = validate_record(one, run)
        held &= verdict.holds
        how = "exactly" if verdict.exact else "to rounding"
        print(f"{one.id}  {one.name}  {f'holds {how}' if verdict.holds else 'DOES NOT HOLD'}", flush=True)
        for line in verdict.differences:
            print(f"    {line}")
        for line in verdict.warnings:
            print(f"    warning: {line}", file=sys.stderr)
    return 0 if held else 1


@app.command
def train(
    config: tyro.conf.Positional[str],
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = (),
    out: Path | None = None,
    conf_file: Path | None = None,
    wandb: Project = None,
    tensorboard: bool = False,
) -> int:
    """Train an agent, or go on with a run that was interrupted.

    Args:
        config: A preset of configs/training, a YAML file, or the folder of a run to go on with.
        set: Settings to replace, as KEY=VALUE (env.episode_s=60); may be given several times.
        out: Folder of the new run; results/train/NAME-SEED without it.
        conf_file: Hyper-parameters in RL Baselines3 Zoo's form, in place of those of the preset.
        wandb: Record the run at Weights & Biases, in this project; offline without a key.
        tensorboard: Also write TensorBoard's event files.
    """
    from biscale_gym.config import parsed_overrides
    from biscale_gym.training import commands

    return commands.train_from(config, parsed_overrides(sum(set, ())), out, conf_file, wandb, tensorboard)


@app.command
def sweep(
    config: tyro.conf.Positional[str],
    agent: int | None = None,
    optuna: bool = False,
    out: Path | None = None,
    seed: int = 0,
    project: str = _DEFAULT_PROJECT,
) -> int:
    """Search over the settings of training: at W&B with a login, else by Optuna on this machine.

    Args:
        config: A preset of configs/sweeps, or a YAML file in W&B's sweep format.
        agent: Trials to run now; without it as many as the file's run_cap, or none at W&B.
        optuna: Run the sweep by Optuna even with a W&B login.
        out: Optuna's folder, where an interrupted sweep goes on; results/sweep/NAME without it.
        seed: Seed of Optuna's proposals.
        project: Project at W&B, where the file names none.
    """
    from biscale_gym.sweeps.commands import sweep_from

    return sweep_from(config, agent, optuna, out, seed, project)


@app.command
def live(
    scenario: str = "live-smoke",
    controllers: str = "max-clock,biscale",
    workers: str = "cpu",
    trace: str | None = None,
    seed: int = 0,
    out: Path = Path("results/live"),
    prefill_url: str = "",
    decode_url: str = "",
    governors: Path | None = None,
) -> int:
    """Replay a trace through live vLLM workers under controllers' clock policies; the last line is JSON.

    With URLs the workers are vLLM servers that are running already (docs/live.md).

    Args:
        scenario: Scenario preset or YAML file; its placement says which workers there are.
        controllers: Controller names or module:Class, comma-separated; they run one after another.
        workers: Preset of live settings, or a YAML file.
        trace: A recorded trace in place of the scenario's workload.
        seed: Seed of the trace and of the prompts' tokens.
        out: Folder of the records, one line per iteration.
        prefill_url: Running prefill servers, http://HOST:PORT, comma-separated.
        decode_url: Running decode servers.
        governors: Folder with the sockets of those servers' governors; without it they are observed only.
    """
    from biscale_gym.cluster.placement import PHASES
    from biscale_gym.live import session
    from biscale_gym.live.signals import ending_signals_raise

    tables, _ = _consoles(None)
    urls = dict(zip(PHASES, (_names(prefill_url), _names(decode_url)), strict=True))
    names = _names(controllers)
    given = urls if any(urls.values()) or governors is not None else None
    with ending_signals_raise():
        outcomes = session.serve(scenario, names, workers, trace, seed, out, given, governors)
    tables.print(session.table(outcomes))
    print(session.summary(outcomes))
    return 0


@app.command
def profile(
    out: tyro.conf.Positional[Path] = Path("results/profile/cpu.csv"),
    scenario: str = "live-smoke",
    workers: str = "cpu",
    sweep: str = "cpu",
    clocks: tuple[int, ...] = (),
    seed: int = 0,
) -> int:
    """Measure what iterations of live workers take and cards draw, point by point; interrupted, it goes on.

    Args:
        out: CSV file with its provenance; requests between the workers go to a second file beside it.
        scenario: Scenario preset or YAML file; its placement says which workers there are.
        workers: Preset of live settings, or a YAML file.
        sweep: Preset of configs/profiling, or a YAML file: points, repeats, precision.
        clocks: Clocks in MHz; without it the scenario's top clock of CPU workers, which only emulate them, and all of
            its clocks of cards, or the one that they run where none may be set.
        seed: Seed of the prompts' tokens.
    """
    from biscale_gym.live import profiling
    from biscale_gym.live.signals import ending_signals_raise

    with ending_signals_raise():
        done = profiling.profile(scenario, workers, sweep, clocks, out, seed)
    told = ", ".join(f"{clock:g}" for clock in done.clocks_mhz)
    power = "power measured" if done.power else "power not measured"
    print(
        f"{out}: {done.points} points, {done.rows} rows; half width of the 95 % intervals: median "
        f"{done.median_percent:.1f} %, widest {done.widest_percent:.1f} %; clocks {done.mode}, {told} MHz; {power}"
    )
    return 0


@app.command
def calibrate(
    csv: tyro.conf.Positional[Path],
    out: Path = Path("results/calibration"),
    form: str = "best",
    hardware: str | None = None,
    model: str | None = None,
    precision: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> int:
    """Fit a profile's CSV file, with cross-validated errors, and write presets that a cluster loads.

    Args:
        csv: What `biscale-gym profile` or scripts/profile_h100.py has written.
        out: Folder of the presets.
        form: parametric, trees (needs scikit-learn), or best, whichever errs less in latency.
        hardware: Preset whose closed form the fit starts from, in place of what the file says.
        model: Preset of the model that was profiled, in place of what the file says.
        precision: Of its weights, in place of what the file says.
        folds: Parts of the cross-validation; each holds out whole operating points.
        seed: Seed of the folds.
    """
    from biscale_gym.calibration import calibrate as calibrating
    from biscale_gym.calibration.report import table

    tables, _ = _consoles(None)
    found = calibrating.calibrate(csv, out, form, hardware, model, precision, folds, seed)
    tables.print(table(found))
    print(f"{out}: form {found.form}, latency measured, power {found.power}\n{found.overrides}")
    return 0


@trace_app.command
def fetch(name: tyro.conf.Positional[str], folder: Path = Path("data/traces"), base_url: str | None = None) -> int:
    """Download a published trace: licence shown, checksum checked, an interrupted download resumed.

    Args:
        name: Name in the catalogue (`trace published` lists it).
        folder: Where the file goes.
        base_url: A mirror in place of the publisher's address.
    """
    from biscale_gym.traces.commands import fetch_file

    print(fetch_file(name, folder, base_url))
    return 0


@trace_app.command
def published() -> int:
    """List the published traces that `trace fetch` knows."""
    from biscale_gym.traces.commands import list_published

    print(list_published())
    return 0


@trace_app.command
def describe(
    path: tyro.conf.Positional[Path], format: str | None = None, skip_bad: bool = False, markdown: bool = False
) -> int:
    """Tell what a trace holds: rates, burstiness, lengths, hash.

    Args:
        path: A recorded trace.
        format: Its format, where it shall not be recognised from the file's beginning.
        skip_bad: Count broken rows instead of stopping at the first.
        markdown: Print a Markdown table.
    """
    from biscale_gym.traces.commands import describe_file

    print(describe_file(path, format, skip_bad=skip_bad, style="markdown" if markdown else "text"))
    return 0


@trace_app.command
def generate(
    workload: tyro.conf.Positional[str],
    output: tyro.conf.Positional[Path],
    rate: float | None = None,
    duration: float = 1800.0,
    seed: int = 0,
) -> int:
    """Generate a trace of a workload and write it as CSV or Parquet.

    Args:
        workload: Workload preset or YAML file.
        output: File to write; its suffix decides the format.
        rate: Mean arrivals per second; the workload's native rate without it.
        duration: Seconds.
        seed: Seed of the generator.
    """
    from biscale_gym.traces.commands import generate_file

    trace = generate_file(workload, rate, duration, seed, output)
    print(f"{output}: {len(trace)} requests over {trace.duration_s:.1f} s, hash {trace.hash}")
    return 0


@trace_app.command
def fit(
    path: tyro.conf.Positional[Path],
    description: str,
    source: str,
    shortest: float = 1.0,
    skip_bad: bool = False,
) -> int:
    """Fit a workload to a recorded trace and print it as YAML for `trace generate` and scenarios.

    Args:
        path: A recorded trace.
        description: One line for lists.
        source: Where the trace comes from.
        shortest: Shortest time scale, in seconds, on which burstiness is fitted.
        skip_bad: Leave out broken rows instead of stopping at the first.
    """
    from biscale_gym.traces.commands import fit_file

    print(fit_file(path, description, source, shortest_s=shortest, skip_bad=skip_bad), end="")
    return 0


app.command(trace_app, name="trace", help="Fetch, describe, generate and fit traces.")


@app.command(name="list")
def list_() -> int:
    """List the scenarios, controllers, models and workloads that can be named."""
    from biscale_gym.config import preset_names
    from biscale_gym.control.controllers import controller_names

    rows = {
        "scenarios": preset_names("scenarios"),
        "controllers": controller_names(),
        "hardware": preset_names("hardware"),
        "models": preset_names("models"),
        "workloads": preset_names("workloads"),
    }
    for kind, names in rows.items():
        print(f"{kind + ':':<13}{', '.join(names)}")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _consoles(json: str | None) -> tuple[Console, Console]:
    """Where tables and messages go: rows printed as JSON have standard output to themselves."""
    from rich.console import Console

    messages = Console(stderr=True)
    if json == "-":
        return messages, messages
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES), messages


def _write_json(target: str | None, text: str) -> None:
    from biscale_gym.evaluation.records import replace_file

    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        replace_file(Path(target), text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; always leaves through ``SystemExit``."""
    from biscale_gym.evaluation.faults import is_user_error, one_line

    # An installed command does not search the folder it is called from; controllers of one's own are there.
    sys.path.append(str(Path.cwd()))
    warnings.formatwarning = lambda message, *_: f"biscale-gym: warning: {message}\n"
    try:
        status = app.cli(prog="biscale-gym", description="A testbed for energy-efficient LLM serving.", args=arguments)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"biscale-gym: error: {one_line(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)
