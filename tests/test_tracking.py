from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from biscale_gym.tracking import TrackingError, open_tracker


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


def test_every_call_is_a_line(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"")
    with open_tracker(tmp_path, kind="train", name="first", group="some", tags=["a"]) as tracker:
        tracker.config({"learning_rate": 3e-4, "policy": {"layers": (64, 64)}})
        tracker.log({"loss": 0.5, "entropy": float("nan")}, 10, "train")
        tracker.table("scenarios", ["scenario", "energy_j"], [["smoke", 12.5], ["tight", None]], 10)
        tracker.figure("cdf", picture)
        tracker.artifact(picture, "model", "policy", {"steps": 10})
        tracker.summary({"energy_j": 12.5})
    assert tracker.run_id is None
    start, provenance, config, log, table, figure, artifact, summary, end = lines(tmp_path)
    assert (start["event"], start["kind"], start["group"], start["tags"]) == ("start", "train", "some", ["a"])
    assert {"git_revision", "numba", "torch", "command"} <= set(provenance["values"]["provenance"])
    assert config["values"]["policy"] == {"layers": [64, 64]}
    assert len(config["values"]["config_hash"]) == 16
    assert (log["global_step"], log["metrics"]) == (10, {"train/loss": 0.5, "train/entropy": None})
    assert table["rows"] == [["smoke", 12.5], ["tight", None]]
    assert figure["path"] == artifact["path"] == "picture.png"
    assert summary["values"] == {"energy_j": 12.5}
    assert (end["event"], end["exit_status"]) == ("end", 0)


def test_an_exception_ends_the_records_with_status_1(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_tracker(tmp_path, kind="train", name="first"):
        _ = 1 / 0
    assert lines(tmp_path)[-1]["exit_status"] == 1


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_tracker(tmp_path, kind="train", name="first") as tracker:
            tracker.log({"loss": 0.0}, step)
    assert [line["global_step"] for line in lines(tmp_path) if line["event"] == "log"] == [1, 2]


def test_a_kind_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="did you mean 'train'"):
        open_tracker(tmp_path, kind="trian", name="first")  # type: ignore[arg-type]
