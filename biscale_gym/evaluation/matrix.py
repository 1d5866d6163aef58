"""Controllers × scenarios × seeds, each run once: over a few processes, resumable, one record per run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from biscale_gym.config import load_preset, validate
from biscale_gym.control.controllers import parsed_variant
from biscale_gym.control.rollout import RunJob, RunOutcome
from biscale_gym.evaluation.faults import EvaluationError, Fault
from biscale_gym.evaluation.identity import run_id
from biscale_gym.evaluation.records import Arrays, Record, RecordStore, arrays_digest
from biscale_gym.evaluation.workers import Workers
from biscale_gym.fingerprint import fingerprint
from biscale_gym.profiles.settings import RandomisationSettings

Runner = Callable[[RunJob], RunOutcome]


@dataclass
class MatrixResult:
    """What a comparison has to show: records in the order of the jobs, and the runs that failed."""

    records: list[Record] = field(default_factory=list)
    faults: list[tuple[RunJob, Fault]] = field(default_factory=list)
    interrupted: bool = False

    def rows(self) -> list[dict[str, float | int | str]]:
        """One row of metrics per record, with the record's id under ``record``."""
        return [{**record.row, "record": record.id} for record in self.records]


def jobs_of(
    scenarios: Sequence[str],
    controllers: Sequence[str],
    seeds: int,
    trace: str | None,
    rate_rps: float | None,
    split: str | None,
    overrides: Mapping[str, Any] | None = None,
    randomisation: str | None = None,
) -> list[RunJob]:
    """The matrix as a list of jobs, scenario by scenario, seed by seed.

    Raises:
        EvaluationError: a list is empty or names something twice, or there are no seeds.
        ControllerError: a controller's settings are not written ``NAME[KEY=VALUE,...]``.
        ConfigError: a value is out of range, or there is no such preset of randomised hardware.
    """
    for what, names in (("scenario", scenarios), ("controller", controllers)):
        if not names:
            raise EvaluationError(f"no {what} given")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise EvaluationError(f"{what} {twice[0]!r} is given twice")
    if seeds < 1:
        raise EvaluationError(f"--seeds {seeds}: at least 1 is needed")
    if randomisation is not None:
        load_preset(RandomisationSettings, "randomisation", randomisation)
    common = {
        "trace": trace,
        "rate_rps": rate_rps,
        "split": split,
        "overrides": dict(overrides or {}),
        "randomisation": randomisation,
    }
    variants = [parsed_variant(text) for text in controllers]
    return [
        validate(
            RunJob,
            {**common, "scenario": scenario, "controller": name, "controller_settings": own, "seed": seed},
            "compare",
        )
        for scenario in scenarios
        for seed in range(seeds)
        for name, own in variants
    ]


def record_of(record_id: str, job: RunJob, outcome: RunOutcome) -> tuple[Record, Arrays]:
    """An outcome as it is kept: the record, and the arrays beside it."""
    arrays = {"ttft_s": outcome.ttft_s, "tpot_s": outcome.tpot_s}
    arrays |= {f"timeline_{name}": values for name, values in outcome.timeline.items()}
    arrays |= {f"window_{name}": values for name, values in outcome.windows.items()}
    record = Record(
        id=record_id,
        job=job.model_dump(mode="json"),
        row=dict(outcome.row),
        action_digest=outcome.action_digest,
        arrays_digest=arrays_digest(arrays),
        provenance=outcome.provenance,
        fingerprint=fingerprint(),
    )
    return record, arrays


def run_matrix(
    jobs: Sequence[RunJob], store: RecordStore, workers: int, runner: Runner, console: Console
) -> MatrixResult:
    """Runs what is not recorded yet; records each run as it finishes.

    A run that fails is reported and the others go on. An interrupt ends those in progress and keeps the finished ones.

    Raises:
        RecordsError: the records cannot be read or written.
        EvaluationError: a job names a scenario or a trace that does not exist, or ``workers`` is below 1.
    """
    if workers < 1:
        raise EvaluationError(f"--workers {workers}: at least 1 is needed")
    ids = {_key(job): run_id(job) for job in jobs}
    done = _recorded(store)
    result = MatrixResult()

    with _progress(console) as progress:
        todo = [job for job in jobs if ids[_key(job)] not in done]
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(todo))

        def announce(job: RunJob) -> None:
            progress.update(task, description=label(job))

        try:
            with Workers(runner, workers, announce) as pool:
                for job, answer in pool.run(todo):
                    if isinstance(answer, Fault):
                        result.faults.append((job, answer))
                    else:
                        record, arrays = record_of(ids[_key(job)], job, answer)
                        store.append(record, arrays)
                        done[record.id] = record
                    progress.advance(task)
        except KeyboardInterrupt:
            result.interrupted = True
            # It may have come between a record's line and this function's note of it.
            done = _recorded(store)

    result.records = [done[ids[_key(job)]] for job in jobs if ids[_key(job)] in done]
    return result


def _recorded(store: RecordStore) -> dict[str, Record]:
    """The folder's whole records by id."""
    return {record_id: record for record_id, record in store.load().items() if store.has_arrays(record)}


def label(job: RunJob) -> str:
    """A job's name in messages."""
    return f"{job.scenario_name} {job.controller_name} seed {job.seed}"


def fault_messages(faults: Sequence[tuple[RunJob, Fault]]) -> list[str]:
    """One message per distinct fault, naming every run that it stopped."""
    runs: dict[tuple[str, str], list[str]] = {}
    for job, fault in faults:
        runs.setdefault((fault.message, fault.detail), []).append(label(job))
    return [
        f"{message} [{', '.join(names)}]" + (f"\n{detail}" if detail else "")
        for (message, detail), names in runs.items()
    ]


def _key(job: RunJob) -> str:
    key: str = job.model_dump_json()
    return key


def _progress(console: Console) -> Progress:
    columns: list[Any] = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
