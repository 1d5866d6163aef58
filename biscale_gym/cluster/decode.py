"""Decode instances: claims, transfers, continuous batching, preemption by recompute."""

from __future__ import annotations

from typing import Any

import numpy as np

from biscale_gym._jit import INDEX, compiled, inlined
from biscale_gym.cluster.prefetch import prefetch, prefetch_request
from biscale_gym.cluster.primitives import delivery_entity, log_event, mark_dirty, set_event
from biscale_gym.cluster.routing import route
from biscale_gym.cluster.state import (
    DECODE,
    DECODING,
    EV_CLAIM,
    EV_DECODE_END,
    EV_DECODE_START,
    EV_DELIVER,
    EV_FINISH,
    EV_JOIN,
    EV_PREEMPT,
    EV_REJECT,
    FINISH_SLOTS,
    FINISHED,
    IN_TRANSFER,
    RECOMPUTING,
    REJECTED,
    WAITING_DECODE,
    State,
)

_SLOTS = FINISH_SLOTS - 1
"""``x & _SLOTS``: the slot of iteration x."""
_SLOT_BYTES = 4


@compiled
def reject(st: State, r: int) -> None:
    """No instance could ever hold request r."""
    st.req[r].status = REJECTED
    st.glob[0].rejected += 1
    log_event(st, EV_REJECT, -1, r)


@inlined
def _kv_present(req: Any) -> int:
    """KV tokens of a request that is (re)joining a batch: its prompt and all generated tokens but the last."""
    return np.int64(req.prompt) + np.int64(req.generated) - 1


@compiled
def _enqueue(st: State, i: int, r: int) -> None:
    inst = st.inst[i]
    req = st.req[r]
    req.decode_instance = i
    req.next = -1
    if inst.queue_tail < 0:
        inst.queue_head = r
    else:
        st.req[inst.queue_tail].next = r
    inst.queue_tail = r
    inst.queue_n += 1
    inst.queue_tokens += _kv_present(req)
    inst.routed += 1
    if not inst.running:
        mark_dirty(st, i)


@compiled
def _pop_queue(st: State, i: int) -> int:
    inst = st.inst[i]
    r = inst.queue_head
    inst.queue_head = st.req[r].next
    if inst.queue_head < 0:
        inst.queue_tail = -1
    st.req[r].next = -1
    inst.queue_n -= 1
    inst.queue_tokens -= _kv_present(st.req[r])
    return r


@compiled
def hand_to_decode(st: State, r: int) -> bool:
    """Route a request whose first token is out. Returns False where no instance of the placement could ever hold it."""
    g = st.glob[0]
    req = st.req[r]
    need = np.int64(req.prompt) + np.int64(req.output)
    if need > g.largest_decode_kv:
        reject(st, r)
        return False
    req.status = WAITING_DECODE
    i = route(st, DECODE, need)
    if i < 0:
        req.next = -1
        if g.pending_decode_tail < 0:
            g.pending_decode_head = r
        else:
            st.req[g.pending_decode_tail].next = r
        g.pending_decode_tail = r
    else:
        _enqueue(st, i, r)
    return True


@inlined
def _release_prefill(st: State, r: int) -> None:
    """The prefill side's KV is no longer needed."""
    source = st.req[r].prefill_instance
    if source >= 0:
        inst = st.inst[source]
        inst.kv_used -= st.req[r].prompt
        if not inst.running:
            mark_dirty(st, source)


@inlined
def _saved_s(g: Any, req: Any) -> float:
    """A running request's slack, less what is common to the batch: SLO x iterations of the instance - now [s].

    Slack is what it may lose and still meet its TPOT if its output ended here: first token + SLO x tokens since - now.
    Its order within the batch never changes.
    """
    # The first token is prefill's, and of "output-length" iterations one makes no token that TPOT counts.
    tokens = np.float64(np.int64(req.generated) - 1 - g.extra_decode_iteration - req.join_iteration)
    return req.first_token_s + g.tpot_slo_s * tokens


