"""What every entry of the whole cluster's observation is: slots of prefill and decode instances, then totals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.envs.layout import Entry, numbered

VERSION = 1
"""Of the layout: a policy trained on another one is refused."""

SLOTS_PER_PHASE = 8
SLOTS = 2 * SLOTS_PER_PHASE
"""Prefill slots first. An empty slot is all zeros, and its action is ignored."""


def slot_entries(phase: Phase) -> list[Entry]:
    """One instance, in order."""
    slo = "TTFT" if phase == "prefill" else "TPOT"
    common = [
        Entry("present", "1 if an instance has this slot", 0.0, 1.0),
        Entry("running", "1 while an iteration runs", 0.0, 1.0),
        Entry("clock", "clock in force [MHz] / 2000", 0.0, 1.5),
        Entry("target", "clock last asked for [MHz] / 2000", 0.0, 1.5),
        Entry("switching", "1 while the clock last asked for is not yet in force", 0.0, 1.0),
        Entry("gpus", "GPUs of the instance / 8", 0.0, 1.0),
        Entry("power", "power [W] / 700 W per GPU", 0.0, 2.0),
        Entry("kv", "KV tokens held / KV capacity", 0.0, 1.0),
        Entry("waiting_requests", "ln(1 + requests that wait) / ln 1025", 0.0, 2.0),
        Entry("waiting_tokens", "ln(1 + tokens that wait) / ln 65537", 0.0, 2.0),
        Entry("arrivals_1s", "ln(1 + arrivals/s, exponential mean over 1 s) / ln 101", 0.0, 2.0),
        Entry("arrivals_10s", "the same over 10 s", 0.0, 2.0),
        Entry("completions_10s", "the same for requests whose phase is over, over 10 s", 0.0, 2.0),
        Entry("late_60s", "share of completed requests that broke the SLO, exponential mean over 60 s", 0.0, 1.0),
        Entry("latency", f"predicted duration of the running iteration at the clock in force / {slo} SLO", 0.0, 4.0),
    ]
    if phase == "prefill":
        return [
            *common,
            Entry("tokens", "tokens of the running batch / 8192", 0.0, 4.0),
            Entry("work_left", "share of the running batch still to do", 0.0, 1.0),
            Entry("slack_running", "(SLO - time waited by the batch's oldest prompt) / SLO; 1 if none runs", -4.0, 1.0),
            Entry("slack_waiting", "(SLO - time waited by the first prompt in the queue) / SLO; 1 if none", -4.0, 1.0),
        ]
    return [
        *common,
        Entry("batch", "ln(1 + requests in the batch) / ln 1025", 0.0, 2.0),
        Entry("context", "KV tokens per request of the batch / 8192", 0.0, 4.0),
        Entry("slack", "least, 5 and 50 % quantile of the batch's saved-up TPOT slack [10 SLO]", -4.0, 4.0, 3),
    ]


def total_entries() -> list[Entry]:
    """What concerns the whole cluster, in order."""
    return [
        Entry("slo_ttft", "TTFT SLO [s]", 0.0, 8.0),
        Entry("slo_tpot", "TPOT SLO [0.1 s]", 0.0, 8.0),
        Entry("interval", "length of a control interval [s]", 0.0, 8.0),
        Entry("arrivals_1s", "ln(1 + arrivals/s, exponential mean over 1 s) / ln 101", 0.0, 2.0),
        Entry("arrivals_10s", "the same over 10 s", 0.0, 2.0),
        Entry("arrivals_60s", "the same over 60 s", 0.0, 2.0),
        Entry("late_60s", "share of completed requests that broke an SLO, exponential mean over 60 s", 0.0, 1.0),
        Entry("in_flight", "ln(1 + requests in flight) / ln 1025", 0.0, 2.0),
        Entry("power", "power of all GPUs [W] / 700 W per GPU", 0.0, 2.0),
        Entry("free_gpus", "share of the cluster's GPUs that belong to no instance", 0.0, 1.0),
    ]


def _size(entries: list[Entry]) -> int:
    return sum(entry.size for entry in entries)


PREFILL_SIZE = _size(slot_entries("prefill"))
DECODE_SIZE = _size(slot_entries("decode"))
TOTALS = SLOTS_PER_PHASE * (PREFILL_SIZE + DECODE_SIZE)
"""Where the totals begin."""
TOTALS_SIZE = _size(total_entries())
SIZE = TOTALS + TOTALS_SIZE


def slot_start(slot: int) -> int:
    """Where a slot's entries begin."""
    if slot < SLOTS_PER_PHASE:
        return slot * PREFILL_SIZE
    return SLOTS_PER_PHASE * PREFILL_SIZE + (slot - SLOTS_PER_PHASE) * DECODE_SIZE


def slot_size(slot: int) -> int:
    """How many entries a slot has."""
    return PREFILL_SIZE if slot < SLOTS_PER_PHASE else DECODE_SIZE


def all_entries() -> list[Entry]:
    """Every entry of every slot and the totals, in order."""
    slots = [slot_entries("prefill")] * SLOTS_PER_PHASE + [slot_entries("decode")] * SLOTS_PER_PHASE
    return [entry for slot in slots for entry in slot] + total_entries()


def names() -> list[str]:
    """A name for every number of the whole observation, e.g. ``prefill[0].clock`` or ``decode[7].slack[2]``."""
    slots = [
        f"{phase}[{slot}].{name}"
        for phase in PHASES
        for slot in range(SLOTS_PER_PHASE)
        for name in numbered(slot_entries(phase))
    ]
    return slots + numbered(total_entries())


def _bounds(entries: list[Entry]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    # An empty slot is all zeros, so zero is in every range.
    low = np.concatenate([np.full(entry.size, min(entry.low, 0.0)) for entry in entries])
    high = np.concatenate([np.full(entry.size, entry.high) for entry in entries])
    return low.astype(np.float32), high.astype(np.float32)


def bounds() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest value of every number of the whole observation: two float32[SIZE]."""
    return _bounds(all_entries())


def agent_bounds(slot: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same for one slot followed by the totals."""
    return _bounds([*slot_entries("prefill" if slot < SLOTS_PER_PHASE else "decode"), *total_entries()])
