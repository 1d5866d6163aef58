"""NvmlDevice over the real pynvml, its library replaced behind ctypes by fake_nvml.c."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from live import fake_nvml
from live.fake_nvml import LOCK, TOP_MHZ, Cards
from live.helpers import ROOT, children, ended, wait_until

from biscale_gym.live.devices import COUNTER_BACK, OVERRIDDEN, WATCHDOG_DIED, Work
from biscale_gym.live.errors import DeviceBusyError, DeviceError, DevicePermissionError
from biscale_gym.live.nvml_device import NvmlDevice

Start = Callable[[str], subprocess.Popen[str]]

CONTROLLER = """
import sys, time
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.signals import ending_signals_raise
with ending_signals_raise(), NvmlDevice([0, 1], watchdog_s=3.0) as device:
    device.ask_clock(1200)
    while device.clock_mhz != 1200:
        time.sleep(0.01)
    print("up", device.watchdog_pid, flush=True)
    {then}
"""
FOREVER = "[(time.sleep(0.05), device.idle()) for _ in range(2000)]"


def started(controller: Start, cards: Cards, then: str = FOREVER) -> tuple[subprocess.Popen[str], int]:
    """A controller that has locked 1200 MHz, and its watchdog's pid."""
    process = controller(CONTROLLER.format(then=then))
    assert process.stdout is not None
    said = process.stdout.readline().split()
    assert said[:1] == ["up"], process.communicate()
    assert cards.locked_mhz == [1200, 1200]
    return process, int(said[1])


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_a_group_moves_together_from_beside_the_caller(cards: Cards) -> None:
    for card in cards:
        card.call_ms = 300
    with NvmlDevice([0, 1]) as device:
        assert device.clocks_mhz == tuple(range(345, TOP_MHZ + 1, 15))
        before_s = time.monotonic()
        device.ask_clock(1410)
        assert time.monotonic() - before_s < 0.3  # two calls take 0.6 s
        assert (device.target_mhz, device.clock_mhz) == (1410, TOP_MHZ)
        wait_until(lambda: device.clock_mhz == 1410)
        assert cards.locked_mhz == [1410, 1410]
    assert cards.locked_mhz == [0, 0]


def test_of_clocks_asked_while_one_is_set_only_the_last_counts(cards: Cards) -> None:
    cards[0].call_ms = 500
    with NvmlDevice([0]) as device:
        for clock_mhz in (600, 900, 1200, 1500):
            device.ask_clock(clock_mhz)
            time.sleep(0.005)
        wait_until(lambda: device.clock_mhz == 1500)
    set_mhz = [call.mhz for call in cards.calls if call.what == LOCK]
    assert set_mhz == [600, 1500]


def test_clock_calls_of_a_node_never_overlap(cards: Cards) -> None:
    for card in cards:
        card.call_ms = 10
    with NvmlDevice([0]) as one, NvmlDevice([1]) as other:
        for clock_mhz in (600, 900, 1200, 1500):
            one.ask_clock(clock_mhz)
            other.ask_clock(clock_mhz)
            wait_until(lambda: one.clock_mhz == other.clock_mhz == one.target_mhz)
    calls = sorted(cards.calls, key=lambda call: call.from_ns)
    assert len(calls) > 8
    assert all(earlier.to_ns <= later.from_ns for earlier, later in pairwise(calls))


def test_a_clock_that_does_not_exist_names_the_nearest(cards: Cards) -> None:
    with NvmlDevice([0]) as device, pytest.raises(DeviceError, match="no clock 1000 MHz; the nearest is 1005 MHz"):
        device.ask_clock(1000)


def test_a_failure_halfway_leaves_no_card_behind(cards: Cards) -> None:
    with NvmlDevice([0, 1]) as device:
        cards[1].lock_error = fake_nvml.GPU_IS_LOST
        device.ask_clock(900)
        wait_until(lambda: len([call for call in cards.calls if call.what == LOCK]) == 2)
        wait_until(lambda: cards.locked_mhz == [0, 0])
        with pytest.raises(DeviceError, match=r"GPU 1 .*lock the clock at 900 MHz.*GPU is lost"):
            wait_until(lambda: device.idle() is not None)