@compiled
def note_slack(st: State, i: int, r: int, n: int) -> None:
    """Put a request that joins a batch of n into the batch's descending list of slacks; the newest are mostly last."""
    saved_s = st.slack_s[i]
    value_s = _saved_s(st.glob[0], st.req[r])
    position = n
    while position > 0 and saved_s[position - 1] < value_s:
        saved_s[position] = saved_s[position - 1]
        position -= 1
    saved_s[position] = value_s


_NEAR = 128


@compiled
def _forget_slack(st: State, i: int, r: int) -> None:
    """Take a request that leaves the batch (its fields as when it joined) out of the list."""
    n = st.inst[i].run_n
    saved_s = st.slack_s[i]
    value_s = _saved_s(st.glob[0], st.req[r])
    first, span = np.int64(0), n
    while span > _NEAR:
        # Added, not branched on: which half it is in cannot be predicted.
        half = span >> 1
        first += half * np.int64(saved_s[(first + half - 1) & INDEX] > value_s)
        span -= half
    # From there on all are compared, several at once: each stays where it is greater, or makes place for the next.
    rest_s = saved_s[first:n]
    for position in range(n - 1 - first):
        this_s, next_s = rest_s[position], rest_s[position + 1]
        rest_s[position] = this_s if this_s > value_s else next_s


@inlined
def _last_iteration(st: State, r: int) -> int:
    """Number of the iteration of its instance in which a running request gets its last token."""
    req = st.req[r]
    return np.int64(req.join_iteration) + req.output - req.generated + st.glob[0].extra_decode_iteration


@inlined
def _finishes_before(st: State, a: int, b: int) -> bool:
    """Whether request a is finished before b; within an iteration they are in the order of their numbers."""
    last_a, last_b = _last_iteration(st, a), _last_iteration(st, b)
    return last_a < last_b or (last_a == last_b and a < b)


@inlined
def _await_finish(st: State, i: int, r: int) -> None:
    """Put a running request into the list of its last iteration's slot, which is in the order of finishing."""
    heads = st.finishing[i]
    slot = _last_iteration(st, r) & _SLOTS
    before = -1
    at = np.int64(heads[slot])
    while at >= 0 and _finishes_before(st, at, r):
        before = at
        at = np.int64(st.req[at].finish_next)
    st.req[r].finish_next = at
    if before < 0:
        heads[slot] = r
    else:
        st.req[before].finish_next = r


@inlined
def _coming_slot(st: State, i: int, r: int) -> int:
    """The slot that request r will be in, if it joins after the running iteration."""
    inst = st.inst[i]
    req = st.req[r]
    last = inst.iterations + inst.running + req.output - req.generated + st.glob[0].extra_decode_iteration
    return last & _SLOTS


@inlined
def _forget_finish(st: State, i: int, r: int) -> None:
    """Take a running request out of that list."""
    heads = st.finishing[i]
    slot = _last_iteration(st, r) & _SLOTS
    if heads[slot] == r:
        heads[slot] = st.req[r].finish_next
        return
    at = np.int64(heads[slot])
    while st.req[at].finish_next != r:
        at = np.int64(st.req[at].finish_next)
    st.req[at].finish_next = st.req[r].finish_next


@inlined
def _join(st: State, i: int, r: int) -> None:
    inst = st.inst[i]
    req = st.req[r]
    g = st.glob[0]
    req.status = DECODING
    req.join_iteration = inst.iterations
    req.prev = inst.run_tail
    req.next = -1
    if inst.run_tail >= 0:
        st.req[inst.run_tail].next = r
    inst.run_tail = r
    _await_finish(st, i, r)
    if g.observe_slack:
        note_slack(st, i, r, inst.run_n)
    inst.run_n += 1
    inst.run_kv += _kv_present(req)
    log_event(st, EV_JOIN, i, r)


@inlined
def _unlink(st: State, i: int, r: int) -> None:
    inst = st.inst[i]
    req = st.req[r]
    if req.prev >= 0:
        st.req[req.prev].next = req.next
    if req.next >= 0:
        st.req[req.next].prev = req.prev
    else:
        inst.run_tail = req.prev
    req.prev = -1
    req.next = -1


