"""How fast the project is. docs/benchmarks.md says what each figure means.

``python scripts/benchmark.py engine`` prints a table (``planners`` and ``envs`` others); ``--json FILE`` writes the
figures, ``--json -`` prints them and sends the table to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from agents.biscale import BiScale
from biscale_gym.cluster import features
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.policy import hold
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import cache_root
from biscale_gym.control.controllers import Controller, PlanContext, make_controller
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.evaluation.latency import decision_times_s, shown_decisions
from biscale_gym.profiles import load_profile
from biscale_gym.testing.trajectories import Actions, lane_masks_of, masks_of
from biscale_gym.traces import Trace, generate, load_workload

Vector = NDArray[np.float64]
Figures = dict[str, Any]
"""Figure by name; a figure that several things have is again a dictionary, by their names."""
WIDTH_OF_FILES = 120


@dataclass(frozen=True)
class Goal:
    """One line of a table: what a figure is, and what it should reach. A dot in its key goes into a dictionary."""

    key: str
    label: str
    unit: str
    at_least: float | None = None
    below: float | None = None

    def read(self, figures: Figures) -> float:
        """This line's figure."""
        value: Any = figures
        for name in self.key.split("."):
            value = value[name]
        return float(value)

    def cells(self, value: float) -> tuple[str, str, str]:
        """Label, the value with its unit, and the goal (marked where it is missed)."""
        shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        if self.at_least is not None:
            least = f"{self.at_least:,.0f}" if self.at_least >= 1 else f"{self.at_least:g}"
            goal, met = f"≥ {least}", value >= self.at_least
        elif self.below is not None:
            goal, met = f"< {self.below:g}", value < self.below
        else:
            goal, met = "", True
        return self.label, f"{shown} {self.unit}".strip(), goal if met else f"{goal}  missed"


@dataclass(frozen=True)
class Benchmark:
    """A sub-command: what it measures, and how its table reads."""

    measure: Callable[[], Figures]
    goals: tuple[Goal, ...]
    about: str
    peers: tuple[tuple[str, float], ...] = ()
    """Others, and what they do per CPU-second."""
    beside: tuple[str, str] = ("requests_per_cpu_s", "requests")
    """The figure that stands beside the peers', and what it counts."""


# -- engine ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineSizes:
    """How much is simulated; the defaults are the published benchmark's.

    Attributes:
        requests: of the 8P+8D run.
        scenario, overrides: of the runs with DistServe and BiScale.
        distserve, biscale: settings of these controllers.
        day_s, day_rate_rps: length and mean rate of the day.
        scaling_s: length of the runs whose cost per iteration is compared.
        scaling_pairs: prefill and decode instances, each, of the small and of the large cluster.
        decisions: prefill decisions that are timed.
        repeats: the best of so many counts.
    """

    requests: int = 10_000
    scenario: str = "paper-67"
    overrides: dict[str, Any] = field(default_factory=dict)
    distserve: dict[str, Any] = field(default_factory=dict)
    biscale: dict[str, Any] = field(default_factory=dict)
    day_s: float = 86_400.0
    day_rate_rps: float = 30.0
    scaling_s: float = 120.0
    scaling_pairs: tuple[int, int] = (8, 512)
    decisions: int = 5_000
    repeats: int = 7


