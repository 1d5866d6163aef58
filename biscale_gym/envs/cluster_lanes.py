"""Lanes of whole clusters: the compiled step of ``BiScale/Cluster-v0``, one control interval of one or many of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import from_dtype, prange, types
from numpy.typing import NDArray

from biscale_gym._jit import INDEX, compiled, compiled_as, inlined, parallel_as
from biscale_gym.cluster.clocks import ask_clock
from biscale_gym.cluster.engine import BAD_ANSWER, DECISION, NO_ANSWER, REACHED, advance_at
from biscale_gym.cluster.handle import HANDLE_TYPE, state_at
from biscale_gym.cluster.state import (
    ABSENT,
    ACTIVE,
    DRAINING,
    LOADING,
    PREFILL,
    State,
)
from biscale_gym.envs import cluster_layout as layout
from biscale_gym.envs.encoding import (
    ARRIVALS_1S,
    ARRIVALS_10S,
    ARRIVALS_60S,
    AT_S,
    COMPLETIONS_10S,
    MHZ,
    NO_KEEPS,
    TOKENS_UNIT,
    Keeps,
    clipped,
    follow,
    grid_of,
    keeps,
    late_share,
    log_rate,
    log_requests,
    log_tokens,
)
from biscale_gym.envs.lanes import (
    COMPLETED,
    DISCOUNT,
    DT_S,
    ENERGY_J,
    NOW_S,
    REWARD,
    TERMS,
    VIOLATIONS,
    count_ended,
    count_outside,
    discounted,
    energy_now_j,
    overdue,
    prefetch_lanes,
)
from biscale_gym.profiles.kernels import iteration_latency

Row = NDArray[np.float32]
_f, _i = np.float64, np.int64

CLUSTER_LANE = np.dtype(
    [
        ("start_s", _f),
        ("interval_s", _f),
        ("steps", _i),
        ("end_s", _f),
        ("border_s", _f),
        ("reference_w", _f),
        ("violation_penalty", _f),
        ("discount_per_s", _f),
        # at the last step
        ("at_s", _f),
        ("prefill_j", _f),
        ("decode_j", _f),
        ("unallocated_j", _f),
        ("violations", _i),
        ("completed", _i),
        # of the totals, as an instance's memory
        ("memory", _f, (32,)),
        # the instance in each slot, -1: none
        ("slots", _i, (layout.SLOTS,)),
        # the slots that hold one, in the order of the instances
        ("filled", _i),
        ("in_order", _i, (layout.SLOTS,)),
    ],
    align=True,
)

# Columns of the terms after those of lanes.py.
PREFILL_J = TERMS
DECODE_J = TERMS + 1
UNALLOCATED_J = TERMS + 2
CLUSTER_TERMS = TERMS + 3

_PREFILL_SIZE, _DECODE_SIZE = layout.PREFILL_SIZE, layout.DECODE_SIZE
_SLOTS, _PER_PHASE = layout.SLOTS, layout.SLOTS_PER_PHASE
_TOTALS = layout.TOTALS
_OWN = 15


@compiled
def fill_slots(st: State, lane: Any) -> None:
    """Give the slots to the instances of the placement in force, in order."""
    slots = lane.slots
    for slot in range(_SLOTS):
        slots[slot] = -1
    prefills, decodes = 0, 0
    lane.filled = 0
    for i in range(st.glob[0].instances):
        inst = st.inst[i]
        # 1, 2, 3: waiting for GPUs, loading, active. Who drains keeps its clock.
        if inst.status < 1 or inst.status > ACTIVE:
            continue
        if inst.phase == PREFILL and prefills < _PER_PHASE:
            slot = prefills
            prefills += 1
        elif inst.phase != PREFILL and decodes < _PER_PHASE:
            slot = _PER_PHASE + decodes
            decodes += 1
        else:
            continue
        slots[slot] = i
        lane.in_order[lane.filled] = slot
        lane.filled += 1


@compiled
def read_energy(st: State, lane: Any, terms: Any) -> None:
    """Joules since the last reading, by phase, into the terms; the reading becomes the last."""
    g = st.glob[0]
    prefill_j, decode_j = 0.0, 0.0
    for i in range(g.instances):
        inst = st.inst[i]
        if inst.status == ABSENT:
            continue
        booked_j = energy_now_j(st, i) if LOADING <= inst.status <= DRAINING else inst.energy_j.sum()
        if inst.phase == PREFILL:
            prefill_j += booked_j
        else:
            decode_j += booked_j
    free = max(0, g.gpus - g.gpus_allocated)
    unallocated_j = g.unallocated_j + free * g.unallocated_w_per_gpu * (g.now_s - g.unallocated_last_s)
    terms[PREFILL_J] = prefill_j - lane.prefill_j
    terms[DECODE_J] = decode_j - lane.decode_j
    terms[UNALLOCATED_J] = unallocated_j - lane.unallocated_j
    lane.prefill_j, lane.decode_j, lane.unallocated_j = prefill_j, decode_j, unallocated_j


@inlined
def _counts(st: State) -> tuple[int, int]:
    """(requests or phases of requests that broke an SLO or were rejected, requests done) so far."""
    g = st.glob[0]
    late = int(g.rejected)
    for i in range(g.instances):
        late += st.inst[i].late
    return late, int(g.finished)


@inlined
def _encode_slot(st: State, i: int, params: Any, known: Keeps, out: Row, at: int) -> Keeps:
    g = st.glob[0]
    inst = st.inst[i]
    memory = st.memory[i]
    known = follow(memory, g.now_s, inst.routed, inst.completed, inst.late, known)
    out[at] = np.float32(1.0)
    out[at + 1] = np.float32(inst.running)
    out[at + 2] = clipped(params[1 + inst.clock] / MHZ, 0.0, 1.5)
    out[at + 3] = clipped(params[1 + inst.target] / MHZ, 0.0, 1.5)
    out[at + 4] = np.float32(inst.in_service >= 0 or inst.queued != 0)
    out[at + 5] = clipped(inst.tp / 8.0, 0.0, 1.0)
    out[at + 6] = clipped(inst.power_w / (700.0 * inst.tp), 0.0, 2.0)
    out[at + 7] = clipped(inst.kv_used / inst.kv_capacity, 0.0, 1.0)
    waiting = inst.queue_n + inst.transit_n
    out[at + 8] = log_requests(waiting)
    out[at + 9] = log_tokens(inst.queue_tokens + inst.transit_tokens)
    out[at + 10] = log_rate(memory[ARRIVALS_1S])
    out[at + 11] = log_rate(memory[ARRIVALS_10S])
    out[at + 12] = log_rate(memory[COMPLETIONS_10S])
    out[at + 13] = late_share(memory)
    slo_s = g.ttft_slo_s if inst.phase == PREFILL else g.tpot_slo_s
    latency_s = 0.0
    if inst.running:
        latency_s = inst.full_duration_s
        if not g.prediction_is_exact:
            latency_s = iteration_latency(
                st.predicted[inst.predicted_start : inst.predicted_stop],
                inst.clock,
                inst.iter_batch,
                inst.iter_kv,
                inst.iter_tokens,
                inst.iter_sum_sq,
            )
    out[at + 14] = clipped(latency_s / slo_s, 0.0, 4.0)
    own = at + _OWN
    if inst.phase == PREFILL:
        tokens, left, running_slack, waiting_slack = 0.0, 0.0, 1.0, 1.0
        if inst.running:
            tokens = inst.iter_tokens
            left = max(0.0, inst.work_left - (g.now_s - inst.segment_start_s) / inst.full_duration_s)
            oldest_s = np.inf
            r = inst.batch_head
            while r >= 0:
                oldest_s = min(oldest_s, st.req[r].arrival_s)
                r = st.req[r].next
            running_slack = (slo_s - (g.now_s - oldest_s)) / slo_s
        if inst.queue_head >= 0:
            waiting_slack = (slo_s - (g.now_s - st.req[inst.queue_head].arrival_s)) / slo_s
        out[own] = clipped(tokens / TOKENS_UNIT, 0.0, 4.0)
        out[own + 1] = clipped(left, 0.0, 1.0)
        out[own + 2] = clipped(running_slack, -4.0, 1.0)
        out[own + 3] = clipped(waiting_slack, -4.0, 1.0)
        return known
    last = inst.run_n - 1
    out[own] = log_requests(inst.run_n)
    out[own + 1] = clipped(inst.run_kv / max(1, inst.run_n) / TOKENS_UNIT, 0.0, 4.0)
    for k, percent in enumerate((0, 5, 50)):
        slack_s = 0.0
        if last >= 0:
            slack_s = st.slack_s[i, last - percent * last // 100] + g.tpot_slo_s * inst.iterations - g.now_s
        out[own + 2 + k] = clipped(slack_s / (10.0 * g.tpot_slo_s), -4.0, 4.0)
    return known


@compiled
def encode_cluster(st: State, lane: Any, params: Any, late: int, out: Row) -> None:
    """Write the whole observation (cluster_layout); ``late`` is of ``_counts``."""
    g = st.glob[0]
    out[:] = np.float32(0.0)
    power_w = max(0, g.gpus - g.gpus_allocated) * g.unallocated_w_per_gpu
    for i in range(g.instances):
        if LOADING <= st.inst[i].status <= DRAINING:
            power_w += st.inst[i].power_w
    # Mostly all were last followed in the same instant.
    known = keeps(g.now_s - lane.memory[AT_S], NO_KEEPS)
    for k in range(lane.filled):
        slot = lane.in_order[k] & INDEX
        i = lane.slots[slot] & INDEX
        at = slot * _PREFILL_SIZE
        if slot >= _PER_PHASE:
            at = _PER_PHASE * _PREFILL_SIZE + (slot - _PER_PHASE) * _DECODE_SIZE
        known = _encode_slot(st, i, params, known, out, at & INDEX)
    memory = lane.memory
    follow(memory, g.now_s, g.arrived, g.finished, late, known)
    out[_TOTALS] = clipped(g.ttft_slo_s, 0.0, 8.0)
    out[_TOTALS + 1] = clipped(g.tpot_slo_s / 0.1, 0.0, 8.0)
    out[_TOTALS + 2] = clipped(lane.interval_s, 0.0, 8.0)
    out[_TOTALS + 3] = log_rate(memory[ARRIVALS_1S])
    out[_TOTALS + 4] = log_rate(memory[ARRIVALS_10S])
    out[_TOTALS + 5] = log_rate(memory[ARRIVALS_60S])
    out[_TOTALS + 6] = late_share(memory)
    out[_TOTALS + 7] = log_requests(g.arrived - g.finished - g.rejected)
    out[_TOTALS + 8] = clipped(power_w / (700.0 * g.gpus), 0.0, 2.0)
    out[_TOTALS + 9] = clipped(max(0, g.gpus - g.gpus_allocated) / g.gpus, 0.0, 1.0)


@inlined
def _set_clocks(st: State, lane: Any, params: Any, actions: Any) -> None:
    """Ask for the actions' clocks, in the order of the instances."""
    grid = grid_of(params)[0]
    for k in range(lane.filled):
        slot = lane.in_order[k] & INDEX
        i = lane.slots[slot] & INDEX
        if st.inst[i].status == ACTIVE:
            ask_clock(st, i, int(params[grid + actions[slot]]))


