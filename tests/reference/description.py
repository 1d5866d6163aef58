"""What a run of the reference simulator is made of: plain values and callables, so that one serves both simulators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["prefill", "decode"]
Decision = dict[str, Any]
Event = tuple[float, str, int, int]
"""(time in s, kind, instance or -1, detail).

The detail is a request for arrive, reject, claim, deliver, join, finish and preempt; a clock for ask and clock; the
number of requests in the batch for prefill-start, prefill-end, decode-start and decode-end.
"""

CostFunction = Callable[[int, int, int, int, int, int], tuple[float, float]]
"""(tp, clock, b, K, m, S2) -> (latency in s, power in W per GPU)."""

IdlePowerFunction = Callable[[int, int], float]
"""(tp, clock) -> W per GPU."""


def zero_duration() -> float:
    """The duration in seconds of a clock call that costs nothing."""
    return 0.0


@dataclass(frozen=True)
class InstanceSpec:
    """One TP group on one node, serving one phase at a clock (an index into the run's ascending list)."""

    phase: Phase
    tp: int
    clock: int
    kv_capacity: int
    weight: float = 1.0
    node: int = 0
    pipeline: Pipeline | None = None


@dataclass(frozen=True)
class Pipeline:
    """The stages that this lane shares with the others of its instance, which are numbered from ``first_lane`` on.

    A hand-over to the next stage takes ``handover_s``, and ``handover_s_per_token`` for each token of the batch.
    """

    stages: int
    first_lane: int
    handover_s: float = 0.0
    handover_s_per_token: float = 0.0


@dataclass(frozen=True)
class RequestSpec:
    """One line of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Policy:
    """A clock policy of one phase, and the decision points (besides the start of a batch) at which it is asked.

    An iteration overruns when it has lasted (1 + ``overrun_margin``) times what ``predict`` (the true cost by default)
    said at its start for the clock then in force; None: never asked.
    """

    function: Callable[[Decision], int]
    on_arrival: bool = False
    on_idle: bool = False
    overrun_margin: float | None = None
    predict: CostFunction | None = None


@dataclass(frozen=True)
class Batching:
    """Rules by which batches form."""

    prefill_token_budget: int = 8192
    chunked_prefill: bool = False
    max_decode_sequences: int = 256
    decode_admission: Literal["current", "full"] = "current"
    preemption: Literal["recompute", "none"] = "recompute"
    decode_iterations: Literal["output-minus-one", "output-length"] = "output-minus-one"


@dataclass(frozen=True)
class Routing:
    """Router of each phase; ``decode_load`` is the measure of least-loaded and power-of-two for decode.

    ``two_candidates(n)`` gives power-of-two its pair of positions among the n instances that may take the request.
    """

    prefill: Literal["weighted-round-robin", "least-loaded", "shortest-queue", "power-of-two"] = "weighted-round-robin"
    decode: Literal["weighted-round-robin", "least-loaded", "shortest-queue", "power-of-two"] = "weighted-round-robin"
    decode_load: Literal["waiting", "requests"] = "requests"
    two_candidates: Callable[[int], tuple[int, int]] | None = None


@dataclass(frozen=True)
class Switching:
    """``draw()`` gives the duration in seconds of each successive call of the run, in the order they begin."""

    draw: Callable[[], float] = zero_duration
    settle_s: float = 0.0


@dataclass(frozen=True)
class Transfer:
    """KV transfer: launch latency, bandwidth of one GPU pair, bytes of KV per token. The default costs nothing."""

    latency_s: float = 0.0
    within_node_bytes_per_s: float = math.inf
    between_nodes_bytes_per_s: float = math.inf
    bytes_per_token: float = 0.0


@dataclass(frozen=True)
class NewInstance:
    """An instance that a border brings: it loads for ``load_s`` at ``start_power_w`` per GPU above idle power."""

    spec: InstanceSpec
    load_s: float = 0.0
    start_power_w: float = 0.0


@dataclass(frozen=True)
class Border:
    """A change of placement: ``drain`` leaves, ``new`` comes (numbered after all before), everyone else stays.

    ``clocks`` are the clocks that the new placement gives to staying instances, ``weights`` their new routing weights.
    """

    time_s: float
    drain: frozenset[int] = frozenset()
    new: tuple[NewInstance, ...] = ()
    clocks: Mapping[int, int] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """Everything that one run depends on."""

    requests: tuple[RequestSpec, ...]
    instances: tuple[InstanceSpec, ...]
    cost: CostFunction
    idle_power: IdlePowerFunction
    clocks: int = 1
    nodes: int = 1
    gpus_per_node: int = 8
    gpus: int = 8
    batching: Batching = Batching()
    routing: Routing = Routing()
    switching: Switching = Switching()
    transfer: Transfer = Transfer()
    prefill_policy: Policy | None = None
    decode_policy: Policy | None = None
    tpot_slo_s: float = math.inf
    borders: tuple[Border, ...] = ()
    replacement: Literal["drain", "instant"] = "drain"
    arrival_phase: Phase = "prefill"
    until_s: float | None = None
