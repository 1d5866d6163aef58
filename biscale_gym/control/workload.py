"""The requests of a run: which trace a scenario, a split and a seed stand for, and what planners may learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import ConfigError, nearest
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.profiles import Profile
from biscale_gym.traces import (
    Trace,
    generate,
    load_workload,
    read_trace,
    scale_rate,
    split_by_time,
    truncate_to_context,
)
from biscale_gym.traces.operations import require_duration

Split = Literal["train", "validation", "test", "all"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Requests:
    """The requests that a run serves.

    Attributes:
        evaluated: served and judged.
        training: what planners learn from.
        mean_rate_rps: the operator's estimate of the mean rate before the run.
        end_s: where the counted part ends: the generated duration, or a recorded trace's last arrival.
    """

    evaluated: Trace
    training: Trace
    mean_rate_rps: float
    end_s: float


def check_split(split: str) -> None:
    """Refuse an unknown split.

    Raises:
        ConfigError: the nearest split is named.
    """
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}; {nearest(split, list(SPLITS))}")


def split_seed(split: str, seed: int) -> int:
    """Seed of a generated trace: disjoint between splits, whatever the seeds."""
    return int(np.random.SeedSequence([SPLITS.index(split), seed]).generate_state(1, np.uint64)[0])


def within_context(trace: Trace, cluster: ClusterSettings, profile: Profile) -> Trace:
    """The trace as the cluster serves it: shortened to the model's context where the cluster's settings say so."""
    return truncate_to_context(trace, profile.context_tokens) if cluster.truncate_to_context else trace


def generated_demand(
    scenario: ScenarioSettings, profile: Profile, split: str, seed: int, rate_rps: float | None
) -> Trace:
    """What a run of the scenario's own workload serves."""
    rate = scenario.rate_rps if rate_rps is None else rate_rps
    drawn = split_seed("test" if split == "all" else split, seed)
    demand = generate(load_workload(scenario.workload), rate, scenario.duration_s, drawn)
    return within_context(demand, scenario.cluster, profile)


def generated_training(scenario: ScenarioSettings, profile: Profile) -> Trace:
    """What planners learn from, the same for every seed, split and rate: tables made from it serve them all."""
    workload = load_workload(scenario.workload)
    training = generate(workload, scenario.rate_rps, scenario.training_s, split_seed("train", 0))
    return within_context(training, scenario.cluster, profile)


def generated_requests(
    scenario: ScenarioSettings, profile: Profile, split: str, seed: int, rate_rps: float | None
) -> Requests:
    """Requests of the scenario's own workload."""
    return Requests(
        generated_demand(scenario, profile, split, seed, rate_rps),
        generated_training(scenario, profile),
        scenario.rate_rps if rate_rps is None else rate_rps,
        scenario.duration_s,
    )


def recorded_requests(
    scenario: ScenarioSettings, profile: Profile, path: Path, split: str, seed: int, rate_rps: float | None
) -> Requests:
    """Requests of a recorded trace, cut 60/20/20 by time; planners learn from the first part.

    ``all`` plays the whole file, so planners have then seen the length distribution of its first 60 %.

    Raises:
        TraceError: the trace cannot be read, or is shorter than the warm-up or than a window.
    """
    whole = within_context(read_trace(path), scenario.cluster, profile)
    require_duration(whole, scenario.warmup_s, "the warm-up")
    require_duration(whole, scenario.window_s, "one window")
    if rate_rps is not None:
        whole = scale_rate(whole, rate_rps, seed)
    parts = dict(zip(SPLITS[:3], split_by_time(whole), strict=True))
    evaluated = whole if split == "all" else parts[split]
    require_duration(evaluated, scenario.warmup_s, f"the warm-up, in its {split} split")
    return Requests(evaluated, parts["train"], evaluated.rate_rps, evaluated.duration_s)


def requests_for(
    scenario: ScenarioSettings, profile: Profile, split: str, seed: int, trace: str | None, rate_rps: float | None
) -> Requests:
    """The requests of a run: the scenario's generated workload, or a recorded trace.

    Raises:
        ConfigError, TraceError: an unknown split or workload, or a trace that cannot be used.
    """
    check_split(split)
    if trace is None:
        return generated_requests(scenario, profile, split, seed, rate_rps)
    return recorded_requests(scenario, profile, Path(trace), split, seed, rate_rps)
