"""``biscale-gym compare``: the matrix, then everything that is read off its records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import MatrixResult, Runner, fault_messages, run_matrix
from biscale_gym.evaluation.records import Record, RecordStore, replace_file, without_nan
from biscale_gym.evaluation.summary import Summary, summarise
from biscale_gym.evaluation.tables import csv_text, markdown, print_tables


@dataclass(frozen=True)
class Comparison:
    """What a comparison left to report: its runs, their summary, the files it wrote."""

    result: MatrixResult
    summaries: list[Summary]
    files: list[Path]

    @property
    def exit_status(self) -> int:
        """0 all recorded; 130 interrupted; 2 every run failed through the input; 1 any other failure."""
        if self.result.interrupted:
            return 130
        if not self.result.faults:
            return 0
        return 2 if not self.result.records and all(fault.by_user for _, fault in self.result.faults) else 1


def compare(
    jobs: Sequence[RunJob], out: Path, workers: int, plots: bool, runner: Runner, progress: Console
) -> Comparison:
    """Runs the jobs that ``out`` does not hold yet and writes tables and plots beside the records.

    Raises:
        RecordsError: the folder's records cannot be read or written.
        EvaluationError: a scenario or trace does not exist.
        DrawingError: plots are asked for without matplotlib.
    """
    store = RecordStore(out)
    result = run_matrix(jobs, store, workers, runner, progress)
    if not result.records:
        return Comparison(result, [], [])
    summaries = summarise(result.records, store)
    files = [out / "table.md", out / "table.csv"]
    replace_file(files[0], markdown(summaries))
    replace_file(files[1], csv_text(summaries))
    if plots:
        from biscale_gym.evaluation.plots import write_plots

        files += write_plots(summaries, store, out / "plots")
    return Comparison(result, summaries, files)


def report(comparison: Comparison, tables: Console, messages: Console, jobs: int) -> None:
    """Prints the tables, the controllers' notes, every failed run, and how to go on after an interrupt."""
    print_tables(comparison.summaries, tables)
    for message in _notes(comparison.result.records):
        tables.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
    for message in fault_messages(comparison.result.faults):
        messages.print(f"biscale-gym: error: {message}", markup=False, highlight=False, soft_wrap=True)
    if comparison.result.interrupted:
        done = len(comparison.result.records)
        messages.print(
            f"interrupted: {done} of {jobs} runs are recorded; the same command runs the rest", highlight=False
        )


def _notes(records: Sequence[Record]) -> list[str]:
    """What the controllers had to say (a placement that meets no constraint, for instance), one line per run."""
    return [
        f"{record.name}: {'; '.join(record.provenance['notes'])}" for record in records if record.provenance["notes"]
    ]


def rows_json(rows: Sequence[dict[str, Any]]) -> str:
    """``{"rows": [...]}``, a metric of nothing as null."""
    return json.dumps({"rows": [without_nan(row) for row in rows]}, indent=2, allow_nan=False) + "\n"
