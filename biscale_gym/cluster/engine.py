"""The compiled event loop: ``advance_at`` runs a state until a time, the end, or a decision that is the caller's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from biscale_gym._jit import INDEX, compiled, compiled_as, inlined
from biscale_gym.cluster import features as f
from biscale_gym.cluster.clocks import ask_clock, cancel_clock_job, node_event
from biscale_gym.cluster.decode import (
    deliver,
    end_decode,
    form_decode_batch,
    note_slack,
    return_waiting,
    route_pending_decode,
)
from biscale_gym.cluster.handle import HANDLE_TYPE, decode_policy_at, prefill_policy_at, state_at
from biscale_gym.cluster.iteration import begin_iteration, end_iteration, go_idle
from biscale_gym.cluster.observe import observe
from biscale_gym.cluster.prefill import (
    arrive,
    end_prefill,
    form_prefill_batch,
    return_queue,
    route_pending_prefill,
)
from biscale_gym.cluster.primitives import (
    accrue,
    accrue_unallocated,
    iteration_entity,
    mark_dirty,
    others_s,
    set_event,
    set_power,
)
from biscale_gym.cluster.routing import router_add, router_remove
from biscale_gym.cluster.state import (
    ACTIVE,
    AWAITING_GPUS,
    COMPILED,
    DECODE,
    DRAINING,
    EXTERNAL,
    GONE,
    HOLD,
    LOADING,
    PREFILL,
    State,
)
from biscale_gym.profiles.kernels import idle_power_w

# What ``advance_at`` returns.
ENDED = 0
"""Nothing is left to happen."""
REACHED = 1
"""The next event is not before the time asked for."""
DECISION = 2
"""``glob.pending_instance`` waits for the caller's clock; its features are in its phase's row of ``obs``."""
BAD_ANSWER = 3
"""A compiled policy answered with a clock outside the list: ``glob.bad_answer``, at ``glob.pending_instance``."""

NO_ANSWER = -1
_NOTHING = -1


@compiled
def fill_arrivals(arrivals: Any, arrival_s: Any, prompt_tokens: Any, output_tokens: Any) -> None:
    """Write a trace into ARRIVAL[R]."""
    for r in range(len(arrivals)):
        one = arrivals[r]
        one.arrival_s = arrival_s[r]
        one.prompt = prompt_tokens[r]
        one.output = output_tokens[r]


@compiled
def activate(st: State, i: int) -> None:
    """Instance i takes requests from now on."""
    inst = st.inst[i]
    inst.status = ACTIVE
    inst.active_from_s = st.glob[0].now_s
    go_idle(st, i)
    router_add(st, i)
    mark_dirty(st, i)


@compiled
def route_common_queues(st: State) -> None:
    """Hand the common queues to the routers again: instances became active."""
    route_pending_prefill(st)
    route_pending_decode(st)


@compiled
def _take_gpus(st: State, i: int) -> None:
    g = st.glob[0]
    inst = st.inst[i]
    accrue_unallocated(st)
    g.gpus_allocated += inst.tp
    st.node[inst.node].free_gpus -= inst.tp
    inst.last_s = g.now_s


@compiled
def _load(st: State, i: int) -> None:
    """Instance i takes its GPUs and loads its weights."""
    inst = st.inst[i]
    _take_gpus(st, i)
    inst.status = LOADING
    idle_w = idle_power_w(st.models[inst.model_start : inst.model_stop], inst.clock)
    set_power(st, i, inst.tp * (idle_w + inst.load_extra_w), True)
    set_event(st, iteration_entity(st, i), st.glob[0].now_s + inst.load_s)


@compiled
def start_waiting_instances(st: State, n: int) -> None:
    """Start instances that wait for GPUs of node n, strictly in order, while they fit."""
    for i in range(st.glob[0].instances):
        inst = st.inst[i]
        if inst.status == AWAITING_GPUS and inst.node == n:
            if st.node[n].free_gpus < inst.tp:
                return
            _load(st, i)


@compiled
def place_at_once(st: State, i: int) -> None:
    """A new instance takes its GPUs and requests now, whatever else is on the node."""
    _take_gpus(st, i)
    activate(st, i)


@compiled
def retire(st: State, i: int) -> None:
    """Instance i takes no more requests; it drains and leaves."""
    g = st.glob[0]
    inst = st.inst[i]
    if inst.status == AWAITING_GPUS:
        inst.status = GONE
        inst.gone_s = g.now_s
        return
    if inst.status == ACTIVE:
        router_remove(st, i)
    elif inst.status == LOADING:
        set_event(st, iteration_entity(st, i), np.inf)
    inst.status = DRAINING
    mark_dirty(st, i)


@compiled
def return_requests(st: State, i: int) -> None:
    """What a retired instance has not begun goes back to the routers."""
    if st.inst[i].phase == PREFILL:
        return_queue(st, i)
    else:
        return_waiting(st, i)


@compiled
def note_slacks(st: State) -> None:
    """Begin the lists of the running requests' slacks: somebody wants to see them from now on."""
    for i in range(st.glob[0].instances):
        r = st.inst[i].run_tail
        for noted in range(st.inst[i].run_n):
            note_slack(st, i, r, noted)
            r = st.req[r].prev


