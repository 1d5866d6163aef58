"""scripts/benchmark.py on small sizes: every figure is there and means what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import ModuleType

import pytest

PUBLISHED = (
    "requests_per_cpu_s",
    "iterations_per_cpu_s",
    "day_16_gpus_s",
    "cost_ratio_1024_to_16_instances",
    "biscale_paper67_s",
    "mpc_decision_median_ms",
)


@pytest.fixture(scope="module")
def benchmark(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmark")


@pytest.fixture(scope="module")
def sizes(benchmark: ModuleType):
    return benchmark.EngineSizes(
        requests=200, scenario="smoke", day_s=60.0, scaling_s=5.0, scaling_pairs=(2, 4), decisions=20, repeats=1
    )


@pytest.fixture(scope="module")
def figures(benchmark: ModuleType, sizes):
    return benchmark.measure_engine(sizes)


def test_every_published_figure_is_measured(benchmark: ModuleType, figures) -> None:
    assert set(PUBLISHED) <= {goal.key for goal in benchmark.ENGINE.goals} <= set(figures)
    assert all(math.isfinite(figures[name]) and figures[name] > 0 for name in PUBLISHED)


def test_the_day_is_served(figures) -> None:
    # The day begins at night.
    assert 0.3 * 60.0 * 30.0 < figures["day_requests"] < 60.0 * 30.0
    assert figures["day_finished_share"] == 1.0
    assert figures["day_iterations"] > figures["day_requests"] / 10


def test_planners_are_measured(benchmark: ModuleType) -> None:
    quick = {"requests_per_probe": 200, "warmup_s": 1.0, "rate_tolerance": 0.2}
    sizes = benchmark.PlannerSizes(
        scenario="smoke", tier1=quick, rates_rps_per_gpu=(1.0, 20.0), repeats=1, compile=False, mpc_queues=100
    )
    figures = benchmark.measure_planners(sizes)
    assert {"plan_cold_s", "plan_warm_ms", "plan_warm_1024_gpus_s", "mpc_gap", "mpc_median_ms"} <= set(figures)
    assert set(figures["mpc_gap"]) == {"greedy", "dp"}
    assert set(figures["mpc_median_ms"]) == {"greedy", "exact", "dp"}
    assert {goal.key.partition(".")[0] for goal in benchmark.PLANNERS.goals} == set(figures)
    shown = [goal.read(figures) for goal in benchmark.PLANNERS.goals]
    assert all(math.isfinite(value) and value >= 0 for value in shown)
    assert sum(value == 0 for value in shown) <= 1, "only the gap of greedy may be nothing"
    assert figures["plan_warm_slowest_ms"] >= figures["plan_warm_ms"]
    assert figures["plan_warm_1024_gpus_slowest_s"] >= figures["plan_warm_1024_gpus_s"]
    assert len(list(benchmark.tables("planners", figures)[0].rows)) == len(shown)


def test_environments_are_measured(benchmark: ModuleType) -> None:
    pytest.importorskip("stable_baselines3")
    quick = {"scenario": "smoke", "episode_s": 3.0, "warmup_s": 1.0}
    sizes = benchmark.EnvSizes(
        ids=("BiScale/Prefill-v0", "BiScale/Decode-v0", "BiScale/Cluster-v0"),
        settings=quick,
        single_steps=200,
        vector_steps=400,
        lanes=4,
        repeats=1,
        ppo_rollouts=1,
        ppo_batch=32,
        ppo_repeats=1,
    )
    figures = benchmark.measure_envs(sizes)
    goals = [goal for goal in benchmark.ENVS.goals if "Placement" not in goal.key]
    assert all(math.isfinite(goal.read(figures)) and goal.read(figures) > 0 for goal in goals)
    assert set(figures["BiScale/Cluster-v0"]) == {"single_steps_per_cpu_s", "vector64_steps_per_cpu_s"}
    assert "ppo_ratio_to_trivial" in figures


def test_masked_environments_are_measured(benchmark: ModuleType) -> None:
    quick = {"requests_per_probe": 200, "probe_warmup_s": 1.0, "rate_tolerance": 0.2}
    settings = {"scenario": "smoke", "episode_s": 20.0, **quick}
    sizes = benchmark.EnvSizes(settings=settings, single_steps=3000, vector_steps=4000, lanes=2, repeats=1)
    assert benchmark.single_steps_per_cpu_s("BiScale/Placement-v0", sizes) > 0
    assert benchmark.vector_steps_per_cpu_s("BiScale/Placement-v0", sizes) > 0


def test_all_requests_of_the_load_are_served(benchmark: ModuleType) -> None:
    trace = benchmark.linear_trace(2, 20.0)
    simulator = benchmark.linear_cluster(2, trace)
    simulator.run()
    assert simulator.counts()["finished"] == len(trace)
    # The policy is compiled and asked at every decode iteration.
    decode = ~simulator.instances().is_prefill
    assert simulator.state.glob[0]["decisions"] >= simulator.instances().iterations[decode].sum()


def test_the_load_is_the_published_one(benchmark: ModuleType) -> None:
    trace = benchmark.linear_trace(8, 400.0)
    assert len(trace) / 400.0 == pytest.approx(32.0, rel=0.05)
    for tokens, mu, sigma, least, most in (
        (trace.prompt_tokens, 5.3, 1.0, 4, 2000),
        (trace.output_tokens, 5.0, 0.8, 2, 1000),
    ):
        assert tokens.min() >= least
        assert tokens.max() <= most
        for share, z in ((0.25, -0.674), (0.5, 0.0), (0.75, 0.674)):
            assert sorted(tokens)[int(share * len(trace))] == pytest.approx(math.exp(mu + sigma * z), rel=0.06)


def test_json_on_standard_output_is_only_json(benchmark: ModuleType, figures, monkeypatch, capsys) -> None:
    monkeypatch.setitem(
        benchmark.BENCHMARKS, "engine", benchmark.replace(benchmark.ENGINE, measure=lambda: dict(figures))
    )
    assert benchmark.main(["engine", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == figures
    assert "requests/CPU-s" in captured.err


def test_a_missed_goal_is_marked(benchmark: ModuleType) -> None:
    goal = benchmark.Goal("x", "what", "s", below=2.0)
    assert goal.cells(1.9)[2] == "< 2"
    assert goal.cells(2.1)[2] == "< 2  missed"
