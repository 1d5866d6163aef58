"""A comparison as run records (``tracking``): one run per scenario and controller, and one of the whole.

All of them share a group and say in their configuration and tags what they compare, so that a W&B report can filter,
group and draw them. A metric is the mean over the seeds, with the ends of Student's 95 % interval beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from biscale_gym.config import config_hash
from biscale_gym.evaluation.compare import Comparison
from biscale_gym.evaluation.plots import file_name, scenario_stem, timeline_stem
from biscale_gym.evaluation.summary import Summary, quantile
from biscale_gym.evaluation.tables import csv_row, grids
from biscale_gym.tracking import Tracker, open_tracker

FOLDER = "tracking"
OVERVIEW = "overview"
_GRIDS = ("energy", "latency", "uses")
"""Of each scenario, in the order of ``tables.grids``."""


def track(comparison: Comparison, out: Path, wandb: str | None, tensorboard: bool) -> None:
    """Writes the run records of a comparison to ``out/tracking``, and to W&B and TensorBoard where asked.

    Once W&B fails, the rest are offline runs: its server is waited for at most once.

    Raises:
        TrackingError: the folder cannot be written, or a package is missing.
    """
    ids = [record.id for record in comparison.result.records]
    group = f"compare-{config_hash({'records': ids})[:8]}"
    offline = False

    def opened(name: str, folder: str, tags: Sequence[str]) -> AbstractContextManager[Tracker]:
        return open_tracker(
            out / FOLDER / folder,
            kind="compare",
            name=name,
            group=group,
            tags=[*tags, group],
            wandb=wandb,
            tensorboard=tensorboard,
            offline=offline,
        )

    for summary in comparison.summaries:
        pair = (scenario_stem(summary.scenario), summary.controller)
        slo = "breaks-slo" if summary.breaches else "keeps-slo"
        with opened(" ".join(pair), "-".join(map(file_name, pair)), [*pair, slo]) as tracker:
            _tell(tracker, summary, group, out)
        offline |= tracker.unreachable
    with opened(OVERVIEW, OVERVIEW, [OVERVIEW]) as tracker:
        _tell_all(tracker, comparison, group, out)


def _tell(tracker: Tracker, summary: Summary, group: str, out: Path) -> None:
    first = summary.records[0]
    tracker.config(
        {
            "comparison": group,
            "scenario": summary.scenario,
            "controller": summary.controller,
            "trace": summary.trace,
            "split": summary.split,
            "seeds": len(summary.records),
            "job": {name: value for name, value in first.job.items() if name != "seed"},
            "resolved": first.provenance.get("scenario", {}),
            "resolved_hash": first.provenance["config_hash"],
        }
    )
    # Percentile by percentile as steps: W&B draws them as curves, of several controllers into one picture.
    for percent in range(101):
        latencies = {"ttft_ms": summary.ttft_s, "tpot_ms": summary.tpot_s}
        tracker.log({name: 1e3 * quantile(values, percent / 100) for name, values in latencies.items()}, percent, "cdf")
    columns = list(first.row)
    tracker.table("seeds", columns, [[record.row.get(name) for name in columns] for record in summary.records])
    timeline = out / "plots" / f"{timeline_stem(summary)}.png"
    if timeline.is_file():
        tracker.figure("timeline", timeline)
    tracker.summary(_known(csv_row(summary)))


def _tell_all(tracker: Tracker, comparison: Comparison, group: str, out: Path) -> None:
    summaries = comparison.summaries
    tracker.config(
        {
            "comparison": group,
            "scenarios": list(dict.fromkeys(summary.scenario for summary in summaries)),
            "controllers": list(dict.fromkeys(summary.controller for summary in summaries)),
        }
    )
    rows = [csv_row(summary) for summary in summaries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    tracker.table("comparison", columns, [[row.get(name) for name in columns] for row in rows])
    scenarios = dict.fromkeys(scenario_stem(summary.scenario) for summary in summaries)
    names = [*(f"{scenario}-{part}" for scenario in scenarios for part in _GRIDS), "all-scenarios"]
    for name, grid in zip(names, grids(summaries), strict=False):  # the last only where there are seeds enough
        tracker.table(name, grid.header, grid.rows)
    for picture in comparison.files:
        if picture.suffix == ".png":
            tracker.figure(picture.stem, picture)
    metadata = {"records": len(comparison.result.records)}
    tracker.artifact(out / "records.jsonl", "records", f"{group}-records", metadata)
    tracker.summary({"runs": len(comparison.result.records), "failed": len(comparison.result.faults)})


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Without metrics of nothing."""
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