@compiled
def _leave(st: State, i: int) -> None:
    """A drained instance gives its GPUs back."""
    g = st.glob[0]
    inst = st.inst[i]
    cancel_clock_job(st, i)
    accrue(st, i)
    inst.status = GONE
    inst.power_w = 0.0
    inst.gone_s = g.now_s
    accrue_unallocated(st)
    g.gpus_allocated -= inst.tp
    st.node[inst.node].free_gpus += inst.tp
    start_waiting_instances(st, inst.node)


@inlined
def _is_drained(inst: Any) -> bool:
    if inst.phase == PREFILL:
        return inst.chunk_request < 0
    return inst.run_n == 0 and inst.transit_n == 0 and inst.queue_n == 0


@inlined
def _wake(st: State, i: int) -> int:
    """Form a batch if there is one to form. Returns the reason for a decision, or -1."""
    inst = st.inst[i]
    if inst.running:
        if inst.ask_overrun:
            inst.ask_overrun = 0
            inst.ask_arrival = 0
            return f.OVERRUN
        if inst.ask_arrival:
            inst.ask_arrival = 0
            return f.ARRIVAL
        return _NOTHING
    inst.ask_overrun = 0
    inst.ask_arrival = 0
    if inst.status != ACTIVE and inst.status != DRAINING:
        return _NOTHING
    formed = form_prefill_batch(st, i) if inst.phase == PREFILL else form_decode_batch(st, i)
    if formed:
        inst.idle_asked = 0
        return f.BOUNDARY
    if inst.status == DRAINING and _is_drained(inst):
        _leave(st, i)
        return _NOTHING
    if inst.idle_asked:
        return _NOTHING
    go_idle(st, i)
    inst.idle_asked = 1
    return f.IDLE


@inlined
def _mode(st: State, i: int, reason: int) -> int:
    """Who decides: HOLD where nobody wants to be asked."""
    g = st.glob[0]
    if st.inst[i].phase == PREFILL:
        if reason == f.IDLE and not g.ask_on_idle_prefill:
            return HOLD
        return g.mode_prefill
    if reason == f.IDLE and not g.ask_on_idle_decode:
        return HOLD
    return g.mode_decode


@inlined
def _iteration_event(st: State, i: int, arrival_s: float) -> bool:
    """The timer of instance i's iteration rang: its end, its overrun, or its loading is done.

    Returns whether the instance is the next to be woken, as nothing else happens in this instant: then it is not
    flagged, and its timer still stands at now.
    """
    g = st.glob[0]
    inst = st.inst[i]
    entity = iteration_entity(st, i)
    if not inst.running:
        set_event(st, entity, np.inf)
        activate(st, i)
        route_common_queues(st)
        return False
    if g.now_s < inst.end_s:
        inst.overrun_s = -1.0
        inst.ask_overrun = 1
        set_event(st, entity, inst.end_s)
        mark_dirty(st, i)
        return False
    alone = g.dirty_n == 0 and arrival_s > g.now_s and others_s(st, entity) > g.now_s
    end_iteration(st, i)
    if not alone:
        set_event(st, entity, np.inf)
        mark_dirty(st, i)
    if inst.phase == PREFILL:
        end_prefill(st, i)
    else:
        end_decode(st, i)
    return alone


@inlined
def _next_arrival_s(st: State) -> float:
    g = st.glob[0]
    return st.arrivals[g.next_arrival].arrival_s if g.next_arrival < g.requests else np.inf


@inlined
def _next_to_wake(st: State) -> int:
    g = st.glob[0]
    i = np.int64(st.dirty[g.dirty_next & INDEX]) & INDEX
    g.dirty_next = g.dirty_next + 1 if g.dirty_next + 1 < g.capacity else 0
    g.dirty_n -= 1
    st.inst[i].dirty = 0
    return i


