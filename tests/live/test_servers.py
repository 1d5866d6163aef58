"""What needs no server: metrics and answers as vLLM 0.32.0 gave them, routing, governors' settings and sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from live import fake_nvml
from live.fake_nvml import Cards

from biscale_gym import cli
from biscale_gym.config import ConfigError
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live import governed
from biscale_gym.live.demand import prepared
from biscale_gym.live.device_choice import open_device
from biscale_gym.live.devices import Device
from biscale_gym.live.errors import DeviceError, LiveError
from biscale_gym.live.http_client import Url
from biscale_gym.live.pool import free_port
from biscale_gym.live.servers import Server, pick, welcome
from biscale_gym.live.settings import NvmlDeviceSettings
from biscale_gym.live.vllm_adapter import server as v

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 10.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"} 600.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="tiny",source="external_kv_transfer"} 1.2e+03
vllm:prompt_tokens_by_source_created{engine="0",model_name="tiny",source="local_compute"} 1.7954673923279476e+09
"""
EVENT = {
    "id": "cmpl-9a8ea48679ca2744",
    "object": "text_completion",
    "choices": [{"index": 0, "text": "", "finish_reason": None, "prompt_token_ids": [5, 6], "token_ids": [255]}],
}


def test_metrics_are_read() -> None:
    assert v.read_metrics(METRICS, "http://a") == v.Metrics(
        3, 3, 0.5, {"local_compute": 10, "external_kv_transfer": 1800}
    )


def test_a_missing_metric_is_named_with_the_versions_that_have_it() -> None:
    without = "\n".join(line for line in METRICS.splitlines() if "kv_cache" not in line)
    with pytest.raises(LiveError, match=r"http://a/metrics has no vllm:kv_cache_usage_perc, which vLLM 0\.32\.0 has"):
        v.read_metrics(without, "http://a")


def test_answers_are_read() -> None:
    assert v.read_piece(EVENT) == v.Piece([255], None, None)
    end = EVENT | {"choices": [EVENT["choices"][0] | {"finish_reason": "length"}], "kv_transfer_params": {"a": 1}}
    assert v.read_piece(end) == v.Piece([255], "length", {"a": 1})
    assert v.read_piece({"choices": [], "usage": {}}) == v.Piece([], None, None)
    with pytest.raises(LiveError, match="not an answer of a vLLM server"):
        v.read_piece({"object": "error"})


def test_what_is_served() -> None:
    models = json.dumps({"data": [{"id": "tiny", "max_model_len": 2048}]}).encode()
    served = v.served_by(models, b'{"version": "0.32.0"}', "http://a")
    assert served == v.Served("tiny", 2048, "0.32.0")
    assert served.tested
    assert not v.Served("tiny", 2048, "0.26.0").tested
    for wrong in (b"<html>", b"{}", b'{"data": []}'):
        with pytest.raises(LiveError, match="http://a does not answer as a vLLM server does"):
            v.served_by(wrong, b'{"version": "0.32.0"}', "http://a")


def test_a_request_asks_for_exact_lengths() -> None:
    first = v.prefill_body("tiny", [5, 6], True, {})
    second = v.decode_body("tiny", [5, 6], 7, {"remote_engine_id": "x"}, {})
    assert (first["max_tokens"], first["min_tokens"], first["ignore_eos"]) == (1, 1, True)
    assert (second["max_tokens"], second["min_tokens"], second["ignore_eos"]) == (7, 7, True)
    assert first["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert "kv_transfer_params" not in v.prefill_body("tiny", [5, 6], False, {})
    assert second["stream"]
    assert second["kv_transfer_params"] == {"remote_engine_id": "x"}


def server(number: int, weight: float = 1.0) -> Server:
    url = Url.parsed(f"http://127.0.0.1:{8200 + number}")
    return Server(f"decode-{number}", "decode", url, weight, v.Served("tiny", 2048, "0.32.0"))


def test_requests_go_round_by_weight() -> None:
    servers = [server(0, 3.0), server(1, 1.0), server(2, 2.0)]
    for each in servers:
        welcome(each, servers)
    picked = Counter[str]()
    for count in range(1, 61):
        chosen = pick(servers)
        assert chosen is not None
        picked[chosen.name] += 1
        for each in servers:  # smooth: nobody is ever more than a request away from its share
            assert abs(picked[each.name] - count * each.weight / 6.0) <= 1.0
    assert picked == {"decode-0": 30, "decode-1": 10, "decode-2": 20}


def test_who_comes_back_starts_level_with_the_least_served() -> None:
    servers = [server(0), server(1), server(2)]
    for each in servers[:2]:
        welcome(each, servers)
    for _ in range(100):
        assert pick(servers) is not servers[2]
    welcome(servers[2], servers)
    assert Counter(each.name for each in (pick(servers) for _ in range(9)) if each) == {
        "decode-0": 3,
        "decode-1": 3,
        "decode-2": 3,
    }
    for each in servers:
        each.up.clear()
    assert pick(servers) is None


def test_tokens_are_counted_across_a_restart() -> None:
    counted = server(0)
    for now in ({"a": 100}, {"a": 150, "b": 5}, {"a": 20}, {"a": 30, "b": 2}):
        counted.count(now)
    assert counted.prompt_tokens == {"a": 50 + 20 + 10, "b": 5 + 2}


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SystemExit) as left:
        cli.main(["live", "--prefill-url", url, "--decode-url", url, "--out", str(tmp_path)])
    assert left.value.code == 2
    assert f"error: no vLLM server to attach to: {url}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["live", "--decode-url", url, "--out", str(tmp_path)])
    assert "error: no URL of a prefill server" in capsys.readouterr().err


