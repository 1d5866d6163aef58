"""The engine's whole state: a handful of preallocated arrays that a snapshot copies.

``State`` is a named tuple of arrays, so compiled code takes it as it is and ``copy_state`` is exact. One record per
instance, node and request; memory is O(requests + instances).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster import features
from biscale_gym.cluster.pages import LINE_BYTES, Blocks
from biscale_gym.cluster.policy import MEMORY_SIZE

PREFILL = 0
DECODE = 1

# Instance status.
ABSENT = 0
AWAITING_GPUS = 1
LOADING = 2
ACTIVE = 3
DRAINING = 4
GONE = 5

# Energy buckets of an instance.
BUSY = 0
IDLE = 1
SWITCHING = 2
LOADING_WEIGHTS = 3
BUCKETS = ("busy", "idle", "switching", "loading")

# Request status.
EXPECTED = 0
QUEUED = 1
PREFILLING = 2
WAITING_DECODE = 3
IN_TRANSFER = 4
DECODING = 5
FINISHED = 6
REJECTED = 7
RECOMPUTING = 8

# Routers.
WEIGHTED_ROUND_ROBIN = 0
LEAST_LOADED = 1
SHORTEST_QUEUE = 2
POWER_OF_TWO = 3
ROUTERS = ("weighted-round-robin", "least-loaded", "shortest-queue", "power-of-two")

# How a phase's clocks are decided.
HOLD = 0
COMPILED = 1
EXTERNAL = 2

# Kinds of logged events.
EVENTS = (
    "arrive",
    "reject",
    "prefill-start",
    "prefill-end",
    "claim",
    "deliver",
    "join",
    "decode-start",
    "decode-end",
    "finish",
    "preempt",
    "clock",
    "ask",
)
(
    EV_ARRIVE,
    EV_REJECT,
    EV_PREFILL_START,
    EV_PREFILL_END,
    EV_CLAIM,
    EV_DELIVER,
    EV_JOIN,
    EV_DECODE_START,
    EV_DECODE_END,
    EV_FINISH,
    EV_PREEMPT,
    EV_CLOCK,
    EV_ASK,
) = range(len(EVENTS))

_i, _f = np.int64, np.float64

# As in INSTANCE below, fields that are used together lie together.
GLOBAL = np.dtype(
    [
        ("now_s", _f),
        ("next_arrival", _i),
        ("requests", _i),
        # position of the entities in the event tree
        ("nodes", _i),
        ("capacity", _i),
        ("leaves", _i),
        # instances to wake in this instant
        ("dirty_n", _i),
        ("dirty_next", _i),
        # a decision that the caller must answer
        ("pending_instance", _i),
        ("pending_reason", _i),
        ("log_n", _i),
        # counts
        ("arrived", _i),
        ("finished", _i),
        ("rejected", _i),
        ("decisions", _i),
        # running digest of every clock that was asked for
        ("digest", np.uint64),
        # policies, by phase
        ("mode_prefill", _i),
        ("mode_decode", _i),
        ("ask_on_arrival", _i),
        ("ask_on_idle_prefill", _i),
        ("ask_on_idle_decode", _i),
        ("observe_slack", _i),
        ("ttft_slo_s", _f),
        ("tpot_slo_s", _f),
        ("prediction_is_exact", _i),
        ("clocks", _i),
        # batching
        ("prefill_token_budget", _i),
        ("chunked_prefill", _i),
        ("full_admission", _i),
        ("preempt", _i),
        ("prefill_only", _i),
        ("extra_decode_iteration", _i),
        # clock switching
        ("switch_median_s", _f),
        ("switch_sigma", _f),
        ("settle_s", _f),
        ("rng_switching", np.uint64),
        ("next_call", _i),
        # the greatest KV capacity of the placement, by phase
        ("largest_prefill_kv", _i),
        ("largest_decode_kv", _i),
        ("arrivals_at_decode", _i),
        ("max_decode_sequences", _i),
        # routing, by phase
        ("router_prefill", _i),
        ("router_decode", _i),
        ("route_n_prefill", _i),
        ("route_n_decode", _i),
        ("decode_load_counts_running", _i),
        ("rng_routing", np.uint64),
        ("instances", _i),
        ("ask_on_overrun_prefill", _i),
        ("ask_on_overrun_decode", _i),
        ("overrun_margin", _f),
        # KV transfer
        ("transfer_latency_s", _f),
        ("kv_bytes_per_token", _f),
        ("bytes_per_s_within_node", _f),
        ("bytes_per_s_between_nodes", _f),
        # common queues while a phase has no instance
        ("pending_prefill_head", _i),
        ("pending_prefill_tail", _i),
        ("pending_decode_head", _i),
        ("pending_decode_tail", _i),
        # GPUs that belong to no instance
        ("gpus", _i),
        ("gpus_allocated", _i),
        ("unallocated_w_per_gpu", _f),
        ("unallocated_j", _f),
        ("unallocated_last_s", _f),
        # an answer outside the clock list
        ("bad_answer", _i),
    ],
    align=True,
)

# Fields that are used together lie together, eight to a cache line, the rarest last: with many simulators taking turns,
# time goes by the lines that an event touches.
INSTANCE = np.dtype(
    [
        # the running iteration
        ("running", _i),
        ("end_s", _f),
        ("iter_start_s", _f),
        ("segment_start_s", _f),
        ("work_left", _f),
        ("full_duration_s", _f),
        ("predicted_full_s", _f),
        ("predicted_done_s", _f),
        # clocks and power
        ("clock", _i),
        ("target", _i),
        ("in_service", _i),
        ("queued", _i),
        ("status", _i),
        ("power_w", _f),
        ("last_s", _f),
        ("bucket", _i),
        # energy
        ("energy_j", _f, (4,)),
        ("time_s", _f, (4,)),
        # what it is
        ("phase", _i),
        ("tp", _i),
        ("pp", _i),
        ("node", _i),
        ("model_start", _i),
        ("model_stop", _i),
        ("predicted_start", _i),
        ("predicted_stop", _i),
        # what runs
        ("iter_batch", _f),
        ("iter_kv", _f),
        ("iter_tokens", _f),
        ("iter_sum_sq", _f),
        ("overrun_s", _f),
        ("iterations", _i),
        ("last_observed_s", _f),
        ("last_predicted_s", _f),
        # queues: linked lists of requests
        ("queue_head", _i),
        ("queue_tail", _i),
        ("queue_n", _i),
        ("queue_tokens", _i),
        ("kv_used", _i),
        ("kv_capacity", _i),
        ("dirty", _i),
        ("idle_asked", _i),
        # requests that were routed here, those whose phase is over here, and those of them that broke its SLO
        ("routed", _i),
        ("completed", _i),
        ("late", _i),
        ("ask_arrival", _i),
        ("ask_overrun", _i),
        ("transit_n", _i),
        ("transit_tokens", _i),
        ("route_pass", _f),
        # running decode batch
        ("run_tail", _i),
        ("run_n", _i),
        ("run_kv", _i),
        ("recompute_n", _i),
        ("recompute_tokens", _i),
        ("recompute_sum_sq", _f),
        ("output_tokens", _i),
        # on its way to decode
        ("ready_head", _i),
        ("ready_tail", _i),
        ("ready_n", _i),
        ("transit_head", _i),
        ("transit_tail", _i),
        ("link_free_s", _f),
        ("weight", _f),
        ("clock_changes", _i),
        # prefill batch
        ("batch_head", _i),
        ("batch_tail", _i),
        ("batch_n", _i),
        ("chunk_request", _i),
        ("prompt_tokens", _i),
        ("queued_clock", _i),
        ("node_next", _i),
        # pipeline: the number of its first lane, the hand-overs of one pass
        ("first_lane", _i),
        ("handover_s", _f),
        ("handover_s_per_token", _f),
        # of a first lane: when the first stage is free, and when the last pass leaves the last stage
        ("stage_free_s", _f),
        ("pass_out_s", _f),
        ("waiting_s", _f),  # the part of a pass in which no stage computes it
        # coming and going
        ("load_s", _f),
        ("load_extra_w", _f),
        ("active_from_s", _f),
        ("gone_s", _f),
    ],
    align=True,
)

NODE = np.dtype(
    [
        ("serving", _i),
        ("stage", _i),
        ("effect_s", _f),
        ("end_s", _f),
        ("queue_head", _i),
        ("queue_tail", _i),
        ("free_gpus", _i),
    ],
    align=True,
)

CALLS = 16
"""How many durations of driver calls are drawn at a time."""

FINISH_SLOTS = 512
"""A request is in the slot of its last iteration's number modulo this; more than most have iterations to go."""

