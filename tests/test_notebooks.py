"""The numbered notebooks run from beginning to end and reach what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NUMBERED = sorted(FOLDER.glob("*.py"))


def run(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """A notebook's variables, and what it printed."""
    names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return names, capsys.readouterr().out


def test_they_are_numbered_and_tested() -> None:
    assert [path.name[:3] for path in NUMBERED] == [f"{number:02d}_" for number in range(1, len(NUMBERED) + 1)]
    tested = re.findall(r'run\("(\d\d_\w+)"', Path(__file__).read_text())
    assert tested == [path.stem for path in NUMBERED]


def test_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = run("01_first_steps", capsys)
    highest, biscale = names["played"]["highest-clock"], names["played"]["biscale"]
    assert biscale["prefill_energy_j"] < highest["prefill_energy_j"]
    assert biscale["ttft_attainment"] > 0.99


def test_train_a_clock_policy(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3")
    names, out = run("02_train_a_clock_policy", capsys)
    assert names["model"].num_timesteps == 4_096
    # Both train and play: too short a training to ask for more than that the clocks are not all at the top.
    assert names["results"]["PPO"][0] < names["results"]["highest clock"][0]
    assert "PPO" in out


def test_placement_with_masks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sb3_contrib")
    names, _ = run("03_placement_with_masks", capsys)
    (planned, _), (learned, figures) = names["results"].values()
    assert planned > learned
    assert figures["total_energy_j"] > 0.0


def test_write_your_own_controller(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = run("04_write_your_own_controller", capsys)
    highest, careful, bold = (figures["decode_energy_j"] for figures in names["played"].values())
    assert bold < careful < highest
    assert names["figures"]["joint_attainment"] > 0.99