# -- governors ---------------------------------------------------------------------------------------------------------


def setting(folder: Path, **changes: object) -> dict[str, object]:
    device = {"kind": "nvml", "gpus": [0, 1]}
    return {
        "name": "prefill-0",
        "phase": "prefill",
        "tp": 2,
        "scenario": "live-smoke",
        "device": device,
        "folder": str(folder),
    } | changes


def opened() -> tuple[Device, str]:
    """The device of the setting that is in force."""
    found = governed.read_setting()
    context = prepared(load_scenario("live-smoke"), None, 0)[1]
    return open_device(found.device, found.name, found.phase, found.tp, context)


def test_a_setting_is_json_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(governed.VARIABLE, json.dumps(setting(tmp_path)))
    inline = governed.read_setting()
    assert inline.device == NvmlDeviceSettings(kind="nvml", gpus=(0, 1))
    path = tmp_path / "governor.json"
    path.write_text(json.dumps(setting(tmp_path)))
    monkeypatch.setenv(governed.VARIABLE, str(path))
    assert governed.read_setting() == inline


def test_a_wrong_setting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(governed.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"\$BISCALE_GYM_GOVERNOR is not set"):
        governed.read_setting()
    for wrong, message in (
        ("{", "not JSON"),
        (str(tmp_path / "none.json"), "cannot be read"),
        (json.dumps(setting(tmp_path, clock=930)), "clock"),
        (json.dumps(setting(tmp_path, name="a/b")), "name"),
        (json.dumps(setting(tmp_path, device={"kind": "nvidia"})), "device"),
    ):
        monkeypatch.setenv(governed.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=message):
            governed.read_setting()
    with pytest.raises(LiveError, match="too long for a Unix socket"):
        governed.socket_path(tmp_path / ("x" * 100), "prefill-0")


def test_without_permission_one_message_and_observe_only(
    cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for card in cards:
        card.lock_error = card.reset_error = fake_nvml.NO_PERMISSION
    monkeypatch.setenv(governed.VARIABLE, json.dumps(setting(tmp_path)))
    device, notice = opened()
    with device:
        assert device.mode == "observe-only"
    assert notice.startswith("clocks are observed only: GPU 0")
    assert "--cap-add SYS_ADMIN" in notice


def test_a_device_that_cannot_be_opened_is_no_device_at_all(
    cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(governed.VARIABLE, json.dumps(setting(tmp_path, device={"kind": "nvml", "gpus": [0, 7]})))
    with pytest.raises(DeviceError, match="GPU 7: this machine has GPUs 0, 1"):
        opened()
    monkeypatch.setenv(governed.VARIABLE, json.dumps(setting(tmp_path, tp=4)))
    with pytest.raises(ConfigError, match=r"tp is 4, but device\.gpus names 2 cards"):
        opened()


def test_a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with governed.listener(path) as listening:
        assert path.stat().st_mode & 0o077 == 0  # for this user alone: what comes through it is unpickled
        accepting = threading.Thread(target=lambda: listening.accept().close(), daemon=True)
        accepting.start()
        with pytest.raises(LiveError, match="another server's governor has this name"):
            governed.listener(path)
        accepting.join()