# -- telemetry ---------------------------------------------------------------------------------------------------------


def test_energy_and_power_are_read_off_the_cards(cards: Cards) -> None:
    with NvmlDevice([0, 1], sample_s=0.01) as device:
        assert device.source == "measured"
        cards[0].energy_mj += 2_000
        cards[1].energy_mj += 500
        cards[0].power_mw = 650_500
        wait_until(lambda: device.reading().energy_j == 2.5)
        wait_until(lambda: device.reading().power_w == 750.5)
        spent = device.iteration(Work(batch=1.0), 0.5)
        assert (spent.duration_s, spent.energy_j) == (0.5, 0.5 * 750.5)
        assert device.reading().flags == frozenset()


def test_a_counter_that_falls_is_bridged_and_flagged(cards: Cards) -> None:
    with NvmlDevice([0], sample_s=0.01) as device:
        cards[0].energy_mj += 1_000
        wait_until(lambda: device.reading().energy_j == 1.0)
        cards[0].energy_mj = 7
        wait_until(lambda: COUNTER_BACK in device.reading().flags)
        bridged_j = device.reading().energy_j - 1.0
        assert 0.0 < bridged_j < 100.0  # 100 W for the time between two samples
        cards[0].energy_mj += 3_000
        wait_until(lambda: abs(device.reading().energy_j - (4.0 + bridged_j)) < 1e-9)


def test_a_card_that_cannot_be_read_leaves_an_old_reading(cards: Cards) -> None:
    with NvmlDevice([0], sample_s=0.01) as device:
        cards[0].read_error = fake_nvml.GPU_IS_LOST
        time.sleep(0.2)
        assert time.monotonic() - device.reading().time_s > 0.1
        cards[0].read_error = 0
        wait_until(lambda: time.monotonic() - device.reading().time_s < 0.05)


@pytest.mark.parametrize("theirs_mhz", [TOP_MHZ, 600])
def test_clocks_that_somebody_else_sets_are_noticed_and_set_anew(cards: Cards, theirs_mhz: int) -> None:
    with NvmlDevice([0, 1], sample_s=0.01) as device:
        device.ask_clock(1200)
        wait_until(lambda: cards.locked_mhz == [1200, 1200])
        time.sleep(0.1)
        assert OVERRIDDEN not in device.reading().flags
        cards[1].locked_mhz = theirs_mhz  # what `nvidia-smi -lgc` of another process would do
        wait_until(lambda: OVERRIDDEN in device.reading().flags)
        device.ask_clock(1200)
        wait_until(lambda: cards.locked_mhz == [1200, 1200])


@pytest.mark.parametrize("reason", [fake_nvml.POWER_CAP, fake_nvml.GPU_IDLE])
def test_a_card_that_slows_down_by_itself_is_nobodys_doing(cards: Cards, reason: int) -> None:
    with NvmlDevice([0], sample_s=0.01) as device:
        device.ask_clock(1200)
        wait_until(lambda: device.clock_mhz == 1200)
        cards[0].clock_mhz, cards[0].reasons = 900, reason
        time.sleep(0.2)
        assert OVERRIDDEN not in device.reading().flags


# -- who may -----------------------------------------------------------------------------------------------------------


def test_without_permission_the_remedy_is_told_and_observing_works(cards: Cards) -> None:
    for card in cards:
        card.lock_error = card.reset_error = fake_nvml.NO_PERMISSION
    with pytest.raises(DevicePermissionError, match=r"GPU 0 .*CAP_SYS_ADMIN.*observe-only"):
        NvmlDevice([0, 1])
    calls = len(cards.calls)
    with NvmlDevice([0, 1], mode="observe-only", sample_s=0.01) as device:
        device.ask_clock(900)
        cards[0].energy_mj += 1_000
        cards[0].clock_mhz = cards[1].clock_mhz = 1307
        wait_until(lambda: device.reading().energy_j == 1.0)
        wait_until(lambda: device.clock_mhz == 1305)
        assert device.target_mhz == 900
        assert device.watchdog_pid is None
    assert len(cards.calls) == calls


