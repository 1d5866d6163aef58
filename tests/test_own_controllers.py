"""Controllers of one's own, through the installed command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MINE = """
from baselines.max_clock import MaxClock
from biscale_gym.cluster.simulator import PhasePolicy


class Mine(MaxClock):
    name = "mine"


class Unfinished(Mine):
    def policies(self, context):
        return PhasePolicy(), None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def compare(folder: Path, controller: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("biscale-gym")), "compare", "--scenario", "smoke"]
    command += ["--controllers", controller, "--json", "rows.json", "--out", "out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_current_folder_is_searched_and_part_of_the_records_id(folder: Path) -> None:
    records = set()
    for _ in range(2):
        done = compare(folder, "mine:Mine")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((folder / "rows.json").read_text())["rows"]
        assert row["controller"] == "mine:Mine"
        records.add(row["record"])
        with (folder / "mine.py").open("a") as source:
            source.write("\n# edited\n")
    assert len(records) == 2


def test_a_policy_without_a_function_is_one_clear_error(folder: Path) -> None:
    done = compare(folder, "mine:Unfinished")
    assert done.returncode == 2
    assert "controller 'mine': its prefill policy has no function" in done.stderr
