"""Cards behind a real ``pynvml``: builds ``fake_nvml.c`` as libnvidia-ml.so.1 and maps its state."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("fake_nvml.c")
LIBRARY = "libnvidia-ml.so.1"
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST = 3, 4, 9, 15
GPU_IDLE, POWER_CAP = 1, 4
LOCK, RESET = 1, 2
TOP_MHZ = 1980
_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64
_CARD = ("locked_mhz", "clock_mhz", "power_mw", "lock_error", "reset_error", "read_error", "power_error", "call_ms")


class Card(ctypes.Structure):
    _fields_ = [*((name, _u32) for name in _CARD), ("energy_mj", _u64), ("reasons", _u64)]


class _Call(ctypes.Structure):
    _fields_ = [("card", _u32), ("what", _u32), ("mhz", _u32), ("pid", _u32), ("from_ns", _u64), ("to_ns", _u64)]


class _State(ctypes.Structure):
    _fields_ = [
        *((name, _u32) for name in ("init_error", "cards", "calls", "unused")),
        ("card", Card * 4),
        ("call", _Call * 4096),
    ]


class Call(NamedTuple):
    card: int
    what: int
    mhz: int
    pid: int
    from_ns: int
    to_ns: int


def build(folder: Path) -> Path:
    """The shared library; skip where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        import pytest

        pytest.skip("no C compiler to build the fake NVML with")
    path = folder / LIBRARY
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{LIBRARY}", "-o", path, SOURCE]
    subprocess.run(command, check=True)
    return path


class Cards:
    """The state that the library maps."""

    def __init__(self, path: Path, count: int = 2) -> None:
        path.write_bytes(bytes(ctypes.sizeof(_State)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state: Any = _State.from_buffer(self._map)
        self.state.cards = count
        for card in self:
            card.power_mw, card.energy_mj = 100_000, 5_000_000

    def __getitem__(self, index: int) -> Any:
        return self.state.card[index]

    def __iter__(self) -> Any:
        return iter([self.state.card[index] for index in range(self.state.cards)])

    @property
    def locked_mhz(self) -> list[int]:
        return [card.locked_mhz for card in self]

    @property
    def calls(self) -> list[Call]:
        made = self.state.call[: self.state.calls]
        return [Call(*(getattr(call, name) for name in Call._fields)) for call in made]


@contextmanager
def counting(cards: Cards, drawn_w: Callable[[Any], float] = lambda card: 1e-3 * card.power_mw) -> Iterator[None]:
    """The cards' energy counters step a hundred times a second."""
    ending = threading.Event()

    def count() -> None:
        exact_mj = [float(card.energy_mj) for card in cards]
        last_s = time.monotonic()
        while not ending.wait(0.01):
            now_s = time.monotonic()
            for number, card in enumerate(cards):
                exact_mj[number] += 1e3 * drawn_w(card) * (now_s - last_s)
                card.energy_mj = int(exact_mj[number])
            last_s = now_s

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    yield
    ending.set()
    thread.join()
