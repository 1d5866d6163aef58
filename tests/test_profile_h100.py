"""scripts/profile_h100.py on a CPU: shapes and FLOP of Llama 3.3 70B's shards, attention, the file."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from biscale_gym.calibration.calibrate import calibrate
from biscale_gym.config import load_preset
from biscale_gym.profiles.iterations import read_profiled
from biscale_gym.profiles.settings import ModelSettings

torch = pytest.importorskip("torch", reason="needs PyTorch")
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    **{"layers": 4, "hidden_size": 64, "attention_heads": 8, "kv_heads": 4, "head_dim": 16},
    **{"mlp_size": 128, "mlp_matrices": 3, "vocabulary": 256, "context_tokens": 4096, "precisions": ["bf16"]},
}


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("profile_h100")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_are_llama_70bs(script: ModuleType, tp: int) -> None:
    model = load_preset(ModelSettings, "models", "llama-3.3-70b")
    shape = script.Shape.of(script.read_model("llama-3.3-70b"), tp)
    assert tp * shape.layers * shape.layer_parameters == model.linear_parameters == 68_451_041_280
    assert tp * shape.head_parameters == model.head_parameters
    assert tp * shape.layers * shape.kv_bytes_per_token_and_layer == model.kv_bytes_per_token == 327_680
    # The weights that are really made, without memory for them.
    shard = script.Shard(shape, 2, "meta", torch.bfloat16)
    assert shard.parameters == 2 * shape.layer_parameters
    assert shard.head.numel() == shape.head_parameters
    assert tuple(shard.weights[0]["qkv"].shape) == ((64 + 2 * 8) // tp * 128, 8192)
    assert tuple(shard.weights[0]["down"].shape) == (8192, 28672 // tp)


def test_flop_are_those_of_the_formula(script: ModuleType) -> None:
    """Counted by PyTorch while the layers run; its count of causal attention is of the whole square."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = script.Shape.of(TINY, 2)
    shard = script.Shard(shape, 3, "cpu", torch.float32)
    for run, tokens, attended in (
        (shard.prefill(2, 32), 2 * 32, 2 * 32 * 32),
        (shard.decode(5, 48), 5, 5 * 48),
    ):
        # The counter does not know the CPU's fused attention.
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 3 * shape.layer_flop(tokens, attended)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        shard.output_head(5)()
    assert counter.get_total_flops() == 2 * 5 * shape.head_parameters