def test_a_second_controller_is_refused_with_the_holders_pid(cards: Cards, controller: Start) -> None:
    process, _ = started(controller, cards)
    with pytest.raises(DeviceBusyError, match=rf"GPU 1 is controlled by process {process.pid} "):
        NvmlDevice([1])
    assert cards.locked_mhz == [1200, 1200]
    NvmlDevice([1], mode="observe-only").close()


def test_a_gpu_is_free_again_after_close(cards: Cards) -> None:
    NvmlDevice([0, 1]).close()
    NvmlDevice([1, 0]).close()


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ([2], r"GPU 2: this machine has GPUs 0, 1"),
        ([-1], r"GPU -1: this machine has GPUs 0, 1"),
        ([], r"a group needs GPUs, each once, got \[\]"),
        ([1, 1], r"each once, got \[1, 1\]"),
    ],
)
def test_gpus_that_are_not_there(cards: Cards, gpus: list[int], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        NvmlDevice(gpus)


def test_a_machine_without_cards(cards: Cards) -> None:
    cards.state.cards = 0
    with pytest.raises(DeviceError, match="GPU 0: this machine has none"):
        NvmlDevice([0])


def test_a_driver_that_is_not_loaded(cards: Cards) -> None:
    cards.state.init_error = fake_nvml.DRIVER_NOT_LOADED
    with pytest.raises(DeviceError, match=r"Driver Not Loaded.*nvidia-smi must work"):
        NvmlDevice([0])


def test_a_card_without_instant_power(cards: Cards) -> None:
    cards[0].power_error = fake_nvml.NOT_SUPPORTED
    with pytest.raises(DeviceError, match=r"GPU 0 \(Fake H100\): cannot read its power.*Ampere"):
        NvmlDevice([0])


def test_the_real_library_where_it_is_absent() -> None:
    """pynvml's own search, in a process that no test has prepared."""
    program = "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"
    clean = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    if subprocess.run([sys.executable, "-c", program], capture_output=True, env=clean).returncode == 0:
        pytest.skip("this machine has libnvidia-ml")
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed (extra: live)")
    program = "from biscale_gym.live.nvml_device import NvmlDevice\nNvmlDevice([0])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=clean)
    assert "DeviceError: NVML: NVML says 'NVML Shared Library Not Found' (code 12); libnvidia-ml.so.1" in done.stderr


def test_without_nvidia_ml_py_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ModuleNotFoundError('pynvml')")
    program = "from biscale_gym.live.nvml_device import NvmlDevice\nNvmlDevice([0])"
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert "DeviceError: nvidia-ml-py is not installed: pip install 'biscale-gym[live]'" in done.stderr


# -- clocks are given back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_on_signals(cards: Cards, controller: Start, number: signal.Signals) -> None:
    process, watchdog = started(controller, cards)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert cards.locked_mhz == [0, 0]
    assert "watchdog:" not in said  # the controller did it itself
    assert cards.calls[-1].pid == process.pid
    wait_until(lambda: ended(watchdog))


def test_on_an_exception(cards: Cards, controller: Start) -> None:
    process, _ = started(controller, cards, "raise RuntimeError('lost')")
    _, said = process.communicate(timeout=120)
    assert "RuntimeError: lost" in said
    assert cards.locked_mhz == [0, 0]


def test_at_exit_of_a_program_that_closes_nothing(cards: Cards, controller: Start) -> None:
    process = controller(
        "import time\nfrom biscale_gym.live.nvml_device import NvmlDevice\n"
        "device = NvmlDevice([0])\ndevice.ask_clock(900)\n"
        "while device.clock_mhz != 900: time.sleep(0.01)\nprint('up', flush=True)"
    )
    process.communicate(timeout=120)
    assert [call.mhz for call in cards.calls if call.what == LOCK] == [900]
    assert cards.locked_mhz[0] == 0


def test_after_kill_9_the_watchdog_does_it_and_only_then_frees_the_gpu(cards: Cards, controller: Start) -> None:
    process, watchdog = started(controller, cards)
    for card in cards:
        card.call_ms = 1500
    process.kill()
    process.wait()
    with pytest.raises(DeviceBusyError):  # the watchdog has not come to it yet
        NvmlDevice([1])
    wait_until(lambda: cards.locked_mhz == [0, 0])
    assert cards.calls[-1].pid == watchdog
    for card in cards:
        card.call_ms = 0

    def free() -> bool:
        try:
            NvmlDevice([0, 1]).close()
        except DeviceBusyError:
            return False
        return True

    wait_until(free)


def test_who_kills_a_controller_with_all_its_descendants_misses_the_watchdog(cards: Cards, controller: Start) -> None:
    """As a vLLM server does with an engine that does not end in time."""
    process, watchdog = started(controller, cards)
    family = children(process.pid)
    assert watchdog not in family
    for pid in (*family, process.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cards.locked_mhz == [0, 0])
    assert cards.calls[-1].pid == watchdog


def test_of_a_controller_that_hangs(cards: Cards, controller: Start) -> None:
    process, watchdog = started(controller, cards, "time.sleep(60)")
    wait_until(lambda: cards.locked_mhz == [0, 0])
    assert cards.calls[-1].pid == watchdog
    assert process.poll() is None


def test_of_a_stopped_controller_that_goes_on_its_clocks_are_set_anew(cards: Cards, controller: Start) -> None:
    then = "[(time.sleep(0.05), device.idle(), device.ask_clock(1200)) for _ in range(2000)]"
    process, watchdog = started(controller, cards, then)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: cards.locked_mhz == [0, 0])
    assert cards.calls[-1].pid == watchdog
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: cards.locked_mhz == [1200, 1200])
    process.terminate()
    process.wait(120)
    assert cards.locked_mhz == [0, 0]


