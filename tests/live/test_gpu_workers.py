"""Workers and servers that control NVIDIA cards: all that lies between a configuration and the driver's C functions.

Real vLLM engines (on CPU cores), the real pynvml, and fake cards behind its ctypes calls.
"""

from __future__ import annotations

import ctypes
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from live import fake_nvml
from live.fake_nvml import LOCK, RESET, TOP_MHZ, Cards, counting
from live.helpers import REAL_WORKERS, ROOT, children, ended, everything_finished, steady, wait_until

from biscale_gym.calibration.calibrate import calibrate
from biscale_gym.cluster.placement import PHASES
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import load_preset, read_yaml, validate
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live.attached import AttachedReplay
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.pool import Pool
from biscale_gym.live.profile_points import SweepSettings
from biscale_gym.live.profiling import run_sweep
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Outcome, Replay, Watcher
from biscale_gym.live.servers import await_up, connect, start, stop
from biscale_gym.live.settings import LiveSettings
from biscale_gym.profiles.iterations import read_profiled

pytestmark = REAL_WORKERS

GPUS = {"prefill-0": (2, 3), "decode-0": (0, 1)}
Play = Callable[..., Outcome]


def preset(folder: Path) -> Path:
    """CPU workers whose clocks and joules are the cards'."""
    values = read_yaml(ROOT / "configs" / "live" / "cpu.yaml")
    gpus = [*GPUS["prefill-0"], *GPUS["decode-0"]]
    values |= {"device": {"kind": "nvml", "gpus": gpus, "watchdog_s": 20.0}, "hung_s": 60.0, "restarts": 9}
    path = folder / "cards.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def four_cards(fake_library: Path, folder: Path) -> Iterator[Cards]:
    """For this process and all that are started: the forkserver, too, must be one that finds the fake library."""
    cards = Cards(folder / "cards", 4)
    forkserver = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    copy = folder / "lib" / fake_nvml.LIBRARY
    copy.parent.mkdir()
    copy.write_bytes(fake_library.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_NVML", str(folder / "cards"))
        patch.setenv("LD_LIBRARY_PATH", str(fake_library.parent))
        patch.setenv("BISCALE_GYM_LOCKS", str(folder))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr("pynvml.nvmlLib", ctypes.CDLL(str(copy)))
        patch.setattr("pynvml._nvmlGetFunctionPointer_cache", {})
        forkserver._stop()
        yield cards
    forkserver._stop()


@pytest.fixture(scope="module")
def settings(folder: Path) -> LiveSettings:
    return load_preset(LiveSettings, "live", str(preset(folder)))


@pytest.fixture(scope="module")
def pool(four_cards: Cards, scenario: ScenarioSettings, settings: LiveSettings, folder: Path) -> Iterator[Pool]:
    with Pool(scenario, settings, folder) as started:
        yield started


@pytest.fixture
def cards(four_cards: Cards) -> Iterator[Cards]:
    """As they were before."""
    four_cards.state.calls = 0
    yield four_cards
    for card in four_cards:
        card.lock_error = card.reset_error = 0
    wait_until(lambda: four_cards.locked_mhz == [0, 0, 0, 0])


@pytest.fixture
def play(pool: Pool, scenario: ScenarioSettings, tmp_path: Path) -> Play:
    def run(controller: str = "biscale", watcher: Watcher | None = None) -> Outcome:
        context = prepared(scenario, None, 0)[1]
        return Replay(pool, steady(), controller, context, tmp_path / "records", 0, watcher).run()

    return run


SWEEP = {
    "decode_batches": [1, 4],
    "decode_contexts": [64, 512],
    "prefill_counts": [1, 2],
    "prefill_lengths": [256, 512],
    "warmup_iterations": 3,
    "iterations": 8,
    "warmup_s": 0.2,
    "window_s": 0.5,
    "least_repeats": 2,
    "most_repeats": 2,
    "precision_percent": 10.0,
    "handovers": 6,
}


def sweep_file(folder: Path) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    return path


def groups_moved_together(cards: Cards) -> None:
    """Each process set the clocks of one worker's cards alone, all of them, one after the other."""
    by_pid: dict[int, list[fake_nvml.Call]] = {}
    for call in cards.calls:
        by_pid.setdefault(call.pid, []).append(call)
    for calls in by_pid.values():
        moves = [call for call in calls if call.what == LOCK]
        assert {call.card for call in calls} in [set(gpus) for gpus in GPUS.values()]
        assert all(one.mhz == other.mhz for one, other in zip(moves[::2], moves[1::2], strict=True))
    ordered = sorted(cards.calls, key=lambda call: call.from_ns)
    assert all(earlier.to_ns <= later.from_ns for earlier, later in pairwise(ordered))  # one at a time on the node


def test_clocks_are_set_and_joules_are_the_cards(play: Play, pool: Pool, cards: Cards, tmp_path: Path) -> None:
    def spend(phase: str, number: int, _: Any) -> None:
        if (phase, number) == ("decode", 3):
            for card in cards:
                card.energy_mj += 5_000

    outcome = play(watcher=spend)
    everything_finished(outcome)
    assert (outcome.source, outcome.mode) == ("measured", "control")
    assert outcome.energy_j == 20.0
    records = {name: read_records(tmp_path / "records" / f"{name}.csv") for name in GPUS}
    for rows in records.values():
        assert set(rows["source"]) == {"measured"}
        np.testing.assert_array_equal(rows["duration_s"], rows["computed_s"])  # nothing is stretched
        np.testing.assert_allclose(rows["energy_j"], 200.0 * rows["duration_s"], rtol=1e-6)  # 100 W each
    assert min(records["decode-0"]["clock_mhz"]) < TOP_MHZ
    set_by = {worker.pid: {call.card for call in cards.calls if call.pid == worker.pid} for worker in pool.workers}
    assert list(set_by.values()) == [set(GPUS["prefill-0"]), set(GPUS["decode-0"])]
    assert min(call.mhz for call in cards.calls if call.what == LOCK) < TOP_MHZ
    groups_moved_together(cards)
    assert cards.locked_mhz == [0, 0, 0, 0]


def test_of_a_killed_worker_the_watchdog_gives_clocks_back_and_the_next_one_sets_them(
    play: Play, pool: Pool, cards: Cards
) -> None:
    killed: list[int] = []

    def kill(phase: str, number: int, worker: Any) -> None:
        if (phase, number) == ("decode", 4) and not killed:
            assert all(cards.locked_mhz[gpu] for gpu in GPUS["decode-0"])
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    outcome = play(watcher=kill)
    everything_finished(outcome)
    assert outcome.replaced == ("decode-0 ended with status -9",)
    decode = [call for call in cards.calls if call.card in GPUS["decode-0"]]
    last = max(number for number, call in enumerate(decode) if call.pid == killed[0])
    assert decode[last].what == LOCK
    after = decode[last + 1 :]
    workers = {worker.pid for worker in pool.workers}
    assert {call.what for call in after[:2]} == {RESET}
    assert not {call.pid for call in after[:2]} & workers  # the watchdog's
    assert any(call.what == LOCK and call.pid in workers for call in after)
    groups_moved_together(cards)


def test_a_second_controller_is_one_message_and_no_restart(play: Play, pool: Pool, cards: Cards) -> None:
    pids = [worker.pid for worker in pool.workers]
    with (
        NvmlDevice([0]),
        pytest.raises(LiveError, match=rf"^decode-0: GPU 0 is controlled by process {os.getpid()} .*observe-only$"),
    ):
        play()
    everything_finished(play())
    assert [worker.pid for worker in pool.workers] == pids


def test_without_permission_clocks_are_observed_and_it_is_said_once(
    play: Play, cards: Cards, capfd: pytest.CaptureFixture[str]
) -> None:
    for card in cards:
        card.lock_error = card.reset_error = fake_nvml.NO_PERMISSION
    outcome = play()
    everything_finished(outcome)
    assert (outcome.source, outcome.mode) == ("measured", "observe-only")
    assert not [call for call in cards.calls if call.what == LOCK]
    said = capfd.readouterr().err
    assert said.count("clocks are observed only") == 1
    assert "--cap-add SYS_ADMIN" in said


def test_a_sweep_of_cards_is_profiled_and_calibrated(
    pool: Pool, scenario: ScenarioSettings, cards: Cards, tmp_path: Path
) -> None:
    """The cards draw 60 W and 0.1 W/MHz, whatever runs."""

    def drawn_w(card: Any) -> float:
        return 60.0 + 0.1 * (card.locked_mhz or TOP_MHZ)

    path, clocks = tmp_path / "cards.csv", (930, TOP_MHZ)
    context = prepared(scenario, None, 0)[1]
    sweep = validate(SweepSettings, SWEEP, "sweep")
    with counting(cards, drawn_w):
        told = run_sweep(pool, context, sweep, clocks, path)
    assert (told.points, told.power, told.mode) == (2 * (4 + 4 + 1), True, "control")
    found = read_profiled(path)
    data = found.iterations
    np.testing.assert_allclose(data.power_w_per_gpu, 60.0 + 0.1 * data.clock_mhz, rtol=0.5)  # a window is short
    for clock in clocks:
        watts = np.median(data.power_w_per_gpu[data.clock_mhz == clock])
        assert watts == pytest.approx(60.0 + 0.1 * clock, rel=0.15)
    for label, batch, prompts, length in (("decode 4x512", 4, 0, 0), ("prefill 2x512", 0, 2, 512)):
        rows = data.rows(found.points == label)
        assert set(rows.clock_mhz) == set(clocks)
        assert set(rows.batch) == {float(batch)}
        assert set(rows.prefill_tokens) == {float(prompts * length)}
        assert set(rows.sum_len_sq) == {float(prompts * length**2)}
        assert (rows.latency_ms > 0.5).all()
    groups_moved_together(cards)
    assert cards.locked_mhz == [0, 0, 0, 0]
    calibration = calibrate(path, tmp_path / "out", "parametric", folds=2)
    assert calibration.power == "measured"
    profile = ClusterSettings.model_validate(calibration.cluster).profile()
    low_w, top_w = (float(profile.power_w(2, clock, 4, 2100)) for clock in clocks)
    assert top_w == pytest.approx(258.0, rel=0.3)
    assert low_w < 0.8 * top_w
    assert profile.idle_power_w(2, TOP_MHZ) == pytest.approx(258.0, rel=0.3)


def test_without_permission_a_sweep_measures_at_the_cards_own_clock(
    pool: Pool, scenario: ScenarioSettings, cards: Cards, tmp_path: Path
) -> None:
    for card in cards:
        card.lock_error = card.reset_error = fake_nvml.NO_PERMISSION
        card.clock_mhz = 1410
    few = {"decode_batches": [2, 3], "decode_contexts": [64, 2000], "prefill_lengths": [256, 2000]}
    path, context = tmp_path / "cards.csv", prepared(scenario, None, 0)[1]
    with counting(cards, lambda _: 200.0):
        told = run_sweep(pool, context, validate(SweepSettings, SWEEP | few, "sweep"), (), path)
    for card in cards:
        card.clock_mhz = 0
    assert (told.mode, told.clocks_mhz) == ("observe-only", (1410,))
    found = read_profiled(path)
    assert set(found.iterations.clock_mhz) == {1410.0}
    assert found.provenance["clocks"].startswith("observed only, none was set")
    assert not [call for call in cards.calls if call.what == LOCK]


def test_a_step_of_the_environment_sets_the_cards_clocks(cards: Cards, folder: Path, tmp_path: Path) -> None:
    env = gymnasium.make(
        "BiScale/Live-v0",
        scenario="live-smoke",
        episode_s=3.0,
        warmup_s=0.5,
        workers=str(preset(folder)),
        out=str(tmp_path),
    )
    env.reset(seed=0)
    action = np.zeros(16, np.int64)
    action[0], action[8] = 1, 4
    over = False
    while not over:
        *_, over, info = env.step(action)
        if not over and info["now_s"] > 2.0:
            assert [cards.locked_mhz[gpus[0]] for gpus in GPUS.values()] == [930, 1470]
    assert (info["energy_source"], info["clock_mode"]) == ("measured", "control")
    groups_moved_together(cards)
    env.close()


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("live", signal.SIGKILL),
        ("live", signal.SIGTERM),
        ("profile", signal.SIGKILL),
        ("profile", signal.SIGTERM),
        ("profile", signal.SIGINT),
    ],
)
def test_clocks_are_given_back_when_the_command_ends(
    cards: Cards, folder: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    program = "from biscale_gym.cli import main; main()"
    options = ["--controllers=biscale", f"--out={tmp_path}"]
    if command == "profile":
        options = [str(tmp_path / "p.csv"), f"--sweep={sweep_file(tmp_path)}", "--clocks", "930"]
    arguments = [sys.executable, "-c", program, command, *options, f"--workers={preset(folder)}"]
    parent = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(0 < clock < TOP_MHZ for clock in cards.locked_mhz), 600.0)
    started = children(parent.pid)
    parent.send_signal(number)
    parent.wait(120.0)
    wait_until(lambda: cards.locked_mhz == [0, 0, 0, 0], 120.0)
    wait_until(lambda: all(ended(pid) for pid in started), 120.0)


def test_servers_by_url_set_the_clocks_of_their_cards(
    cards: Cards, scenario: ScenarioSettings, settings: LiveSettings, folder: Path, tmp_path: Path
) -> None:
    started = []
    try:
        for server in start("live-smoke", scenario, settings, folder):
            started.append(server)
        await_up(started, 600.0)
        attached = connect(
            {phase: [each.url for each in started if each.phase == phase] for phase in PHASES}, scenario, folder
        )
        context = prepared(scenario, None, 0)[1]
        outcome = AttachedReplay(attached, steady(), "biscale", context, settings, tmp_path).run()
        everything_finished(outcome)
        assert (outcome.source, outcome.mode) == ("measured", "control")
        assert min(call.mhz for call in cards.calls if call.what == LOCK) < TOP_MHZ
        groups_moved_together(cards)
        engines = [pid for server in started for pid in children(server.process.pid)]
        started[1].process.kill()  # its engine notices
        wait_until(lambda: all(cards.locked_mhz[gpu] == 0 for gpu in GPUS["decode-0"]))
    finally:
        stop(started)
    wait_until(lambda: all(ended(pid) for pid in engines))