def best_s(work: Callable[[], object], before: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Least seconds of ``work`` by ``clock``; ``before`` runs untimed ahead of every repeat."""
    least_s = np.inf
    for _ in range(repeats):
        before()
        start_s = clock()
        work()
        least_s = min(least_s, clock() - start_s)
    return float(least_s)


def best_run_cpu_s(simulator: Simulator, repeats: int) -> float:
    """Least CPU seconds of the engine from the simulator's present state to the end, after a run that warms up."""
    start = simulator.snapshot()
    simulator.run()
    return best_s(simulator.run, lambda: simulator.restore(start), repeats, time.process_time)


def iterations_of(simulator: Simulator) -> int:
    """Iterations that a simulator's instances have run."""
    return int(simulator.instances().iterations.sum())


# An OPT-13B cluster on the linear A100 preset: the load that other simulators' figures are compared on.

PAIR_RATE_RPS = 4.0


def linear_cluster(pairs: int, trace: Trace, scenario: ScenarioSettings | None = None) -> Simulator:
    """``pairs`` prefill and as many decode instances of OPT-13B TP1; a compiled policy at every iteration."""
    cluster = ClusterSettings(
        hardware="a100-80g-linear",
        model="opt-13b",
        precision="bf16",
        nodes=-(-2 * pairs // 8),
        switching="instant",
        transfer="free",
    )
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    top = profile.top_clock_mhz
    slo = SloSettings(ttft_s=0.6, tpot_s=0.1)
    specs = [InstanceSpec(phase, 1, top) for phase in ("prefill", "decode") for _ in range(pairs)]
    simulator = Simulator(cluster, profile, Placement(tuple(specs)), trace, (top,), slo)
    context = PlanContext(
        scenario=ScenarioSettings(
            workload="lognormal-poisson", rate_rps=1.0, slo=slo, cluster=cluster, clocks_mhz=(top,), top_clock_mhz=top
        ),
        profile=profile,
        training=trace,
        mean_rate_rps=1.0,
        clocks_mhz=(top,),
    )
    decode = make_controller("biscale").policies(context)[1]
    simulator.set_policies(PhasePolicy(function=hold), decode)
    return simulator


def linear_trace(pairs: int, duration_s: float) -> Trace:
    """Poisson arrivals with lognormal lengths, so many per second and pair of instances."""
    return generate(load_workload("lognormal-poisson"), PAIR_RATE_RPS * pairs, duration_s, 0)


def measure_requests(sizes: EngineSizes) -> Figures:
    """Requests per CPU-second through 8 + 8 instances."""
    longer = linear_trace(8, 1.2 * sizes.requests / (8 * PAIR_RATE_RPS) + 10.0)
    trace = Trace(
        longer.arrival_s[: sizes.requests],
        longer.prompt_tokens[: sizes.requests],
        longer.output_tokens[: sizes.requests],
        longer.name,
    )
    simulator = linear_cluster(8, trace)
    cpu_s = best_run_cpu_s(simulator, 3 * sizes.repeats)
    build_s = best_s(lambda: linear_cluster(8, trace), lambda: None, 3, time.process_time)
    return {
        "requests_per_cpu_s": len(trace) / cpu_s,
        "requests_8p8d_iterations_per_cpu_s": iterations_of(simulator) / cpu_s,
        "requests_8p8d_build_s": build_s,
    }


def measure_scaling(sizes: EngineSizes) -> Figures:
    """CPU seconds per iteration of a large cluster, as a multiple of a small one's at the same load per instance."""
    cost_s = []
    for pairs in sizes.scaling_pairs:
        simulator = linear_cluster(pairs, linear_trace(pairs, sizes.scaling_s))
        cpu_s = best_run_cpu_s(simulator, sizes.repeats)
        cost_s.append(cpu_s / iterations_of(simulator))
    return {
        "cost_ratio_1024_to_16_instances": cost_s[1] / cost_s[0],
        "iteration_16_instances_us": 1e6 * cost_s[0],
        "iteration_1024_instances_us": 1e6 * cost_s[1],
    }


# The H100 cluster of a scenario.


@dataclass(frozen=True)
class Prepared:
    """A planner's placement on the scenario's trace, ready to be driven, and what other controllers plan with."""

    simulator: Simulator
    context: PlanContext


def prepare(sizes: EngineSizes, planner: Controller) -> Prepared:
    """Build the scenario's cluster with the placement that ``planner`` makes before the run."""
    scenario = load_scenario(sizes.scenario, sizes.overrides)
    cluster = scenario.cluster
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    requests = requests_for(scenario, profile, "test", 0, None, None)
    clocks = tuple(sorted({*scenario.clocks_mhz, scenario.top_clock_mhz}))
    context = PlanContext(
        scenario=scenario,
        profile=profile,
        training=requests.training,
        mean_rate_rps=requests.mean_rate_rps,
        clocks_mhz=clocks,
    )
    simulator = Simulator(cluster, profile, planner.plan(context), requests.evaluated, clocks, scenario.slo)
    return Prepared(simulator, context)


def measure_iterations(sizes: EngineSizes) -> Figures:
    """Iterations per CPU-second under DistServe's placement: prefill clocks held, decode slack at every iteration."""
    prepared = prepare(sizes, make_controller("distserve", sizes.distserve))
    decode = make_controller("biscale", sizes.biscale).policies(prepared.context)[1]
    prepared.simulator.set_policies(None, decode)
    cpu_s = best_run_cpu_s(prepared.simulator, 3 * sizes.repeats)
    return {"iterations_per_cpu_s": iterations_of(prepared.simulator) / cpu_s}


def measure_biscale(sizes: EngineSizes) -> Figures:
    """Wall seconds of a whole BiScale run: trace, placements, both tiers, metrics; class tables are at hand."""
    job = RunJob(
        scenario=sizes.scenario, controller="biscale", overrides=sizes.overrides, controller_settings=sizes.biscale
    )
    run(job)
    return {"biscale_paper67_s": best_s(lambda: run(job), lambda: None, min(3, sizes.repeats), time.perf_counter)}


def measure_mpc(sizes: EngineSizes) -> Figures:
    """Milliseconds of a prefill decision, without Python: many calls in compiled code, less the same with none."""
    controller = make_controller("biscale", sizes.biscale)
    prepared = prepare(sizes, controller)
    policies = controller.policies(prepared.context)
    assert policies[0] is not None
    warmup_s = prepared.context.scenario.warmup_s
    shown = shown_decisions(prepared.simulator, policies, "prefill", sizes.decisions, warmup_s)
    each_ms = 1e3 * decision_times_s(policies[0], shown)
    return {
        "mpc_decision_median_ms": float(np.median(each_ms)),
        "mpc_decision_p99_ms": float(np.quantile(each_ms, 0.99)),
        "mpc_decisions_timed": len(each_ms),
        "mpc_batches_mean": float(np.mean([one.obs[features.BATCHES] for one in shown])),
    }


def resident_mb(name: str) -> float:
    """A memory figure of this process from Linux's own account, ``VmRSS`` (now) or ``VmHWM`` (peak) [MB]."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024e-6
    raise OSError(f"/proc/self/status has no {name}")


def measure_day(sizes: EngineSizes) -> Figures:
    """Wall seconds to build and run a day on 16 H100 at the top clock, and its peak memory per request."""
    trace = generate(load_workload("diurnal"), sizes.day_rate_rps, sizes.day_s, 0)
    cluster = ClusterSettings()
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    top = profile.top_clock_mhz
    placement = Placement((InstanceSpec("prefill", 2, top),) * 4 + (InstanceSpec("decode", 4, top),) * 2)
    # The peak is counted anew from here.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before_mb = resident_mb("VmRSS")
    start_s = time.perf_counter()
    simulator = Simulator(cluster, profile, placement, trace, (top,), SloSettings(ttft_s=0.6, tpot_s=0.1))
    simulator.run()
    wall_s = time.perf_counter() - start_s
    return {
        "day_16_gpus_s": wall_s,
        "day_requests": len(trace),
        "day_iterations": iterations_of(simulator),
        "day_peak_bytes_per_request": 1e6 * (resident_mb("VmHWM") - before_mb) / len(trace),
        "day_finished_share": simulator.counts()["finished"] / len(trace),
    }


FIRST_RESULT = """
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.profiles import load_profile
from biscale_gym.traces import generate, load_workload

cluster = ClusterSettings()
profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
placement = Placement((InstanceSpec("prefill", 2, 1980), InstanceSpec("decode", 4, 1980)))
trace = generate(load_workload("paper"), 4.0, 30.0, 0)
simulator = Simulator(cluster, profile, placement, trace, (1980,), SloSettings(ttft_s=0.6, tpot_s=0.1))
simulator.run()
assert simulator.counts()["finished"] == len(trace)
"""


def measure_start(sizes: EngineSizes) -> Figures:
    """Wall seconds from starting another Python process to its first result, compiled code being cached."""

    def start() -> None:
        subprocess.run([sys.executable, "-c", FIRST_RESULT], check=True)

    start()
    return {"second_start_s": best_s(start, lambda: None, min(3, sizes.repeats), time.perf_counter)}


def measure_engine(sizes: EngineSizes | None = None) -> Figures:
    """All figures of the engine."""
    sizes = sizes or EngineSizes()
    figures: Figures = {}
    for part in (
        measure_requests,
        measure_iterations,
        measure_scaling,
        measure_day,
        measure_biscale,
        measure_mpc,
        measure_start,
    ):
        figures |= part(sizes)
    return figures


ENGINE = Benchmark(
    measure=measure_engine,
    about="speed of the cluster model and of the controllers in it",
    goals=(
        Goal("requests_per_cpu_s", "OPT-13B, 8P+8D at 32/s, policy at every iteration", "requests/CPU-s", 500_000),
        Goal("requests_8p8d_build_s", "… building its state, not counted above", "CPU-s"),
        Goal("iterations_per_cpu_s", "paper-67, DistServe's placement, decode slack", "iterations/CPU-s", 5_000_000),
        Goal("day_16_gpus_s", "a day at 30 requests/s on 16 H100", "s", below=30.0),
        Goal("day_peak_bytes_per_request", "… peak memory", "bytes/request"),
        Goal("cost_ratio_1024_to_16_instances", "cost of an iteration, 1,024 to 16 instances", "", below=2.0),
        Goal("biscale_paper67_s", "whole BiScale run of paper-67, class tables cached", "s", below=10.0),
        Goal("mpc_decision_median_ms", "prefill MPC (greedy), median decision", "ms", below=0.2),
        Goal("mpc_decision_p99_ms", "… 99th percentile", "ms"),
        Goal("second_start_s", "second start of a process to its first result", "s", below=3.0),
    ),
    peers=(("simdistserve", 1_500.0), ("Vidur", 450.0), ("AISimulate (Rust)", 3_300.0)),
)


# -- planners ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannerSizes:
    """How much is planned; the defaults are the published benchmark's.

    Attributes:
        scenario: whose workload, SLO and clocks the classes have.
        tier1: settings of BiScale's tier 1.
        rates_rps_per_gpu: rates that a window is planned for; past about 5.5 no placement carries them.
        repeats: the best of so many counts.
        compile: whether the cold plan compiles, too.
        mpc_queues: random queues whose clocks are searched, over both TP degrees.
    """

    scenario: str = "paper-67"
    tier1: dict[str, Any] = field(default_factory=dict)
    rates_rps_per_gpu: tuple[float, ...] = tuple(np.linspace(0.5, 7.0, 27).tolist())
    repeats: int = 5
    compile: bool = True
    mpc_queues: int = 10_000


def warm_plans_ms(sizes: PlannerSizes, nodes: int) -> list[float]:
    """Milliseconds of planning a window on that many nodes of 8 GPUs, class tables in memory; one for each rate."""
    scenario = load_scenario(sizes.scenario, {"cluster.nodes": nodes, "cluster.gpus_per_node": 8})
    cluster = scenario.cluster
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    requests = requests_for(scenario, profile, "test", 0, None, None)
    controller = BiScale(tier1=sizes.tier1)
    context = PlanContext(scenario, profile, requests.training, requests.mean_rate_rps)
    context = replace(context, previous=controller.plan(context))
    each_ms = []
    for rate_rps_per_gpu in sizes.rates_rps_per_gpu:
        window = replace(context, history_rps=(8 * nodes * rate_rps_per_gpu,))

        def plan(window: PlanContext = window) -> None:
            controller.plan(window)

        each_ms.append(1e3 * best_s(plan, lambda: None, sizes.repeats, time.perf_counter))
    return each_ms


def measure_warm_plans(sizes: PlannerSizes) -> Figures:
    """Time of a plan on 16 and on 1,024 GPUs, at the median rate and at the one that takes longest."""
    few_ms, many_ms = (warm_plans_ms(sizes, gpus // 8) for gpus in (16, 1024))
    return {
        "plan_warm_ms": float(np.median(few_ms)),
        "plan_warm_slowest_ms": max(few_ms),
        "plan_warm_1024_gpus_s": 1e-3 * float(np.median(many_ms)),
        "plan_warm_1024_gpus_slowest_s": 1e-3 * max(many_ms),
    }


FIRST_PLAN = """
import json, sys
from agents.biscale import BiScale
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.profiles import load_profile

scenario = load_scenario(sys.argv[1], {"cluster.nodes": 2, "cluster.gpus_per_node": 8})
cluster = scenario.cluster
profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
requests = requests_for(scenario, profile, "test", 0, None, None)
BiScale(tier1=json.loads(sys.argv[2])).plan(PlanContext(scenario, profile, requests.training, requests.mean_rate_rps))
"""


def first_plan_s(sizes: PlannerSizes, compiled: bool) -> float:
    """Wall seconds from starting a Python process to its first plan for 16 GPUs, no class table being on disk.

    Args:
        sizes: what is planned.
        compiled: whether the code's compiled form is on disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "BISCALE_GYM_CACHE": folder}
        if compiled:
            environment.setdefault("NUMBA_CACHE_DIR", str(cache_root() / "numba"))
        else:
            environment.pop("NUMBA_CACHE_DIR", None)
        command = [sys.executable, "-c", FIRST_PLAN, sizes.scenario, json.dumps(sizes.tier1)]
        start_s = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        return time.perf_counter() - start_s


def measure_mpc_search(sizes: PlannerSizes) -> Figures:
    """How far the prefill searches are from the best assignment, and how long they take: ``scripts/mpc_gap.py``."""
    script = Path(__file__).with_name("mpc_gap.py")
    queues = str(sizes.mpc_queues // 2)
    command = [sys.executable, str(script), "--scenario", sizes.scenario, "--queues", queues, "--json", "-"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def measure_planners(sizes: PlannerSizes | None = None) -> Figures:
    """All figures of the placement planner and of the prefill searches."""
    sizes = sizes or PlannerSizes()
    return {
        **measure_warm_plans(sizes),
        "plan_cold_s": first_plan_s(sizes, compiled=not sizes.compile),
        "plan_cold_compiled_s": first_plan_s(sizes, compiled=True),
        **measure_mpc_search(sizes),
    }


PLANNERS = Benchmark(
    measure=measure_planners,
    about="speed of tier 1 and of the prefill searches",
    goals=(
        Goal("plan_warm_ms", "plan for 16 GPUs, class tables in memory, median rate", "ms", below=50.0),
        Goal("plan_warm_slowest_ms", "… slowest rate", "ms", below=50.0),
        Goal("plan_warm_1024_gpus_s", "plan for 1,024 GPUs, median rate", "s", below=1.0),
        Goal("plan_warm_1024_gpus_slowest_s", "… slowest rate", "s", below=1.0),
        Goal("plan_cold_s", "new process to its first plan, nothing on disk", "s", below=60.0),
        Goal("plan_cold_compiled_s", "… compiled code on disk", "s"),
        Goal("mpc_gap.greedy", "prefill MPC: mean excess energy over the best, greedy", ""),
        Goal("mpc_gap.dp", "… dp", ""),
        Goal("mpc_median_ms.greedy", "prefill MPC: median search, greedy", "ms", below=0.2),
        Goal("mpc_median_ms.exact", "… exact", "ms"),
        Goal("mpc_median_ms.dp", "… dp", "ms"),
    ),
)

# -- environments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvSizes:
    """How much is played; the defaults are the published benchmark's.

    Attributes:
        ids: of the environments.
        settings: of every one of them.
        single_steps, vector_steps: of a repeat, which begins with a reset; steps of all lanes together.
        lanes: of the vector environments.
        repeats: the median of so many counts.
        ppo_id: what PPO trains on.
        ppo_rollouts: of ``ppo_batch`` x 4 steps each, in a repeat.
        ppo_batch: its batch.
        ppo_repeats: pairs of PPO on the environment and on the trivial one.
    """

    ids: tuple[str, ...] = tuple(f"BiScale/{name}-v0" for name in ("Prefill", "Decode", "Cluster", "Placement"))
    settings: dict[str, Any] = field(default_factory=dict)
    single_steps: int = 20_000
    vector_steps: int = 640_000
    lanes: int = 64
    repeats: int = 5
    ppo_id: str = "BiScale/Prefill-v0"
    ppo_rollouts: int = 2
    ppo_batch: int = 2048
    ppo_repeats: int = 7


def median_cpu_s(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of ``work`` after a run that warms up."""
    work()
    each_s = []
    for _ in range(repeats):
        start_s = time.process_time()
        work()
        each_s.append(time.process_time() - start_s)
    return float(np.median(each_s))


def single_steps_per_cpu_s(env_id: str, sizes: EnvSizes) -> float:
    """Steps per CPU-second of one environment as ``gymnasium.make`` gives it, a reset included; random actions."""
    env = gymnasium.make(env_id, **sizes.settings)
    actions = Actions(seed=0)
    masked = env.has_wrapper_attr("action_masks")
    steps = sizes.single_steps // 100 if masked else sizes.single_steps
    drawn = [actions.next(env.action_space, None) for _ in range(steps)]

    def play() -> None:
        env.reset(seed=0)
        for action in drawn:
            # Masks are part of choosing.
            chosen = actions.next(env.action_space, masks_of(env)) if masked else action
            _, _, terminated, truncated, _ = env.step(chosen)
            if terminated or truncated:
                env.reset()

    return steps / median_cpu_s(play, sizes.repeats)


def vector_steps_per_cpu_s(env_id: str, sizes: EnvSizes) -> float:
    """The same of all lanes of a vector environment together, as ``gymnasium.make_vec`` gives it."""
    envs: Any = gymnasium.make_vec(env_id, sizes.lanes, vectorization_mode="vector_entry_point", **sizes.settings)
    actions = Actions(seed=0)
    space = envs.single_action_space
    masked = hasattr(envs, "call")
    steps = max(1, sizes.vector_steps // sizes.lanes // (1000 if masked else 1))
    drawn = [np.stack([actions.next(space, None) for _ in range(sizes.lanes)]) for _ in range(64)]

    def play() -> None:
        envs.reset(seed=0)
        for number in range(steps):
            if masked:
                envs.step(np.stack([actions.next(space, mask) for mask in lane_masks_of(envs)]))
            else:
                envs.step(drawn[number % len(drawn)])

    return steps * sizes.lanes / median_cpu_s(play, sizes.repeats)


def measure_ppo(sizes: EnvSizes) -> Figures:
    """CPU time of PPO on a trivial VecEnv over that on the environment: steps per CPU-second as a share of the best.

    The trivial one has the same spaces and hands out the same arrays at every step. Both train in turn, on one thread.
    """
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv

    from biscale_gym.sb3 import make_vec_env

    class Trivial(VecEnv):
        """Does nothing."""

        def __init__(self, observation_space: Any, action_space: Any) -> None:
            super().__init__(sizes.lanes, observation_space, action_space)
            self.obs = np.stack([observation_space.sample() for _ in range(sizes.lanes)])
            self.rewards = np.zeros(sizes.lanes, np.float32)
            self.dones = np.zeros(sizes.lanes, np.bool_)
            self.infos: list[dict[str, Any]] = [{} for _ in range(sizes.lanes)]

        def reset(self) -> Any:
            return self.obs

        def step_async(self, actions: Any) -> None:
            pass

        def step_wait(self) -> Any:
            return self.obs, self.rewards, self.dones, self.infos

        def close(self) -> None:
            pass

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * sizes.lanes

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            pass

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            return [None] * sizes.lanes

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * sizes.lanes

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = make_vec_env(sizes.ppo_id, sizes.lanes, seed=0, **sizes.settings)
    rollout = 4 * sizes.ppo_batch
    steps = sizes.ppo_rollouts * rollout
    models = [
        PPO("MlpPolicy", envs, n_steps=rollout // sizes.lanes, batch_size=sizes.ppo_batch, n_epochs=4, seed=0)
        for envs in (ours, Trivial(ours.observation_space, ours.action_space))
    ]
    cpu_s: list[list[float]] = [[], []]
    for repeat in range(sizes.ppo_repeats + 1):
        for model, each_s in zip(models, cpu_s, strict=True):
            start_s = time.process_time()
            model.learn(steps, reset_num_timesteps=False)
            if repeat > 0:
                each_s.append(time.process_time() - start_s)
    torch.set_num_threads(threads)
    return {
        "ppo_steps_per_cpu_s": steps / float(np.median(cpu_s[0])),
        "ppo_trivial_steps_per_cpu_s": steps / float(np.median(cpu_s[1])),
        "ppo_ratio_to_trivial": float(np.median(np.array(cpu_s[1]) / np.array(cpu_s[0]))),
    }


def measure_envs(sizes: EnvSizes | None = None) -> Figures:
    """All figures of the environments."""
    sizes = sizes or EnvSizes()
    figures: Figures = {
        env_id: {
            "single_steps_per_cpu_s": single_steps_per_cpu_s(env_id, sizes),
            "vector64_steps_per_cpu_s": vector_steps_per_cpu_s(env_id, sizes),
        }
        for env_id in sizes.ids
    }
    return figures | measure_ppo(sizes)


def _env_goals(name: str, single: float | None, vector: float | None) -> tuple[Goal, ...]:
    key, unit = f"BiScale/{name}-v0", "steps/CPU-s"
    return (
        Goal(f"{key}.single_steps_per_cpu_s", f"{name}-v0, gymnasium.make", unit, single),
        Goal(f"{key}.vector64_steps_per_cpu_s", "… 64 lanes, gymnasium.make_vec", unit, vector),
    )


ENVS = Benchmark(
    measure=measure_envs,
    about="speed of the environments",
    goals=(
        *_env_goals("Prefill", 50_000, 1_000_000),
        *_env_goals("Decode", 50_000, 1_000_000),
        *_env_goals("Cluster", 20_000, 200_000),
        *_env_goals("Placement", None, None),
        Goal("ppo_steps_per_cpu_s", "SB3's PPO on Prefill-v0, 64 lanes, batch 2,048, 4 epochs", "steps/CPU-s"),
        Goal("ppo_trivial_steps_per_cpu_s", "… on an environment that does nothing", "steps/CPU-s"),
        Goal("ppo_ratio_to_trivial", "… the one over the other", "", 0.9),
    ),
    peers=(("CityLearn", 416.0), ("SustainDC", 424.0), ("Grid2Op", 1_310.0)),
    beside=("BiScale/Prefill-v0.single_steps_per_cpu_s", "steps"),
)

BENCHMARKS: dict[str, Benchmark] = {"engine": ENGINE, "planners": PLANNERS, "envs": ENVS}
"""Sub-commands by name."""


# -- the command -------------------------------------------------------------------------------------------------------


def tables(name: str, figures: Figures) -> list[Table]:
    """The figures beside their goals, and beside the peers'."""
    benchmark = BENCHMARKS[name]
    own = Table("figure", "measured", "goal", title=f"{name}: {benchmark.about}", title_justify="left")
    for goal in benchmark.goals:
        own.add_row(*goal.cells(goal.read(figures)))
    shown = [own]
    if benchmark.peers:
        key, counted = benchmark.beside
        ours = Goal(key, "", "").read(figures)
        beside = Table("peer", f"{counted}/CPU-s", "ours is", title="beside its peers", title_justify="left")
        beside.add_row("this project", f"{ours:,.0f}", "")
        for peer, rate in benchmark.peers:
            beside.add_row(peer, f"~{rate:,.0f}", f"{ours / rate:,.0f} ×")
        shown.append(beside)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about)
        command.add_argument("--json", metavar="FILE", help="file for the figures as JSON; - prints them")
    chosen = parser.parse_args(arguments)
    figures = BENCHMARKS[chosen.name].measure()
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    console = Console(stderr=chosen.json == "-", width=width)
    for table in tables(chosen.name, figures):
        console.print(table)
    text = json.dumps(figures, indent=2) + "\n"
    if chosen.json == "-":
        sys.stdout.write(text)
    elif chosen.json:
        Path(chosen.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
