from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import fake_nvml
from live.fake_nvml import Cards
from live.helpers import ROOT

from biscale_gym.control.scenario import ScenarioSettings, load_scenario


@pytest.fixture(scope="session")
def scenario() -> ScenarioSettings:
    """What real workers serve in tests: a short trace of their own, and time to drain on a crowded machine."""
    return load_scenario("live-smoke", {"duration_s": 4.0, "training_s": 60.0, "drain_limit_s": 300.0})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, as the paths of Unix sockets must be."""
    made = Path(tempfile.mkdtemp(prefix="biscale-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake libnvidia-ml.so.1."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed (extra: live)")
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def cards(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cards:
    """Two fake cards, for this process and for those that it starts; locks in a folder of their own.

    No test ever reaches a real card: here the fake is put where pynvml keeps the library that it has loaded, and
    processes that are started find it under its name.
    """
    import pynvml

    state = tmp_path / "cards"
    cards = Cards(state)
    monkeypatch.setenv("FAKE_NVML", str(state))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_library.parent))
    monkeypatch.setenv("BISCALE_GYM_LOCKS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A load of its own for every test, as the library maps its state once.
    copy = tmp_path / "lib" / fake_nvml.LIBRARY
    copy.parent.mkdir()
    copy.write_bytes(fake_library.read_bytes())
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(copy)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    pynvml.nvmlInit()
    assert pynvml.nvmlSystemGetDriverVersion() == "fake"
    return cards


@pytest.fixture
def controller(cards: Cards) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a program that controls the cards, in a process of its own; it says ``up`` when it has set its clocks."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ.copy(),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
