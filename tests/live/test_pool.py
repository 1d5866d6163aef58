"""Whether a silent process is hung or only gets no core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from live.helpers import wait_until

from biscale_gym.live.pool import starved_s


@pytest.fixture
def two_on_one_core() -> Iterator[list[int]]:
    """Two programs that compute without end, on the same core."""
    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("this kernel does not tell how long a process waits for a core")
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    yield [process.pid for process in spinning]
    for process in spinning:
        process.kill()
        process.wait()


def test_waiting_for_a_core_is_counted_and_standing_still_is_not(two_on_one_core: list[int]) -> None:
    one, other = two_on_one_core
    wait_until(lambda: starved_s(one) > 0.5 and starved_s(other) > 0.5)
    os.kill(one, signal.SIGSTOP)
    time.sleep(0.1)
    before_s = starved_s(one)
    time.sleep(0.5)
    assert starved_s(one) == before_s
    os.kill(one, signal.SIGCONT)
    wait_until(lambda: starved_s(one) > before_s + 0.2)


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert starved_s(process.pid) == 0.0
