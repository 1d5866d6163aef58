"""From a profile's file to presets that a cluster loads: the made-up worker comes out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration.made_up import CLOCKS, PROVENANCE, SLEPT, batch_ms, truth

from biscale_gym import cli
from biscale_gym.calibration.calibrate import calibrate, medians
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.profiles import Profile, ProfileError, load_profile
from biscale_gym.profiles.iterations import read_profiled, synthetic_iterations, write_iterations

Write = Callable[..., Path]
Rows = list[dict[str, Any]]
HANDOVERS = "prompt_tokens,ttft_ms,prefill_ms,handover_ms\n" + "".join(
    f"{tokens},{20 + 3.5},{20},{6 + 0.004 * tokens}\n" for tokens in (100, 200, 300, 400, 500)
)


@pytest.mark.parametrize("form", ["trees", "parametric"])
def test_a_cpu_profile_becomes_a_cluster(
    cpu_rows: Rows, write: Write, emulated: Profile, tmp_path: Path, form: str
) -> None:
    if form == "trees":
        pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    path = write(cpu_rows, PROVENANCE)
    path.with_suffix(".handovers.csv").write_text(HANDOVERS)
    found = calibrate(path, tmp_path / "out", form, folds=3)
    assert found.power == "modelled"
    assert {error.phase for error in found.errors} == {"prefill", "decode"}
    assert all(error.power_percent is None for error in found.errors)
    assert all(error.latency_percent <= error.latency_p90_percent < 25 for error in found.errors)
    cluster = ClusterSettings.model_validate(found.cluster)
    profile = cluster.profile()
    assert profile.clocks_mhz == CLOCKS
    assert profile.kv_capacity_tokens(2) == 32768
    tolerance = 0.04 if form == "trees" else 0.15
    for clock in CLOCKS:
        for work in ((1, 300, 0, 0), (3, 900, 0, 0), (10, 6000, 0, 0), (0, 0, 200, 200**2), (0, 0, 600, 2 * 300**2)):
            latency_ms, _ = truth(emulated, clock, *work)
            assert float(profile.latency_ms(2, clock, *work)) == pytest.approx(latency_ms, rel=tolerance)
            card_w, idle_w = float(emulated.power_w(2, clock, *work)), emulated.idle_power_w(2, clock)
            assert idle_w < float(profile.power_w(2, clock, *work)) < card_w
        assert profile.idle_power_w(2, clock) == emulated.idle_power_w(2, clock)
    assert cluster.serving_overhead_ms == pytest.approx(3.5 - 1.2, abs=0.02)
    described = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert described["form"] == form
    for phase, (more, share) in SLEPT.items():
        found_more, found_share = described["host_time"][f"{phase}_slept_ms"]
        for batch in (4.0, 12.0):
            assert found_more + found_share * batch == pytest.approx(more + share * batch, abs=0.25)
    assert described["provenance"]["identity"]["device"] == "a processor"


def test_batches_in_service_scale_what_the_sweep_showed(
    cpu_rows: Rows, write: Write, emulated: Profile, tmp_path: Path
) -> None:
    """Decode batches 10 % and prefill batches 40 % slower than in the sweep, some of them much slower still."""
    rng = np.random.default_rng(0)
    served: Rows = []
    for number in range(400):
        decode = number % 4 > 0
        count, tokens = int(rng.integers(1, 6)), int(rng.integers(50, 500))
        work = (count, count * tokens, 0, 0) if decode else (0, 0, tokens, tokens**2)
        factor = (1.1 if decode else 1.4) * (5.0 if rng.random() < 0.1 else 1.0)
        names = ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq")
        row = {"tp": 2, "clock_mhz": CLOCKS[-1], **dict(zip(names, work, strict=True))}
        served.append({**row, "latency_ms": factor * batch_ms(*work)})
    path = write(cpu_rows, PROVENANCE)
    plain = ClusterSettings.model_validate(calibrate(path, tmp_path / "plain", "parametric", folds=3).cluster).profile()
    write(served, None, "profile.service.csv")
    found = calibrate(path, tmp_path / "out", "parametric", folds=3)
    told = json.loads((tmp_path / "out" / "calibration.json").read_text())["host_time"]
    assert told["decode_factor"] == pytest.approx(1.1, rel=0.06)
    assert told["prefill_factor"] == pytest.approx(1.4, rel=0.15)
    profile = ClusterSettings.model_validate(found.cluster).profile()
    host_ms = told["decode_ms"][0] + 2 * told["decode_ms"][1]
    ms = [float(each.latency_ms(2, 1980, 2, 500)) - host_ms for each in (plain, profile)]
    assert ms[1] / ms[0] == pytest.approx(told["decode_factor"], rel=1e-3)
    # Below the top clock the core has slept in any case: a batch is slower by the one or the other, not by both.
    more, share = told["prefill_slept_ms"]
    for tokens in (100, 500):
        work = (0, 0, tokens, tokens**2)
        host_ms = told["prefill_ms"][0] + tokens * told["prefill_ms"][1]
        swept_ms = float(plain.latency_ms(2, 1980, *work)) - host_ms
        factor = float(emulated.latency_ms(2, 750, *work) / emulated.latency_ms(2, 1980, *work))
        slower_ms = max(told["prefill_factor"] * swept_ms, more + (1 + share) * swept_ms)
        assert float(profile.latency_ms(2, 750, *work)) == pytest.approx(host_ms + factor * slower_ms, rel=1e-3)


def test_repeats_count_by_their_median(cpu_rows: Rows, write: Write) -> None:
    profiled = read_profiled(write(cpu_rows, PROVENANCE))
    rows = medians(profiled)
    assert len(rows) == len(cpu_rows) // 3
    repeats = [row for row in cpu_rows if row["point"] == "decode 4x256" and row["clock_mhz"] == CLOCKS[0]]
    here = (rows.points == "decode 4x256") & (rows.iterations.clock_mhz == CLOCKS[0])
    assert rows.iterations.latency_ms[here] == pytest.approx(np.median([row["latency_ms"] for row in repeats]))


def test_a_measured_profile_gives_the_closed_form_back(tmp_path: Path) -> None:
    """Constants are fitted to rows made by another hardware: 20 % less bandwidth, 15 % more power per TB/s."""
    base = load_profile("h100-sxm5", "llama-3.3-70b", "bf16")
    form = base.hardware.parametric
    assert form is not None
    own = form.latency.precisions["bf16"].model_copy(
        update={"bandwidth_tb_per_s": 0.8 * form.latency.precisions["bf16"].bandwidth_tb_per_s}
    )
    latency = form.latency.model_copy(update={"precisions": {**form.latency.precisions, "bf16": own}})
    power = form.power.model_copy(update={"w_per_tb_per_s": 1.15 * form.power.w_per_tb_per_s, "idle_highest_w": 130.0})
    other = base.__class__(
        base.hardware.model_copy(update={"parametric": form.model_copy(update={"latency": latency, "power": power})}),
        base.model,
        base.model_name,
        base.precision,
    )
    path = tmp_path / "card.csv"
    rows = synthetic_iterations(other, 4, (1980,), 80, 0.0, np.random.default_rng(3))
    write_iterations(path, rows, {"identity": {"model": "llama-3.3-70b", "precision": "bf16"}})
    found = calibrate(path, tmp_path / "out", "parametric", folds=4)
    assert found.power == "measured"
    for error in found.errors:
        assert error.latency_percent < 1.5
        assert error.power_percent is not None
        assert error.power_percent < 1.5
    fitted = load_profile(found.cluster["hardware"], found.cluster["model"], "bf16")
    assert fitted.idle_power_w(4, 1980) == pytest.approx(130.0)
    work = (32, 16_000, 0, 0)
    for clock in (1005, 1980):  # a clock that was not profiled follows from the form
        assert float(fitted.latency_ms(4, clock, *work)) == pytest.approx(
            float(other.latency_ms(4, clock, *work)), rel=0.03
        )


def test_what_one_rank_does_not_exchange_is_added(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    base = load_profile("h100-sxm5", "llama-3.3-70b", "bf16")
    rows = synthetic_iterations(base, 4, (1980,), 60, 0.0, np.random.default_rng(0))
    path = tmp_path / "card.csv"
    identity = {"identity": {"model": "llama-3.3-70b", "precision": "bf16"}}
    ms = []
    for told in ({}, {"allreduce": "absent: one GPU alone"}):
        write_iterations(path, rows, {**identity, **told})
        found = calibrate(path, tmp_path / "out", "trees", folds=2)
        profile = load_profile(found.cluster["hardware"], found.cluster["model"], "bf16")
        ms.append(float(profile.latency_ms(4, 1980, 16, 8000)))
    assert 0.5 < ms[1] - ms[0] < 2.0, "160 all-reduces of 5.4 µs and some bytes"


def test_faults_name_file_row_and_column(cpu_rows: Rows, write: Write, tmp_path: Path) -> None:
    path = write(cpu_rows, PROVENANCE)
    text = path.read_text().splitlines()
    first = text[2].split(",")
    cases = {
        rf"{path}:3: latency_ms: 'slow' is not a number": [*text[:2], ",".join([*first[:6], "slow", *first[7:]])],
        rf"{path}:3: 8 values for 9 columns": [*text[:2], ",".join(first[:-1])],
        rf"{path}: unknown column 'latency'; did you mean 'latency_ms'": [
            text[0],
            text[1].replace("latency_ms", "latency"),
        ],
        rf"{path}:1: provenance must be one JSON object": ["# {", *text[1:]],
        rf"{path}: no row": text[:2],
        rf"{path}:3: host_ms must be less": [*text[:2], ",".join([*first[:7], "900", first[8]])],
        "has 1 prefill points, 5 folds need as many": [
            line for line in text if not line.split(",")[-1].startswith("prefill") or line.endswith("prefill 1x64")
        ],
        "no row at the device's top clock, 1980 MHz": [*text[:2], *(line for line in text[2:] if ",750," in line)],
    }
    for message, lines in cases.items():
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ProfileError, match=message):
            calibrate(path, tmp_path / "out", "parametric")


def test_without_power_a_card_must_be_emulated(cpu_rows: Rows, write: Write, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="give --model"):
        calibrate(write(cpu_rows, None), tmp_path / "out")
    with pytest.raises(ProfileError, match="'power_w_per_gpu' is missing, and no card is emulated"):
        calibrate(write(cpu_rows, None), tmp_path / "out", model="llama-3.3-70b")
    with pytest.raises(ProfileError, match="no form 'tree'; did you mean 'trees'"):
        calibrate(write(cpu_rows, None), tmp_path / "out", "tree")


def test_the_command_prints_errors_and_settings(
    cpu_rows: Rows, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", str(write(cpu_rows, PROVENANCE)), "--out", str(tmp_path / "o"), "--form", "parametric"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "form parametric, latency measured, power modelled" in told
    assert f"--set cluster.hardware={tmp_path / 'o' / 'hardware.yaml'}" in told
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", str(tmp_path / "absent.csv")])
    assert ended.value.code == 2
    assert "absent.csv: No such file" in capsys.readouterr().err
