"""Lanes: the compiled step of the environments of one instance, for one of them or for many.

A lane is a simulator of one instance (reached by its handle) and a record of what its environment has told so far. One
call answers the waiting decision of every lane, runs each to its next decision or to its episode's end, and writes
observations and reward terms into rows. Lanes share nothing, so their number and order cannot matter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import from_dtype, prange, types

from biscale_gym._jit import compiled, compiled_as, inlined, parallel_as
from biscale_gym.cluster import features as f
from biscale_gym.cluster.engine import BAD_ANSWER, DECISION, NO_ANSWER, REACHED, advance_at
from biscale_gym.cluster.handle import HANDLE_TYPE, state_at
from biscale_gym.cluster.observe import observe
from biscale_gym.cluster.pages import LINE_BYTES
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.cluster.prefetch import prefetch, prefetch_request
from biscale_gym.cluster.state import (
    ARRIVAL,
    FINISH_SLOTS,
    FINISHED,
    INSTANCE,
    PREFILL,
    REJECTED,
    WAITING_DECODE,
    State,
)
from biscale_gym.envs.encoding import FIRST, encode_decode, encode_prefill, grid_of
from biscale_gym.envs.shield import guarded, raised_decode, raised_prefill

_f, _i = np.float64, np.int64

LANE = np.dtype(
    [
        ("end_s", _f),
        ("decide_every", _i),
        # of the reward
        ("reference_w", _f),
        ("baseline_w", _f),
        ("violation_penalty", _f),
        ("discount_per_s", _f),
        # at the last decision
        ("at_s", _f),
        ("energy_j", _f),
        ("violations", _i),
        ("completed", _i),
        # of the shield: whether its guard of KV memory holds the clock
        ("guarded", _i),
    ],
    align=True,
)

# Columns of the terms that a step reports.
ENERGY_J = 0
"""Joules of the instance since the last decision, idle included."""
VIOLATIONS = 1
"""Requests since then that broke the phase's SLO; at the end also those in flight past their deadline."""
COMPLETED = 2
"""Requests since then whose phase was completed."""
DT_S = 3
"""Seconds since then."""
NOW_S = 4
REWARD = 5
DISCOUNT = 6
"""What the reward after this step is worth now: ``discount_per_s ** dt``."""
TERMS = 7


@compiled
def energy_now_j(st: State, i: int) -> float:
    """Joules of instance i so far. Reads only, so that looking does not change how joules add up."""
    inst = st.inst[i]
    booked = inst.energy_j[0] + inst.energy_j[1] + inst.energy_j[2] + inst.energy_j[3]
    return float(booked + inst.power_w * max(0.0, st.glob[0].now_s - inst.last_s))


@compiled
def overdue(st: State) -> int:
    """Requests in flight that can no longer keep the SLO of their present phase."""
    g = st.glob[0]
    n = 0
    for r in range(g.next_arrival):
        req = st.req[r]
        if req.status == FINISHED or req.status == REJECTED:
            continue
        if req.status < WAITING_DECODE:
            n += g.now_s - req.arrival_s > g.ttft_slo_s
        else:
            n += g.now_s - req.first_token_s > g.tpot_slo_s * np.float64(req.output - 1)
    return n


@inlined
def discounted(spent: float, discount_per_s: float, dt_s: float) -> tuple[float, float]:
    """(``spent`` as discounted over the step, if spent evenly; what the next reward is worth now)."""
    if discount_per_s >= 1.0 or dt_s <= 0.0:
        return spent, 1.0
    discount = discount_per_s**dt_s
    return spent * (1.0 - discount) / (-math.log(discount_per_s) * dt_s), discount


@inlined
def _write(st: State, i: int, lane: Any, more_violations: int, terms: Any) -> None:
    """Terms since the lane's last decision, and now as the new one."""
    g = st.glob[0]
    inst = st.inst[i]
    energy_j = energy_now_j(st, i)
    violations = inst.late + g.rejected + more_violations
    spent_j, broken, dt_s = energy_j - lane.energy_j, violations - lane.violations, g.now_s - lane.at_s
    spent, discount = discounted((spent_j - lane.baseline_w * dt_s) / lane.reference_w, lane.discount_per_s, dt_s)
    terms[ENERGY_J] = spent_j
    terms[VIOLATIONS] = broken
    terms[COMPLETED] = inst.completed - lane.completed
    terms[DT_S] = dt_s
    terms[NOW_S] = g.now_s
    terms[REWARD] = -spent - lane.violation_penalty * broken
    terms[DISCOUNT] = discount
    lane.energy_j = energy_j
    lane.violations = violations
    lane.completed = inst.completed
    lane.at_s = g.now_s