@inlined
def _tell(st: State, lane: Any, params: Any, over: bool, obs: Any, terms: Any) -> None:
    g = st.glob[0]
    read_energy(st, lane, terms)
    late, finished = _counts(st)
    encode_cluster(st, lane, params, late, obs)
    if over:
        late += overdue(st)
    terms[ENERGY_J] = terms[PREFILL_J] + terms[DECODE_J] + terms[UNALLOCATED_J]
    terms[VIOLATIONS] = late - lane.violations
    terms[COMPLETED] = finished - lane.completed
    terms[DT_S] = g.now_s - lane.at_s
    terms[NOW_S] = g.now_s
    spent, discount = discounted(terms[ENERGY_J] / lane.reference_w, lane.discount_per_s, terms[DT_S])
    terms[REWARD] = -spent - lane.violation_penalty * terms[VIOLATIONS]
    terms[DISCOUNT] = discount
    lane.violations, lane.completed, lane.at_s = late, finished, g.now_s


@compiled
def _step(handle: Any, lane: Any, params: Any, actions: Any, obs: Any, terms: Any) -> int:
    st = state_at(handle)
    _set_clocks(st, lane, params, actions)
    lane.steps += 1
    until_s = min(lane.start_s + lane.steps * lane.interval_s, lane.end_s)
    advance_at(handle, until_s, NO_ANSWER)
    over = until_s >= lane.end_s
    _tell(st, lane, params, over, obs, terms)
    return REACHED if over else DECISION


