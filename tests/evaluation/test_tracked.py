from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.compare import Comparison, compare
from biscale_gym.evaluation.plots import timeline_stem
from biscale_gym.evaluation.tracked import track

from evaluation.fakes import run  # isort: skip
from wandb_file import RunFile, run_files  # isort: skip


@pytest.fixture
def comparison(make_jobs: Callable[..., list[RunJob]], tmp_path: Path) -> Comparison:
    jobs = make_jobs(("distserve", "reckless"), seeds=3)
    return compare(jobs, tmp_path / "out", 1, False, run, Console(quiet=True))


def table(run_file: RunFile, name: str) -> dict[str, Any]:
    (row,) = [row for row in run_file.history if row.get(f"{name}._type") == "table-file"]
    content: dict[str, Any] = json.loads((run_file.files / row[f"{name}.path"]).read_text())
    return content


def test_a_comparison_is_a_group_of_runs_that_a_report_can_draw(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    plots = tmp_path / "out" / "plots"
    plots.mkdir()
    for name in ("tiny-energy", *map(timeline_stem, comparison.summaries)):
        Figure(figsize=(1, 1)).savefig(plots / f"{name}.png")
        comparison.files.extend([plots / f"{name}.png", plots / f"{name}.svg"])
    track(comparison, tmp_path / "out", "testbed", tensorboard=False)
    folders = {folder.name: folder for folder in (tmp_path / "out" / "tracking").iterdir()}
    assert set(folders) == {"tiny-distserve", "tiny-reckless", "overview"}
    runs = {name: RunFile(path) for name, folder in folders.items() for path in run_files(folder)}
    (group,) = {one.run.run_group for one in runs.values()}
    assert {one.run.job_type for one in runs.values()} == {"compare"}

    reckless = runs["tiny-reckless"]
    assert {"reckless", "breaks-slo", group} <= set(reckless.run.tags)
    assert "keeps-slo" in runs["tiny-distserve"].run.tags
    assert reckless.config["controller"] == "reckless"
    assert reckless.config["job"]["controller"] == "reckless"
    assert reckless.config["seeds"] == 3
    (summary,) = [one for one in comparison.summaries if one.controller == "reckless"]
    energy = summary.metrics["total_energy_j"]
    logged = [reckless.summary[f"total_energy_j{end}"] for end in ("", "_low", "_high")]
    assert logged == pytest.approx([energy.value, energy.low, energy.high])
    assert reckless.summary["total_energy_j_ratio_to_distserve"] == pytest.approx(0.5, abs=0.02)
    curve = [row for row in reckless.history if "cdf/ttft_ms" in row]
    assert [row["global_step"] for row in curve] == list(range(101))
    assert curve[99]["cdf/ttft_ms"] == pytest.approx(1e3 * reckless.summary["pooled_ttft_p99_s"])
    seeds = table(reckless, "seeds")
    assert [row[seeds["columns"].index("seed")] for row in seeds["data"]] == [0, 1, 2]
    assert any(row.get("timeline._type") == "image-file" for row in reckless.history)

    overview = runs["overview"]
    assert overview.run.display_name == "overview"
    tables = {name.removesuffix("._type") for row in overview.history for name in row if row[name] == "table-file"}
    assert tables == {"comparison", "tiny-energy", "tiny-latency", "tiny-uses", "all-scenarios"}
    heads = {name: " ".join(table(overview, name)["columns"]) for name in tables}
    assert "P99" in heads["tiny-latency"]
    assert "prefill" in heads["tiny-energy"]
    assert "idle" in heads["tiny-uses"]
    whole = table(overview, "comparison")
    assert [row[whole["columns"].index("controller")] for row in whole["data"]] == ["distserve", "reckless"]
    pictures = {name.removesuffix("._type") for row in overview.history for name in row if row[name] == "image-file"}
    assert pictures == {"tiny-energy", "tiny-distserve-timeline", "tiny-reckless-timeline"}
    (records,) = [one for one in overview.artifacts if one.type == "records"]
    (entry,) = records.manifest.contents
    assert Path(entry.local_path).read_bytes() == (tmp_path / "out" / "records.jsonl").read_bytes()


def test_without_wandb_a_comparison_is_still_on_record(comparison: Comparison, tmp_path: Path) -> None:
    track(comparison, tmp_path / "out", None, tensorboard=False)
    lines = (tmp_path / "out" / "tracking" / "overview" / "run.jsonl").read_text().splitlines()
    assert {json.loads(line)["event"] for line in lines} >= {"config", "table", "artifact", "summary"}
    assert not run_files(tmp_path / "out" / "tracking" / "overview")
