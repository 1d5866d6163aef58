"""A scenario: a cluster, a workload, an SLO, and what is counted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from biscale_gym.cluster.placement import InstanceGroup
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.config import Settings, load_preset, replaced, validate
from biscale_gym.metrics import TpotDefinition
from biscale_gym.profiles.prediction import PredictionSettings

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class ScenarioSettings(Settings):
    """Everything that a run depends on, except the controller and the seed.

    Attributes:
        description: one line for lists.
        workload: preset in configs/workloads, or a path.
        rate_rps: mean arrival rate of the generated workload.
        rate_from: the command that derived ``rate_rps``, where it was derived.
        duration_s: length of the generated trace.
        warmup_s: what is not counted at the start.
        drain_limit_s: how long after the last arrival unfinished requests are waited for.
        window_s: coarse period, tier 1's.
        window_start: how a window begins: with the queues that the last one left (``carried``), or on an idle cluster
            that serves this window's arrivals alone, the first ``warmup_s`` of each not counted (``steady-state``).
        slo: on P99 TTFT and P99 TPOT.
        cluster: the GPUs and the engine's rules.
        clocks_mhz: the controllers' candidate clocks.
        top_clock_mhz: the card's top clock, where an uncontrolled GPU runs.
        training_s: length of the generated training trace that planners learn from.
        tpot_definition: see ``metrics.tpot_s``.
        placement: the placement that environments start from, frozen so that making one plans nothing.
        placement_from: the command that planned it.
        prediction: how controllers come to believe what iterations cost; None: they know the truth.
    """

    description: str = ""
    workload: str
    rate_rps: Positive
    rate_from: str = ""
    duration_s: Positive = 1800.0
    warmup_s: NonNegative = 30.0
    drain_limit_s: NonNegative = 600.0
    window_s: Positive = 300.0
    window_start: Literal["carried", "steady-state"] = "carried"
    slo: SloSettings
    cluster: ClusterSettings = ClusterSettings()
    clocks_mhz: Annotated[tuple[int, ...], Field(min_length=1)]
    top_clock_mhz: int
    training_s: Positive = 1800.0
    tpot_definition: TpotDefinition = "per-decode-token"
    placement: tuple[InstanceGroup, ...] = ()
    placement_from: str = ""
    prediction: PredictionSettings | None = None

    @model_validator(mode="after")
    def _ordered(self) -> ScenarioSettings:
        if self.duration_s <= self.warmup_s:
            raise ValueError(f"duration_s ({self.duration_s}) must exceed warmup_s ({self.warmup_s})")
        if list(self.clocks_mhz) != sorted(set(self.clocks_mhz)):
            raise ValueError(f"clocks_mhz must ascend without repeats, got {list(self.clocks_mhz)}")
        if self.window_start == "steady-state" and self.window_s <= self.warmup_s:
            raise ValueError(
                f"window_s ({self.window_s}) must exceed warmup_s ({self.warmup_s}) in steady-state windows"
            )
        return self


def load_scenario(name_or_path: str, overrides: dict[str, Any] | None = None) -> ScenarioSettings:
    """A scenario preset or file, with some settings replaced.

    Args:
        name_or_path: preset in configs/scenarios, or a YAML file.
        overrides: dotted setting to value, e.g. ``{"cluster.precision": "bf16"}``.

    Raises:
        ConfigError: an unknown scenario or setting, or a wrong value.
    """
    scenario = load_preset(ScenarioSettings, "scenarios", name_or_path)
    if not overrides:
        return scenario
    values = replaced(scenario.model_dump(), overrides, f"scenario {name_or_path!r}")
    return validate(ScenarioSettings, values, f"scenario {name_or_path!r} with overrides")
