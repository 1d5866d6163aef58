"""What control adds to a live decode step, measured on one CPU worker's engine.

    .venv-live/bin/python scripts/live_overhead.py

Batches of requests decode on a real vLLM engine, as a worker drives it. Blocks of steps take turns: without control
(``off``), with BiScale's slack policy asked before each batch, its energy booked and its record written (``on``), and
the same with the status that BiScale/Live-v0 reads (``watched``). The emulated clock stays at the top, so that no step
is stretched. A figure is the median over rounds of the difference between a block's median step and the ``off``
block's of the same round, with the middle half of the rounds: of the time that a step took, and of the processor time
that the worker's thread spent on it, which other programs disturb less. The machine's load is told beside it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from biscale_gym.config import load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live import messages as m
from biscale_gym.live.demand import prepared
from biscale_gym.live.devices import Device
from biscale_gym.live.emulated import EmulatedDevice
from biscale_gym.live.pool import free_port
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import setups_of
from biscale_gym.live.status import BLOCK_BYTES
from biscale_gym.live.vllm_adapter.engine import Engine
from biscale_gym.live.vllm_adapter.model import FIRST_TOKEN_ID
from biscale_gym.live.worker import WorkerRun

ARMS = ("off", "on", "watched")
KINDS = ("step", "cpu")
PROMPT_TOKENS = 200
TOP_MHZ = 1980


class Unmoved(EmulatedDevice):
    """An emulated card that is asked for clocks and stays at the top one."""

    def ask_clock(self, clock_mhz: int) -> None:
        """Take the same path as far as the answer, then ask for the top clock."""
        super().ask_clock(max(clock_mhz, self.clocks_mhz[-1]))


class UnmovedRun(WorkerRun):
    """A worker's run on such a card."""

    def open_device(self, context: PlanContext) -> tuple[Device, str]:
        """The card."""
        cluster = context.scenario.cluster
        profile = cluster.profile().for_phase(self.setup.phase)
        return Unmoved(profile, self.setup.tp, context.clocks_mhz, cluster.switching_settings()), ""


def median_step_ms(engine: Engine, run: WorkerRun, count: int) -> list[float]:
    """Of the engine's next steps, as in ``KINDS``."""
    taken_s = []
    for _ in range(count):
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        outputs = list(engine.step())
        taken_s.append((time.perf_counter() - began_s, time.thread_time() - began_cpu_s))
        run.take(outputs)
    found: list[float] = (1e3 * np.median(taken_s, axis=0)).tolist()
    return found


def measured(engine: Engine, runs: dict[str, WorkerRun], batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """One batch size: median step of every arm and round."""
    longest = 2 * len(ARMS) * rounds * steps
    prompt = np.random.default_rng(batch).integers(FIRST_TOKEN_ID, 1000, PROMPT_TOKENS, dtype=np.int32)
    names = [f"{batch}.{number}" for number in range(batch)]
    now_s = runs["on"].governor.now_s()
    engine.unhook()
    for name in names:
        add = m.Add(name, prompt, longest, None, now_s, now_s)
        for run in runs.values():  # every arm knows the requests, the engine gets them once
            run.note(add)
        engine.add(name, prompt.tolist(), longest, None)
    while any(engine.computed_tokens(name) <= PROMPT_TOKENS for name in names):
        list(engine.step())
    medians_ms: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        order = [ARMS[(number + place) % len(ARMS)] for place in range(len(ARMS))]
        for arm in order:
            if arm == "off":
                engine.unhook()
            else:
                runs[arm].hook()
            medians_ms[arm].append(median_step_ms(engine, runs["on"], steps))
    for name in names:
        for run in runs.values():
            run.requests.pop(name, None)
        engine.abort(name)
    row: dict[str, Any] = {"batch": batch}
    for number, kind in enumerate(KINDS):
        off_ms = np.array(medians_ms["off"])[:, number]
        row[f"off_{kind}_ms"] = float(np.median(off_ms))
        for arm in ARMS[1:]:
            added_ms = np.array(medians_ms[arm])[:, number] - off_ms
            low, middle, high = np.percentile(added_ms, (25, 50, 75)).tolist()
            row[f"{arm}_added_{kind}_ms"] = {"median": middle, "quartiles": [low, high]}
    return row


def main(
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 12,
    steps: int = 20,
    scenario: str = "live-smoke",
    controller: str = "biscale",
    json_to: str | None = None,
) -> None:
    """Measure and print.

    Args:
        batches: requests that decode at the same time.
        rounds: of one block per arm.
        steps: of a block.
        scenario: whose clocks, SLO and decode instance to take.
        controller: whose decode policy.
        json_to: file for the figures as JSON; "-": standard output.
    """
    chosen, settings = load_scenario(scenario), load_preset(LiveSettings, "live", "cpu")
    context = prepared(chosen, None, 0)[1]
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        decode = next(setup for setup in setups_of(chosen, settings, Path(folder)) if setup.phase == "decode")
        setup = replace(decode, port=free_port(), block=bytearray(BLOCK_BYTES))
        engine = Engine(setup)
        runs: dict[str, WorkerRun] = {}
        for arm in ARMS[1:]:
            told = m.Run(m.Variant.parsed(controller), context, Path(folder) / f"{arm}.csv", TOP_MHZ, arm == "watched")
            runs[arm] = UnmovedRun(setup, engine, told)
            runs[arm].go(time.monotonic())
        rows = [measured(engine, runs, batch, rounds, steps) for batch in batches]
        engine.unhook()
        for run in runs.values():
            run.end()
        engine.close()
    figures = {"load_average_before": load[0], "load_average_after": os.getloadavg()[0], "rows": rows}
    print("| batch | | off [ms] | control adds [ms] | with the status [ms] |")
    print("|--:|---|--:|--:|--:|")
    for row in rows:
        for kind in KINDS:
            cells = [f"{row['batch']}", kind, f"{row[f'off_{kind}_ms']:.3f}"]
            for arm in ARMS[1:]:
                added = row[f"{arm}_added_{kind}_ms"]
                low, high = added["quartiles"]
                cells.append(f"{added['median']:.3f} ({low:.3f} to {high:.3f})")
            print(f"| {' | '.join(cells)} |")
    print(f"load average {figures['load_average_before']:.1f} before, {figures['load_average_after']:.1f} after")
    if json_to == "-":
        print(json.dumps(figures))
    elif json_to is not None:
        Path(json_to).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
