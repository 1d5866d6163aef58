"""The leaderboard: controllers against BiScale on the test split, trained ones over several training seeds.

    python scripts/leaderboard.py --seeds 10 --training-seeds results/pairs/* --family both --page docs/leaderboard.md

Rows and workloads are those of configs/leaderboard.yaml; --submission adds rows. Every run is recorded under --out, so
an interrupted board resumes, and `biscale-gym validate` runs any of them again. docs/leaderboard.md says what the
columns mean, and holds the tables between two markers, where --page writes them.
"""

from __future__ import annotations

import json as jsonlib
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import Field, model_validator
from rich.console import Console

from biscale_gym.cluster.placement import PHASES
from biscale_gym.cluster.policy import hold
from biscale_gym.config import ConfigError, Settings, config_hash, nearest, presets_dir, read_yaml, validate
from biscale_gym.control.controllers import ControllerError, make_controller
from biscale_gym.control.rollout import RunJob, dotted, rollout_of, run
from biscale_gym.evaluation.faults import EvaluationError, RecordsError, is_user_error, one_line
from biscale_gym.evaluation.latency import decision_times_s, shown_decisions
from biscale_gym.evaluation.matrix import Runner, fault_messages, run_matrix
from biscale_gym.evaluation.records import Record, RecordStore, replace_file
from biscale_gym.evaluation.statistics import (
    Floats,
    Interval,
    crossed_interval,
    interquartile_mean,
    probability_of_improvement,
)
from biscale_gym.evaluation.summary import Summary, pooled, quantile
from biscale_gym.evaluation.tables import Grid, grids_markdown, print_grids
from biscale_gym.fingerprint import fingerprint

Family = Literal["nominal", "randomised"]
Phases = tuple[float | None, float | None]
"""A figure of prefill and of decode; None where the phase's clocks are held."""
NAMES = r"[\w.:+' -]+"
MODEL_PLACES = ("{name}", "{name}/policy", "{name}/best/policy")
"""Where a training seed's folder may have the model of a phase."""
DECISIONS = 500
PAGE_MARKS = ("<!-- leaderboard -->", "<!-- /leaderboard -->")


# -- what is on the board ----------------------------------------------------------------------------------------------


class Workload(Settings):
    """What every row serves."""

    name: Annotated[str, Field(pattern=NAMES)]
    scenario: str
    """Preset or path."""
    trace: str | None = None
    """A recorded trace in place of the scenario's workload; it has no traffic seeds."""
    split: str | None = None
    """Part of it that is played; None: test for a generated workload, all of a recorded one."""


class Row(Settings):
    """A controller on the board."""

    name: Annotated[str, Field(pattern=NAMES)]
    controller: str
    """Installed name, or ``module:Class``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The controller's keyword settings."""
    trained: tuple[str, ...] = ()
    """Settings that each folder of ``--training-seeds`` fills with its model of that name."""
    training_seeds: tuple[dict[str, Any], ...] = ()
    """Settings of each training seed, laid over ``settings``; for rows whose models are elsewhere."""

    @model_validator(mode="after")
    def _one_source(self) -> Row:
        if self.trained and self.training_seeds:
            raise ValueError("trained and training_seeds both say where models are: give one")
        return self


class Submission(Row):
    """A row from outside, as docs/leaderboard.md asks for it."""

    by: Annotated[str, Field(min_length=1)]
    """Whose it is, and how to reach them."""
    source: Annotated[str, Field(min_length=1)]
    """Where its code and models are, at which revision, under which licence."""
    trained_on: Annotated[str, Field(min_length=1)]
    """What it was trained and selected on; never a test split."""


class Board(Settings):
    """Workloads and rows."""

    reference: str
    """Row that all others are compared with."""
    randomisation: str
    """Preset of the randomised family."""
    workloads: tuple[Workload, ...]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _names(self) -> Board:
        for names in ([row.name for row in self.rows], [workload.name for workload in self.workloads]):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{twice[0]!r} is named twice")
        if self.reference not in [row.name for row in self.rows]:
            raise ValueError(f"reference {self.reference!r} is no row")
        return self


