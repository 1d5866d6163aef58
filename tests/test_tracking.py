from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

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


def test_tensorboard_gets_the_same(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(2, 1), dpi=50)
    with open_tracker(tmp_path, kind="train", name="first", tensorboard=True) as tracker:
        tracker.config({"learning_rate": 3e-4})
        for step in (0, 10):
            tracker.log({"loss": step / 8}, step, "train")
        tracker.table("scenarios", ["scenario", "energy_j"], [["smoke", 12.5]], 10)
        tracker.figure("cdf", figure, 10)
        tracker.summary({"energy_j": 12.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(0, 0.0), (10, 1.25)]
    (image,) = events.Images("cdf")
    assert (image.width, image.height, image.step) == (100, 50, 10)
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| smoke | 12.5 |" in texts["scenarios/text_summary"]
    assert '"energy_j": 12.5' in texts["summary/text_summary"]


def test_a_record_that_fails_is_left_behind_with_one_warning(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, kind="train", name="first", tensorboard=True)
    tracker._sinks["TensorBoard"].close(0)
    (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            tracker.log({"loss": 0.0}, step)
        tracker.figure("missing", tmp_path / "missing.png")
        tracker.close()
    assert len([one for one in caught if "TensorBoard: " in str(one.message)]) == 1
    assert [line["event"] for line in lines(tmp_path)][-5:] == ["log", "log", "log", "figure", "end"]


def test_a_figure_that_cannot_be_saved_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    with open_tracker(tmp_path, kind="train", name="first") as tracker, pytest.warns(UserWarning, match="figures"):
        tracker.figure("cdf", Figure())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackingError, match=r"--wandb needs wandb: pip install 'biscale-gym\[train\]'"):
        open_tracker(tmp_path, kind="train", name="first", wandb="testbed")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="file: cannot be written"):
        open_tracker(tmp_path / "file", kind="train", name="first")
