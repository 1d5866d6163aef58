"""Small compiled parts that every other part of the engine uses: the event tree, joules, random numbers, the log.

An *entity* is a timer: nodes come first (their drivers' next stage), then deliveries by instance, then iterations by
instance. The event tree is a tournament over them; equal times are won by the lower entity, which is the order of
docs/cluster.md.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from biscale_gym._jit import INDEX, compiled, inlined
from biscale_gym.cluster.state import BUSY, IDLE, LOADING_WEIGHTS, SWITCHING, State
from biscale_gym.profiles.elementary import bits_of, cosine_of_turns, exponential, natural_log, of_bits

Vector = npt.NDArray[np.float64]


@inlined
def set_event(st: State, entity: int, time_s: float) -> None:
    """Set an entity's timer (inf: none) and replay its matches up the tree, until one that it neither won nor wins."""
    tree_s, tree_entity = st.tree_s, st.tree_entity
    position = (st.glob[0].leaves + entity) & INDEX
    tree_s[position] = time_s
    # The winner so far climbs along; a match needs only its opponent, the sibling. The bits of times are in the order
    # of the times, as none is negative.
    bits, winner = bits_of(time_s), entity
    while position > 1:
        opponent = position ^ 1
        opponent_bits = bits_of(tree_s[opponent])
        # Equal times are won by the lower entity, which is on the left. Masked, not branched on: who wins cannot be
        # predicted.
        lost = -np.int64(opponent_bits < bits + (position & 1))
        winner ^= (winner ^ np.int64(tree_entity[opponent])) & lost
        bits ^= (bits ^ opponent_bits) & lost
        position >>= 1
        if tree_entity[position] != entity and winner != entity:
            break
        tree_s[position] = of_bits(bits)
        tree_entity[position] = winner


@inlined
def others_s(st: State, entity: int) -> float:
    """When the first of all other timers rings."""
    tree_s = st.tree_s
    position = (st.glob[0].leaves + entity) & INDEX
    least_s = np.inf
    while position > 1:
        least_s = min(least_s, tree_s[position ^ 1])
        position >>= 1
    return least_s


@inlined
def iteration_entity(st: State, i: int) -> int:
    """Timer of the end of instance i's iteration, its overrun, or its loading."""
    g = st.glob[0]
    return g.nodes + g.capacity + i


@inlined
def delivery_entity(st: State, i: int) -> int:
    """Timer of the next KV delivery to instance i."""
    return st.glob[0].nodes + i


@inlined
def accrue(st: State, i: int) -> None:
    """Book instance i's joules and seconds up to now."""
    inst = st.inst[i]
    now_s = st.glob[0].now_s
    elapsed_s = now_s - inst.last_s
    if elapsed_s > 0.0:
        inst.energy_j[inst.bucket] += inst.power_w * elapsed_s
        inst.time_s[inst.bucket] += elapsed_s
    inst.last_s = now_s


@inlined
def set_power(st: State, i: int, power_w: float, loading: bool) -> None:
    """From now on instance i (all its GPUs) draws ``power_w``; what it drew until now is booked."""
    accrue(st, i)
    inst = st.inst[i]
    inst.power_w = power_w
    if inst.in_service >= 0:
        inst.bucket = SWITCHING
    elif inst.running:
        inst.bucket = BUSY
    elif loading:
        inst.bucket = LOADING_WEIGHTS
    else:
        inst.bucket = IDLE


@compiled
def accrue_unallocated(st: State) -> None:
    """Book the idle power of GPUs that belong to no instance up to now."""
    g = st.glob[0]
    free = max(0, g.gpus - g.gpus_allocated)
    g.unallocated_j += free * g.unallocated_w_per_gpu * (g.now_s - g.unallocated_last_s)
    g.unallocated_last_s = g.now_s


@inlined
def mark_dirty(st: State, i: int) -> None:
    """Wake instance i at the end of this instant."""
    inst = st.inst[i]
    if inst.dirty == 0:
        inst.dirty = 1
        g = st.glob[0]
        tail = g.dirty_next + g.dirty_n
        if tail >= g.capacity:
            tail -= g.capacity
        st.dirty[tail] = i
        g.dirty_n += 1


@inlined
def log_event(st: State, kind: int, instance: int, subject: int) -> None:
    """Append to the event log while it has room."""
    g = st.glob[0]
    if g.log_n < st.log.shape[0]:
        event = st.log[g.log_n]
        event.time_s = g.now_s
        event.kind = kind
        event.instance = instance
        event.subject = subject
        g.log_n += 1


_STEP = np.uint64(0x9E3779B97F4A7C15)


@inlined
def splitmix64(x: np.uint64) -> tuple[np.uint64, np.uint64]:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014): (next state, 64 random bits)."""
    x = np.uint64(x + _STEP)
    z = x
    z = np.uint64((z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    z = np.uint64((z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return x, np.uint64(z ^ (z >> np.uint64(31)))


@inlined
def uniform(x: np.uint64) -> tuple[np.uint64, float]:
    """(next state, a double in (0, 1])."""
    x, bits = splitmix64(x)
    return x, (np.float64(np.int64(bits >> np.uint64(11))) + 1.0) * (1.0 / 9007199254740992.0)


@compiled
def draw_lognormals(x: np.uint64, median: float, sigma: float, out: Vector) -> np.uint64:
    """Fill ``out`` with draws of this median and log-space deviation and return the next state.

    By Box and Muller, two uniforms a draw; the loop is one of vector instructions.
    """
    for k in range(len(out)):
        before = np.uint64(x + np.uint64(2 * k) * _STEP)
        size = math.sqrt(-2.0 * natural_log(uniform(before)[1]))
        out[k] = median * exponential(sigma * size * cosine_of_turns(uniform(np.uint64(before + _STEP))[1]))
    return np.uint64(x + np.uint64(2 * len(out)) * _STEP)
