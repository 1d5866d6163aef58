from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from biscale_gym.tracking import Tracker, open_tracker
from biscale_gym.wandb_run import Limits, WandbRun, new_run
from tests.wandb_file import RunFile, run_files
from tests.wandb_server import WandbServer

KEY, TOKEN = secrets.token_hex(20), secrets.token_hex(20)
"""Drawn, since a run's diff.patch may hold this very file."""
CALLS = 200
SLOW_S = 2.0
"""Far more than 200 calls take that nobody waits for (some 20 ms)."""
WAITED_FOR_EVER_S = 60.0
"""W&B may have 120 s at the end of a run, unless a test says less."""


@pytest.fixture(autouse=True)
def nobodys_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


def opened(folder: Path, limits: Limits | None = None, resume: str | None = None) -> Tracker:
    return open_tracker(
        folder, kind="train", name="first", group="some", tags=["a"], wandb="testbed", limits=limits, resume=resume
    )


def sink_of(tracker: Tracker) -> WandbRun:
    sink = tracker._sinks["W&B"]
    assert isinstance(sink, WandbRun)
    return sink


def until(condition: Callable[[], object], limit_s: float = 120.0) -> None:
    latest = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.02)


def children(process_id: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process_id)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


@contextmanager
def troubled() -> Iterator[list[str]]:
    """W&B's warnings, each of which may come once."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if str(warning.message).startswith("W&B")]
    assert len(messages) == len(set(messages))


def log_many(tracker: Tracker, first: int = 0) -> None:
    """Logs as a training does, and would be late if W&B could make it wait."""
    start = time.monotonic()
    for step in range(first, first + CALLS):
        tracker.log({f"figure_{number}": step for number in range(50)}, step, "train")
    assert time.monotonic() - start < SLOW_S


def all_on_disk(folder: Path) -> bool:
    """Whether what ``log_many`` logged is in W&B's file."""
    return [len([row for row in RunFile(one).history if "train/figure_0" in row]) for one in run_files(folder)] == [
        CALLS
    ]


def logged(folder: Path) -> int:
    return (folder / "run.jsonl").read_text().count('"event": "log"')


def test_an_offline_run_reads_back_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SOMEBODYS_TOKEN", TOKEN)
    model = tmp_path / "model.bin"
    model.write_bytes(b"weights")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().plot([0, 1], [0.5, 0.99])
    with opened(tmp_path) as tracker:
        tracker.config({"algorithm": {"learning_rate": 3e-4}, "scenario": "smoke"})
        for step in (0, 10, 20):
            tracker.log({"loss": step / 8, "entropy": float("nan")}, step, "train")
        tracker.table("scenarios", ["scenario", "energy_j"], [["smoke", 12.5], ["tight", None]], 20)
        tracker.figure("cdf", figure, 20)
        tracker.artifact(model, "model", "policy of smoke", {"steps": 20})
        tracker.summary({"validation/energy_j": 12.5})

    (path,) = run_files(tmp_path)
    run = RunFile(path)
    assert run.offline
    assert (run.run.run_id, run.run.project, run.run.display_name) == (tracker.run_id, "testbed", "first")
    assert (run.run.run_group, list(run.run.tags), run.run.job_type) == ("some", ["a"], "train")
    assert run.config["algorithm"] == {"learning_rate": 3e-4}
    assert len(run.config["config_hash"]) == 16
    provenance = run.config["provenance"]
    assert run.run.git.commit == (provenance["git_revision"] or "")
    assert {"numba", "torch", "wandb", "git_dirty"} <= set(provenance)
    if (tmp_path / "diff.patch").exists():
        assert (run.files / "diff.patch").read_text() == (tmp_path / "diff.patch").read_text()
    rows = [row for row in run.history if "train/loss" in row]
    assert [(row["global_step"], row["train/loss"]) for row in rows] == [(0, 0.0), (10, 1.25), (20, 2.5)]
    assert {(one.name or one.glob_name, one.step_metric) for one in run.metrics} == {
        ("global_step", ""),
        ("*", "global_step"),
    }
    (table,) = [row for row in run.history if row.get("scenarios._type") == "table-file"]
    assert (table["scenarios.nrows"], table["global_step"]) == (2, 20)
    content = json.loads((run.files / table["scenarios.path"]).read_text())
    assert content == {"columns": ["scenario", "energy_j"], "data": [["smoke", 12.5], ["tight", None]]}
    (picture,) = [row for row in run.history if row.get("cdf._type") == "image-file"]
    assert (run.files / picture["cdf.path"]).read_bytes() == (tmp_path / "figures" / "cdf-20.png").read_bytes()
    (kept,) = [one for one in run.artifacts if one.type == "model"]
    assert (kept.name, kept.metadata) == ("policy-of-smoke", '{"steps":20}')
    (entry,) = kept.manifest.contents
    assert Path(entry.local_path).read_bytes() == b"weights"
    assert Path(entry.local_path).is_relative_to(tmp_path)
    assert run.summary["validation/energy_j"] == 12.5
    assert run.statistics >= 1
    assert run.exit_status == 0
    assert f"wandb sync {path.parent}" in capsys.readouterr().err
    for file in tmp_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY.encode() not in content, file
            assert TOKEN.encode() not in content, file


