"""Prefill instances: arrivals, first-come-first-served batches, whole prompts or chunks, first tokens."""

from __future__ import annotations

import numpy as np

from biscale_gym._jit import compiled, inlined
from biscale_gym.cluster.decode import hand_to_decode, reject
from biscale_gym.cluster.prefetch import prefetch
from biscale_gym.cluster.primitives import log_event, mark_dirty
from biscale_gym.cluster.routing import route
from biscale_gym.cluster.state import (
    ARRIVAL,
    EV_ARRIVE,
    EV_FINISH,
    EV_PREFILL_END,
    EV_PREFILL_START,
    EXPECTED,
    FINISHED,
    HOLD,
    PREFILL,
    PREFILLING,
    QUEUED,
    State,
)

_ARRIVAL_BYTES = ARRIVAL.itemsize
_AHEAD = 8
"""Whose turn it is after so many others: two lines on."""


@compiled
def _enqueue(st: State, i: int, r: int) -> None:
    g = st.glob[0]
    inst = st.inst[i]
    req = st.req[r]
    req.prefill_instance = i
    req.next = -1
    if inst.queue_tail < 0:
        inst.queue_head = r
    else:
        st.req[inst.queue_tail].next = r
    inst.queue_tail = r
    inst.queue_n += 1
    inst.queue_tokens += req.prompt
    inst.routed += 1
    if not inst.running:
        mark_dirty(st, i)
    elif g.mode_prefill != HOLD and g.ask_on_arrival:
        inst.ask_arrival = 1
        mark_dirty(st, i)


@compiled
def hand_to_prefill(st: State, r: int) -> None:
    """Route a prompt, or put it in the common queue."""
    g = st.glob[0]
    req = st.req[r]
    if req.prompt > g.largest_prefill_kv:
        reject(st, r)
        return
    req.status = QUEUED
    i = route(st, PREFILL, np.int64(req.prompt))
    if i >= 0:
        _enqueue(st, i, r)
        return
    req.next = -1
    if g.pending_prefill_tail < 0:
        g.pending_prefill_head = r
    else:
        st.req[g.pending_prefill_tail].next = r
    g.pending_prefill_tail = r


@inlined
def _note_request(st: State, r: int) -> None:
    """Write the record of a request that nothing has happened to yet: every field."""
    one = st.req[r]
    arrival = st.arrivals[r]
    one.arrival_s = arrival.arrival_s
    one.prefill_start_s = one.first_token_s = one.delivered_s = one.finish_s = np.nan
    one.prompt = arrival.prompt
    one.output = arrival.output
    one.next = one.prev = -1
    one.generated = one.done = one.join_iteration = 0
    one.prefill_instance = one.decode_instance = -1
    one.finish_next = -1
    one.preemptions = 0
    one.status = EXPECTED


@inlined
def arrive(st: State, r: int) -> None:
    """Request r enters the cluster."""
    g = st.glob[0]
    prefetch(st.arrivals, (r + _AHEAD) * _ARRIVAL_BYTES)
    _note_request(st, r)
    req = st.req[r]
    g.arrived += 1
    log_event(st, EV_ARRIVE, -1, r)
    decodes = not g.prefill_only and (req.output > 1 or g.extra_decode_iteration)
    if g.arrivals_at_decode:
        req.first_token_s = req.arrival_s
        req.generated = 1
        if decodes:
            hand_to_decode(st, r)
        else:
            _finish(st, -1, r)
        return
    if decodes and np.int64(req.prompt) + np.int64(req.output) > g.largest_decode_kv:
        reject(st, r)
        return
    hand_to_prefill(st, r)


@compiled
def _finish(st: State, i: int, r: int) -> None:
    g = st.glob[0]
    st.req[r].finish_s = g.now_s
    st.req[r].status = FINISHED
    g.finished += 1
    log_event(st, EV_FINISH, i, r)