_LANES = types.Array(from_dtype(CLUSTER_LANE), 1, "C")
_PARAMS = types.float64[::1]
_ONE = (HANDLE_TYPE, _LANES, _PARAMS, types.int64[::1], types.float32[::1], types.float64[::1])
_ROWS = (
    types.int64[:, ::1],
    _LANES,
    _PARAMS,
    types.int64[:, ::1],
    types.float32[:, ::1],
    types.float64[:, ::1],
    types.int64[::1],
)


@compiled_as(types.int64(*_ONE))
def step_cluster(handle: Any, lane: Any, params: Any, actions: Any, obs: Any, terms: Any) -> int:
    """Ask for clocks and run one control interval.

    Args:
        handle: int64[handle.SIZE].
        lane: CLUSTER_LANE[1].
        params: float64[any] that begins with ``encoding.encoder_params``.
        actions: int64[SLOTS], indices into the grid of clocks; those of empty slots are ignored.
        obs: float32[cluster_layout.SIZE], written.
        terms: float64[CLUSTER_TERMS], written.

    Returns:
        DECISION (the next interval's), REACHED (the episode's end), or BAD_ANSWER (nothing has happened).
    """
    if count_outside(actions, grid_of(params)[1]) > 0:  # of slots that are empty, too
        return BAD_ANSWER
    return int(_step(handle, lane[0], params, actions, obs, terms))