@inlined
def _encode(st: State, i: int, params: Any, out: Any) -> None:
    inst = st.inst[i]
    model = st.predicted[inst.predicted_start : inst.predicted_stop]
    if inst.phase == PREFILL:
        encode_prefill(st.obs[0], st.memory[i], params, model, out)
    else:
        encode_decode(st.obs[1], st.memory[i], params, model, out)


@inlined
def _at_boundary(st: State) -> bool:
    """Whether the waiting decision is about a batch that is about to start."""
    phase = 0 if st.inst[0].phase == PREFILL else 1
    return int(st.obs[phase][f.REASON]) == f.BOUNDARY


@inlined
def _shielded(st: State, lane: Any, params: Any, clock: int) -> int:
    """The clock that the shield makes of the agent's, for the decision that waits."""
    inst = st.inst[0]
    model = st.predicted[inst.predicted_start : inst.predicted_stop]
    if inst.phase == PREFILL:
        return int(raised_prefill(st.obs[0], params, model, clock))
    lane.guarded = 1 if guarded(st.obs[1], params, lane.guarded > 0) else 0
    if lane.guarded > 0 and int(st.obs[1][f.REASON]) != f.IDLE:
        grid, n = grid_of(params)
        return int(params[grid + n - 1])
    return int(raised_decode(st.obs[1], params, model, clock))


@compiled
def _step(handle: Any, lane: Any, params: Any, action: int, obs: Any, terms: Any) -> int:
    """Answer a lane's decision, run it on, and tell what came of it."""
    st = state_at(handle)
    clock = NO_ANSWER
    keep = 0
    if st.glob[0].pending_instance >= 0:
        grid, n = grid_of(params)
        if action < 0 or action >= n:
            return BAD_ANSWER
        clock = _shielded(st, lane, params, int(params[grid + action]))
        if _at_boundary(st):
            keep = lane.decide_every - 1
    reached = advance_at(handle, lane.end_s, clock)
    while keep > 0 and reached == DECISION and _at_boundary(st):
        keep -= 1
        clock = _shielded(st, lane, params, clock)
        reached = advance_at(handle, lane.end_s, clock)
    if reached == DECISION:
        i = st.glob[0].pending_instance
        _encode(st, i, params, obs)
        _write(st, i, lane, 0, terms)
        return DECISION
    observe(st, 0, f.INTERVAL if st.inst[0].running else f.IDLE)
    _encode(st, 0, params, obs)
    _write(st, 0, lane, overdue(st), terms)
    return REACHED


_INSTANCE_BYTES, _ARRIVAL_BYTES = INSTANCE.itemsize, ARRIVAL.itemsize
# Lines that nearly every step touches (state.py has what is touched most first).
_HOT_GLOBAL, _HOT_INSTANCE = 6, 10
# As many as a decode instance mostly has in a step.
_ITERATIONS = 4


