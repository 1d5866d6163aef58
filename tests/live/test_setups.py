"""What a placement's instances are started as: which cards, which model, which options; no worker is started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from biscale_gym.config import ConfigError, load_preset, read_yaml, validate
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live.environment import LiveSetting
from biscale_gym.live.errors import LiveError
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import Setup, setups_of
from biscale_gym.live.vllm_adapter import install
from biscale_gym.live.vllm_adapter.options import engine_options, environment
from biscale_gym.live.vllm_adapter.server import server_command


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Setup]:
    """The workers of ``live-h100`` on ``h100``, as if vLLM were installed."""
    monkeypatch.setattr(install, "version", lambda name: {"vllm": install.TESTED[0], "nixl": "1.5.1"}[name])
    return setups_of(load_scenario("live-h100"), load_preset(LiveSettings, "live", "h100"), tmp_path)


def h100(**changes: Any) -> LiveSettings:
    values = read_yaml(Path(__file__).parents[2] / "configs" / "live" / "h100.yaml")
    return validate(LiveSettings, values | changes, "changed")


def test_each_instance_gets_cards_of_its_own(on_gpus: list[Setup]) -> None:
    assert {setup.name: setup.device.gpus for setup in on_gpus} == {
        "prefill-0": (0, 1),
        "prefill-1": (2, 3),
        "decode-0": (4, 5),
        "decode-1": (6, 7),
    }
    assert all(setup.device.kind == "nvml" for setup in on_gpus)
    told = environment(on_gpus[2])
    assert (told["CUDA_VISIBLE_DEVICES"], told["CUDA_DEVICE_ORDER"]) == ("4,5", "PCI_BUS_ID")
    assert told["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "OMP_NUM_THREADS" not in told


def test_an_engine_on_gpus_runs_the_scenarios_model(on_gpus: list[Setup]) -> None:
    options = engine_options(on_gpus[0])
    assert (options["tensor_parallel_size"], options["quantization"], options["load_format"]) == (2, "fp8", "dummy")
    assert not options["enforce_eager"]
    assert "num_gpu_blocks_override" not in options
    assert options["kv_transfer_config"]["kv_buffer_device"] == "cuda"
    config = json.loads((on_gpus[0].model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (80, 8192, 8)
    command = server_command(on_gpus[0], 8000)
    assert {"--tensor-parallel-size=2", "--no-enforce-eager", "--host=127.0.0.1"} <= set(command)
    assert not any("CpuWorker" in option for option in command)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here (make live-cpu makes .venv-live)")
def test_vllm_knows_every_option(on_gpus: list[Setup]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert engine_options(on_gpus[0]).keys() <= EngineArgs.__dataclass_fields__.keys()


def test_real_weights_are_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "version", lambda name: install.TESTED[0])
    (setup, *_) = setups_of(load_scenario("live-h100"), h100(weights="/models/llama"), tmp_path)
    options = engine_options(setup)
    assert (options["model"], options["load_format"]) == ("/models/llama", "auto")
    assert not list(tmp_path.iterdir())


def test_only_a_llama_can_be_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "version", lambda name: install.TESTED[0])
    scenario = load_scenario("live-h100", {"cluster.model": "opt-66b", "cluster.precision": "bf16"})
    with pytest.raises(LiveError, match=r"only models of Llama's form .* name a folder with real ones \(weights\)"):
        setups_of(scenario, h100(), tmp_path)


def test_the_official_build_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install, "version", absent)
    with pytest.raises(LiveError, match=r"vllm is not installed here; pip install 'biscale-gym\[live\]' on a machine"):
        setups_of(load_scenario("live-h100"), h100(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": {"kind": "emulated"}}, r"engines on GPUs have clocks of their own: device\.kind must be nvml"),
        ({"device": {"kind": "nvml", "gpus": [0, 1, 1]}}, r"gpus names a card twice: \[0, 1, 1\]"),
        ({"engine": "cpu"}, "an engine on CPUs needs model and kv_blocks"),
        ({"weights": "/a", "model": {"hidden_size": 256, "layers": 2, "vocabulary": 64}}, "either model or weights"),
    ],
)
def test_settings_that_do_not_fit_together_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        h100(**changes)


def test_a_placement_that_takes_more_gpus_is_refused() -> None:
    few = h100(device={"kind": "nvml", "gpus": [0, 1, 2]})
    with pytest.raises(ConfigError, match=r"the placement takes 8 GPUs, but device\.gpus names 3"):
        few.deal(load_scenario("live-h100").placement)


def test_measured_joules_are_not_mixed_with_modelled_ones() -> None:
    """GPUs without an instance have no meter in the environment."""
    LiveSetting("live-h100", {"workers": "h100"})
    with pytest.raises(
        ConfigError, match="8 GPUs of scenario 'live-h100' belong to no instance: their joules would be"
    ):
        LiveSetting("live-h100", {"workers": "h100", "overrides": {"cluster.nodes": 2}})
