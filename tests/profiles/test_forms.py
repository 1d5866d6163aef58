"""Linear, table and fitted forms; switching, transfer, randomisation; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.config import ConfigError, load_preset, presets_dir
from biscale_gym.profiles import Profile, ProfileError, SwitchingSettings, TransferSettings, kernels, load_profile
from biscale_gym.profiles.iterations import (
    Iterations,
    read_iterations,
    read_profiled,
    synthetic_iterations,
    work_of,
    write_iterations,
)
from biscale_gym.profiles.parametric import ParametricProfile
from biscale_gym.profiles.randomisation import randomised_switching
from biscale_gym.profiles.settings import RandomisationSettings
from biscale_gym.profiles.tabulated import ProfileTable, tabulate

CLOCKS = (705, 1005, 1410, 1980)
LINEAR = {  # model, TP: prefill A, B, C; decode A, B, C below batch 95; from 95 on
    ("opt-13b", 1): ((18.10, 0.10191, 7.122e-6), (19.93, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831)),
    ("opt-13b", 2): ((14.74, 0.06858, 2.450e-6), (13.29, 3.411e-4, 0.06296), (10.64, 3.118e-4, 0.08563)),
    ("opt-13b", 4): ((12.06, 0.03808, 5.226e-7), (10.26, 1.879e-4, 0.03269), (10.48, 1.712e-4, 0.04567)),
    ("opt-66b", 2): ((43.06, 0.27423, 2.248e-5), (48.29, 9.424e-4, 0.12755), (28.73, 4.745e-4, 0.29618)),
    ("opt-66b", 3): ((33.00, 0.19568, 1.221e-5), (35.80, 5.845e-4, 0.09527), (22.65, 5.358e-4, 0.20851)),
    ("opt-66b", 8): ((25.49, 0.10659, 3.391e-6), (23.16, 2.269e-4, 0.04801), (21.72, 3.758e-4, 0.08979)),
    ("opt-66b", 4): ((29.44, 0.15135, 8.317e-6), (30.76, 4.519e-4, 0.06328), (27.47, 4.047e-4, 0.12481)),
}


@pytest.mark.parametrize(("model", "tp"), sorted(LINEAR))
@pytest.mark.parametrize("max_batch", [1, 64, 200])
def test_linear_form_is_the_published_formula(model: str, tp: int, max_batch: int) -> None:
    profile = load_profile("a100-80g-linear", model, "bf16")
    vector = profile.compile(tp, [1410], max_batch)
    (a, b, c), small, large = LINEAR[model, tp]
    for batch, kv in ((1, 100), (94, 30_000), (95, 30_000), (150, 50_000), (300, 70_000)):
        x, y, z = small if batch < 95 else large
        expected_ms = x + y * (kv + batch) + z * batch + 2 + 1e-4 * kv
        assert 1e3 * kernels.decode_latency(vector, 0, float(batch), float(kv)) == pytest.approx(expected_ms, rel=1e-9)
        assert kernels.decode_cost(vector, 0, float(batch), float(kv))[1] == 300.0
    lengths = np.array([17.0, 400.0, 2000.0])
    m, s2 = lengths.sum(), (lengths**2).sum()
    prefill_ms = a + b * m + c * s2 + 1 + 2 + 1e-4 * m
    latency_s, power_w = kernels.iteration_cost(vector, 0, 0.0, 0.0, m, s2)
    assert 1e3 * latency_s == pytest.approx(prefill_ms, rel=1e-12)
    assert power_w == pytest.approx(300.0)
    decode_ms = 1e3 * kernels.decode_latency(vector, 0, 10.0, 5000.0)
    assert 1e3 * kernels.iteration_latency(vector, 0, 10.0, 5000.0, m, s2) == pytest.approx(prefill_ms + decode_ms)
    assert kernels.idle_power_w(vector, 0) == 60.0


def test_linear_form_lists_what_it_knows() -> None:
    assert load_profile("a100-80g-linear", "opt-13b", "bf16").tensor_parallel_degrees == (1, 2, 4)
    with pytest.raises(ProfileError, match="valid: 2, 3, 4, 8"):
        load_profile("a100-80g-linear", "opt-66b", "bf16").compile(1, [1410], 8)
    with pytest.raises(ProfileError, match=r"no coefficients for 'llama-3\.1-8b'"):
        load_profile("a100-80g-linear", "llama-3.1-8b", "bf16")


@pytest.fixture(scope="module")
def table(bf16: Profile) -> ProfileTable:
    knots = np.unique(np.geomspace(16, 8192, 24).round())
    batches = [1, *range(4, 260, 4)]
    return tabulate(bf16, 4, CLOCKS, batches, np.linspace(0, 400_000, 41), knots, np.geomspace(16, 4096, 8))


def test_table_form_meets_its_source(bf16: Profile, table: ProfileTable, tmp_path: Path) -> None:
    table.save(tmp_path / "tp4.npz")
    preset = (presets_dir() / "hardware" / "h100-sxm5.yaml").read_text().split("parametric:")[0]
    (tmp_path / "mine.yaml").write_text(preset + "table: {files: {llama-3.3-70b: {bf16: {4: tp4.npz}}}}\n")
    profile = load_profile(str(tmp_path / "mine.yaml"), "llama-3.3-70b", "bf16")
    assert profile.clocks_mhz == CLOCKS
    assert profile.tensor_parallel_degrees == (4,)
    assert profile.kv_capacity_tokens(4) == bf16.kv_capacity_tokens(4)
    assert profile.hash != bf16.hash
    batch, kv = np.array([1.0, 3.0, 64.0, 255.0, 256.0]), np.array([1024.0, 2000.0, 60_000.0, 200_123.0, 395_000.0])
    m, s2 = np.array([16.0, 500.0, 3000.0, 8192.0]), np.array([256.0, 500.0 * 300, 3000.0 * 1000, 8192.0 * 4096])
    for mhz in CLOCKS:
        np.testing.assert_allclose(profile.latency_ms(4, mhz, batch, kv), bf16.latency_ms(4, mhz, batch, kv), rtol=2e-3)
        np.testing.assert_allclose(profile.power_w(4, mhz, batch, kv), bf16.power_w(4, mhz, batch, kv), rtol=2e-3)
        got, want = profile.latency_ms(4, mhz, 0, 0, m, s2), bf16.latency_ms(4, mhz, 0, 0, m, s2)
        np.testing.assert_allclose(got, want, rtol=2e-2)
        np.testing.assert_allclose(profile.power_w(4, mhz, 0, 0, m, s2), bf16.power_w(4, mhz, 0, 0, m, s2), rtol=2e-2)
        both = profile.latency_ms(4, mhz, 64, 60_000, 500, 500.0 * 300)
        parts = profile.latency_ms(4, mhz, 64, 60_000) + profile.latency_ms(4, mhz, 0, 0, 500, 500.0 * 300)
        assert float(both) == pytest.approx(float(parts))
        assert profile.idle_power_w(4, mhz) == bf16.idle_power_w(4, mhz)


def test_table_form_is_exact_at_its_knots_and_continues_beyond(table: ProfileTable) -> None:
    from biscale_gym.profiles.tabulated import compile_table

    vector = compile_table(table, 4, CLOCKS, 128)
    for i, b in enumerate(table.decode_batches[:10]):
        for j, kv in enumerate(table.decode_kv_tokens):
            cost = kernels.decode_cost(vector, 2, b, kv)
            assert cost[0] == pytest.approx(table.decode_latency_s[2, i, j], rel=1e-12)
            assert cost[1] == pytest.approx(table.decode_power_w[2, i, j], rel=1e-12)
    for i, m in enumerate(table.prefill_tokens):
        for j, length in enumerate(table.prefill_mean_length):
            cost = kernels.iteration_cost(vector, 1, 0.0, 0.0, m, m * length)
            assert cost[0] == pytest.approx(table.prefill_latency_s[1, i, j], rel=1e-9)
            assert cost[1] == pytest.approx(table.prefill_power_w[1, i, j], rel=1e-9)
    inside, edge, beyond = (kernels.decode_latency(vector, 0, b, 50_000.0) for b in (127.0, 128.0, 130.0))
    assert beyond == pytest.approx(edge + 2 * (edge - inside))


def test_broken_tables_are_refused(table: ProfileTable, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="decode_latency_s has shape"):
        replace(table, decode_latency_s=table.decode_latency_s[:, 1:])
    with pytest.raises(ProfileError, match="regular grid"):
        replace(table, decode_kv_tokens=np.arange(41.0) ** 2)
    with pytest.raises(ProfileError, match="not finite"):
        replace(table, prefill_power_w=table.prefill_power_w * np.nan)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    for name in ("torn.npz", "absent.npz"):
        with pytest.raises(ProfileError, match="not a profile table"):
            ProfileTable.load(tmp_path / name)


def test_fitted_form_learns_the_parametric_one(bf16: Profile, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    from biscale_gym.profiles.fitted import FitSettings, fit_tables, predict

    path = tmp_path / "profiled.csv"
    write_iterations(path, synthetic_iterations(bf16, 4, CLOCKS, 1600, 0.01, np.random.default_rng(0)))
    tables, errors = fit_tables(read_iterations(path), FitSettings(trees=150, learning_rate=0.12, folds=2))
    assert {error.phase for error in errors} == {"prefill", "decode"}
    for error in errors:
        assert error.latency_percent < 4.0
        assert error.power_percent < 2.0
        assert error.latency_percent < error.latency_p90_percent < 10.0
        assert error.power_percent < error.power_p90_percent < 5.0
    table = tables[4]
    assert np.all(np.diff(table.decode_latency_s, axis=0) <= 0)
    assert np.all(np.diff(table.prefill_latency_s, axis=0) <= 0)
    assert np.all(np.diff(table.decode_power_w, axis=0) >= 0)
    # Held out, against the truth without noise: rows of another seed.
    fresh = synthetic_iterations(bf16, 4, CLOCKS, 400, 0.0, np.random.default_rng(1))
    fresh = fresh.rows(fresh.latency_ms > 0)
    got = predict(table, 4, fresh)
    assert np.mean(np.abs(got[:, 0] / fresh.latency_ms - 1)) < 0.035
    assert np.mean(np.abs(got[:, 1] / fresh.power_w_per_gpu - 1)) < 0.02


def test_broken_profiles_name_the_place(bf16: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profiled.csv"
    write_iterations(path, synthetic_iterations(bf16, 4, CLOCKS, 8, 0.0, np.random.default_rng(0)))
    text = path.read_text().splitlines()
    cases = {
        "unknown column 'clock_mh'; did you mean 'clock_mhz'": [text[0].replace("clock_mhz", "clock_mh"), *text[1:]],
        "column 'power_w_per_gpu' is missing": [line.rsplit(",", 1)[0] for line in text],
        r":3: tp: 'nan' must be finite": [*text[:2], "nan" + text[2][3:], *text[3:]],
        r":2: tp: 'four' is not a number": [text[0], "four" + text[1][3:], *text[2:]],
        r":2: an iteration must be prefill or decode": [text[0], "4,705,1,10,20,400,30,200"],
        r":2: latency_ms must be positive": [text[0], "4,705,1,10,0,0,0,200"],
    }
    for message, lines in cases.items():
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ProfileError, match=message):
            read_iterations(path)


def test_folds_hold_out_whole_points(bf16: Profile) -> None:
    """Repeats of a point would tell a fit what it is asked for."""
    from biscale_gym.profiles.fitted import Predictor, cross_validate

    once = synthetic_iterations(bf16, 4, CLOCKS, 40, 0.0, np.random.default_rng(0))
    order = np.tile(np.arange(len(once)), 3)
    rows, points = once.rows(order), work_of(once)[order]
    asked: list[str] = []

    def fit(seen: Iterations) -> Predictor:
        known = set(work_of(seen).tolist())

        def predict(rows: Iterations) -> np.ndarray:
            labels = work_of(rows).tolist()
            asked.extend(labels)
            assert not known & set(labels)
            return np.column_stack([1.1 * rows.latency_ms, 0.8 * rows.power_w_per_gpu])

        return predict

    errors = cross_validate(rows, points, 4, 5, 0, fit)
    busy = (rows.batch > 0) | (rows.prefill_tokens > 0)
    assert sorted(asked) == sorted(points[busy].tolist()), "each row once"
    for error in errors:
        assert error.rows == 60
        assert (error.latency_percent, error.latency_p90_percent) == pytest.approx((10.0, 10.0))
        assert (error.power_percent, error.power_p90_percent) == pytest.approx((20.0, 20.0))
    with pytest.raises(ProfileError, match="TP 4 has 20 prefill points, 21 folds need as many"):
        cross_validate(rows, points, 4, 21, 0, fit)


def test_a_file_says_where_it_comes_from(bf16: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profiled.csv"
    rows = synthetic_iterations(bf16, 4, CLOCKS, 8, 0.0, np.random.default_rng(0))
    write_iterations(path, rows, {"device": "a card"})
    found = read_profiled(path)
    assert found.provenance == {"device": "a card"}
    assert found.has_power
    assert np.array_equal(found.iterations.latency_ms, rows.latency_ms)
    assert not found.host_ms.any()
    assert np.array_equal(found.points, work_of(rows))
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], *(line.rsplit(",", 1)[0] for line in text[1:])]) + "\n")
    assert not read_profiled(path).has_power
    with pytest.raises(ProfileError, match="column 'power_w_per_gpu' is missing"):
        read_iterations(path)
    path.write_text("\n".join([text[0], text[1], "4,705,1,10,20,400,30,200"]))
    with pytest.raises(ProfileError, match=":3: an iteration must be prefill or decode"):
        read_profiled(path)


def test_fit_refuses_missing_phases(bf16: Profile) -> None:
    pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    from biscale_gym.profiles.fitted import fit_tables

    rows = synthetic_iterations(bf16, 4, CLOCKS, 60, 0.0, np.random.default_rng(0))
    with pytest.raises(ProfileError, match="no idle row"):
        fit_tables(rows.rows(rows.latency_ms > 0))
    with pytest.raises(ProfileError, match="no prefill row"):
        fit_tables(rows.rows(rows.prefill_tokens == 0))


def test_a_clock_may_be_profiled_in_one_phase_only(bf16: Profile) -> None:
    pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    from biscale_gym.profiles.fitted import FitSettings, fit_tables

    rows = synthetic_iterations(bf16, 4, CLOCKS, 800, 0.0, np.random.default_rng(0))
    lacking = rows.rows((rows.prefill_tokens == 0) | (rows.clock_mhz != CLOCKS[1]))
    table = fit_tables(lacking, FitSettings(trees=40, folds=0))[0][4]
    assert table.clocks_mhz.tolist() == list(CLOCKS)
    assert np.all(np.diff(table.prefill_latency_s, axis=0) <= 0)


def test_the_fit_goes_on_beyond_what_was_profiled(bf16: Profile) -> None:
    pytest.importorskip("sklearn", reason="the fitted form needs scikit-learn")
    from biscale_gym.profiles.fitted import FitSettings, fit_tables, predict

    rows = synthetic_iterations(bf16, 4, CLOCKS, 1600, 0.0, np.random.default_rng(0), largest_batch=256)
    table = fit_tables(rows, FitSettings(trees=60, learning_rate=0.2, folds=0))[0][4]
    beyond = synthetic_iterations(bf16, 4, CLOCKS, 800, 0.0, np.random.default_rng(1), largest_batch=512)
    beyond = beyond.rows(beyond.batch > 320)
    assert len(beyond) > 10
    got_ms = predict(table, 4, beyond)[:, 0]
    assert np.mean(np.abs(got_ms / beyond.latency_ms - 1)) < 0.12
    assert np.mean(got_ms / beyond.latency_ms - 1) > -0.08, "never far too hopeful"


def test_randomisation_varies_only_what_is_uncertain(bf16: Profile) -> None:
    ranges = load_preset(RandomisationSettings, "randomisation", "h100-uncertainty")
    one, same = (bf16.randomised(np.random.default_rng(7), ranges) for _ in range(2))
    other = bf16.randomised(np.random.default_rng(8), ranges)
    assert isinstance(one, ParametricProfile)
    assert one.hash == same.hash
    assert len({one.hash, other.hash, bf16.hash}) == 3
    assert bf16.hash == load_profile("h100-sxm5", "llama-3.3-70b", "bf16").hash
    # Compute-bound prefill above the limit keeps its time: only efficiency x limit was measured, and it is kept.
    work = (4, 1980, 0, 0, 16384, 1024 * 16384.0)
    assert float(one.latency_ms(*work)) == pytest.approx(float(bf16.latency_ms(*work)), rel=0.03)
    spread = [float(bf16.randomised(np.random.default_rng(i), ranges).power_w(4, 1980, 64, 65536)) for i in range(40)]
    assert 0.01 < np.std(spread) / np.mean(spread) < 0.08
    for seed in range(10):
        vector = bf16.randomised(np.random.default_rng(seed), ranges).compile(4, bf16.clocks_mhz[::10], 8)
        costs = np.array([kernels.iteration_cost(vector, f, 8.0, 8e3, 512.0, 512.0**2) for f in range(11)])
        assert np.all(np.diff(costs[:, 0]) <= 0)
    with pytest.raises(ProfileError, match="only a parametric"):
        load_profile("a100-80g-linear", "opt-13b", "bf16").randomised(np.random.default_rng(0), ranges)


def test_switching_presets() -> None:
    nvml = load_preset(SwitchingSettings, "switching", "nvml")
    draws = nvml.draw_s(np.random.default_rng(0), 200_000)
    assert np.median(draws) == pytest.approx(4.5e-3, rel=0.01)
    assert np.quantile(draws, 0.99) == pytest.approx(13e-3, rel=0.02)
    smi = load_preset(SwitchingSettings, "switching", "nvidia-smi").draw_s(np.random.default_rng(0), 100_000)
    low, high = np.quantile(smi, [0.025, 0.975])
    assert low == pytest.approx(50e-3, rel=0.01)
    assert high == pytest.approx(80e-3, rel=0.01)
    assert not load_preset(SwitchingSettings, "switching", "instant").draw_s(np.random.default_rng(0), 5).any()
    ranges = load_preset(RandomisationSettings, "randomisation", "h100-uncertainty")
    slower = randomised_switching(nvml, np.random.default_rng(0), ranges)
    assert 4.5 <= slower.median_ms <= 22.5


def test_transfer_presets() -> None:
    rdma = load_preset(TransferSettings, "transfer", "rdma-20")
    size = 327_680 * 2000.0
    assert rdma.transfer_s(size, 4, 4) == pytest.approx(3.45e-3 + size / 80e9)
    assert rdma.transfer_s(size, 2, 8) == pytest.approx(3.45e-3 + size / 40e9)
    assert rdma.transfer_s(size, 4, 4, same_node=True) == pytest.approx(3.45e-3 + size / 400e9)
    assert load_preset(TransferSettings, "transfer", "nvlink").transfer_s(size, 1, 1) < rdma.transfer_s(size, 1, 1)
    assert load_preset(TransferSettings, "transfer", "free").transfer_s(size, 4, 4) == 0.0


def test_what_does_not_exist_is_refused_with_the_nearest(bf16: Profile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100-sxm5'"):
        load_profile("h100-sxm", "llama-3.3-70b", "bf16")
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.3-70b'"):
        load_profile("h100-sxm5", "llama-3-70b", "bf16")
    with pytest.raises(ProfileError, match="did you mean 'bf16'"):
        load_profile("h100-sxm5", "llama-3.3-70b", "fp16")
    with pytest.raises(ProfileError, match="the nearest is 1005 MHz"):
        bf16.compile(4, [1000], 8)
    with pytest.raises(ProfileError, match="TP 3 is not supported"):
        bf16.compile(3, [1005], 8)
    for clocks in ([], [1980, 705], [705, 705]):
        with pytest.raises(ProfileError, match="ascending"):
            bf16.compile(4, clocks, 8)
    with pytest.raises(ProfileError, match="max_batch"):
        bf16.compile(4, [1980], 0)
    text = (presets_dir() / "hardware" / "h100-sxm5.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("voltage_floor", "voltage_flor"))
    with pytest.raises(ConfigError, match="did you mean 'voltage_floor'"):
        load_profile(str(tmp_path / "bad.yaml"), "llama-3.3-70b", "bf16")
    (tmp_path / "bad.yaml").write_text(text.split("parametric:")[0])
    with pytest.raises(ConfigError, match="exactly one of"):
        load_profile(str(tmp_path / "bad.yaml"), "llama-3.3-70b", "bf16")


# -- two precisions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "bf16", "fp8")


def test_each_phase_has_its_own_precision(mixed: Profile, bf16: Profile, fp8: Profile) -> None:
    assert mixed.for_phase("prefill") == mixed
    assert mixed.for_phase("decode") == fp8
    for tp in mixed.tensor_parallel_degrees:
        assert mixed.kv_capacity_for("prefill", tp) == bf16.kv_capacity_for("prefill", tp)
        assert mixed.kv_capacity_for("decode", tp) == fp8.kv_capacity_for("decode", tp)
    assert mixed.kv_bytes_per_token == mixed.for_phase("decode").kv_bytes_per_token


def test_a_second_precision_changes_the_hash_only_where_it_differs(mixed: Profile, bf16: Profile) -> None:
    assert mixed.hash != bf16.hash
    assert load_profile("h100-sxm5", "llama-3.3-70b", "bf16", "bf16") == bf16
    with pytest.raises(ProfileError, match="no precision 'fp16'"):
        load_profile("h100-sxm5", "llama-3.3-70b", "bf16", "fp16")


def test_both_precisions_are_randomised_alike(mixed: Profile) -> None:
    ranges = load_preset(RandomisationSettings, "randomisation", "h100-uncertainty")
    drawn = mixed.randomised(np.random.default_rng(7), ranges)
    assert drawn.for_phase("decode").hardware == drawn.hardware != mixed.hardware
    assert drawn.for_phase("decode").precision == "fp8"