_s = np.int32
REQUEST = np.dtype(
    [
        ("arrival_s", _f),
        ("prefill_start_s", _f),
        ("first_token_s", _f),
        ("delivered_s", _f),
        ("finish_s", _f),
        ("prompt", _s),
        ("output", _s),
        ("next", _s),
        ("prev", _s),
        ("generated", _s),
        ("done", _s),
        ("join_iteration", _s),
        ("prefill_instance", _s),
        ("decode_instance", _s),
        ("preemptions", _s),
        ("status", _s),
        ("finish_next", _s),
    ],
    align=True,
)

ARRIVAL = np.dtype([("arrival_s", _f), ("prompt", _s), ("output", _s)], align=True)

EVENT = np.dtype([("time_s", _f), ("kind", _i), ("instance", _i), ("subject", _i)], align=True)


class State(NamedTuple):
    """Everything the engine reads and writes: I instances (capacity), N nodes, R requests, L leaves of the tree."""

    glob: npt.NDArray[Any]  # GLOBAL[1]
    inst: npt.NDArray[Any]  # INSTANCE[I]
    node: npt.NDArray[Any]  # NODE[N]
    arrivals: npt.NDArray[Any]  # ARRIVAL[R] the trace
    req: npt.NDArray[Any]  # REQUEST[R] written at arrival, meaningless until then
    tree_s: npt.NDArray[np.float64]  # [2 L] least event time below each node of the tournament tree
    tree_entity: npt.NDArray[np.int32]  # [2 L] the entity it belongs to
    finishing: npt.NDArray[np.int32]  # [I, FINISH_SLOTS] running requests by their last iteration: heads of lists
    route_heap: npt.NDArray[np.int32]  # [2, I] heap of instances by pass, per phase
    calls_s: npt.NDArray[np.float64]  # [CALLS] drawn durations of the drivers' calls, used up before ``next_call``
    dirty: npt.NDArray[np.int32]  # [I] ring of instances to wake, in order
    memory: npt.NDArray[np.float64]  # [I, MEMORY_SIZE or more] the policies' own
    obs: npt.NDArray[np.float64]  # [2, features.SIZE] of the last decision of each phase
    slack_s: npt.NDArray[np.float64]  # [I, max sequences] descending, of the running requests, where it is observed
    models: npt.NDArray[np.float64]  # compiled profiles of all classes, one after another
    predicted: npt.NDArray[np.float64]  # the same, as the controllers believe them
    params_prefill: npt.NDArray[np.float64]
    params_decode: npt.NDArray[np.float64]
    log: npt.NDArray[Any]  # EVENT[any]; logging stops when it is full