@compiled_as(types.void(HANDLE_TYPE, _LANES, _PARAMS, types.float32[::1], types.float64[::1]))
def begin_cluster(handle: Any, lane: Any, params: Any, obs: Any, terms: Any) -> None:
    """Fill the slots and the accounts of a new episode and write its first observation.

    Args: as of ``step_cluster``.
    """
    st = state_at(handle)
    fill_slots(st, lane[0])
    lane[0].at_s = st.glob[0].now_s
    late, finished = _counts(st)
    lane[0].violations, lane[0].completed = late, finished
    read_energy(st, lane[0], terms)
    _tell(st, lane[0], params, False, obs, terms)


@compiled_as(types.void(HANDLE_TYPE, _LANES, _PARAMS, types.boolean, types.float32[::1], types.float64[::1]))
def tell_cluster(handle: Any, lane: Any, params: Any, over: bool, obs: Any, terms: Any) -> None:
    """Write the observation and the terms of the time since the last ones; ``over``: the episode ends here.

    For who advances the state by other means. Args: as of ``step_cluster``.
    """
    _tell(state_at(handle), lane[0], params, over, obs, terms)


@compiled_as(types.void(HANDLE_TYPE, _LANES, _PARAMS, types.float32[::1]))
def turn_cluster(handle: Any, lane: Any, params: Any, obs: Any) -> None:
    """After a change of placement: fill the slots anew and write the observation. No time passes."""
    st = state_at(handle)
    fill_slots(st, lane[0])
    encode_cluster(st, lane[0], params, _counts(st)[0], obs)


@compiled_as(types.boolean(HANDLE_TYPE, _LANES, _PARAMS, types.int64[::1]))
def choose_clocks(handle: Any, lane: Any, params: Any, actions: Any) -> bool:
    """Ask for the actions' clocks and let no time pass; False, and nothing asked, where one is no clock.

    Args: as of ``step_cluster``.
    """
    return bool(_set_clocks(state_at(handle), lane[0], params, actions))


@compiled_as(types.int64(*_ROWS))
def step_clusters(handles: Any, lanes: Any, params: Any, actions: Any, obs: Any, terms: Any, reached: Any) -> int:
    """``step_cluster`` for every row; ``reached`` int64[N] takes the answers.

    Returns:
        How many lanes came to their episode's end, or -1 where an action is no clock: no lane has moved then.
    """
    if count_outside(actions, grid_of(params)[1]) > 0:  # of slots that are empty, too
        return -1
    for n in range(len(lanes)):
        prefetch_lanes(handles, n)
        reached[n] = _step(handles[n], lanes[n], params, actions[n], obs[n], terms[n])
    return count_ended(reached)


@parallel_as(types.int64(*_ROWS))
def step_clusters_in_parallel(
    handles: Any, lanes: Any, params: Any, actions: Any, obs: Any, terms: Any, reached: Any
) -> int:
    """``step_clusters`` on numba's threads: the same numbers."""
    if count_outside(actions, grid_of(params)[1]) > 0:  # of slots that are empty, too
        return -1
    for n in prange(len(lanes)):
        prefetch_lanes(handles, n)
        reached[n] = _step(handles[n], lanes[n], params, actions[n], obs[n], terms[n])
    return count_ended(reached)


assert layout.PREFILL_SIZE == _OWN + 4
assert layout.DECODE_SIZE == _OWN + 5
assert layout.TOTALS_SIZE == 10