@compiled
def _preempt_last(st: State, i: int) -> None:
    """The request that joined last leaves the batch and its KV; it waits at the head of the queue."""
    inst = st.inst[i]
    r = inst.run_tail
    req = st.req[r]
    if req.status == RECOMPUTING:
        inst.recompute_n -= 1
        inst.recompute_tokens -= _kv_present(req)
        inst.recompute_sum_sq -= np.float64(_kv_present(req)) ** 2
    if st.glob[0].observe_slack:
        _forget_slack(st, i, r)
    _forget_finish(st, i, r)
    req.generated += inst.iterations - req.join_iteration
    _unlink(st, i, r)
    inst.run_n -= 1
    inst.run_kv -= _kv_present(req)
    inst.kv_used -= _kv_present(req)
    req.status = WAITING_DECODE
    req.preemptions += 1
    req.next = inst.queue_head
    inst.queue_head = r
    if inst.queue_tail < 0:
        inst.queue_tail = r
    inst.queue_n += 1
    inst.queue_tokens += _kv_present(req)
    log_event(st, EV_PREEMPT, i, r)


@compiled
def _transfer(st: State, i: int, r: int) -> float:
    """Start the KV transfer of a claimed request; returns when it is delivered (s)."""
    g = st.glob[0]
    req = st.req[r]
    if req.prefill_instance < 0:
        return g.now_s
    inst = st.inst[i]
    source = st.inst[req.prefill_instance]
    per_gpu = g.bytes_per_s_within_node if source.node == inst.node else g.bytes_per_s_between_nodes
    start_s = max(g.now_s, max(source.link_free_s, inst.link_free_s))
    end_s = start_s + req.prompt * g.kv_bytes_per_token / (min(source.tp, inst.tp) * per_gpu)
    source.link_free_s = end_s
    inst.link_free_s = end_s
    return end_s + g.transfer_latency_s


@compiled
def _claim(st: State, i: int) -> None:
    """Reserve KV for waiting requests, in order, while they fit (docs/cluster.md, Reservation)."""
    g = st.glob[0]
    inst = st.inst[i]
    while inst.queue_head >= 0:
        r = inst.queue_head
        req = st.req[r]
        present = _kv_present(req)
        claim = np.int64(req.prompt) + np.int64(req.output) if g.full_admission else present
        if req.preemptions > 0 and inst.kv_used + claim + inst.run_n + 1 > inst.kv_capacity:
            return
        if inst.kv_used + claim > inst.kv_capacity:
            return
        if inst.run_n + inst.transit_n >= g.max_decode_sequences:
            return
        _pop_queue(st, i)
        inst.kv_used += claim
        if req.preemptions > 0:
            _join(st, i, r)
            req.status = RECOMPUTING
            inst.recompute_n += 1
            inst.recompute_tokens += present
            inst.recompute_sum_sq += np.float64(present) ** 2
            continue
        log_event(st, EV_CLAIM, i, r)
        req.delivered_s = _transfer(st, i, r)
        if req.delivered_s <= g.now_s:
            log_event(st, EV_DELIVER, i, r)
            _release_prefill(st, r)
            _join(st, i, r)
            continue
        req.status = IN_TRANSFER
        # In two steps, here and at its delivery, what its joining looks up is made ready.
        prefetch(st.finishing, (i * FINISH_SLOTS + _coming_slot(st, i, r)) * _SLOT_BYTES)
        if inst.transit_tail < 0:
            inst.transit_head = r
            set_event(st, delivery_entity(st, i), req.delivered_s)
        else:
            st.req[inst.transit_tail].next = r
        inst.transit_tail = r
        inst.transit_n += 1
        inst.transit_tokens += present


@inlined
def deliver(st: State, i: int) -> None:
    """The first transfer on its way to instance i is complete."""
    inst = st.inst[i]
    r = inst.transit_head
    req = st.req[r]
    inst.transit_head = req.next
    req.next = -1
    if inst.transit_head < 0:
        inst.transit_tail = -1
        set_event(st, delivery_entity(st, i), np.inf)
    else:
        set_event(st, delivery_entity(st, i), st.req[inst.transit_head].delivered_s)
    log_event(st, EV_DELIVER, i, r)
    prefetch_request(st, st.finishing[i, _coming_slot(st, i, r)])
    if not inst.running:
        mark_dirty(st, i)
    _release_prefill(st, r)
    if inst.ready_tail < 0:
        inst.ready_head = r
    else:
        st.req[inst.ready_tail].next = r
    inst.ready_tail = r
    inst.ready_n += 1