def load_board(path: Path | None = None, submissions: Sequence[Path] = ()) -> Board:
    """The board of a file, with the rows of submissions behind its own.

    Raises:
        ConfigError: a file that cannot be used; the place is named.
    """
    path = path or presets_dir() / "leaderboard.yaml"
    board = validate(Board, read_yaml(path), str(path))
    added = [validate(Submission, read_yaml(one), str(one)) for one in submissions]
    rows = [row.model_dump() for row in board.rows]
    rows += [one.model_dump(include=set(Row.model_fields)) for one in added]
    where = ", ".join(map(str, (path, *submissions)))
    return validate(Board, {**board.model_dump(), "rows": rows}, where)


def chosen(board: Board, rows: str, workloads: str) -> Board:
    """The board with these rows (and the reference) and workloads only, in the board's order; "" keeps all.

    Raises:
        EvaluationError: an unknown name; the nearest is named.
    """

    def kept(what: str, items: tuple[Any, ...], text: str, always: str = "") -> tuple[Any, ...]:
        names = [item.name for item in items]
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        for name in wanted:
            if name not in names:
                raise EvaluationError(f"no {what} {name!r}; {nearest(name, names)}")
        return tuple(item for item in items if not wanted or item.name in (*wanted, always))

    return board.model_copy(
        update={
            "rows": kept("row", board.rows, rows, board.reference),
            "workloads": kept("workload", board.workloads, workloads),
        }
    )


def model_in(folder: Path, name: str) -> str:
    """The model of this name in a training seed's folder, without its suffix.

    Raises:
        EvaluationError: there is none; the places are named.
    """
    places = [folder / place.format(name=name) for place in MODEL_PLACES]
    for place in places:
        if place.with_name(f"{place.name}.safetensors").is_file():
            return place.as_posix()
    tried = ", ".join(f"{place}.safetensors" for place in places)
    raise EvaluationError(f"training seed {folder}: no {name} model; looked for {tried}")


