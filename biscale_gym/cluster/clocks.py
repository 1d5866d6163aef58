"""Clock switching: a node's driver carries out one instance's calls at a time (docs/cluster.md, Clocks)."""

from __future__ import annotations

import numpy as np

from biscale_gym._jit import compiled, inlined
from biscale_gym.cluster.iteration import clock_in_force
from biscale_gym.cluster.primitives import accrue, draw_lognormals, log_event, set_event, set_power, splitmix64
from biscale_gym.cluster.state import EV_ASK, EV_CLOCK, GONE, LOADING, State

# Stages of a node's driver.
FIRST_RETURN = 0
JOB_END = 1


@inlined
def _take_effect(st: State, i: int, clock: int) -> None:
    st.inst[i].clock_changes += 1
    log_event(st, EV_CLOCK, i, clock)
    clock_in_force(st, i, clock)


@inlined
def _call_s(st: State) -> float:
    """How long the driver's next call lasts; drawn many at a time, which takes a third of the time."""
    g = st.glob[0]
    if g.next_call == len(st.calls_s):
        g.rng_switching = draw_lognormals(g.rng_switching, g.switch_median_s, g.switch_sigma, st.calls_s)
        g.next_call = 0
    duration_s = st.calls_s[g.next_call]
    g.next_call += 1
    return float(duration_s)


@inlined
def _serve(st: State, n: int, i: int) -> None:
    """The driver of node n begins instance i's job: one call per GPU, back to back."""
    g = st.glob[0]
    node = st.node[n]
    inst = st.inst[i]
    inst.in_service = inst.queued_clock
    inst.queued = 0
    node.serving = i
    return_s = g.now_s
    first_s = g.now_s
    for call in range(inst.tp):
        return_s += _call_s(st)
        if call == 0:
            first_s = return_s
    node.end_s = return_s + g.settle_s
    falls = inst.in_service < inst.clock
    node.effect_s = first_s + g.settle_s if falls else node.end_s
    node.stage = FIRST_RETURN if node.effect_s < node.end_s else JOB_END
    set_event(st, n, node.effect_s)
    set_power(st, i, inst.power_w, inst.status == LOADING)


@inlined
def node_event(st: State, n: int) -> None:
    """A stage of node n's driver is over: the clock changes, or the job ends and the next begins."""
    node = st.node[n]
    i = node.serving
    inst = st.inst[i]
    gone = inst.status == GONE
    if inst.clock != inst.in_service and not gone:
        _take_effect(st, i, inst.in_service)
    if node.stage == FIRST_RETURN:
        node.stage = JOB_END
        set_event(st, n, node.end_s)
        return
    inst.in_service = -1
    if not gone:
        set_power(st, i, inst.power_w, inst.status == LOADING)
    following = node.queue_head
    if following < 0:
        node.serving = -1
        set_event(st, n, np.inf)
        return
    node.queue_head = st.inst[following].node_next
    if node.queue_head < 0:
        node.queue_tail = -1
    st.inst[following].node_next = -1
    _serve(st, n, following)


@compiled
def _unqueue(st: State, i: int) -> None:
    """Drop instance i's job that has not begun."""
    inst = st.inst[i]
    node = st.node[inst.node]
    before = -1
    at = node.queue_head
    while at != i:
        before = at
        at = st.inst[at].node_next
    if before < 0:
        node.queue_head = inst.node_next
    else:
        st.inst[before].node_next = inst.node_next
    if node.queue_tail == i:
        node.queue_tail = before
    inst.node_next = -1
    inst.queued = 0


@compiled
def cancel_clock_job(st: State, i: int) -> None:
    """Forget a job that has not begun (the instance leaves); one being carried out is finished."""
    if st.inst[i].queued:
        _unqueue(st, i)


@compiled
def _switch_at_once(st: State, i: int, clock: int) -> None:
    accrue(st, i)
    _take_effect(st, i, clock)


@inlined
def ask_clock(st: State, i: int, clock: int) -> None:
    """Ask for a clock; the node's driver brings it about."""
    g = st.glob[0]
    inst = st.inst[i]
    if clock == inst.target:
        return
    inst.target = clock
    asked = np.uint64(np.int64(g.now_s * 1e9)) ^ np.uint64((i << 16) + clock)
    g.digest = np.uint64(splitmix64(np.uint64(g.digest ^ asked))[1])
    log_event(st, EV_ASK, i, clock)
    if g.switch_median_s == 0.0 and g.settle_s == 0.0:
        _switch_at_once(st, i, clock)
        return
    coming = inst.in_service if inst.in_service >= 0 else inst.clock
    if inst.queued:
        if clock == coming:
            _unqueue(st, i)
        else:
            inst.queued_clock = clock
        return
    if clock == coming:
        return
    inst.queued = 1
    inst.queued_clock = clock
    node = st.node[inst.node]
    if node.serving < 0:
        _serve(st, inst.node, i)
    else:
        if node.queue_tail < 0:
            node.queue_head = i
        else:
            st.inst[node.queue_tail].node_next = i
        node.queue_tail = i
