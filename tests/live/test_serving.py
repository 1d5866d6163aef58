"""Real vLLM workers on CPU cores: serving, KV transfer, and what happens when a worker or the parent dies.

They need vLLM: ``make test-live``, or ``.venv-live/bin/python -m pytest -m live tests/live``.
"""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live.helpers import (
    LOOPBACK,
    REAL_WORKERS,
    ROOT,
    children,
    ended,
    everything_finished,
    listening_addresses,
    steady,
    wait_until,
)

from biscale_gym.config import load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Pool, WorkerProcess
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Outcome, Replay, Watcher
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.worker import ORPHAN_GRACE_S
from biscale_gym.metrics import tpot_s, ttft_s
from biscale_gym.traces import Trace

pytestmark = REAL_WORKERS

HUNG_S, LEASE_S = 10.0, 6
Play = Callable[..., Outcome]


@pytest.fixture(scope="module")
def settings() -> LiveSettings:
    changes = {"hung_s": HUNG_S, "kv_lease_s": LEASE_S, "restarts": 9}
    return load_preset(LiveSettings, "live", "cpu").model_copy(update=changes)


@pytest.fixture(scope="module")
def pool(
    scenario: ScenarioSettings, settings: LiveSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    with Pool(scenario, settings, tmp_path_factory.mktemp("live")) as started:
        yield started


@pytest.fixture
def play(pool: Pool, scenario: ScenarioSettings, tmp_path: Path) -> Play:
    def run(trace: Trace | None = None, controller: str = "max-clock", watcher: Watcher | None = None) -> Outcome:
        context = prepared(scenario, None, 0)[1]
        return Replay(pool, trace or steady(), controller, context, tmp_path / "records", 0, watcher).run()

    return run


def settled(pool: Pool, phase: str) -> bool:
    """Listen for a moment; whether no KV is held by a phase's workers."""
    for _ in pool.messages(0.1):
        pass
    return all(worker.kv_used_tokens == 0 for worker in pool.workers if worker.setup.phase == phase)


# -- serving -----------------------------------------------------------------------------------------------------------


@pytest.mark.live_smoke
def test_every_prompts_kv_is_transferred_and_lengths_are_exact(play: Play, pool: Pool, tmp_path: Path) -> None:
    trace = steady()
    outcome = play(trace)
    everything_finished(outcome)
    assert outcome.prompt_tokens == int(trace.prompt_tokens.sum())
    assert outcome.prompt_tokens_by_source.get("external_kv_transfer") == outcome.prompt_tokens
    assert outcome.prompt_tokens_by_source.get("local_compute", 0) == 0
    assert len(outcome.itl_s) == int((trace.output_tokens - 1).sum())
    assert (outcome.lag_s >= 0.0).all()
    assert np.median(outcome.lag_s) < 0.1
    np.testing.assert_allclose(outcome.requests.arrival_s, trace.arrival_s)
    assert (ttft_s(outcome.requests) > 0.0).all()
    spans_s = tpot_s(outcome.requests) * (trace.output_tokens - 1)
    assert spans_s.sum() == pytest.approx(outcome.itl_s.sum())
    rows = {name: read_records(tmp_path / "records" / f"{name}.csv") for name in ("prefill-0", "decode-0")}
    assert rows["prefill-0"]["prefill_tokens"].sum() == outcome.prompt_tokens
    assert rows["prefill-0"]["batch"].sum() == 0
    assert rows["decode-0"]["batch"].sum() == int(trace.output_tokens.sum())  # the first token once more
    assert rows["decode-0"]["prefill_tokens"].sum() == 0
    assert all(set(each["source"]) == {"modelled"} for each in rows.values())
    busy_j = sum(each["energy_j"].sum() for each in rows.values())
    assert 0.0 < busy_j < outcome.energy_j
    assert settled(pool, "prefill")


def test_a_full_disk_ends_records_and_not_the_serving(play: Play, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "decode-0.csv").symlink_to("/dev/full")
    outcome = play()
    everything_finished(outcome)
    assert outcome.records_dropped > 10
    assert len(read_records(folder / "prefill-0.csv")) > 0


def test_times_between_tokens_are_those_of_the_iterations(
    pool: Pool, scenario: ScenarioSettings, tmp_path: Path
) -> None:
    """Each of a request's tokens reaches the client when its iteration has ended, and before the next one's does."""
    context = prepared(scenario, None, 0)[1]
    replay = Replay(pool, steady(1, output_tokens=40), "max-clock", context, tmp_path, 0)
    outcome = replay.run()
    (served,) = replay._served
    rows = read_records(tmp_path / "decode-0.csv")
    ended_s = rows["end_s"][rows["batch"] > 0]
    assert len(ended_s) == 40  # the first makes the prefill worker's token once more
    token_s = np.array(served.token_s)
    np.testing.assert_array_equal(outcome.itl_s, np.diff(token_s))
    late_s = token_s[1:] - ended_s[1:]
    assert (late_s > 0.0).all()
    assert np.median(late_s) < 0.1
    assert (outcome.itl_s > 0.0).all()  # each has a time of its own
    assert outcome.itl_s[1:].sum() == pytest.approx(ended_s[-1] - ended_s[1] + late_s[-1] - late_s[0])


def test_clock_policies_act_on_live_workers(play: Play, tmp_path: Path) -> None:
    def decode_records() -> np.ndarray:
        return read_records(tmp_path / "records" / "decode-0.csv")

    play()
    top = decode_records()
    assert set(top["clock_mhz"]) == {1980}
    low = play(controller="biscale")
    everything_finished(low)
    rows = decode_records()
    assert low.source == "modelled"
    assert rows["energy_j"].sum() / rows["duration_s"].sum() < 0.8 * top["energy_j"].sum() / top["duration_s"].sum()
    lowered = rows[rows["clock_mhz"] < 1980]
    assert len(lowered) > 20
    assert np.median(lowered["duration_s"] / lowered["computed_s"]) > 1.05
    # Requests in the batch are not behind it: the last iteration runs the last request alone.
    assert rows["queue_requests"][-1] == 0
    assert np.median(low.control_s) < 0.3e-3


def test_what_does_not_fit_is_rejected_and_one_token_needs_no_decode(play: Play, pool: Pool) -> None:
    trace = Trace(np.array([0.0, 0.1, 0.2]), np.array([2040, 200, 100]), np.array([100, 1, 2]), "odd")
    outcome = play(trace)
    assert outcome.states == {"finished": 2, "failed": 0, "rejected": 1, "unfinished": 0}
    assert outcome.prompt_tokens == outcome.prompt_tokens_by_source["external_kv_transfer"] == 100
    wait_until(lambda: settled(pool, "prefill"), 2.0)


def test_nothing_listens_beyond_loopback(play: Play, pool: Pool) -> None:
    play(steady(2))
    found = listening_addresses({os.getpid(), *(worker.pid for worker in pool.workers)})
    assert found  # the side channels
    assert found <= LOOPBACK


# -- deaths ------------------------------------------------------------------------------------------------------------


def when(phase: str, number: int, act: Callable[[WorkerProcess], None]) -> Watcher:
    """Act once, when a request is about to be sent to a phase's worker."""
    done = []

    def watch(stage: str, request: int, worker: WorkerProcess) -> None:
        if (stage, request) == (phase, number) and not done:
            done.append(request)
            act(worker)

    return watch


def kill(worker: WorkerProcess) -> None:
    os.kill(worker.pid, signal.SIGKILL)


def test_decode_killed_before_its_pull(play: Play, pool: Pool) -> None:
    pinned: list[int] = []

    def before_pull(worker: WorkerProcess) -> None:
        kill(worker)
        threading.Timer(1.0, lambda: pinned.append(pool.workers[0].kv_used_tokens)).start()

    outcome = play(watcher=when("decode", 3, before_pull))
    everything_finished(outcome)
    assert outcome.retried >= 1
    assert "decode-0 ended with status -9" in outcome.replaced
    assert pinned[0] > 0  # nobody fetches this prompt's KV any more ...
    wait_until(lambda: settled(pool, "prefill"), LEASE_S + 60.0)  # ... and its lease ends


def test_kv_that_nobody_fetched_in_time_is_computed_again(play: Play, pool: Pool) -> None:
    """The next decode worker comes later than the leases of the prompts that wait for it end."""
    began_s = time.monotonic()

    def long_gone(worker: WorkerProcess) -> None:
        kill(worker)
        restart = worker.restart

        def late() -> None:
            restart()
            os.kill(worker.pid, signal.SIGSTOP)
            threading.Timer(LEASE_S + 4.0, os.kill, (worker.pid, signal.SIGCONT)).start()

        worker.restart = late  # type: ignore[method-assign]

    outcome = play(watcher=when("decode", 2, long_gone))
    del pool.workers[1].restart  # type: ignore[misc]
    assert time.monotonic() - began_s > LEASE_S + 4.0
    everything_finished(outcome)
    assert outcome.retried > 2  # those that had begun there, and those that waited
    assert len(outcome.replaced) == 1


def test_decode_killed_in_the_midst_of_a_transfer(pool: Pool, scenario: ScenarioSettings, tmp_path: Path) -> None:
    """Prefill stands still, so that the transfer has begun and cannot end when decode dies."""
    prefill, decode = pool.workers
    seen: dict[str, Any] = {}

    def in_transfer(worker: WorkerProcess) -> None:
        os.kill(prefill.pid, signal.SIGSTOP)

        def end() -> None:
            moved = replay._served[2]
            with contextlib.suppress(AssertionError):
                wait_until(lambda: decode.kv_used_tokens > 0, HUNG_S / 2)
            time.sleep(0.5)
            seen.update(stage=moved.stage, made=moved.made, taken=decode.kv_used_tokens)
            kill(worker)
            os.kill(prefill.pid, signal.SIGCONT)
            time.sleep(1.0)
            seen.update(pinned=prefill.kv_used_tokens)

        threading.Thread(target=end, daemon=True).start()

    context = prepared(scenario, None, 0)[1]
    trace = steady(gap_s=1.0)  # no other request is there
    replay = Replay(pool, trace, "max-clock", context, tmp_path, 0, when("decode", 2, in_transfer))
    outcome = replay.run()
    everything_finished(outcome)
    assert (seen["stage"], seen["made"]) == ("decode", 0), "it had ended"
    assert seen["taken"] > 0, "it had not begun: no KV blocks were there to take it"
    assert seen["pinned"] > 0
    assert outcome.retried >= 1
    assert "decode-0 ended with status -9" in outcome.replaced
    wait_until(lambda: settled(pool, "prefill"), LEASE_S + 60.0)


def test_prefill_killed_with_prompts_and_pinned_kv(play: Play) -> None:
    outcome = play(watcher=when("prefill", 4, kill))
    everything_finished(outcome)
    assert outcome.retried >= 1
    assert "prefill-0 ended with status -9" in outcome.replaced


def test_a_worker_that_hangs_is_replaced(play: Play) -> None:
    outcome = play(watcher=when("decode", 3, lambda worker: os.kill(worker.pid, signal.SIGSTOP)))
    everything_finished(outcome)
    assert any(why.startswith("decode-0 has said nothing for 1") for why in outcome.replaced)


def test_workers_are_replaced_after_the_forkserver_has_died(play: Play, pool: Pool) -> None:
    """It starts every worker; killed alone it is not missed, and the next worker to start gets a new one.

    So does multiprocessing's other helper.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    tracker = multiprocessing.resource_tracker._resource_tracker  # type: ignore[attr-defined]

    def all_of_them(worker: WorkerProcess) -> None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        os.kill(tracker._pid, signal.SIGKILL)
        for each in pool.workers:
            kill(each)

    outcome = play(watcher=when("decode", 3, all_of_them))
    everything_finished(outcome)
    assert len(outcome.replaced) == 2


def test_a_request_whose_workers_die_again_and_again_fails(play: Play, settings: LiveSettings) -> None:
    killed: list[int] = []

    def watch(phase: str, number: int, worker: WorkerProcess) -> None:
        if (phase, number) == ("decode", 0):
            killed.append(worker.pid)
            kill(worker)

    outcome = play(steady(1), watcher=watch)
    assert outcome.states["failed"] == 1
    assert outcome.retried == settings.retries
    # Where the next worker takes longer to start than KV is leased for, an attempt ends without having met one.
    assert 1 <= len(killed) <= settings.retries + 1
    assert outcome.replaced == ("decode-0 ended with status -9",) * len(killed)


def test_a_worker_that_dies_too_often_ends_the_run(play: Play, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    none_left = pool.settings.model_copy(update={"restarts": 0})
    monkeypatch.setattr(pool, "settings", none_left)
    with pytest.raises(LiveError, match=r"prefill-0 was replaced \d+ times, and died again: .* status -9"):
        play(watcher=when("prefill", 1, kill))
    monkeypatch.undo()
    pool.workers[0].restart()
    while not pool.workers[0].up:
        list(pool.messages(0.1))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)],
    ids=["SIGKILL", "SIGTERM", "SIGINT"],
)
def test_everything_ends_with_the_command(tmp_path: Path, number: signal.Signals, status: int) -> None:
    program = "from biscale_gym.cli import main; main()"
    command = [sys.executable, "-c", program, "live", "--controllers", "max-clock", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    records = tmp_path / "max-clock" / "decode-0.csv"
    wait_until(lambda: records.is_file() and len(records.read_text().splitlines()) > 10, 600.0)
    started = children(parent.pid)
    assert len(started) >= 4  # two workers, and multiprocessing's helpers
    parent.send_signal(number)
    _, said = parent.communicate(timeout=120.0)
    assert parent.returncode == status
    assert "Traceback" not in said
    wait_until(lambda: all(ended(pid) for pid in started), ORPHAN_GRACE_S + 60.0)


def test_the_context_of_workers_can_be_sent(scenario: ScenarioSettings) -> None:
    import pickle

    context = prepared(scenario, None, 0)[1]
    again: PlanContext = pickle.loads(pickle.dumps(context))
    assert again.clocks_mhz == context.clocks_mhz == (750, 930, 1110, 1290, 1470, 1650, 1830, 1980)
