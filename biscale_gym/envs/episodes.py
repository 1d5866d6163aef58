"""What an episode plays: a trace of the split, a starting point, a load, and the hardware that serves it.

A generated workload has a fixed set of traces per split, seeds from 0 (``settings.TRACES``), disjoint between splits;
the test split's are those that ``biscale-gym compare`` plays. A recorded trace is cut 60/20/20 by time. Draws come from
one generator in one order, so an episode depends on nothing but the generator's state and the options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biscale_gym.config import ConfigError, load_preset, nearest
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.control.workload import generated_demand, generated_training, recorded_requests
from biscale_gym.envs.settings import TRACES, EpisodeSettings
from biscale_gym.profiles import Profile
from biscale_gym.profiles.randomisation import randomised_switching
from biscale_gym.profiles.settings import RandomisationSettings, SwitchingSettings
from biscale_gym.traces import Trace, TraceError
from biscale_gym.traces.operations import slice_time, thin

OPTIONS = ("split", "start_s", "trace_seed", "load", "instance", "hardware_seed", "cluster_seed", "thinning_seed")
SEEDS = 2**31
KEPT_DEMANDS, KEPT_SHARES = 4, 256
"""Traces of the whole cluster, and of instances, that a source keeps at hand."""


@dataclass(frozen=True)
class Episode:
    """One episode's draw.

    Attributes:
        split: what part of the workload is played.
        trace_seed: which generated trace; 0 for a recorded one.
        start_s: where in it the warm-up begins.
        load: share of the requests that is kept.
        instance: number of the instance, for environments of one instance.
        requests: the demand, times from the start of the warm-up.
        warmup_s, end_s: end of the warm-up and of the episode, from its start.
        profile: what iterations truly cost.
        switching: how clocks truly switch; None: the cluster's preset.
        hardware_seed: of the hardware's draw; None: nominal.
        cluster_seed: of the cluster's random numbers.
        thinning_seed: which requests are kept, where not all are.
    """

    split: str
    trace_seed: int
    start_s: float
    load: float
    instance: int
    requests: Trace
    warmup_s: float
    end_s: float
    profile: Profile
    switching: SwitchingSettings | None
    hardware_seed: int | None
    cluster_seed: int
    thinning_seed: int

    @property
    def info(self) -> dict[str, Any]:
        """What ``reset`` reports; given back as its options, it plays the same episode again."""
        info: dict[str, Any] = {
            "split": self.split,
            "trace_seed": self.trace_seed,
            "start_s": self.start_s,
            "load": self.load,
            "instance": self.instance,
            "cluster_seed": self.cluster_seed,
            "thinning_seed": self.thinning_seed,
        }
        if self.hardware_seed is not None:
            info["hardware_seed"] = self.hardware_seed
        return info


class EpisodeSource:
    """Draws episodes of a scenario.

    Args:
        scenario: what is served.
        profile: the nominal hardware.
        settings: what to draw from.
        share: from the cluster's demand and an instance's number to what the environment is fed with.
        instances: how many instances to draw from; 1 where the environment holds the whole cluster.
        fixed_instance: draw none but this one.

    Raises:
        ConfigError, TraceError: an unknown preset, or a trace that cannot be used.
    """

    def __init__(
        self,
        scenario: ScenarioSettings,
        profile: Profile,
        settings: EpisodeSettings,
        share: Callable[[Trace, int], Trace],
        instances: int = 1,
        fixed_instance: int | None = None,
    ) -> None:
        self.scenario = scenario
        self.settings = settings
        self._profile = profile
        self._instances = instances
        self._fixed_instance = fixed_instance
        self.warmup_s = scenario.warmup_s if settings.warmup_s is None else settings.warmup_s
        self._ranges: RandomisationSettings | None = None
        if settings.randomisation is not None:
            self._ranges = load_preset(RandomisationSettings, "randomisation", settings.randomisation)
            profile.randomised(np.random.default_rng(0), self._ranges)  # refuse now what cannot be randomised
        self._nominal_switching = scenario.cluster.switching_settings()
        self._share = share
        self._shares: dict[tuple[str, int, int], tuple[Trace, float]] = {}
        self._demands: dict[tuple[str, int], tuple[Trace, float]] = {}
        self._training: Trace | None = None

    @property
    def episode_s(self) -> float:
        """Length of an episode, warm-up excluded, unless the split is shorter."""
        if self.settings.episode_s is not None:
            return self.settings.episode_s
        return self.scenario.duration_s - self.scenario.warmup_s

    def training(self) -> Trace:
        """What planners learn from: the training trace of the workload, never an evaluated part."""
        if self._training is None:
            settings, scenario = self.settings, self.scenario
            if settings.trace is not None:
                path = Path(settings.trace)
                part = recorded_requests(scenario, self._profile, path, "train", 0, settings.rate_rps)
                self._training = part.training
            else:
                self._training = generated_training(scenario, self._profile)
        return self._training

    def trace_seeds(self, split: str) -> int:
        """How many traces the split has."""
        return 1 if self.settings.trace is not None else TRACES[split]

    def split_hash(self, split: str) -> str:
        """Of everything that the split's traces depend on, and of the first of them."""
        parts = {
            "workload": self.scenario.workload,
            "rate_rps": self.settings.rate_rps or self.scenario.rate_rps,
            "split": split,
            "traces": self.trace_seeds(split),
            "first": self._demand(split, 0)[0].hash,
        }
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]

    def _demand(self, split: str, seed: int) -> tuple[Trace, float]:
        """The cluster's whole demand, and how long it lasts [s]."""
        key = (split, seed)
        if key not in self._demands:
            if len(self._demands) >= KEPT_DEMANDS:
                del self._demands[next(iter(self._demands))]
            self._demands[key] = self._read_demand(split, seed)
        return self._demands[key]

    def _read_demand(self, split: str, seed: int) -> tuple[Trace, float]:
        settings, scenario = self.settings, self.scenario
        if settings.trace is not None:
            path = Path(settings.trace)
            part = recorded_requests(scenario, self._profile, path, split, seed, settings.rate_rps)
            return part.evaluated, part.end_s
        longest_s = self.warmup_s + self.episode_s
        if longest_s > scenario.duration_s:
            scenario = scenario.model_copy(update={"duration_s": longest_s})
        return generated_demand(scenario, self._profile, split, seed, settings.rate_rps), scenario.duration_s

    def _shared(self, split: str, seed: int, instance: int) -> tuple[Trace, float]:
        """What the environment is fed with, and how long it lasts [s]."""
        key = (split, seed, instance)
        if key not in self._shares:
            if len(self._shares) >= KEPT_SHARES:
                del self._shares[next(iter(self._shares))]
            demand, end_s = self._demand(split, seed)
            self._shares[key] = self._share(demand, instance), end_s
        return self._shares[key]

    def draw(self, rng: np.random.Generator, options: dict[str, Any] | None = None) -> Episode:
        """The next episode.

        Args:
            rng: drawn from, always in the same order and number.
            options: any of ``OPTIONS``, to be taken instead of drawn.

        Raises:
            ConfigError: an unknown option, or a value outside its range.
            TraceError: no request falls into the episode.
        """
        given = self._checked(options or {})
        split = given.get("split", self.settings.split)
        seeds = self.trace_seeds(split)
        drawn_seed = int(rng.integers(seeds))
        drawn_load = float(rng.uniform(*self.settings.load))
        drawn_instance = int(rng.integers(self._instances))
        drawn_start = float(rng.random())
        drawn_seeds = {name: int(rng.integers(SEEDS)) for name in ("hardware_seed", "cluster_seed", "thinning_seed")}
        seed_of = {name: _whole(name, given.get(name, drawn), SEEDS) for name, drawn in drawn_seeds.items()}
        trace_seed = _whole("trace_seed", given.get("trace_seed", drawn_seed), seeds)
        load = float(given.get("load", drawn_load))
        if not 0.0 < load <= 1.0:
            raise ConfigError(f"reset option load is {load}, expected more than 0 and at most 1")
        fixed = drawn_instance if self._fixed_instance is None else self._fixed_instance
        instance = _whole("instance", given.get("instance", fixed), self._instances)
        trace, lasts_s = self._shared(split, trace_seed, instance)
        length_s = min(self.warmup_s + self.episode_s, lasts_s)
        latest_s = lasts_s - length_s
        start_s = float(given.get("start_s", self._with_a_request(trace, drawn_start * latest_s, length_s, latest_s)))
        if not 0.0 <= start_s <= latest_s:
            raise ConfigError(
                f"reset option start_s is {start_s:g}: an episode of {length_s:g} s (warm-up included) of this trace "
                f"of {lasts_s:g} s starts between 0 and {latest_s:g} s"
            )
        requests = slice_time(trace, start_s, start_s + length_s)
        if load < 1.0:
            requests = _thinned(requests, load, seed_of["thinning_seed"])
        profile, switching = self._profile, None
        if self._ranges is not None:
            hardware = np.random.default_rng(seed_of["hardware_seed"])
            profile = self._profile.randomised(hardware, self._ranges)
            switching = randomised_switching(self._nominal_switching, hardware, self._ranges)
        return Episode(
            split=split,
            trace_seed=trace_seed,
            start_s=start_s,
            load=load,
            instance=instance,
            requests=requests,
            warmup_s=min(self.warmup_s, length_s),
            end_s=length_s,
            profile=profile,
            switching=switching,
            hardware_seed=seed_of["hardware_seed"] if self._ranges is not None else None,
            cluster_seed=seed_of["cluster_seed"],
            thinning_seed=seed_of["thinning_seed"],
        )

    def _with_a_request(self, trace: Trace, start_s: float, length_s: float, latest_s: float) -> float:
        """``start_s``; where nothing arrives in an episode from there, moved so that the nearest request is counted."""
        first, last = np.searchsorted(trace.arrival_s, (start_s, start_s + length_s))
        if first < last:
            return start_s
        nearest_s = float(trace.arrival_s[min(int(first), len(trace) - 1)])
        return min(max(0.0, nearest_s - self.warmup_s), latest_s)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name not in OPTIONS:
                raise ConfigError(f"no reset option {name!r}; {nearest(name, list(OPTIONS))}")
        split = options.get("split")
        if split is not None and split not in TRACES:
            raise ConfigError(f"no split {split!r}; {nearest(str(split), list(TRACES))}")
        if options.get("hardware_seed") is not None and self._ranges is None:
            raise ConfigError("reset option hardware_seed: hardware is drawn only where randomisation names a preset")
        return {name: value for name, value in options.items() if value is not None}


def _thinned(requests: Trace, load: float, seed: int) -> Trace:
    """``thin``, but of a few requests the last stays, where none would be left."""
    try:
        return thin(requests, load, seed)
    except TraceError:
        return requests.take(slice(len(requests) - 1, None), f"{requests.name}*{load:g}")


def _whole(name: str, value: Any, count: int) -> int:
    """``value`` as one of 0 to ``count`` - 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < count:
        raise ConfigError(f"reset option {name} is {value!r}, expected a whole number from 0 to {count - 1}")
    return int(value)