@compiled
def _append_to_batch(st: State, i: int, r: int) -> None:
    inst = st.inst[i]
    st.req[r].next = -1
    if inst.batch_tail < 0:
        inst.batch_head = r
    else:
        st.req[inst.batch_tail].next = r
    inst.batch_tail = r
    inst.batch_n += 1


@compiled
def form_prefill_batch(st: State, i: int) -> bool:
    """Take prompts from the queue by the batching rule; fill the ``iter_*`` fields. False: there is no batch."""
    g = st.glob[0]
    inst = st.inst[i]
    budget = g.prefill_token_budget
    tokens = np.int64(0)
    sum_sq = 0.0
    r = inst.chunk_request
    if r >= 0:
        req = st.req[r]
        take = min(np.int64(req.prompt - req.done), budget)
        sum_sq += np.float64(req.done + take) ** 2 - np.float64(req.done) ** 2
        req.done += take
        tokens += take
        _append_to_batch(st, i, r)
        if req.done == req.prompt:
            inst.chunk_request = -1
    while inst.queue_head >= 0 and inst.chunk_request < 0:
        r = inst.queue_head
        req = st.req[r]
        prompt = np.int64(req.prompt)
        if inst.kv_used + prompt > inst.kv_capacity:
            break
        take = prompt
        if g.chunked_prefill:
            take = min(prompt, budget - tokens)
            if take <= 0:
                break
        elif inst.batch_n > 0 and tokens + prompt > budget:
            break
        inst.queue_head = req.next
        if inst.queue_head < 0:
            inst.queue_tail = -1
        inst.queue_n -= 1
        inst.queue_tokens -= prompt
        inst.kv_used += prompt
        req.done = take
        req.prefill_start_s = g.now_s
        req.status = PREFILLING
        sum_sq += np.float64(take) ** 2
        tokens += take
        _append_to_batch(st, i, r)
        if take < prompt:
            inst.chunk_request = r
    if inst.batch_n == 0:
        return False
    inst.iter_batch = 0.0
    inst.iter_kv = 0.0
    inst.iter_tokens = tokens
    inst.iter_sum_sq = sum_sq
    log_event(st, EV_PREFILL_START, i, inst.batch_n)
    return True


@compiled
def end_prefill(st: State, i: int) -> None:
    """First tokens are out; requests go on to decode."""
    g = st.glob[0]
    inst = st.inst[i]
    inst.prompt_tokens += np.int64(inst.iter_tokens)
    log_event(st, EV_PREFILL_END, i, inst.batch_n)
    r = inst.batch_head
    inst.batch_head = -1
    inst.batch_tail = -1
    inst.batch_n = 0
    while r >= 0:
        req = st.req[r]
        following = np.int64(req.next)
        req.next = -1
        if r != inst.chunk_request:
            req.first_token_s = g.now_s
            req.generated = 1
            inst.completed += 1
            inst.late += np.int64(g.now_s - req.arrival_s > g.ttft_slo_s)
            if g.prefill_only or (req.output == 1 and not g.extra_decode_iteration):
                inst.kv_used -= req.prompt
                _finish(st, i, r)
            elif not hand_to_decode(st, r):
                inst.kv_used -= req.prompt
        r = following


@compiled
def return_queue(st: State, i: int) -> None:
    """Hand the prompts that a draining instance has not begun back to the router, in order."""
    inst = st.inst[i]
    r = inst.queue_head
    inst.queue_head = -1
    inst.queue_tail = -1
    inst.queue_n = 0
    inst.queue_tokens = 0
    while r >= 0:
        following = np.int64(st.req[r].next)
        hand_to_prefill(st, r)
        r = following


@compiled
def route_pending_prefill(st: State) -> None:
    """Try the common queue again: an instance became active."""
    g = st.glob[0]
    r = g.pending_prefill_head
    g.pending_prefill_head = -1
    g.pending_prefill_tail = -1
    while r >= 0:
        following = np.int64(st.req[r].next)
        hand_to_prefill(st, r)
        r = following