def agents_of(row: Row, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The row's settings, once per training seed; once where it has none.

    Raises:
        EvaluationError: a folder lacks a model.
    """
    if row.trained and folders:
        return [{**row.settings, **{name: model_in(folder, name) for name in row.trained}} for folder in folders]
    return [{**row.settings, **one} for one in row.training_seeds or ({},)]


@dataclass(frozen=True)
class Cell:
    """One row on one workload and one family of hardware: its jobs, [agents][traffic seeds]."""

    row: Row
    workload: Workload
    family: Family
    jobs: tuple[tuple[RunJob, ...], ...]


def cells_of(board: Board, families: Sequence[Family], seeds: int, folders: Sequence[Path]) -> list[Cell]:
    """Every cell of the board.

    A recorded trace has no traffic seeds: it is played once on the nominal hardware, and on as many draws of the
    randomised one as there are seeds.

    Raises:
        EvaluationError: a training seed's folder lacks a model.
        ConfigError: a setting is wrong.
    """

    def job(row: Row, settings: dict[str, Any], workload: Workload, family: Family, seed: int) -> RunJob:
        values = {
            "scenario": workload.scenario,
            "controller": row.controller,
            "controller_settings": settings,
            "seed": seed,
            "trace": workload.trace,
            "split": workload.split,
            "randomisation": board.randomisation if family == "randomised" else None,
        }
        return validate(RunJob, values, f"row {row.name!r}")

    agents = {row.name: agents_of(row, folders) for row in board.rows}
    return [
        Cell(
            row,
            workload,
            family,
            tuple(
                tuple(
                    job(row, settings, workload, family, seed)
                    for seed in range(1 if workload.trace and family == "nominal" else seeds)
                )
                for settings in agents[row.name]
            ),
        )
        for family in families
        for workload in board.workloads
        for row in board.rows
    ]


def key_of(job: RunJob) -> str:
    """What tells a job from all others; records keep their keys in another order."""
    return jsonlib.dumps(job.model_dump(mode="json"), sort_keys=True)


# -- what its tables hold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row on a workload, beside the reference on the same requests and the same hardware.

    Attributes:
        cell: which row, where.
        summary: over all its runs.
        energy_j, attainment: total joules and joint attainment, float64[agents, traffic seeds].
        ratio: of total joules to the reference's on the same seed, as ``energy_j``.
        gain: joint attainment less the reference's on the same seed, as ``energy_j``.
        reference_j: the reference's total joules, float64[traffic seeds].
    """

    cell: Cell
    summary: Summary
    energy_j: Floats
    attainment: Floats
    ratio: Floats
    gain: Floats
    reference_j: Floats


def lines_of(cells: Sequence[Cell], reference: str, records: dict[str, Record], store: RecordStore) -> list[Line]:
    """A line per cell whose runs, and whose reference's, are all recorded."""

    def found(cell: Cell) -> list[list[Record]] | None:
        runs = [[records.get(key_of(job)) for job in jobs] for jobs in cell.jobs]
        whole = [[record for record in one if record is not None] for one in runs]
        return whole if [len(one) for one in whole] == [len(jobs) for jobs in cell.jobs] else None

    def column(runs: list[list[Record]], metric: str) -> Floats:
        return np.array([[float(record.row[metric]) for record in one] for one in runs])

    references = {(cell.workload.name, cell.family): found(cell) for cell in cells if cell.row.name == reference}
    lines = []
    for cell in cells:
        own, base = found(cell), references[cell.workload.name, cell.family]
        if own is None or base is None:
            continue
        # Where the reference itself has training seeds, their mean is what others are compared with.
        base_j = column(base, "total_energy_j").mean(axis=0)
        energy_j, attainment = column(own, "total_energy_j"), column(own, "joint_attainment")
        lines.append(
            Line(
                cell,
                pooled([record for one in own for record in one], [], store),
                energy_j,
                attainment,
                energy_j / base_j,
                attainment - column(base, "joint_attainment").mean(axis=0),
                base_j,
            )
        )
    return lines


def mean(values: Floats, axis: int) -> Floats:
    """``np.mean`` as the bootstrap wants it."""
    return np.asarray(np.mean(values, axis=axis), dtype=np.float64)


@dataclass(frozen=True)
class Verdict:
    """A row against the reference, on one workload or over several."""

    name: str
    ratio: Interval
    """Interquartile mean of total joules over the reference's on the same requests."""
    improvement: float
    """Probability that a run takes less than one of the reference's on the same workload."""
    gain: Interval
    """Mean difference in joint attainment."""
    breaches: tuple[str, ...]
    wins: bool | None
    """The SLO is kept, attainment is no worse, and the interval of the ratio is below 1; None without an interval."""

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Verdict:
        """One row's lines brought together."""
        ratio = crossed_interval([line.ratio for line in lines], interquartile_mean)
        gain = crossed_interval([line.gain for line in lines], mean)
        breaches = tuple(
            f"{name} {line.cell.workload.name}" if len(lines) > 1 else name
            for line in lines
            for name in line.summary.breaches
        )
        return cls(
            lines[0].cell.row.name,
            ratio,
            probability_of_improvement([line.energy_j.ravel() for line in lines], [line.reference_j for line in lines]),
            gain,
            breaches,
            None if math.isnan(ratio.high) else not breaches and gain.value >= 0.0 and ratio.high < 1.0,
        )


def percent(ratio: Interval) -> str:
    """A ratio as a change, with its interval."""
    return _with_ends([f"{100 * (value - 1):+.1f}" for value in (ratio.value, ratio.low, ratio.high)], " %")


def points(gain: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""
    return _with_ends([f"{100 * value:+.2f}" for value in (gain.value, gain.low, gain.high)], "")


def _with_ends(texts: Sequence[str], unit: str) -> str:
    value, low, high = texts
    ends = "" if "nan" in low else f" [{low}, {high}]"
    return f"{value}{unit}{ends}".replace("-", "−")


Columns = dict[str, Callable[[Line, Verdict], str]]
COLUMNS: Columns = {
    "total MJ": lambda line, _: f"{line.energy_j.mean() / 1e6:.3f}",
    "energy against {reference}": lambda _, verdict: percent(verdict.ratio),
    "P(less)": lambda _, verdict: f"{verdict.improvement:.2f}",
    "within both": lambda line, _: f"{100 * line.attainment.mean():.2f} %",
    "difference, points": lambda _, verdict: points(verdict.gain),
    "P99 TTFT, TPOT ms": lambda line, _: ", ".join(
        f"{1e3 * quantile(values, 0.99):,.1f}" for values in (line.summary.ttft_s, line.summary.tpot_s)
    ),
    "SLO": lambda _, verdict: "kept" if not verdict.breaches else f"broken: {', '.join(verdict.breaches)}",
    "wins": lambda _, verdict: {None: "–", True: "yes", False: "no"}[verdict.wins],
    "runs": lambda line, _: " × ".join(map(str, line.energy_j.shape)),
}
OF_THE_REFERENCE = ("energy against {reference}", "P(less)", "difference, points", "wins")
"""Columns that say nothing of the reference itself."""


def workload_grid(lines: Sequence[Line], reference: str) -> Grid:
    """One workload under one family, the SLO kept before broken, then by energy."""
    rows, warned = [], []
    judged = sorted(((line, Verdict.of([line])) for line in lines), key=lambda one: _rank(one[1]))
    for line, verdict in judged:
        own = verdict.name == reference
        cells = ["–" if own and name in OF_THE_REFERENCE else text(line, verdict) for name, text in COLUMNS.items()]
        rows.append([_marked(verdict), *cells])
        warned.append(bool(verdict.breaches))
    cell, slo = lines[0].cell, lines[0].summary.slo
    title = (
        f"{cell.workload.name}, {cell.family} hardware (P99 TTFT {1e3 * slo.ttft_s:g}, TPOT {1e3 * slo.tpot_s:g} ms)"
    )
    return Grid(title, ["row", *(name.format(reference=reference) for name in COLUMNS)], rows, warned)


def overall_grid(lines: Sequence[Line], reference: str, latencies: dict[str, Phases]) -> Grid | None:
    """Every generated workload under one family together; None where no row has all of them."""
    lines = [line for line in lines if line.cell.workload.trace is None]
    workloads = list(dict.fromkeys(line.cell.workload.name for line in lines))
    by_row: dict[str, list[Line]] = {}
    for line in lines:
        by_row.setdefault(line.cell.row.name, []).append(line)
    whole = [own for own in by_row.values() if len(own) == len(workloads)]
    if not whole:
        return None
    rows, warned = [], []
    for verdict in sorted((Verdict.of(own) for own in whole), key=_rank):
        own = [Verdict.of([line]) for line in by_row[verdict.name]]
        won = [name for name, one in zip(workloads, own, strict=True) if one.wins]
        is_reference = verdict.name == reference
        rows.append(
            [
                _marked(verdict),
                "–" if is_reference else percent(verdict.ratio),
                "–" if is_reference else f"{verdict.improvement:.2f}",
                "–" if is_reference else points(verdict.gain),
                "kept" if not verdict.breaches else f"broken: {', '.join(verdict.breaches)}",
                "–" if is_reference else ", ".join(won) or "none",
                ", ".join("–" if time is None else f"{time:.2f}" for time in latencies.get(verdict.name, (None, None))),
            ]
        )
        warned.append(bool(verdict.breaches))
    header = ["row", f"energy against {reference}", "P(less)", "attainment, points", "SLO", "wins on", "decision µs"]
    return Grid(f"{', '.join(workloads)}, {lines[0].cell.family} hardware", header, rows, warned)


def _rank(verdict: Verdict) -> tuple[bool, float]:
    return bool(verdict.breaches), verdict.ratio.value


def _marked(verdict: Verdict) -> str:
    return f"{verdict.name} ✗" if verdict.breaches else verdict.name


def grids_of(lines: Sequence[Line], reference: str, latencies: dict[str, Phases]) -> Iterator[Grid]:
    """Per family the generated workloads together, then each workload."""
    for family in dict.fromkeys(line.cell.family for line in lines):
        own = [line for line in lines if line.cell.family == family]
        overall = overall_grid(own, reference, latencies)
        if overall is not None:
            yield overall
        for workload in dict.fromkeys(line.cell.workload.name for line in own):
            yield workload_grid([line for line in own if line.cell.workload.name == workload], reference)


# -- decision latency --------------------------------------------------------------------------------------------------


def decision_us(job: RunJob, decisions: int = DECISIONS) -> Phases:
    """Median microseconds of a decision of prefill and of decode, at the first of a run's after its warm-up.

    The compiled policy is called in compiled code (``biscale_gym.evaluation.latency``): no Python, no observation made
    by the engine, no clock call.
    """
    medians: list[float | None] = []
    for number, phase in enumerate(PHASES):
        rollout = rollout_of(job)
        policies = rollout.simulator.snapshot().policies
        if policies[number].function is hold:
            medians.append(None)
            continue
        shown = shown_decisions(rollout.simulator, policies, phase, decisions, rollout.scenario.warmup_s)
        medians.append(1e6 * float(np.median(decision_times_s(policies[number], shown))) if shown else None)
    return medians[0], medians[1]


# -- the page ----------------------------------------------------------------------------------------------------------


def provenance(cells: Sequence[Cell], lines: Sequence[Line], arguments: Sequence[str], timed: bool) -> str:
    """What made the tables: command, code, machine, records, and each row as the command line names it."""
    here = fingerprint()
    ids = sorted(record.id for line in lines for record in line.summary.records)
    revisions = sorted(
        {str(record.fingerprint.get("git_revision")) for line in lines for record in line.summary.records}
    )
    told = [
        f"    python scripts/leaderboard.py {shlex.join(arguments)}".rstrip(),
        f"{len(ids)} runs (digest of their ids {config_hash({'records': ids})}), made at revision"
        f" {', '.join(revisions)} with biscale-gym {here['biscale_gym']}, numba {here['numba']}, numpy {here['numpy']}"
        f" on {here['cpu']}. Runs: training seeds × traffic seeds.",
    ]
    if timed:
        told.append(
            f"Decisions: median of the first {DECISIONS} boundaries and arrivals after the warm-up of"
            f" {cells[0].workload.name}, seed 0, prefill then decode; the compiled"
            " policy called in compiled code, on that processor."
        )
    rows = {cell.row.name: cell for cell in cells}
    told.append(
        "\n".join(
            [
                "| row | as `--controllers` of `biscale-gym compare` takes it |",
                "| :-- | :-- |",
                *(
                    f"| {name} | {'<br>'.join(f'`{named(jobs[0])}`' for jobs in cell.jobs)} |"
                    for name, cell in rows.items()
                ),
            ]
        )
    )
    return "\n\n".join(told) + "\n"


def named(job: RunJob) -> str:
    """A job's controller as the command line takes it."""
    settings = ",".join(f"{name}={value}" for name, value in dotted(job.controller_settings))
    return f"{job.controller}[{settings}]" if settings else job.controller


def filled(page: str, text: str) -> str:
    """The page with its tables replaced.

    Raises:
        EvaluationError: the page has no place for them.
    """
    start, stop = PAGE_MARKS
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(stop)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise EvaluationError(f"the page needs {start} and, below it, {stop}, once each")
    return pattern.sub(lambda _: f"{start}\n\n{text.strip()}\n\n{stop}", page)


def as_json(line: Line) -> dict[str, Any]:
    """A line for programs."""

    def ends(interval: Interval) -> list[float | None]:
        return [None if math.isnan(value) else value for value in (interval.value, interval.low, interval.high)]

    verdict = Verdict.of([line])
    return {
        "row": verdict.name,
        "workload": line.cell.workload.name,
        "family": line.cell.family,
        "records": [record.id for record in line.summary.records],
        "total_energy_j": line.energy_j.tolist(),
        "joint_attainment": line.attainment.tolist(),
        "energy_ratio": ends(verdict.ratio),
        "probability_of_improvement": verdict.improvement,
        "attainment_difference": ends(verdict.gain),
        "ttft_p99_s": quantile(line.summary.ttft_s, 0.99),
        "tpot_p99_s": quantile(line.summary.tpot_s, 0.99),
        "breaks_slo": list(verdict.breaches),
        "wins": verdict.wins,
    }


def present(board: Board, messages: Console) -> Board:
    """The board without recorded traces that are not at hand, each with a message."""
    missing = [one for one in board.workloads if one.trace is not None and not Path(one.trace).is_file()]
    for one in missing:
        messages.print(f"leaderboard: {one.name} is left out: no file {one.trace}", markup=False, highlight=False)
    return board.model_copy(update={"workloads": tuple(one for one in board.workloads if one not in missing)})


def main(
    seeds: int = 10,
    training_seeds: tuple[Path, ...] = (),
    family: Literal["nominal", "randomised", "both"] = "both",
    rows: str = "",
    workloads: str = "",
    submission: tuple[Path, ...] = (),
    board: Path | None = None,
    out: Path = Path("results/leaderboard"),
    workers: int = 2,
    latency: bool = True,
    page: Path | None = None,
    json: Path | None = None,
) -> int:
    """Run the board and print its tables.

    Args:
        seeds: Traffic seeds, counted from 0; with the randomised family each also draws the hardware.
        training_seeds: Folders, one per training seed, each with a prefill and a decode model; without them the shipped
            models are the only training seed.
        family: Hardware as it is believed to be, drawn anew for each seed, or both.
        rows: Rows to run beside the reference, comma-separated; all without it.
        workloads: Workloads to run, comma-separated; all without it.
        submission: YAML files of further rows.
        board: Another board than configs/leaderboard.yaml.
        out: Folder of the records, and of the tables in leaderboard.md; a run that it holds is not run again.
        workers: Processes.
        latency: Time decisions, too; best on an idle machine.
        page: Page whose tables are replaced, between its two markers; only when every run is there.
        json: File for all lines with their intervals.

    Returns:
        0, 1 if a run failed, or 130 if interrupted.
    """
    return make(
        chosen(load_board(board, submission), rows, workloads),
        seeds,
        training_seeds,
        ("nominal", "randomised") if family == "both" else (family,),
        out,
        workers,
        latency,
        page,
        json,
    )


def make(
    board: Board,
    seeds: int,
    training_seeds: Sequence[Path],
    families: Sequence[Family],
    out: Path,
    workers: int,
    latency: bool,
    page: Path | None,
    json: Path | None,
    runner: Runner = run,
) -> int:
    """``main`` for a given board and runner.

    Raises:
        EvaluationError, RecordsError, ConfigError, ControllerError: the input is wrong, or records are.
    """
    if seeds < 1:
        raise EvaluationError(f"--seeds {seeds}: at least 1 is needed")
    messages, tables = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 190)
    board = present(board, messages)
    cells = cells_of(board, families, seeds, training_seeds)
    if not cells:
        raise EvaluationError("no workload is left to run")
    if page is not None:
        filled(page.read_text(encoding="utf-8"), "")
    for job in {named(job): job for cell in cells for jobs in cell.jobs for job in jobs[:1]}.values():
        make_controller(job.controller, job.controller_settings)
    jobs = {key_of(job): job for cell in cells for own in cell.jobs for job in own}
    store = RecordStore(out)
    result = run_matrix(list(jobs.values()), store, workers, runner, messages)
    records = {key_of(RunJob.model_validate(record.job)): record for record in result.records}
    lines = lines_of(cells, board.reference, records, store)
    for message in fault_messages(result.faults):
        messages.print(f"leaderboard: {message}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) < len(cells):
        messages.print(f"leaderboard: {len(lines)} of {len(cells)} lines have all their runs; the rest is left out")
    if lines:
        first = {cell.row.name: cell.jobs[0][0] for cell in reversed(cells)}
        latencies = {name: decision_us(job) for name, job in first.items()} if latency else {}
        made = list(grids_of(lines, board.reference, latencies))
        print_grids(made, tables)
        text = f"{grids_markdown(made)}\n{provenance(cells, lines, sys.argv[1:], latency)}"
        replace_file(out / "leaderboard.md", text)
        if json is not None:
            replace_file(json, jsonlib.dumps({"lines": [as_json(line) for line in lines]}, indent=1) + "\n")
        if page is not None and len(lines) == len(cells):
            replace_file(page, filled(page.read_text(encoding="utf-8"), text))
    return 130 if result.interrupted else int(bool(result.faults))


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))
    try:
        sys.exit(tyro.cli(main, description=__doc__))
    except (ConfigError, ControllerError, EvaluationError, RecordsError, OSError, ValueError) as error:
        if not is_user_error(error):
            raise
        raise SystemExit(f"leaderboard: {one_line(error)}") from error
