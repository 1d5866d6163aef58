"""What the tests of live serving share."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.live.replay import Outcome
from biscale_gym.traces import Trace

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
REAL_WORKERS = [
    pytest.mark.live,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="no vLLM here (make live-cpu makes .venv-live)"
    ),
]


def steady(count: int = 8, gap_s: float = 0.3, prompt_tokens: int = 300, output_tokens: int = 20) -> Trace:
    """A request every ``gap_s``, each of its own length."""
    numbers = np.arange(count)
    return Trace(gap_s * numbers, prompt_tokens + numbers, output_tokens + numbers, "steady")


def everything_finished(outcome: Outcome) -> None:
    assert outcome.states == {"finished": len(outcome.requests.arrival_s), "failed": 0, "rejected": 0, "unfinished": 0}
    assert outcome.first_tokens_agree


def wait_until(true: Callable[[], bool], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses on which processes listen, as /proc shows them."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and cells[9] in sockets:
                found.add(cells[1].partition(":")[0])
    return found


def ended(pid: int) -> bool:
    """Gone, or a zombie until its parent, the forkserver, has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def children(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found
