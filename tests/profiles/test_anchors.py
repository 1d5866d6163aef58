"""The closed form against the reference evaluation and against what was measured."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from biscale_gym.profiles import Profile, load_profile

ROOT = Path(__file__).resolve().parents[2]
SERVING_OVERHEAD_MS = 34.01489704182551


@pytest.fixture(scope="module")
def card(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("model_card")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_golden_values_are_met(shared_data: Path, bf16: Profile, fp8: Profile) -> None:
    golden = rows(shared_data / "calibration" / "golden.csv")
    keys = sorted({(row["precision"], int(row["tp"]), int(row["clock_mhz"])) for row in golden})
    assert len(golden) > 600
    for precision, tp, clock in keys:
        own = [r for r in golden if (r["precision"], int(r["tp"]), int(r["clock_mhz"])) == (precision, tp, clock)]
        columns = [[float(r[c]) for r in own] for c in ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq")]
        profile = bf16 if precision == "bf16" else fp8
        where = f"{precision} TP{tp} {clock} MHz"
        expected = {c: [float(r[c]) for r in own] for c in ("latency_ms", "power_w_per_gpu", "effective_clock_mhz")}
        got = profile.latency_ms(tp, clock, *columns), profile.power_w(tp, clock, *columns)
        np.testing.assert_allclose(got[0], expected["latency_ms"], rtol=1e-3, err_msg=where)
        np.testing.assert_allclose(got[1], expected["power_w_per_gpu"], rtol=1e-3, err_msg=where)
        effective = profile.effective_clock_mhz(tp, clock, *columns)
        np.testing.assert_allclose(effective, expected["effective_clock_mhz"], rtol=1e-3, err_msg=where)


def test_measured_points_within_the_stated_fit(shared_data: Path, bf16: Profile, fp8: Profile) -> None:
    errors = []
    for row in rows(shared_data / "calibration" / "latency_points.csv"):
        if row["tab"] == "1":
            continue
        profile = fp8 if row["dt"] == "fp8" else bf16
        tp = int(row["tp"])
        b, kv, m, s2, isl, osl = (float(row[name]) for name in ("b", "K", "m", "S2", "isl", "osl"))
        b, m, isl = round(b), round(m), round(isl)
        modelled = float(profile.latency_ms(tp, 1980, b, kv, m, s2))
        if row["kind"] == "dec" and isl:
            modelled += b * float(profile.latency_ms(tp, 1980, 0, 0, isl, isl**2)) / osl
        if row["kind"] == "ttft":
            modelled += SERVING_OVERHEAD_MS
        errors.append(100 * (modelled / float(row["meas"]) - 1))
    assert len(errors) == 66
    assert np.mean(np.abs(errors)) < 4.3
    assert min(errors) > -12.7
    assert max(errors) < 11.4


@pytest.mark.parametrize(("tp", "bound_percent"), [(2, 0.3), (4, 4.4), (8, 0.9)])
def test_client_ttft_of_fp8(shared_data: Path, fp8: Profile, tp: int, bound_percent: float) -> None:
    errors = []
    for row in rows(shared_data / "calibration" / "latency_points.csv"):
        if row["kind"] == "ttft" and int(row["tp"]) == tp:
            modelled = float(fp8.latency_ms(tp, 1980, 0, 0, float(row["m"]), float(row["S2"]))) + SERVING_OVERHEAD_MS
            errors.append(100 * (modelled / float(row["meas"]) - 1))
    assert len(errors) == 3
    assert abs(np.mean(errors)) < bound_percent


def test_anchors_within_their_stated_errors(card: ModuleType) -> None:
    points = card.anchors()
    bounds = {  # latency from, to; power from, to [%]
        "70B bf16 decode": (-4.05, 4.05, -5.0, 5.0),
        "70B bf16 prefill": (-12.7, 11.4, 0, 0),
        "70B fp8 colocated decode": (-12.7, 11.4, 0, 0),
        "8B bf16 decode (not fitted)": (-12.0, 1.0, -23.0, 0),
    }
    assert {point.group for point in points} == set(bounds)
    for point in points:
        low, high, power_low, power_high = bounds[point.group]
        assert low <= point.latency_percent <= high, point
        assert point.power_percent is None or power_low <= point.power_percent <= power_high, point


def test_the_page_shows_what_the_command_prints(card: ModuleType) -> None:
    assert card.figures() in (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")


def test_colocated_decode_leaves_room_for_prefill(fp8: Profile) -> None:
    # The colocated measurements contain prefill work: a pure decode step lies below most of them, never far above.
    measured = {2: [18.0, 19.2, 22.1, 27.7], 4: [12.0, 12.7, 14.1, 18.4, 23.4], 8: [9.2, 9.8, 11.6, 12.9, 16.5]}
    for tp, values in measured.items():
        batch = np.array([4, 8, 16, 32, 64][: len(values)])
        pure = fp8.latency_ms(tp, 1980, batch, batch * 4608)
        assert np.all(pure < 1.02 * np.array(values))
        assert np.all(pure > 0.86 * np.array(values))


def test_energy_optimum_lies_below_the_top_clock(bf16: Profile) -> None:
    clocks = (705, 885, 1005, 1200, 1410, 1620, 1980)

    def joules(*work: float) -> np.ndarray:
        return np.array([float(bf16.latency_ms(4, f, *work)) * float(bf16.power_w(4, f, *work)) for f in clocks])

    for work, low, high in (((64.0, 65536.0, 0.0, 0.0), -44, -31), ((0.0, 0.0, 4096.0, 4 * 1024.0**2), -28.5, -26)):
        energy = joules(*work)
        best = int(np.argmin(energy))
        assert clocks[best] in {885, 1005}
        assert low <= 100 * (energy[best] / energy[-1] - 1) <= high


def test_capacities() -> None:
    bf16 = load_profile("h100-sxm5", "llama-3.3-70b", "bf16")
    fp8 = load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
    assert bf16.kv_capacity_tokens(1) <= 0
    assert fp8.kv_capacity_tokens(1) <= 0
    assert bf16.kv_capacity_for("decode", 2) <= 0
    assert bf16.kv_capacity_for("prefill", 2) == pytest.approx(27_000, rel=0.03)
    assert bf16.kv_capacity_tokens(2, utilisation=0.95, reserve_gb=2.0) == bf16.kv_capacity_for("prefill", 2)
    assert bf16.kv_capacity_tokens(4) == pytest.approx(400_000, rel=0.03)
    assert bf16.kv_capacity_tokens(8) == pytest.approx(1_240_000, rel=0.01)
    assert fp8.kv_capacity_tokens(2) == pytest.approx(200_000, rel=0.01)
    assert fp8.kv_capacity_tokens(4) == pytest.approx(610_000, rel=0.01)
    assert fp8.kv_capacity_tokens(8) == pytest.approx(1_450_000, rel=0.01)
    assert bf16.kv_capacity_tokens(4, pp=2) == bf16.kv_capacity_tokens(8)
    assert bf16.kv_bytes_per_token == 327_680
    assert bf16.weight_bytes == pytest.approx(139.0e9, rel=1e-4)
    assert fp8.weight_bytes == pytest.approx(70.55e9, rel=1e-4)
