"""``biscale-gym profile`` on cards: the workers' own loop and the real device code, a toy in the engine's place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import fake_nvml, toy
from live.fake_nvml import LOCK, TOP_MHZ, Cards, counting
from live.helpers import ROOT, wait_until

from biscale_gym.calibration.calibrate import calibrate
from biscale_gym.cluster.placement import written_placement
from biscale_gym.config import read_yaml, validate
from biscale_gym.control.controllers import make_controller
from biscale_gym.control.rollout import Rollout
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.simulate import StatedPlacement
from biscale_gym.control.workload import requests_for
from biscale_gym.live import card_sweep
from biscale_gym.live.card_sweep import CardSweep
from biscale_gym.live.demand import prepared
from biscale_gym.live.devices import Meter, Work
from biscale_gym.live.errors import LiveError
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.pool import Pool, WorkerProcess
from biscale_gym.live.profile_file import CARD_COLUMNS, ProfileFile, handovers_path, service_path
from biscale_gym.live.profile_points import Point, SweepSettings
from biscale_gym.live.profiling import run_sweep
from biscale_gym.live.settings import LiveSettings
from biscale_gym.profiles import load_profile
from biscale_gym.profiles.iterations import read_profiled, synthetic_iterations

LOW_MHZ = 930
SWEEP = SweepSettings(
    decode_batches=(1, 4),
    decode_contexts=(64, 256),
    prefill_counts=(2,),
    prefill_lengths=(128, 256),
    warmup_iterations=2,
    iterations=4,
    warmup_s=0.05,
    window_s=0.4,
    least_repeats=2,
    most_repeats=2,
    precision_percent=5.0,
    handovers=5,
    handover_gap_s=0.1,
)
SCENARIO = load_scenario("live-smoke", {"training_s": 60.0})
PLACEMENT = [{"phase": "prefill", "tp": 2, "count": 1}, {"phase": "decode", "tp": 2, "count": 1}]
H100 = load_scenario("live-h100", {"placement": PLACEMENT, "training_s": 60.0})


@pytest.fixture
def four_cards(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    cards.state.cards = 4
    toy.without_vllm(monkeypatch, cards)
    with counting(cards):
        yield cards


@pytest.fixture
def pool(four_cards: Cards, tmp_path: Path) -> Iterator[Pool]:
    values = read_yaml(ROOT / "configs" / "live" / "cpu.yaml")
    device = {"kind": "nvml", "gpus": [2, 3, 0, 1]}
    with toy.ToyPool(SCENARIO, validate(LiveSettings, values | {"device": device}, "toy"), tmp_path) as started:
        yield started
    assert four_cards.locked_mhz == [0, 0, 0, 0]


def sweep_of(pool: Pool, folder: Path, **changes: Any) -> CardSweep:
    return CardSweep(pool, prepared(SCENARIO, None, 0)[1], SWEEP.model_copy(update=changes), folder)


def test_a_sweep_sets_clocks_and_reads_latency_and_joules(pool: Pool, four_cards: Cards, tmp_path: Path) -> None:
    path = tmp_path / "cards.csv"
    few = SWEEP.model_copy(
        update={
            "decode_contexts": (64, 30_000),
            "prefill_lengths": (256, 3000),
            "decode_batches": (4, 500),
            "service_s": 1.0,
        }
    )
    context = prepared(SCENARIO, None, 0)[1]
    clocks = (LOW_MHZ, TOP_MHZ)
    told = run_sweep(pool, context, few, clocks, path)
    assert (told.points, told.rows) == (6, 12), "a batch in each phase, and none; no worker holds the others"
    assert (told.power, told.mode, told.clocks_mhz) == (True, "control", clocks)
    found = read_profiled(path)
    data = found.iterations
    for number, label in enumerate(found.points.tolist()):
        work = Work(*(float(column[number]) for column in (data.batch, data.kv_tokens, data.prefill_tokens)))
        mhz = int(data.clock_mhz[number])
        assert data.power_w_per_gpu[number] == pytest.approx(toy.watts(work, mhz), rel=0.3), label
        if not work.empty:
            assert data.latency_ms[number] > 1e3 * toy.seconds(work, mhz)
            assert found.host_ms[number] < data.latency_ms[number]
    rows = found.points == "prefill 2x256"
    assert (set(data.prefill_tokens[rows]), set(data.sum_len_sq[rows])) == ({512.0}, {2 * 256.0**2})
    assert (data.kv_tokens[found.points == "decode 4x64"] > 4 * 64).all()
    assert (found.points == "idle").sum() == 4
    identity = found.provenance["identity"]
    assert (identity["device"], identity["clocks"], identity["precision"]) == ("Fake H100", "control", "bf16")
    assert identity["driver"].startswith("NVIDIA fake, ")
    assert found.provenance["power"].startswith("measured")
    assert found.provenance["model_config"]["layers"] == 4
    assert handovers_path(path).exists()
    assert not service_path(path).exists()
    moves = [call for call in four_cards.calls if call.what == LOCK]
    assert {call.mhz for call in moves} == {LOW_MHZ}
    pairs = {(one.card, other.card) for one, other in zip(moves[::2], moves[1::2], strict=True)}
    assert pairs == {(0, 1), (2, 3)}, "a group moves together"
    assert run_sweep(pool, context, few, clocks, path).rows == told.rows, "nothing is left to measure"
    with pytest.raises(LiveError, match=r"no clock 931 MHz; valid: 345, 360, .*1980"):
        run_sweep(pool, context, few, (931,), path)


def test_where_no_clock_may_be_set_the_cards_own_is_measured_at(
    pool: Pool, four_cards: Cards, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for card in four_cards:
        card.lock_error = card.reset_error = fake_nvml.NO_PERMISSION
        card.clock_mhz = 1410
    measuring = sweep_of(pool, tmp_path)
    assert measuring.mode == "observe-only"
    assert measuring.clocks(()) == (1410,)
    with pytest.raises(LiveError, match=r"no clock may be set here .*without --clocks every point .* 1410 MHz"):
        measuring.clocks((930,))
    point = next(point for point in measuring.points((1410,)) if point.label == "decode 4x64")
    (row,) = measuring.repeat(point)
    assert row["clock_mhz"] == 1410
    assert row["power_w_per_gpu"] == pytest.approx(100.0 + 141.0, rel=0.3)
    told = measuring.provenance((1410,))
    assert told["identity"]["clocks"] == "observe-only at 1410 MHz"
    assert told["clocks"].startswith("observed only, none was set: the column holds the 1410 MHz")
    said = capfd.readouterr().err
    assert said.count("clocks are observed only") == 1
    assert "--cap-add SYS_ADMIN" in said
    assert not [call for call in four_cards.calls if call.what == LOCK]
    for card in four_cards:
        card.clock_mhz = 1800
    with pytest.raises(LiveError, match="the cards ran at 1410 MHz, and now at 1800 MHz"):
        measuring.repeat(point)
    four_cards[0].clock_mhz = 1410
    four_cards[1].clock_mhz = 1410
    with pytest.raises(LiveError, match="the cards run at different ones: 1410 MHz, 1800 MHz"):
        sweep_of(pool, tmp_path)


def test_a_repeat_that_another_process_disturbs_is_measured_again(
    pool: Pool, four_cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = sweep_of(pool, tmp_path)
    point = Point("decode", 4, 64, LOW_MHZ, 2)
    stepped, disturbed = CardSweep._stepped, []

    def disturb(self: CardSweep, worker: WorkerProcess) -> tuple[Meter, ...]:
        if len(disturbed) < disturbances:
            disturbed.append(worker.setup.name)
            four_cards[1].locked_mhz = 0  # nvidia-smi -rgc
            time.sleep(0.5)
        return stepped(self, worker)

    monkeypatch.setattr(CardSweep, "_stepped", disturb)
    disturbances = 1
    (row,) = measuring.repeat(point)
    assert disturbed == ["decode-0"]
    assert row["power_w_per_gpu"] == pytest.approx(100.0 + 93.0, rel=0.3)
    disturbances = 99
    with pytest.raises(LiveError, match=r"decode-0 cannot measure 'decode 4x64 TP2 @930': .*clock"):
        measuring.repeat(point)


def test_an_energy_counter_that_stands_still_is_told(
    pool: Pool, four_cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = sweep_of(pool, tmp_path)
    monkeypatch.setattr(card_sweep, "COUNTER_LIMIT_S", 0.1)
    monkeypatch.setattr(toy, "watts", lambda *_: 0.0)
    with pytest.raises(LiveError, match=r"cannot measure 'prefill 2x128 TP2 @1980': an energy counter did not step"):
        measuring.repeat(Point("prefill", 2, 128, TOP_MHZ, 2))


def test_batches_of_another_kind_do_not_count(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = sweep_of(pool, tmp_path)
    monkeypatch.setattr(toy.ToyEngine, "limit", lambda *_: None)  # so that a batch holds whatever is queued
    with pytest.raises(LiveError, match=r"prefill 2x128.*: the engine forms other batches"):
        measuring.repeat(Point("prefill", 2, 128, TOP_MHZ, 2))


def test_points_leave_room_for_their_window(pool: Pool, tmp_path: Path) -> None:
    def decode(measuring: CardSweep) -> set[tuple[int, int]]:
        return {(each.count, each.tokens) for each in measuring.points((TOP_MHZ,)) if each.phase == "decode"}

    asked = {"decode_batches": (1, 31, 64, 65), "decode_contexts": (64, 1000, 1900)}
    # 65 are more sequences than a worker takes; 31 of 1,000 tokens have 24 left in its 255 blocks.
    assert decode(sweep_of(pool, tmp_path, **asked)) == {(1, 64), (1, 1000), (1, 1900), (31, 64), (64, 64)}
    assert decode(sweep_of(pool, tmp_path, window_s=2.0, **asked)) == {(1, 64), (1, 1000), (31, 64), (64, 64)}


def test_sequences_that_are_about_to_end_end_their_window(pool: Pool, tmp_path: Path) -> None:
    measuring = sweep_of(pool, tmp_path, window_s=60.0)
    (row,) = measuring.repeat(Point("decode", 4, 1900, TOP_MHZ, 2))
    assert 4 * 1900 < row["kv_tokens"] < 4 * 2048


def test_an_interrupted_sweep_gives_clocks_back(
    pool: Pool, four_cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture asserts that the cards are free again."""
    measuring = sweep_of(pool, tmp_path)

    def interrupt(*_: object) -> None:
        wait_until(lambda: four_cards.locked_mhz[:2] == [LOW_MHZ, LOW_MHZ])
        raise KeyboardInterrupt

    monkeypatch.setattr(CardSweep, "_window", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measuring.repeat(Point("decode", 1, 64, LOW_MHZ, 2))
    assert four_cards.locked_mhz[:2] == [LOW_MHZ, LOW_MHZ]


def test_cards_of_another_controller_are_refused_and_free_when_it_has_ended(pool: Pool, tmp_path: Path) -> None:
    with (
        NvmlDevice([1]),
        pytest.raises(LiveError, match=rf"decode-0: GPU 1 is controlled by process {os.getpid()} .*observe-only"),
    ):
        sweep_of(pool, tmp_path)
    assert sweep_of(pool, tmp_path).mode == "control"


def test_a_clock_of_the_scenario_that_the_cards_do_not_have_is_refused(pool: Pool, tmp_path: Path) -> None:
    context = prepared(load_scenario("live-smoke", {"clocks_mhz": [751, 1980], "training_s": 60.0}), None, 0)[1]
    with pytest.raises(LiveError, match=r"prefill-0: the device of a prefill instance has no clocks \[751\]"):
        CardSweep(pool, context, SWEEP, tmp_path)
    assert sweep_of(pool, tmp_path).mode == "control", "the cards are free again"


def test_what_an_energy_counter_cannot_tell_apart_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(LiveError, match="chunked_lengths: an energy counter cannot tell the chunks"):
        sweep_of(pool, tmp_path, chunked_lengths=(1500,))


# -- what becomes of it ------------------------------------------------------------------------------------------------


@pytest.fixture
def h100_pool(four_cards: Cards, tmp_path: Path) -> Iterator[Pool]:
    """As ``--workers h100`` has it, with half of its workers."""
    with toy.ToyPool(H100, half_h100(), tmp_path) as started:
        yield started


def half_h100(**changes: Any) -> LiveSettings:
    values = read_yaml(ROOT / "configs" / "live" / "h100.yaml")
    device = {"kind": "nvml", "gpus": [0, 1, 2, 3]}
    return validate(LiveSettings, values | {"device": device} | changes, "half of h100")


def test_a_profile_of_cards_becomes_a_cluster_with_their_power(h100_pool: Pool, tmp_path: Path) -> None:
    """A card that is 20 % slower and draws 10 % less than the model card's."""
    measuring = CardSweep(h100_pool, prepared(H100, None, 0)[1], SWEEP, tmp_path)
    clocks = measuring.clocks(())
    assert clocks == (*H100.clocks_mhz, TOP_MHZ)
    told = measuring.provenance(clocks)
    identity = told["identity"]
    assert (identity["model"], identity["precision"], identity["hardware"]) == ("llama-3.3-70b", "fp8", "h100-sxm5")
    assert identity["engine"].startswith("vllm 0.")
    assert told["allreduce"].startswith("measured")
    path = tmp_path / "cards.csv"
    file = ProfileFile(path, told, CARD_COLUMNS)
    truth = load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
    data = synthetic_iterations(truth, 2, clocks, 400, 0.005, np.random.default_rng(0))
    names = CARD_COLUMNS[:6]
    for number in np.flatnonzero(data.power_w_per_gpu < 0.95 * data.power_w_per_gpu.max()):  # not at the board's limit
        row = {name: float(getattr(data, name)[number]) for name in names}
        busy = bool(row["batch"] or row["prefill_tokens"])
        latency_ms = 1.2 * float(data.latency_ms[number]) if busy else 0.0
        row |= {"latency_ms": latency_ms, "host_ms": 0.5 * busy}
        label = f"point {number}" if busy else "idle"
        file.add([{**row, "power_w_per_gpu": 0.9 * float(data.power_w_per_gpu[number]), "point": label}])
    found = calibrate(path, tmp_path / "out", "parametric", folds=2)
    assert found.power == "measured"
    assert all(error.power_percent is not None and error.power_percent < 3.0 for error in found.errors)
    assert (tmp_path / "out" / "hardware.yaml").read_text().splitlines()[1].startswith("description: 'Fake H100:")
    overrides = {f"cluster.{name}": value for name, value in found.cluster.items()}
    calibrated = load_scenario("live-h100", overrides | {"duration_s": 5.0, "warmup_s": 1.0, "training_s": 60.0})
    profile = calibrated.cluster.profile()
    for clock in (clocks[0], 1290):
        for work in ((8, 8000, 0, 0), (64, 64_000, 0, 0), (0, 0, 2048, 2 * 1024**2)):
            expected_ms = 1.2 * float(truth.latency_ms(2, clock, *work))
            assert float(profile.latency_ms(2, clock, *work)) == pytest.approx(expected_ms, rel=0.05)
            expected_w = 0.9 * float(truth.power_w(2, clock, *work))
            assert float(profile.power_w(2, clock, *work)) == pytest.approx(expected_w, rel=0.05)

    requests = requests_for(calibrated, profile, "test", 0, None, None)
    placement = written_placement(calibrated.placement, TOP_MHZ)
    held = StatedPlacement(placement, "max-clock", make_controller("max-clock").policies)
    rollout = Rollout(held, calibrated, requests, 0, profile)
    counted = rollout.run(count_drain=True)
    assert rollout.ledger().finished.all()
    assert float(counted.energy.energy_j.sum()) > 4 * 60.0 * counted.seconds, "more than four idle cards"


def test_a_profile_has_one_precision(four_cards: Cards, tmp_path: Path) -> None:
    mixed = load_scenario("live-h100", {"placement": PLACEMENT, "cluster.decode_precision": "bf16"})
    with (
        toy.ToyPool(mixed, half_h100(), tmp_path) as started,
        pytest.raises(LiveError, match="the workers have bf16/fp8: set decode_precision"),
    ):
        CardSweep(started, prepared(SCENARIO, None, 0)[1], SWEEP, tmp_path)
