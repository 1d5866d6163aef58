"""Random small clusters, described once for the compiled engine and once for the plain simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference_simulator as ref
from numba import njit

from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import InstanceSpec, Phase, Placement, layout
from biscale_gym.cluster.policy import POLICY_SIGNATURE
from biscale_gym.cluster.primitives import draw_lognormals
from biscale_gym.cluster.settings import (
    BatchingSettings,
    ClusterSettings,
    ReplacementSettings,
    RoutingSettings,
    SloSettings,
)
from biscale_gym.cluster.simulator import Decision, PhasePolicy, Simulator, lowest_idle_power_w
from biscale_gym.cluster.state import EVENTS
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.profiles.kernels import idle_power_w, iteration_cost
from biscale_gym.traces import Trace

CLOCKS_MHZ = (705, 1005, 1410, 1980)
SLO = SloSettings(ttft_s=0.6, tpot_s=0.1)


@njit(POLICY_SIGNATURE)
def restless_prefill(obs, memory, params, model):  # type: ignore[no-untyped-def]
    """A policy that changes its mind with every batch, the same in both simulators."""
    if obs[f.REASON] == f.IDLE:
        return 0
    key = int(obs[f.BATCH_FIRST + f.BATCH_TOKENS]) * 7 + int(obs[f.QUEUE_REQUESTS]) * 3 + int(obs[f.REASON])
    return key % int(obs[f.CLOCK_COUNT])


@njit(POLICY_SIGNATURE)
def restless_decode(obs, memory, params, model):  # type: ignore[no-untyped-def]
    """Its counterpart for decode."""
    if obs[f.REASON] == f.IDLE:
        return 1
    key = int(obs[f.BATCH]) * 5 + int(obs[f.BATCH_KV_TOKENS]) // 64 + int(obs[f.RECOMPUTE_TOKENS]) + int(obs[f.REASON])
    return key % int(obs[f.CLOCK_COUNT])


_REASONS = {"boundary": f.BOUNDARY, "arrival": f.ARRIVAL, "overrun": f.OVERRUN, "idle": f.IDLE}


def _plain_prefill(decision: dict[str, Any]) -> int:
    if decision["reason"] == "idle":
        return 0
    return (decision["m"] * 7 + decision["queue"] * 3 + _REASONS[decision["reason"]]) % len(CLOCKS_MHZ)


def _plain_decode(decision: dict[str, Any]) -> int:
    if decision["reason"] == "idle":
        return 1
    key = decision["b"] * 5 + decision["K"] // 64 + decision["m"] + _REASONS[decision["reason"]]
    return key % len(CLOCKS_MHZ)


@dataclass(frozen=True)
class Case:
    """One random cluster and its requests."""

    settings: ClusterSettings
    placement: Placement
    trace: Trace
    policies: bool
    mispredict: bool
    seed: int
    until_s: float
    borders: tuple[tuple[float, Placement], ...] = ()
    only: Phase | None = None
    profile: Profile = field(default_factory=lambda: load_profile("h100-sxm5", "llama-3.3-70b", "fp8"))

    @property
    def predicted(self) -> Profile | None:
        """What the policies believe: slow host work is left out, so that every iteration overruns."""
        if not self.mispredict:
            return None
        return load_profile("h100-sxm5", "llama-3.1-8b", "bf16")


def random_case(seed: int, borders: bool = False, only: Phase | None = None, pipelines: bool = False) -> Case:
    """Every rule of the engine is drawn: sizes, batching, routing, switching, transfer, policies, loads."""
    rng = np.random.default_rng(seed)
    preempted = bool(rng.random() < 0.5)
    batching = BatchingSettings(
        prefill_token_budget=int(rng.choice([64, 300, 2048])),
        chunked_prefill=bool(rng.random() < 0.4),
        max_decode_sequences=int(rng.choice([3, 8, 256])),
        decode_admission="full" if rng.random() < 0.25 else "current",
        preemption="recompute" if preempted else "none",
        decode_iterations="output-length" if rng.random() < 0.3 else "output-minus-one",
        decode_kv_tokens=int(rng.integers(260, 1200)) if rng.random() < 0.8 else None,
        prefill_kv_tokens=int(rng.integers(260, 1500)) if rng.random() < 0.5 else None,
    )
    routers = ("weighted-round-robin", "least-loaded", "shortest-queue")
    routing = RoutingSettings(
        prefill=rng.choice(routers), decode=rng.choice(routers), decode_load=rng.choice(["requests", "waiting"])
    )
    settings = ClusterSettings(
        nodes=3 if pipelines else 2,
        batching=batching,
        routing=routing,
        switching=str(rng.choice(["nvml", "nvidia-smi", "instant"])),
        transfer=str(rng.choice(["rdma-20", "nvlink", "free"])),
        replacement=ReplacementSettings(
            mode="instant" if rng.random() < 0.4 else "drain", load_gb_per_s=100.0, start_s=0.5, start_power_w=40.0
        ),
    )
    count = int(rng.integers(1, 60))
    rate = float(rng.choice([3.0, 30.0, 300.0]))
    trace = Trace(
        np.cumsum(rng.exponential(1.0 / rate, count)),
        rng.integers(1, 300, count),
        rng.integers(1, 60, count),
        f"random-{seed}",
    )
    placement = _random_placement(rng, only, pipelines)
    duration_s = trace.duration_s
    first_s = duration_s * 0.3 + rng.uniform(0.0, 0.3)
    changes = tuple(
        (float(at_s), _random_placement(rng, only, pipelines)) for at_s in (first_s, first_s + duration_s * 0.4)
    )
    return Case(
        settings=settings,
        placement=placement,
        trace=trace,
        policies=bool(rng.random() < 0.7),
        mispredict=bool(rng.random() < 0.5),
        seed=seed,
        until_s=duration_s + 40.0,
        borders=changes if borders else (),
        only=only,
    )


def _random_placement(rng: np.random.Generator, only: Phase | None, pipelines: bool) -> Placement:
    specs = []
    phases: tuple[Phase, ...] = ("prefill", "decode") if only is None else (only,)
    for phase in phases:
        for _ in range(int(rng.integers(1, 3))):
            clock = int(rng.choice(CLOCKS_MHZ))
            weight = float(rng.choice([1.0, 2.0, 0.7]))
            tp, pp = (2, int(rng.integers(1, 4))) if pipelines else (int(rng.choice([2, 4])), 1)
            specs.append(InstanceSpec(phase, tp, clock, weight, pp))
    return Placement(tuple(specs))


def new_engine(case: Case) -> Simulator:
    """The case on the compiled engine, every event logged, nothing run yet."""
    simulator = Simulator(
        case.settings,
        case.profile,
        case.placement,
        case.trace,
        CLOCKS_MHZ,
        SLO,
        case.seed,
        predicted=case.predicted,
        only=case.only,
        log_events=400_000,
    )
    if case.policies:
        simulator.set_policies(
            PhasePolicy(restless_prefill, on_arrival=True, on_overrun=case.mispredict, on_idle=True),
            PhasePolicy(restless_decode, on_overrun=case.mispredict, on_idle=True),
        )
    return simulator


def decode_decisions(case: Case) -> tuple[Simulator, list[Decision]]:
    """The case with this program answering for the decode policy, as it would; accumulated slack is observed."""
    simulator = new_engine(case)
    simulator.set_policies(
        PhasePolicy(restless_prefill, on_arrival=True, on_overrun=case.mispredict, on_idle=True),
        PhasePolicy(on_overrun=case.mispredict, on_idle=True, slack=True),
    )
    model, seen = np.zeros(1), []
    decision = simulator.run(case.until_s)
    while decision is not None:
        seen.append(decision)
        answer = restless_decode.py_func(decision.obs, model, model, model)
        decision = simulator.run(case.until_s, answer)
    return simulator, seen


def run_engine(case: Case) -> Simulator:
    """The case on the compiled engine until its ``until_s``."""
    simulator = new_engine(case)
    for at_s, placement in case.borders:
        simulator.run(at_s)
        simulator.reconfigure(placement)
    simulator.run(case.until_s)
    return simulator


def run_reference(case: Case, engine: Simulator, asked: list[dict[str, Any]] | None = None) -> ref.Result:
    """The same case on the plain simulator. Nodes, and who stays at a border, are read off the engine's lanes.

    ``asked`` takes what the decode policy was told, in order.
    """
    settings, profile = case.settings, case.profile
    vectors = {tp: profile.compile(tp, CLOCKS_MHZ, 256) for tp in (2, 4)}
    believed = case.predicted or profile
    beliefs = {tp: believed.compile(tp, CLOCKS_MHZ, 256) for tp in (2, 4)}

    def cost(tp: int, clock: int, b: int, kv: int, m: int, s2: int) -> tuple[float, float]:
        latency_s, power_w = iteration_cost(vectors[tp], clock, float(b), float(kv), float(m), float(s2))
        return float(latency_s), float(power_w)

    def predict(tp: int, clock: int, b: int, kv: int, m: int, s2: int) -> tuple[float, float]:
        latency_s, power_w = iteration_cost(beliefs[tp], clock, float(b), float(kv), float(m), float(s2))
        return float(latency_s), float(power_w)

    lowest_w = lowest_idle_power_w(profile)

    def idle(tp: int, clock: int) -> float:
        return lowest_w if tp == 1 else float(idle_power_w(vectors[tp], clock))

    instances = engine.state.inst

    def spec_of(number: int, spec: InstanceSpec, node: int) -> ref.InstanceSpec:
        return ref.InstanceSpec(
            spec.phase,
            spec.tp,
            CLOCKS_MHZ.index(spec.clock_mhz),
            int(instances[number]["kv_capacity"]),
            spec.weight / spec.pp,
            node,
            None
            if spec.pp == 1
            else ref.Pipeline(
                spec.pp,
                int(instances[number]["first_lane"]),
                float(instances[number]["handover_s"]) / (spec.pp - 1),
                float(instances[number]["handover_s_per_token"]) / (spec.pp - 1),
            ),
        )

    lanes = layout(case.placement, settings.nodes, settings.gpus_per_node)
    fresh = Simulator(settings, profile, case.placement, case.trace, CLOCKS_MHZ, SLO, case.seed, only=case.only)
    state = np.uint64(fresh.state.glob[0]["rng_switching"])
    glob = fresh.state.glob[0]

    def draw() -> float:
        nonlocal state
        one = np.empty(1)
        following = draw_lognormals(state, float(glob["switch_median_s"]), float(glob["switch_sigma"]), one)
        state = np.uint64(following)
        return float(one[0])

    def plain_decode(decision: dict[str, Any]) -> int:
        if asked is not None:
            asked.append(decision)
        return _plain_decode(decision)

    margin = settings.overrun_margin if case.mispredict else None
    policies = (
        (
            ref.Policy(_plain_prefill, on_arrival=True, on_idle=True, overrun_margin=margin, predict=predict),
            ref.Policy(plain_decode, on_idle=True, overrun_margin=margin, predict=predict),
        )
        if case.policies
        else (None, None)
    )
    scenario = ref.Scenario(
        requests=tuple(
            ref.RequestSpec(float(a), int(p), int(o))
            for a, p, o in zip(case.trace.arrival_s, case.trace.prompt_tokens, case.trace.output_tokens, strict=True)
        ),
        instances=tuple(spec_of(number, lane.spec, lane.node) for number, lane in enumerate(lanes)),
        cost=cost,
        idle_power=idle,
        clocks=len(CLOCKS_MHZ),
        nodes=settings.nodes,
        gpus_per_node=settings.gpus_per_node,
        gpus=settings.gpus,
        batching=_batching(settings.batching),
        routing=ref.Routing(settings.routing.prefill, settings.routing.decode, settings.routing.decode_load),
        switching=ref.Switching(draw, float(glob["settle_s"])),
        transfer=ref.Transfer(
            float(glob["transfer_latency_s"]),
            float(glob["bytes_per_s_within_node"]),
            float(glob["bytes_per_s_between_nodes"]),
            float(glob["kv_bytes_per_token"]),
        ),
        prefill_policy=policies[0],
        decode_policy=policies[1],
        tpot_slo_s=SLO.tpot_s,
        borders=_borders(case, spec_of),
        replacement=settings.replacement.mode,
        arrival_phase="decode" if case.only == "decode" else "prefill",
        until_s=case.until_s,
    )
    return ref.simulate(scenario)


def _batching(settings: BatchingSettings) -> ref.Batching:
    values = settings.model_dump(exclude={"decode_kv_tokens", "prefill_kv_tokens"})
    return ref.Batching(**values)


def _borders(case: Case, spec_of: Any) -> tuple[ref.Border, ...]:
    """The borders as the engine's own transitions make them, from a dry run that only changes placements."""
    if not case.borders:
        return ()
    dry = Simulator(case.settings, case.profile, case.placement, case.trace, CLOCKS_MHZ, SLO, case.seed, only=case.only)
    borders = []
    for at_s, placement in case.borders:
        before = dict(enumerate(dry.lanes))
        serving = {n for n in before if dry.state.inst[n]["status"] in (1, 2, 3)}
        dry.reconfigure(placement)
        after = dry.lanes
        leave = {n for n in serving if dry.state.inst[n]["status"] not in (1, 2, 3)}
        new = tuple(
            ref.NewInstance(
                spec_of(n, after[n].spec, after[n].node),
                float(dry.state.inst[n]["load_s"]),
                float(dry.state.inst[n]["load_extra_w"]),
            )
            for n in range(len(before), len(after))
        )
        stay = serving - leave
        borders.append(
            ref.Border(
                at_s,
                frozenset(leave),
                new,
                clocks={} if case.policies else {n: CLOCKS_MHZ.index(after[n].spec.clock_mhz) for n in stay},
                weights={n: after[n].spec.weight / after[n].spec.pp for n in stay},
            )
        )
    return tuple(borders)


def events_of(simulator: Simulator) -> list[tuple[float, str, int, int]]:
    """The engine's events; ``ask`` is left out, and an arrival names no instance."""
    return [
        (float(event["time_s"]), EVENTS[event["kind"]], int(event["instance"]), int(event["subject"]))
        for event in simulator.events
        if EVENTS[event["kind"]] != "ask"
    ]


def reference_events(result: ref.Result) -> list[tuple[float, str, int, int]]:
    """The plain simulator's events in the same form."""
    return [
        (time_s, kind, -1 if kind in ("arrive", "reject") else instance, detail)
        for time_s, kind, instance, detail in result.events
        if kind != "ask"
    ]