@compiled
def _answer(st: State, clock: int) -> bool:
    """Carry out the answer to the pending decision; False where the clock does not exist."""
    g = st.glob[0]
    i = g.pending_instance
    if clock < 0 or clock >= g.clocks:
        g.bad_answer = clock
        return False
    reason = g.pending_reason
    g.pending_instance = -1
    g.decisions += 1
    ask_clock(st, i, clock)
    if reason == f.BOUNDARY:
        begin_iteration(st, i)
    return True


@compiled_as(types.int64(HANDLE_TYPE, types.float64, types.int64))
def advance_at(handle: Any, until_s: float, answer: int) -> int:
    """Run the events before ``until_s``, in order, of the simulator that a handle describes (handle.py).

    ``answer`` is the clock for the pending decision, or NO_ANSWER. Returns ENDED, REACHED, DECISION or BAD_ANSWER.
    """
    # A state as an argument would be some 140 words to copy at every call.
    st = state_at(handle)
    prefill_policy, decode_policy = prefill_policy_at(handle), decode_policy_at(handle)
    g = st.glob[0]
    tree_s, tree_entity = st.tree_s, st.tree_entity
    if g.pending_instance >= 0:
        if answer == NO_ANSWER:
            return DECISION
        if not _answer(st, answer):
            return BAD_ANSWER
    arrival_s = _next_arrival_s(st)
    while True:
        # Events of this instant come before waking; waking may cause more of them.
        event_s = tree_s[1]
        ended = False
        if g.dirty_n > 0 and event_s > g.now_s and arrival_s > g.now_s:
            i = _next_to_wake(st)
        elif event_s <= arrival_s:
            if event_s >= until_s:
                break
            entity = np.int64(tree_entity[1]) & INDEX
            g.now_s = event_s
            i = entity - g.nodes - g.capacity
            if i >= 0:
                ended = _iteration_event(st, i, arrival_s)
            elif entity >= g.nodes:
                deliver(st, entity - g.nodes)
            else:
                node_event(st, entity)
            if not ended:
                continue
        else:
            if arrival_s >= until_s:
                break
            g.now_s = arrival_s
            r = g.next_arrival
            g.next_arrival += 1
            arrival_s = _next_arrival_s(st)
            arrive(st, r)
            continue
        inst = st.inst[i]
        reason = _wake(st, i)
        mode = _mode(st, i, reason)
        if ended and (reason != f.BOUNDARY or mode != HOLD):
            # Where the next iteration begins at once, the timer is set to its end instead.
            set_event(st, iteration_entity(st, i), np.inf)
        if reason == _NOTHING:
            continue
        if mode == COMPILED:
            observe(st, i, reason)
            model = st.predicted[inst.predicted_start : inst.predicted_stop]
            if inst.phase == PREFILL:
                clock = prefill_policy(st.obs[PREFILL], st.memory[i], st.params_prefill, model)
            else:
                clock = decode_policy(st.obs[DECODE], st.memory[i], st.params_decode, model)
            g.decisions += 1
            if clock < 0 or clock >= g.clocks:
                g.pending_instance = i
                g.pending_reason = reason
                g.bad_answer = clock
                return BAD_ANSWER
            if clock != inst.target:
                ask_clock(st, i, clock)
        elif mode == EXTERNAL:
            observe(st, i, reason)
            g.pending_instance = i
            g.pending_reason = reason
            return DECISION
        if reason == f.BOUNDARY:
            begin_iteration(st, i)
    if until_s < np.inf:
        g.now_s = max(g.now_s, until_s)
        if event_s == np.inf and arrival_s == np.inf:
            return ENDED
        return REACHED
    return ENDED


@compiled_as(types.int64(HANDLE_TYPE))
def ask_everyone_at(handle: Any) -> int:
    """Ask the policies about every instance that serves, in order, whatever it is doing, and carry the answers out.

    Returns -1, or the number of the instance whose policy answered with a clock outside the list: ``glob.bad_answer``.
    """
    st = state_at(handle)
    prefill_policy, decode_policy = prefill_policy_at(handle), decode_policy_at(handle)
    g = st.glob[0]
    for i in range(g.instances):
        inst = st.inst[i]
        if inst.status != ACTIVE:
            continue
        observe(st, i, f.INTERVAL if inst.running else f.IDLE)
        model = st.predicted[inst.predicted_start : inst.predicted_stop]
        if inst.phase == PREFILL:
            clock = prefill_policy(st.obs[PREFILL], st.memory[i], st.params_prefill, model)
        else:
            clock = decode_policy(st.obs[DECODE], st.memory[i], st.params_decode, model)
        if clock < 0 or clock >= g.clocks:
            g.bad_answer = clock
            return int(i)
        g.decisions += 1
        ask_clock(st, i, clock)
    return -1