@inlined
def form_decode_batch(st: State, i: int) -> bool:
    """Join, claim, preempt; fill the ``iter_*`` fields. Returns whether there is anything to run."""
    g = st.glob[0]
    inst = st.inst[i]
    while inst.ready_head >= 0:
        r = inst.ready_head
        inst.ready_head = st.req[r].next
        if inst.ready_head < 0:
            inst.ready_tail = -1
        inst.ready_n -= 1
        inst.transit_n -= 1
        inst.transit_tokens -= _kv_present(st.req[r])
        _join(st, i, r)
    if inst.queue_head >= 0:
        _claim(st, i)
    if g.preempt:
        while inst.kv_used + inst.run_n > inst.kv_capacity and inst.run_n > 1:
            _preempt_last(st, i)
    if inst.run_n == 0:
        return False
    # Who finishes soon joined seconds ago.
    prefetch_request(st, st.finishing[i, (inst.iterations + 3) & _SLOTS])
    inst.iter_batch = inst.run_n - inst.recompute_n
    inst.iter_kv = inst.run_kv - inst.recompute_tokens
    inst.iter_tokens = inst.recompute_tokens
    inst.iter_sum_sq = inst.recompute_sum_sq
    log_event(st, EV_DECODE_START, i, inst.run_n)
    return True


@inlined
def end_decode(st: State, i: int) -> None:
    """Every request of the batch has one more token; those that have all of theirs are finished."""
    g = st.glob[0]
    inst = st.inst[i]
    inst.output_tokens += inst.run_n
    inst.run_kv += inst.run_n
    if not g.full_admission:
        inst.kv_used += inst.run_n
    log_event(st, EV_DECODE_END, i, inst.run_n)
    if inst.recompute_n > 0:
        r = inst.run_tail
        while inst.recompute_n > 0:
            if st.req[r].status == RECOMPUTING:
                st.req[r].status = DECODING
                inst.recompute_n -= 1
            r = st.req[r].prev
        inst.recompute_tokens = 0
        inst.recompute_sum_sq = 0.0
    heads = st.finishing[i]
    slot = inst.iterations & _SLOTS
    while heads[slot] >= 0:
        r = np.int64(heads[slot]) & INDEX
        if _last_iteration(st, r) != inst.iterations:
            break
        heads[slot] = st.req[r].finish_next
        prefetch_request(st, st.req[r].finish_next)
        if g.observe_slack:
            _forget_slack(st, i, r)
        _unlink(st, i, r)
        inst.run_n -= 1
        req = st.req[r]
        req.generated += inst.iterations - req.join_iteration
        present = _kv_present(req)
        inst.run_kv -= present
        inst.kv_used -= np.int64(req.prompt) + np.int64(req.output) if g.full_admission else present
        req.finish_s = g.now_s
        req.status = FINISHED
        inst.completed += 1
        # Not divided by output - 1: it is 0 where one token is decoded once more.
        inst.late += np.int64(g.now_s - req.first_token_s > g.tpot_slo_s * np.float64(req.output - 1))
        g.finished += 1
        log_event(st, EV_FINISH, i, r)


@compiled
def return_waiting(st: State, i: int) -> None:
    """Hand the unclaimed requests of a draining instance back to the router, in order."""
    inst = st.inst[i]
    r = inst.queue_head
    inst.queue_head = -1
    inst.queue_tail = -1
    inst.queue_n = 0
    inst.queue_tokens = 0
    while r >= 0:
        following = st.req[r].next
        if not hand_to_decode(st, r) and st.req[r].preemptions == 0:
            _release_prefill(st, r)
        r = following


@compiled
def route_pending_decode(st: State) -> None:
    """Try the common queue again: an instance became active."""
    g = st.glob[0]
    r = g.pending_decode_head
    g.pending_decode_head = -1
    g.pending_decode_tail = -1
    while r >= 0:
        following = st.req[r].next
        if not hand_to_decode(st, r) and st.req[r].preemptions == 0:
            _release_prefill(st, r)
        r = following