def test_a_killed_watchdog_is_replaced_and_clocks_are_the_drivers_until_then(cards: Cards) -> None:
    with NvmlDevice([0, 1], sample_s=0.01) as device:
        device.ask_clock(1200)
        wait_until(lambda: device.clock_mhz == 1200)
        first = device.watchdog_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)

        def noticed() -> bool:
            device.idle()
            return WATCHDOG_DIED in device.reading().flags

        wait_until(noticed)
        assert device.watchdog_pid != first
        assert cards.locked_mhz == [0, 0]
        device.ask_clock(1200)
        wait_until(lambda: cards.locked_mhz == [1200, 1200])
    assert cards.locked_mhz == [0, 0]


def test_sigterm_to_the_watchdog_gives_clocks_back_before_it_goes(cards: Cards, controller: Start) -> None:
    _, watchdog = started(controller, cards, "time.sleep(60)")
    os.kill(watchdog, signal.SIGTERM)
    wait_until(lambda: any(call.pid == watchdog for call in cards.calls))
    wait_until(lambda: cards.locked_mhz == [0, 0])


def test_what_the_controller_cannot_give_back_the_watchdog_goes_on_with(
    cards: Cards, capfd: pytest.CaptureFixture[str]
) -> None:
    device = NvmlDevice([0])
    device.ask_clock(1200)
    wait_until(lambda: device.clock_mhz == 1200)
    watchdog = device.watchdog_pid
    cards[0].reset_error = fake_nvml.GPU_IS_LOST

    healed = threading.Timer(1.0, lambda: setattr(cards[0], "reset_error", 0))
    healed.start()
    with pytest.raises(DeviceError, match="cannot give its clock back"):
        device.close()
    assert cards.locked_mhz[0] == 0
    assert cards.calls[-1].pid == watchdog
    assert "cannot give its clock back" in capfd.readouterr().err
