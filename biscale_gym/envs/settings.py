"""Settings of the environments: what is played, when the agent is asked, what it is rewarded for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from biscale_gym.config import Settings
from biscale_gym.envs.shield import NO_SHIELD, ShieldSettings

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
EnvSplit = Literal["train", "validation", "test"]
DecisionPoint = Literal["boundary", "arrival", "overrun", "idle"]

TRACES = {"train": 64, "validation": 16, "test": 16}
"""Generated traces of each split, seeds from 0; ``biscale-gym compare --seeds`` plays the test split's in order."""


class EpisodeSettings(Settings):
    """What an episode is drawn from.

    Attributes:
        split: of the workload; ``reset(options={"split": ...})`` overrules it.
        trace: recorded trace (path), cut 60/20/20 by time, instead of the scenario's generated workload.
        rate_rps: another mean rate of the whole cluster.
        load: each episode keeps a share of the requests, drawn uniformly from this range.
        episode_s: length of an episode, warm-up excluded; None: the scenario's duration less its warm-up.
        warmup_s: what is simulated before, clocks held, and not counted; None: the scenario's.
        randomisation: preset of configs/randomisation: each episode draws its own hardware; None: the nominal one.
    """

    split: EnvSplit = "train"
    trace: str | None = None
    rate_rps: Positive | None = None
    load: tuple[float, float] = (1.0, 1.0)
    episode_s: Positive | None = None
    warmup_s: NonNegative | None = None
    randomisation: str | None = None

    @model_validator(mode="after")
    def _load_in_range(self) -> EpisodeSettings:
        low, high = self.load
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(
                f"load is {list(self.load)}, expected 0 < low <= high <= 1: it thins; rate_rps raises the rate"
            )
        return self


class RewardSettings(Settings):
    """The reward: - joules / (reference power x 1 s) - penalty x violations.

    Attributes:
        reference_w_per_gpu: the reward of one second of the instances' GPUs at this power is -1.
        violation_penalty: of a request that breaks its SLO.
        discount_per_s: joules within a step are discounted at this rate, and ``info["discount"]`` is its power of the
            step's length, for agents that discount by time; 1: they are not.
    """

    reference_w_per_gpu: Positive = 700.0
    violation_penalty: NonNegative = 1.0
    discount_per_s: Annotated[float, Field(gt=0, le=1)] = 1.0


class ClusterEnvSettings(EpisodeSettings, RewardSettings):
    """Settings of ``BiScale/Cluster-v0``.

    Attributes:
        interval_s: length of a step.
        planner: name of the controller whose placements are in force, planned anew at the borders of the scenario's
            windows; None: the placement frozen in the scenario, throughout.
    """

    interval_s: Positive = 0.1
    planner: str | None = None


class ClassTableSettings(Settings):
    """How class tables are measured; the defaults are BiScale's, so that the tables on disk serve both.

    Attributes:
        headroom: share of the SLO that the quantile may use.
        quantile: of latency.
        requests_per_probe: least number of requests in a simulation.
        probe_warmup_s: its uncounted start.
        rate_tolerance: relative width at which bisection stops.
        table_seed: of thinning.
    """

    headroom: Annotated[float, Field(gt=0, le=1)] = 0.95
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.99
    requests_per_probe: Annotated[int, Field(ge=100)] = 10_000
    probe_warmup_s: NonNegative = 30.0
    rate_tolerance: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    table_seed: Annotated[int, Field(ge=0)] = 2602


class PlacementEnvSettings(EpisodeSettings, ClassTableSettings):
    """Settings of ``BiScale/Placement-v0``.

    Attributes:
        clocks: whose clock policies run within the windows: a controller's name, or ``hold``.
        reference_w_per_gpu: the reward of a window in which all GPUs draw this power is -1.
        violation_penalty: of a window in which every request breaks an SLO.
    """

    clocks: str = "biscale"
    reference_w_per_gpu: Positive = 700.0
    violation_penalty: NonNegative = 10.0


class InstanceEnvSettings(EpisodeSettings, RewardSettings):
    """Settings of ``BiScale/Prefill-v0`` and ``BiScale/Decode-v0``.

    Attributes:
        instance: which instance of that phase of the scenario's placement; None: each episode draws one.
        decision_points: when the agent is asked, beside a batch about to start.
        decide_every: batches, or decode iterations, from one choice to the next; the clock is kept in between. Any
            other decision point than a batch about to start is a choice of its own.
        baseline_w_per_gpu: power that costs no reward: joules count from there, less of them as a gain. With
            ``discount_per_s`` it changes no policy's rank, and returns stay near 0, which value functions learn faster.
        shield: what overrules the agent's clocks, as it does a learned policy's in service.
    """

    instance: Annotated[int, Field(ge=0)] | None = None
    decision_points: tuple[DecisionPoint, ...] = ("boundary", "idle")
    decide_every: Annotated[int, Field(ge=1)] = 1
    baseline_w_per_gpu: NonNegative = 0.0
    shield: ShieldSettings = NO_SHIELD

    @model_validator(mode="after")
    def _asked_at_boundaries(self) -> InstanceEnvSettings:
        if "boundary" not in self.decision_points:
            raise ValueError(f"decision_points {list(self.decision_points)} must name 'boundary'")
        return self