@inlined
def prefetch_lanes(handles: Any, n: int) -> None:
    """While lane n is stepped, have what the next three will touch loaded: their state, then what it refers to."""
    if n + 3 < len(handles):
        st = state_at(handles[n + 3])
        for line in range(_HOT_GLOBAL):
            prefetch(st.glob, line * LINE_BYTES)
        for i in range(len(st.inst)):
            for line in range(_HOT_INSTANCE):
                prefetch(st.inst, i * _INSTANCE_BYTES + line * LINE_BYTES)
            prefetch(st.memory, (i * MEMORY_SIZE + FIRST) * 8)
            prefetch(st.memory, (i * MEMORY_SIZE + FIRST) * 8 + LINE_BYTES)
        prefetch(st.tree_s, 0)
        prefetch(st.tree_s, LINE_BYTES)
        prefetch(st.tree_entity, 0)
        prefetch(st.node, 0)
        prefetch(st.dirty, 0)
    if n + 2 < len(handles):
        st = state_at(handles[n + 2])
        for i in range(len(st.inst)):
            prefetch(st.finishing, 4 * (i * FINISH_SLOTS + ((st.inst[i].iterations + 1) & (FINISH_SLOTS - 1))))
    if n + 1 < len(handles):
        st = state_at(handles[n + 1])
        prefetch_request(st, st.glob[0].next_arrival)
        prefetch(st.arrivals, st.glob[0].next_arrival * _ARRIVAL_BYTES)
        row = st.slack_s.shape[1] * 8
        for i in range(len(st.inst)):
            inst = st.inst[i]
            if inst.phase == PREFILL:
                prefetch_request(st, inst.batch_head)
                prefetch_request(st, inst.queue_head)
                continue
            # Those that finish in the next iterations.
            for ahead in range(_ITERATIONS):
                prefetch_request(st, st.finishing[i, (inst.iterations + 1 + ahead) & (FINISH_SLOTS - 1)])
            for line in range((inst.run_n * 8) // LINE_BYTES + 1):
                prefetch(st.slack_s, i * row + line * LINE_BYTES)
        if len(st.inst) == 1:
            phase = st.inst[0].phase
            for line in range(3):
                prefetch(st.obs, phase * f.SIZE * 8 + line * LINE_BYTES)
            prefetch(st.obs, (phase * f.SIZE + f.ROUTED) * 8)


_LANES = types.Array(from_dtype(LANE), 1, "C")
_PARAMS = types.float64[::1]


@compiled_as(types.int64(HANDLE_TYPE, _LANES, _PARAMS, types.int64, types.float32[::1], types.float64[::1]))
def step_lane(handle: Any, lane: Any, params: Any, action: int, obs: Any, terms: Any) -> int:
    """Step one lane.

    Args:
        handle: int64[handle.SIZE].
        lane: LANE[1].
        params: float64[any], ``encoding.encoder_params``, then ``shield.shield_params``.
        action: index into the grid of clocks; ignored if no decision waits.
        obs: float32[layout.size], written.
        terms: float64[TERMS], written.

    Returns:
        DECISION, REACHED (the episode's end), or BAD_ANSWER (nothing has happened).
    """
    return int(_step(handle, lane[0], params, action, obs, terms))


_ROWS = (
    types.int64[:, ::1],
    _LANES,
    _PARAMS,
    types.int64[::1],
    types.float32[:, ::1],
    types.float64[:, ::1],
    types.int64[::1],
)


@inlined
def count_ended(reached: Any) -> int:
    """How many lanes have come to their episode's end."""
    ended = 0
    for n in range(len(reached)):
        ended += reached[n] == REACHED
    return ended


@inlined
def count_outside(values: Any, count: int) -> int:
    """How many of an array's numbers are no index into ``count`` things."""
    outside = 0
    for value in values.flat:
        outside += value < 0 or value >= count
    return outside


@compiled_as(types.int64(*_ROWS))
def step_lanes(handles: Any, lanes: Any, params: Any, actions: Any, obs: Any, terms: Any, reached: Any) -> int:
    """``step_lane`` for every row; ``reached`` int64[N] takes the answers.

    Returns:
        How many lanes came to their episode's end, or -1 where an action is no clock: no lane has moved then.
    """
    if count_outside(actions, grid_of(params)[1]) > 0:
        return -1
    for n in range(len(lanes)):
        prefetch_lanes(handles, n)
        reached[n] = _step(handles[n], lanes[n], params, actions[n], obs[n], terms[n])
    return count_ended(reached)


@parallel_as(types.int64(*_ROWS))
def step_lanes_in_parallel(
    handles: Any, lanes: Any, params: Any, actions: Any, obs: Any, terms: Any, reached: Any
) -> int:
    """``step_lanes`` on numba's threads: the same numbers."""
    if count_outside(actions, grid_of(params)[1]) > 0:
        return -1
    for n in prange(len(lanes)):
        prefetch_lanes(handles, n)
        reached[n] = _step(handles[n], lanes[n], params, actions[n], obs[n], terms[n])
    return count_ended(reached)