def reference(query: np.ndarray, keys: np.ndarray, values: np.ndarray, causal: bool) -> np.ndarray:
    """Softmax attention of one sequence, head by head: (heads, n, d), (KV heads, m, d) twice."""
    group = query.shape[0] // keys.shape[0]
    out = np.empty_like(query)
    for head in range(query.shape[0]):
        scores = query[head] @ keys[head // group].T / np.sqrt(query.shape[-1])
        if causal:
            scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[head] = weights / weights.sum(axis=-1, keepdims=True) @ values[head // group]
    return out


def test_attention_is_attention(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    query, keys, values = (rng.standard_normal((3, heads, 7, 4)) for heads in (6, 2, 2))
    found = script.prefill_attention(*(torch.from_numpy(each) for each in (query, keys, values))).numpy()
    last = script.decode_attention(*(torch.from_numpy(each) for each in (query[:, :, -1].copy(), keys, values))).numpy()
    for number in range(3):
        np.testing.assert_allclose(found[number], reference(query[number], keys[number], values[number], True))
        np.testing.assert_allclose(last[number], found[number, :, -1], err_msg="the last token sees all")


def test_decode_goes_on_from_prefill(script: ModuleType) -> None:
    """One more token over the cache of a prompt is the last row of the whole prompt."""
    shape = script.Shape.of(TINY, 1)
    shard = script.Shard(shape, 1, "cpu", torch.float64)
    whole = shard.prefill(1, 9)
    hidden = whole.__closure__[whole.__code__.co_freevars.index("given")].cell_contents
    with torch.inference_mode():
        layer = shard.weights[0]
        joined = torch.nn.functional.linear(shard._normed(hidden), layer["qkv"])[0]
        _, key, value = joined.split((8 * 16, 4 * 16, 4 * 16), dim=-1)
        cos, sin = shard._angles(torch.arange(9))
        step = shard.decode(1, 9)
        cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
        cache = cells["caches"][0]
        cache[0, 0] = script.rotate(key.view(9, 4, 16).transpose(0, 1), cos, sin)
        cache[1, 0] = value.view(9, 4, 16).transpose(0, 1)
        cache[:, :, :, -1] = 0.0  # the new token writes its own
        cells["given"].copy_(hidden[0, -1:])
        torch.testing.assert_close(step()[0], whole()[0, -1])


def test_points_fit_into_the_memory(script: ModuleType) -> None:
    shape = script.Shape.of(script.read_model("llama-3.3-70b"), 4)
    points = script.points_of(shape, 4, 80e9, (512, 8192), (1, 4), (1, 256), (512, 8192))
    assert {point.label for point in points} == {
        *("prefill 1x512", "prefill 1x8192", "prefill 4x512"),
        *("decode 1x512", "decode 1x8192", "decode 256x512", "decode 256x8192"),
    }
    fewer = script.points_of(shape, 4, 6e9, (512, 8192), (1,), (1, 256), (512, 8192))
    assert "decode 256x8192" not in {point.label for point in fewer}
    assert script.Point("decode", 256, 512).work == (256, 131072, 0, 0)
    assert script.Point("prefill", 4, 512).work == (0, 0, 2048, 4 * 512**2)


def test_rows_are_scaled_to_the_whole_model(script: ModuleType) -> None:
    shard = script.Shard(script.Shape.of(TINY, 2), 1, "meta", torch.bfloat16)
    row = script.row_of(
        script.Point("decode", 8, 100), shard, script.Window(0.010, 400.0), script.Window(0.010, 200.0), 1980
    )
    assert row["latency_ms"] == pytest.approx(4 * 10.0 + 10.0)
    assert row["power_w_per_gpu"] == pytest.approx((40 * 400 + 10 * 200) / 50)
    assert (row["tp"], row["batch"], row["kv_tokens"]) == (2, 8, 800)


def test_a_sweep_on_a_cpu_can_be_calibrated(script: ModuleType, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.csv"
    arguments = ["--device", "cpu", "--layers", "1", "--model", str(tiny), "--tp", "2", "--prompts", "8", "16", "32"]
    arguments += ["--counts", "1", "2", "--batches", "1", "2", "4", "8", "--contexts", "8", "16", "32"]
    arguments += ["--window-s", "0.002", "--out", str(out)]
    script.main([*arguments, "--repeats", "1"])
    once = len(read_profiled(out))
    script.main([*arguments, "--repeats", "2"])
    found = read_profiled(out)
    assert len(found) == 2 * once == 2 * (5 + 12)
    assert found.provenance["power"] == "absent"
    assert found.provenance["allreduce"].startswith("absent")
    assert not found.has_power
    # Power as a card would have given it; then the file is one that calibrate takes.
    lines = out.read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    idle = dict.fromkeys(rows[0], "0") | {"tp": "2", "clock_mhz": "1980", "point": "idle"}
    with out.open("w", newline="") as stream:
        stream.write(lines[0] + "\n")
        writer = csv.DictWriter(stream, [*rows[0], "power_w_per_gpu"])
        writer.writeheader()
        writer.writerows({**row, "power_w_per_gpu": 300} for row in [*rows, idle])
    calibration = calibrate(out, tmp_path / "out", "parametric", folds=3)
    assert calibration.power == "measured"
    assert (tmp_path / "out" / "model.yaml").exists()


def test_faults_are_one_line(script: ModuleType, tiny: Path, tmp_path: Path) -> None:
    cases = {
        "TP 3 does not divide attention_heads = 8": ["--device", "cpu", "--tp", "3", "--model", str(tiny)],
        "absent.yaml: cannot be read": ["--device", "cpu", "--model", "absent.yaml"],
    }
    if not torch.cuda.is_available():
        cases["no CUDA device"] = []
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as ended:
            script.main([*arguments, "--out", str(tmp_path / "o.csv")])
        assert str(ended.value.code).startswith("profile_h100: ")
        assert message in str(ended.value.code)
        assert "\n" not in str(ended.value.code)


def test_it_needs_nothing_of_the_package(tmp_path: Path) -> None:
    program = (
        "import sys, runpy; sys.argv = ['profile_h100.py', '--help']\n"
        "try: runpy.run_path('scripts/profile_h100.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not [name for name in sys.modules if name.startswith(('biscale_gym', 'numba', 'pydantic'))]"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