def test_without_a_key_a_run_is_offline_and_a_resumed_one_keeps_its_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as first:
        first.log({"loss": 1.0}, 1)
    with opened(tmp_path, resume=first.run_id) as second:
        second.log({"loss": 0.5}, 2)
    assert second.run_id == first.run_id
    runs = [RunFile(path) for path in run_files(tmp_path)]
    assert [run.run.run_id for run in runs] == [first.run_id] * 2
    assert sorted(run.history[-1]["global_step"] for run in runs) == [1, 2]
    assert "offline (no key is configured)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_costs_only_the_wandb_run(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way, also of a root user")
    with troubled() as messages:
        tracker = opened(tmp_path)
        log_many(tracker)
        tracker.close()
    assert any("File exists" in message for message in messages)
    assert logged(tmp_path) == CALLS
    assert tracker.unreachable


def test_a_service_killed_in_the_middle_costs_only_the_wandb_run(tmp_path: Path) -> None:
    with troubled() as messages:
        tracker = opened(tmp_path)
        process = sink_of(tracker).process_id
        tracker.log({"loss": 0.0}, 0)
        until(lambda: run_files(tmp_path))
        (service,) = children(process)
        os.kill(service, signal.SIGKILL)
        log_many(tracker, 1)
        until(lambda: sink_of(tracker)._process.poll() is not None)
        log_many(tracker, 1 + CALLS)
        tracker.close()
    assert any("the run goes on without it" in message for message in messages)
    assert any("calls were dropped" in message for message in messages)
    assert logged(tmp_path) == 1 + 2 * CALLS


def test_a_process_that_hangs_is_neither_waited_for_nor_left_behind(tmp_path: Path) -> None:
    limits = Limits(queue_calls=16, finish_s=1.0)
    with troubled() as messages:
        tracker = opened(tmp_path, limits)
        process = sink_of(tracker).process_id
        until(lambda: run_files(tmp_path))
        os.kill(process, signal.SIGSTOP)
        log_many(tracker)
        start = time.monotonic()
        tracker.close()
    assert 0.9 < time.monotonic() - start < WAITED_FOR_EVER_S
    assert any("does not keep up" in message for message in messages)
    assert any("not finished within 1 s" in message for message in messages)
    (count,) = [int(found[1]) for message in messages if (found := re.search(r"(\d+) calls were dropped", message))]
    assert 0 < count < CALLS
    assert logged(tmp_path) == CALLS
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_server_that_never_answers_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker = opened(tmp_path, Limits(start_s=1.0))
        log_many(tracker)
        start = time.monotonic()
        tracker.close()
        assert time.monotonic() - start < WAITED_FOR_EVER_S
    (path,) = run_files(tmp_path)
    run = RunFile(path)
    assert run.offline
    assert all_on_disk(tmp_path)
    assert run.exit_status == 0
    assert tracker.unreachable
    assert "no answer from http://127.0.0.1" in capsys.readouterr().err


def test_a_connection_lost_in_the_middle_leaves_a_run_to_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with troubled() as messages, WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = opened(tmp_path, Limits(finish_s=3.0))
        tracker.log({"loss": 1.0}, 1)
        until(lambda: "file_stream" in server.operations)
        server.end()
        log_many(tracker, 2)
        until(lambda: all_on_disk(tmp_path))
        start = time.monotonic()
        tracker.close()
    assert time.monotonic() - start < WAITED_FOR_EVER_S
    (path,) = run_files(tmp_path)
    assert not RunFile(path).offline
    assert all_on_disk(tmp_path)
    assert tracker.unreachable
    assert any("Timeout" in message or "not finished" in message for message in messages)
    assert f"not complete there; upload it with: wandb sync {path.parent}" in capsys.readouterr().err
    for file in path.parent.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_with_a_key_and_a_server_the_history_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with troubled() as messages, opened(tmp_path) as tracker:
            for step in (1, 2):
                tracker.log({"loss": 1.0 / step}, step)
    assert messages == []
    assert [(line["global_step"], line["loss"]) for line in server.lines] == [(1, 1.0), (2, 0.5)]
    assert "requirements.txt" in server.uploaded
    assert not tracker.unreachable
    said = capsys.readouterr().err
    assert f"{server.url}/somebody/testbed/runs/{tracker.run_id}" in said
    assert "wandb sync" not in said


def test_under_an_agent_project_and_id_are_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "left over")
    assert new_run("testbed")[0] == "testbed"
    assert new_run("testbed")[1] != "left over"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run0")
    monkeypatch.setenv("WANDB_PROJECT", "the sweep's")
    assert new_run("testbed") == ("the sweep's", "run0")


def test_wandb_switched_off_in_the_environment_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with troubled() as messages, opened(tmp_path) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert messages == []
    assert run_files(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_a_call_that_wandb_refuses_costs_only_itself(tmp_path: Path) -> None:
    with troubled() as messages, opened(tmp_path) as tracker:
        tracker.table("broken", ["one", "two"], [[1]])
        tracker.artifact(tmp_path / "nothing", "model", "policy")
        tracker.table("long " * 100, ["one"], [[1]])
        tracker.log({"loss": 1.0}, 1)
    (message,) = messages
    assert message.startswith("W&B: 2 calls were refused, the first by ")
    (path,) = run_files(tmp_path)
    assert RunFile(path).history[-1]["loss"] == 1.0
