"""Which requests a run serves, and that planners never learn from those that are judged."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from biscale_gym.config import ConfigError
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import SPLITS, Requests, requests_for, split_seed
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.traces import Trace, TraceError, write_trace


@pytest.fixture(scope="module")
def scenario() -> ScenarioSettings:
    return load_scenario("smoke", {"warmup_s": 5.0, "window_s": 20.0})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


def recorded(folder: Path, arrival_s: object, name: str = "t.csv") -> str:
    """A trace file whose prompt lengths count the requests."""
    times_s = np.asarray(arrival_s, dtype=float)
    path = folder / name
    write_trace(Trace(times_s, np.arange(1, len(times_s) + 1), np.full(len(times_s), 7)), path)
    return str(path)


# -- generated workloads -----------------------------------------------------------------------------------------------


def test_generated_splits_share_no_random_numbers() -> None:
    streams = [split_seed(split, seed) for split in SPLITS[:3] for seed in range(200)]
    assert len(set(streams)) == len(streams)


def test_planners_learn_from_one_trace_that_is_never_judged(scenario: ScenarioSettings, profile: Profile) -> None:
    def served(split: str, seed: int, rate_rps: float | None = None) -> Requests:
        return requests_for(scenario, profile, split, seed, None, rate_rps)

    runs = [served(split, seed) for split in ("validation", "test") for seed in range(3)]
    runs.append(served("test", 0, 35.0))
    assert {run.training.hash for run in runs} == {runs[0].training.hash}
    assert len({run.evaluated.hash for run in runs}) == len(runs)
    for run in runs:
        assert not np.isin(run.evaluated.arrival_s, run.training.arrival_s).any()
    assert served("all", 2).evaluated.hash == served("test", 2).evaluated.hash


def test_a_generated_workload_has_the_scenarios_duration_and_the_rate_asked_for(
    scenario: ScenarioSettings, profile: Profile
) -> None:
    plain = requests_for(scenario, profile, "test", 0, None, None)
    assert plain.mean_rate_rps == scenario.rate_rps
    assert plain.end_s == scenario.duration_s > plain.evaluated.duration_s
    assert plain.training.duration_s > scenario.duration_s
    faster = requests_for(scenario, profile, "test", 0, None, 80.0)
    assert faster.mean_rate_rps == 80.0
    assert len(faster.evaluated) == pytest.approx(80.0 * scenario.duration_s, rel=0.1)


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(scenario: ScenarioSettings, profile: Profile, rate_rps: float) -> None:
    with pytest.raises(TraceError, match=f"rate_rps is {rate_rps}, expected a positive number"):
        requests_for(scenario, profile, "test", 0, None, rate_rps)


def test_an_unknown_split_is_refused_with_the_nearest(scenario: ScenarioSettings, profile: Profile) -> None:
    with pytest.raises(ConfigError, match=r"^no split 'tset'; did you mean 'test'\? valid: train, validation, test, "):
        requests_for(scenario, profile, "tset", 0, None, None)


def test_requests_are_shortened_to_the_context_unless_the_cluster_says_otherwise(
    scenario: ScenarioSettings, profile: Profile, tmp_path: Path
) -> None:
    path = tmp_path / "long.csv"
    write_trace(Trace(np.arange(60.0), np.full(60, 200_000), np.full(60, 9)), path)
    cut = requests_for(scenario, profile, "all", 0, str(path), None)
    assert (cut.evaluated.prompt_tokens + cut.evaluated.output_tokens <= profile.context_tokens).all()
    assert (cut.training.prompt_tokens < profile.context_tokens).all()
    whole = load_scenario("smoke", {"cluster.truncate_to_context": False})
    assert (requests_for(whole, profile, "all", 0, str(path), None).evaluated.prompt_tokens == 200_000).all()


# -- recorded traces ---------------------------------------------------------------------------------------------------


def test_a_recorded_trace_is_cut_by_time_and_every_request_is_in_one_part(
    scenario: ScenarioSettings, profile: Profile, tmp_path: Path
) -> None:
    arrival_s = np.cumsum(np.random.default_rng(2).exponential(0.5, 400))
    path = recorded(tmp_path, arrival_s)
    parts = {split: requests_for(scenario, profile, split, 0, path, None) for split in SPLITS}
    prompts = {split: set(part.evaluated.prompt_tokens.tolist()) for split, part in parts.items()}
    for one, other in combinations(SPLITS[:3], 2):
        assert not prompts[one] & prompts[other]
    assert prompts["all"] == prompts["train"] | prompts["validation"] | prompts["test"] == set(range(1, 401))
    for part in parts.values():
        assert set(part.training.prompt_tokens.tolist()) == prompts["train"]
        assert part.end_s == part.evaluated.duration_s
        assert part.mean_rate_rps == part.evaluated.rate_rps
    shares = [(np.array(sorted(prompts[split])) - 1).max() for split in ("train", "validation", "test")]
    assert [arrival_s[last] / arrival_s[-1] for last in shares] == pytest.approx([0.6, 0.8, 1.0], abs=0.02)
    assert parts["test"].evaluated.arrival_s[0] < 5.0


def test_a_recorded_trace_is_thinned_before_it_is_cut(
    scenario: ScenarioSettings, profile: Profile, tmp_path: Path
) -> None:
    path = recorded(tmp_path, np.cumsum(np.random.default_rng(2).exponential(0.1, 4000)))
    whole, half = (requests_for(scenario, profile, "all", 0, path, rate_rps) for rate_rps in (None, 5.0))
    assert half.mean_rate_rps == pytest.approx(5.0, rel=0.1)
    assert set(half.evaluated.prompt_tokens.tolist()) < set(whole.evaluated.prompt_tokens.tolist())
    judged, learnt = (
        set(part.prompt_tokens.tolist())
        for requests in [requests_for(scenario, profile, "test", 0, path, 5.0)]
        for part in (requests.evaluated, requests.training)
    )
    assert not judged & learnt


@pytest.mark.parametrize(
    ("arrival_s", "split", "message"),
    [
        (np.linspace(0.0, 4.0, 50), "all", r"lasts 4 s, which is shorter than the warm-up \(5 s\)"),
        (np.linspace(0.0, 19.0, 50), "all", r"lasts 19 s, which is shorter than one window \(20 s\)"),
        (np.linspace(0.0, 22.0, 50), "test", r"lasts 4\.\d* s, which is shorter than the warm-up, in its test split"),
        ([0.0], "all", r"'t' lasts 0 s, which is shorter than the warm-up"),
        ([40.0], "all", r"part 0 of 3 of 't' would be empty \(1 requests over 40 s\)"),
        ([0.0, 1.0, 100.0], "all", r"part 1 of 3 of 't' would be empty"),
        (np.zeros(9), "all", r"'t' lasts 0 s"),
    ],
)
def test_a_trace_too_short_to_judge_is_refused(
    scenario: ScenarioSettings, profile: Profile, tmp_path: Path, arrival_s: object, split: str, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        requests_for(scenario, profile, split, 0, recorded(tmp_path, arrival_s), None)


def test_a_trace_file_that_is_broken_or_absent_is_named(
    scenario: ScenarioSettings, profile: Profile, tmp_path: Path
) -> None:
    path = tmp_path / "broken.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,0,5\n")
    with pytest.raises(TraceError, match=r"broken\.csv:3: prompt_tokens is 0"):
        requests_for(scenario, profile, "all", 0, str(path), None)
    with pytest.raises(TraceError, match=r"absent\.csv: cannot be read"):
        requests_for(scenario, profile, "all", 0, str(tmp_path / "absent.csv"), None)
