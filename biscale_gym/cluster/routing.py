"""Which instance takes a request: weighted round robin, least loaded, shortest queue, power of two choices."""

from __future__ import annotations

from typing import Any

import numpy as np

from biscale_gym._jit import INDEX, compiled, inlined
from biscale_gym.cluster.primitives import uniform
from biscale_gym.cluster.state import (
    ACTIVE,
    LEAST_LOADED,
    POWER_OF_TWO,
    PREFILL,
    SHORTEST_QUEUE,
    WEIGHTED_ROUND_ROBIN,
    State,
)


@inlined
def _before(st: State, a: int, b: int) -> bool:
    pass_a, pass_b = st.inst[a & INDEX].route_pass, st.inst[b & INDEX].route_pass
    return pass_a < pass_b or (pass_a == pass_b and a < b)


@compiled
def _sift_down(st: State, heap: Any, n: int, position: int) -> None:
    moved = heap[position]
    while True:
        child = 2 * position + 1
        if child >= n:
            break
        if child + 1 < n and _before(st, heap[child + 1], heap[child]):
            child += 1
        if not _before(st, heap[child], moved):
            break
        heap[position] = heap[child]
        position = child
    heap[position] = moved


@compiled
def _sift_up(st: State, heap: Any, position: int) -> None:
    moved = heap[position]
    while position > 0:
        parent = (position - 1) // 2
        if not _before(st, moved, heap[parent]):
            break
        heap[position] = heap[parent]
        position = parent
    heap[position] = moved


@compiled
def _size(st: State, phase: int) -> int:
    g = st.glob[0]
    return g.route_n_prefill if phase == PREFILL else g.route_n_decode


@compiled
def _resize(st: State, phase: int, by: int) -> None:
    g = st.glob[0]
    if phase == PREFILL:
        g.route_n_prefill += by
    else:
        g.route_n_decode += by


@compiled
def router_add(st: State, i: int) -> None:
    """Instance i takes requests from now on; it starts level with the least served of its phase."""
    inst = st.inst[i]
    heap = st.route_heap[inst.phase]
    n = _size(st, inst.phase)
    inst.route_pass = st.inst[heap[0]].route_pass if n > 0 else 0.0
    heap[n] = i
    _resize(st, inst.phase, 1)
    _sift_up(st, heap, n)


@compiled
def router_remove(st: State, i: int) -> None:
    """Instance i takes no more requests."""
    phase = st.inst[i].phase
    heap = st.route_heap[phase]
    n = _size(st, phase)
    for position in range(n):
        if heap[position] == i:
            heap[position] = heap[n - 1]
            _resize(st, phase, -1)
            if position < n - 1:
                _sift_down(st, heap, n - 1, position)
                _sift_up(st, heap, position)
            return


@inlined
def _can_hold(st: State, i: int, tokens: int) -> bool:
    inst = st.inst[i]
    return inst.status == ACTIVE and inst.kv_capacity >= tokens


@compiled
def _weighted_round_robin(st: State, phase: int, tokens: int) -> int:
    """Stride scheduling: the least pass goes first and is raised by 1/weight."""
    heap = st.route_heap[phase]
    n = _size(st, phase)
    best = -1
    if n > 0 and _can_hold(st, heap[0], tokens):
        best = 0
    else:
        for position in range(n):
            if _can_hold(st, heap[position], tokens) and (best < 0 or _before(st, heap[position], heap[best])):
                best = position
    if best < 0:
        return -1
    chosen = heap[best] & INDEX
    st.inst[chosen].route_pass += 1.0 / st.inst[chosen].weight
    _sift_down(st, heap, n, best)
    return chosen


@compiled
def _load(st: State, i: int, router: int) -> int:
    inst = st.inst[i]
    if router == SHORTEST_QUEUE:
        return inst.queue_n
    if inst.phase == PREFILL:
        running = inst.batch_n
        if running == 0 and inst.chunk_request >= 0:
            running = 1
        return inst.queue_n + running
    if st.glob[0].decode_load_counts_running:
        return inst.queue_n + inst.transit_n + inst.run_n
    return inst.queue_n


@compiled
def _least(st: State, phase: int, tokens: int, router: int) -> int:
    best = -1
    least = np.int64(0)
    for i in range(st.glob[0].instances):
        if st.inst[i].phase == phase and _can_hold(st, i, tokens):
            load = _load(st, i, router)
            if best < 0 or load < least:
                best, least = i, load
    return best


@compiled
def _pick_random(st: State, phase: int, tokens: int, able: int, other: int) -> int:
    """The k-th able instance (k uniform over ``able`` of them), never ``other``."""
    g = st.glob[0]
    g.rng_routing, u = uniform(g.rng_routing)
    k = min(able - 1, int(u * able))
    for i in range(g.instances):
        if st.inst[i].phase == phase and i != other and _can_hold(st, i, tokens):
            if k == 0:
                return i
            k -= 1
    return -1


@compiled
def _power_of_two(st: State, phase: int, tokens: int) -> int:
    able = 0
    for i in range(st.glob[0].instances):
        if st.inst[i].phase == phase and _can_hold(st, i, tokens):
            able += 1
    if able == 0:
        return -1
    first = _pick_random(st, phase, tokens, able, -1)
    if able == 1:
        return first
    second = _pick_random(st, phase, tokens, able - 1, first)
    load_first, load_second = _load(st, first, LEAST_LOADED), _load(st, second, LEAST_LOADED)
    if load_second < load_first or (load_second == load_first and second < first):
        return second
    return first


@compiled
def route(st: State, phase: int, tokens: int) -> int:
    """The active instance of a phase that takes a request of ``tokens`` KV tokens; -1 where none can."""
    g = st.glob[0]
    router = g.router_prefill if phase == PREFILL else g.router_decode
    if router == WEIGHTED_ROUND_ROBIN:
        return _weighted_round_robin(st, phase, tokens)
    if router == POWER_OF_TWO:
        return _power_of_two(st, phase, tokens)
    return _least(st, phase, tokens, router)