def copy_state(state: State) -> State:
    """An exact copy that shares nothing that the engine writes."""
    return State._make([array.copy() for array in state])


def request_arrays(requests: int, blocks: Blocks) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(``arrivals``, ``req``) of any content, side by side in one of ``blocks``."""
    behind = requests * REQUEST.itemsize
    room = blocks.take(behind + requests * ARRIVAL.itemsize)
    return room[behind:].view(ARRIVAL), room[:behind].view(REQUEST)


_SETTLED = (
    "glob",
    "inst",
    "node",
    "tree_s",
    "tree_entity",
    "route_heap",
    "calls_s",
    "dirty",
    "memory",
    "obs",
    "finishing",
    "slack_s",
)
"""What every event touches; the most often touched first."""


def room_bytes(state: State) -> int:
    """How much room ``settled`` takes."""
    return sum(-(-getattr(state, name).nbytes // LINE_BYTES) * LINE_BYTES for name in _SETTLED)


def settled(state: State, room: npt.NDArray[np.uint8]) -> State:
    """The state with the arrays that every event touches moved into ``room``, side by side.

    Where many simulators take turns, time goes by the lines and the pages that each of them touches.
    """
    moved = {}
    at = 0
    for name in _SETTLED:
        array = getattr(state, name)
        moved[name] = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        moved[name][...] = array
        at += -(-array.nbytes // LINE_BYTES) * LINE_BYTES
    return state._replace(**moved)


def restore_state(state: State, snapshot: State) -> None:
    """Write ``snapshot`` back into ``state`` in place."""
    arrays: tuple[npt.NDArray[Any], ...] = state
    for target, source in zip(arrays, snapshot, strict=True):
        target[...] = source


def leaves_for(nodes: int, capacity: int) -> int:
    """Leaves of the event tree: a power of two that holds nodes, deliveries and iterations."""
    return 1 << (nodes + 2 * capacity - 1).bit_length()


def empty_state(requests: int, nodes: int, capacity: int, max_sequences: int, log_events: int = 0) -> State:
    """Arrays of the right sizes with every list empty and every timer at infinity; requests are yet to be filled in."""
    leaves = leaves_for(nodes, capacity)
    glob = np.zeros(1, GLOBAL)
    glob["requests"], glob["nodes"], glob["capacity"], glob["leaves"] = requests, nodes, capacity, leaves
    for name in ("pending_prefill_head", "pending_prefill_tail", "pending_decode_head", "pending_decode_tail"):
        glob[name] = -1
    glob["pending_instance"] = -1
    glob["bad_answer"] = -1
    glob["next_call"] = CALLS
    inst = np.zeros(capacity, INSTANCE)
    for name in (
        "queue_head",
        "queue_tail",
        "batch_head",
        "batch_tail",
        "chunk_request",
        "transit_head",
        "transit_tail",
        "ready_head",
        "ready_tail",
        "run_tail",
        "node_next",
        "in_service",
    ):
        inst[name] = -1
    inst["end_s"] = inst["overrun_s"] = inst["gone_s"] = np.inf
    node = np.zeros(nodes, NODE)
    node["serving"] = node["queue_head"] = node["queue_tail"] = -1
    entities = np.minimum(np.arange(2 * leaves, dtype=np.int32), 2 * leaves - 1)
    for position in range(2 * leaves - 1, 0, -1):
        entities[position] = position - leaves if position >= leaves else entities[2 * position]
    return State(
        glob=glob,
        inst=inst,
        node=node,
        arrivals=np.zeros(requests, ARRIVAL),
        req=np.zeros(requests, REQUEST),
        tree_s=np.full(2 * leaves, np.inf),
        tree_entity=entities,
        finishing=np.full((capacity, FINISH_SLOTS), -1, np.int32),
        route_heap=np.zeros((2, capacity), np.int32),
        calls_s=np.zeros(CALLS),
        dirty=np.zeros(capacity, np.int32),
        memory=np.zeros((capacity, MEMORY_SIZE)),
        obs=np.zeros((2, features.SIZE)),
        slack_s=np.zeros((capacity, max_sequences)),
        models=np.zeros(1),
        predicted=np.zeros(1),
        params_prefill=np.zeros(1),
        params_decode=np.zeros(1),
        log=np.zeros(log_events, EVENT),
    )
