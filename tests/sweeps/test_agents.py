from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from biscale_gym.config import validate
from biscale_gym.sweeps.agents import logged_in, run_at_wandb
from biscale_gym.sweeps.settings import SweepSettings

from wandb_server import WandbServer  # isort: skip

KEY = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """#!/usr/bin/env python3
import json, os, sys
with open({path!r}, "a") as stream:
    print(json.dumps([sys.argv[1:], os.environ["WANDB_SWEEP_ID"], os.environ["WANDB_RUN_ID"]]), file=stream)
"""


@pytest.fixture(autouse=True)
def nobodys_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


@pytest.fixture
def sweep(tmp_path: Path) -> SweepSettings:
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(path=str(tmp_path / "calls.jsonl")))
    program.chmod(0o755)
    values: dict[str, Any] = {
        "name": "some",
        "program": str(program),
        "command": ["${program}", "train", "smoke", "--wandb", "--set", "${args_no_hyphens}"],
        "metric": {"name": "best/objective", "goal": "minimize"},
        "parameters": {"lanes": {"min": 8, "max": 64}, "net_arch": {"values": [[64, 64], [128]]}},
    }
    return validate(SweepSettings, values, "sweep.yaml")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
@pytest.mark.slow
def test_wandbs_agent_runs_the_command_of_the_file(
    sweep: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        server.proposals = [{"lanes": 16, "net_arch": [64, 64]}]
        assert logged_in()
        said: list[str] = []
        assert run_at_wandb(sweep, "testbed", 1, said.append) == 0
    asked = sweep.model_dump(mode="json", exclude_unset=True)
    asked["parameters"]["lanes"]["distribution"] = sweep.parameters["lanes"].kind  # what W&B makes of min and max
    assert server.sweep == asked
    assert said == ["agents, here and elsewhere: wandb agent testbed/sweep1"]
    (call,) = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    arguments, sweep_id, run_id = call
    assert arguments == ["train", "smoke", "--wandb", "--set", "lanes=16", "net_arch=[64, 64]"]
    assert (sweep_id, run_id) == ("sweep1", "run0")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_key_or_where_the_network_is_forbidden_nobody_is_logged_in(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert not logged_in()
