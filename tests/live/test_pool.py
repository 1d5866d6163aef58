"""Whether a silent process is hung or only gets no core; ports for workers; a worker whose listener fails."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live.helpers import wait_until

from biscale_gym.live.errors import LiveError
from biscale_gym.live.pool import free_port, starved_s


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


def test_free_ports_are_none_that_systems_hand_out_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if handed_out.exists():
        assert max(ports) < int(handed_out.read_text().split()[0])
    with socket.socket() as taken:
        least, most = min(ports), max(ports)
        taken.bind(("127.0.0.1", least))
        monkeypatch.setattr(random, "sample", lambda *_: [least, most])
        assert free_port() == most
        monkeypatch.setattr(random, "sample", lambda *_: [least])
        with pytest.raises(LiveError, match="no free port"):
            free_port()


@pytest.mark.parametrize(("thread", "code"), [("nixl_handshake_listener", 1), ("another", 0)])
def test_a_worker_ends_where_its_listener_fails(thread: str, code: int) -> None:
    program = f"""
import threading
from biscale_gym.live.vllm_adapter import engine
def fail():
    raise OSError("Address already in use")
threading.excepthook = engine._end_with_the_listener
one = threading.Thread(target=fail, name={thread!r})
one.start()
one.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Address already in use" in done.stderr
