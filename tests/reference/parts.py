"""The things that have a state: requests, iterations, instances, nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from reference.description import InstanceSpec, Phase, RequestSpec

BUCKETS = ("busy", "idle", "switching", "loading")


class Request:
    """One request and its record; times are NaN, and instances -1, until they happen."""

    def __init__(self, number: int, spec: RequestSpec) -> None:
        """A request that has not arrived."""
        self.number = number
        self.arrival_s = spec.arrival_s
        self.prompt_tokens = spec.prompt_tokens
        self.output_tokens = spec.output_tokens
        self.status = "not-arrived"
        self.prefill_start_s = math.nan
        self.first_token_s = math.nan
        self.delivered_s = math.nan
        self.decode_start_s = math.nan
        self.finish_s = math.nan
        self.prefill_instance = -1
        self.decode_instance = -1
        self.preemptions = 0
        self.prefilled_tokens = 0
        self.generated = 0
        self.source: Instance | None = None
        self.on_source = False
        self.claimed_tokens = 0
        self.must_recompute = False

    def kv_tokens(self) -> int:
        """Tokens whose KV an iteration over this request reads: the prompt, and what decode has added since."""
        return self.prompt_tokens + self.generated - 1


@dataclass
class Iteration:
    """A batch being computed; ``latency_s`` is what the whole of it takes at the clock in force."""

    requests: list[Request]
    chunk_ends: list[int]
    b: int
    kv: int
    m: int
    s2: int
    latency_s: float = 0.0
    waiting_s: float = 0.0
    power_w: float = 0.0
    ends_s: float = 0.0
    overrun_s: float = math.inf
    started_s: float = 0.0
    share_left: float = 1.0
    predicted_s: float = 0.0
    predicted_done_s: float = 0.0


class Instance:
    """One instance of either phase, with its ledger."""

    def __init__(self, number: int, spec: InstanceSpec) -> None:
        """An instance that has no GPUs yet."""
        self.number = number
        self.phase: Phase = spec.phase
        self.tp = spec.tp
        self.node = spec.node
        self.kv_capacity = spec.kv_capacity
        self.weight = spec.weight
        self.pipeline = spec.pipeline
        self.stages_free_s = [0.0] * (1 if spec.pipeline is None else spec.pipeline.stages)
        self.passed = 0.0
        self.due_decisions: set[str] = set()
        self.state = "waiting-for-gpus"
        self.load_s = 0.0
        self.start_power_w = 0.0
        self.loaded_s = math.inf
        self.clock = spec.clock
        self.target = spec.clock
        self.commanded = spec.clock
        self.landings: list[tuple[float, int]] = []
        self.calls_running = False
        self.iteration: Iteration | None = None
        self.nothing_asked = True
        self.link_free_s = 0.0
        self.kv_used = 0
        self.queue: list[Request] = []
        self.unfinished_prompt: Request | None = None
        self.in_transfer: list[tuple[float, Request]] = []
        self.delivered: list[Request] = []
        self.running: list[Request] = []
        self.joules = dict.fromkeys(BUCKETS, 0.0)
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        self.iterations = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.clock_changes = 0
        self.active_from_s = math.nan
        self.gone_s = math.nan

    def has_gpus(self) -> bool:
        """Whether it occupies GPUs."""
        return self.state in ("loading", "active", "draining")

    def in_placement(self) -> bool:
        """Whether the placement in force counts on it, now or once it is loaded."""
        return self.state in ("waiting-for-gpus", "loading", "active")

    def works(self) -> bool:
        """Whether it may compute."""
        return self.state in ("active", "draining")

    def bucket(self) -> str:
        """Where its joules of this moment belong."""
        if self.calls_running:
            return "switching"
        if self.iteration is not None:
            return "busy"
        return "loading" if self.state == "loading" else "idle"

    def requests_begun(self) -> int:
        """Requests on their way through the instance that wait in no queue."""
        if self.phase == "decode":
            return len(self.in_transfer) + len(self.delivered) + len(self.running)
        if self.iteration is not None:
            return len(self.iteration.requests)
        return 0 if self.unfinished_prompt is None else 1


@dataclass
class ClockRequest:
    """A clock asked of a node's driver."""

    instance: Instance
    clock: int


@dataclass
class Node:
    """A node: its GPUs, and its driver, which carries out one instance's clock calls at a time."""

    number: int
    gpus: int
    requests: list[ClockRequest] = field(default_factory=list)
    serving: Instance | None = None
    driver_free_s: float = math.inf
