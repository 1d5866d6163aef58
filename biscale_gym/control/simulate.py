"""``biscale-gym simulate``: one run of a stated placement, cluster preset and trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from biscale_gym.cluster.placement import InstanceGroup, Placement, written_placement
from biscale_gym.cluster.settings import (
    BatchingSettings,
    ClusterSettings,
    ReplacementSettings,
    Router,
    RoutingSettings,
    SloSettings,
)
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.config import Settings, config_hash, load_preset, nearest, read_yaml, validate
from biscale_gym.control.controllers import ControllerError, PlanContext, controller_names, make_controller
from biscale_gym.control.rollout import Rollout, RunJob, RunOutcome, outcome_of
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.control.workload import Requests, within_context
from biscale_gym.metrics import TpotDefinition
from biscale_gym.profiles import SwitchingSettings
from biscale_gym.profiles.settings import Precision
from biscale_gym.traces import read_trace
from biscale_gym.traces.operations import require_duration

HOLD = "hold"
MAX_CLOCK = "max-clock"
Count = Annotated[int, Field(ge=1)]


class SimulationSettings(Settings):
    """A placement file: instances, the cluster preset they run on, and what of it is replaced."""

    instances: tuple[InstanceGroup, ...]
    preset: str = "h100-2x8"
    model: str | None = None
    precision: Precision | None = None
    decode_precision: Precision | None = None
    router: Router | RoutingSettings | None = None
    batching: BatchingSettings | None = None
    decode_iterations: Literal["output-minus-one", "output-length"] | None = None
    tpot_definition: TpotDefinition = "per-decode-token"
    switching: str | SwitchingSettings | None = None
    transfer: str | None = None
    replacement: ReplacementSettings | None = None
    nodes: Count | None = None
    gpus_per_node: Count | None = None
    slo: SloSettings = SloSettings(ttft_s=0.6, tpot_s=0.1)
    clocks_mhz: tuple[int, ...] = ()
    warmup_s: Annotated[float, Field(ge=0)] = 0.0
    phases: Literal["both", "prefill", "decode"] = "both"
    """``prefill``: requests are done at their first token; ``decode``: they arrive with it, and with their KV."""
    control_interval_s: Annotated[float, Field(gt=0)] | None = None
    """Ask the clock policies about every instance at multiples of this, at no other time."""


class StatedPlacement:
    """A controller that keeps one placement; another controller's clock policies may run on it."""

    replans = False

    def __init__(
        self, placement: Placement, name: str, policies: Callable[[PlanContext], tuple[PhasePolicy | None, ...]] | None
    ) -> None:
        self.name = name
        self._placement = placement
        self._policies = policies

    def plan(self, context: PlanContext) -> Placement:
        """The stated placement."""
        return self._placement

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """The borrowed policies, or every instance's own clock."""
        if self._policies is None:
            return (None, None)
        prefill, decode = self._policies(context)
        return (prefill, decode)


def _cluster(settings: SimulationSettings) -> ClusterSettings:
    """The preset with what the file replaces."""
    base = load_preset(ClusterSettings, "clusters", settings.preset)
    names = (
        "model",
        "precision",
        "decode_precision",
        "switching",
        "transfer",
        "replacement",
        "batching",
        "nodes",
        "gpus_per_node",
    )
    changes: dict[str, Any] = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if isinstance(settings.router, RoutingSettings):
        changes["routing"] = settings.router
    elif settings.router is not None:
        changes["routing"] = base.routing.model_copy(update={"prefill": settings.router, "decode": settings.router})
    if settings.decode_iterations is not None:
        batching: BatchingSettings = changes.get("batching", base.batching)
        changes["batching"] = batching.model_copy(update={"decode_iterations": settings.decode_iterations})
    return base.model_copy(update=changes)


def _policies(policy: str) -> Callable[[PlanContext], tuple[PhasePolicy | None, ...]] | None:
    """The clock policies of a controller; None where clocks are held."""
    if policy in (HOLD, MAX_CLOCK):
        return None
    known = controller_names()
    if ":" not in policy and policy not in known:
        raise ControllerError(f"no policy {policy!r}; {nearest(policy, [HOLD, *known])}, or module:Class")
    return make_controller(policy).policies


def simulate_file(placement: Path, trace: Path, policy: str = "max-clock", seed: int = 0) -> RunOutcome:
    """Run a placement file on a trace, whole and without planning.

    Args:
        placement: YAML of SimulationSettings.
        trace: any supported trace.
        policy: ``hold`` or ``max-clock`` (every instance keeps the file's clock, or goes to the top), or another
            controller's name, whose clock policies run.
        seed: of the cluster's random numbers.

    Raises:
        ConfigError, TraceError, PlacementError, ClusterError, ControllerError: what is wrong with the input.
    """
    settings = validate(SimulationSettings, read_yaml(placement), str(placement))
    cluster = _cluster(settings)
    profile = cluster.profile()
    stated = written_placement(settings.instances, profile.top_clock_mhz)
    top = profile.top_clock_mhz
    if policy == MAX_CLOCK:
        stated = Placement(tuple(replace(spec, clock_mhz=top) for spec in stated.instances))
    scenario = ScenarioSettings(
        description=f"{placement.name} on {trace.name}",
        workload="recorded",
        rate_rps=1.0,
        warmup_s=settings.warmup_s,
        duration_s=max(1800.0, 2.0 * settings.warmup_s),
        slo=settings.slo,
        cluster=cluster,
        clocks_mhz=tuple(sorted(set(settings.clocks_mhz) or {spec.clock_mhz for spec in stated.instances} | {top})),
        top_clock_mhz=top,
        tpot_definition=settings.tpot_definition,
    )
    requests = within_context(read_trace(trace), cluster, profile)
    if settings.warmup_s > 0.0:
        require_duration(requests, settings.warmup_s, "the warm-up")
    controller = StatedPlacement(stated, policy, _policies(policy))
    has_rate = requests.arrival_s[0] < requests.arrival_s[-1]
    served = Requests(requests, requests, requests.rate_rps if has_rate else 0.0, requests.duration_s)
    only = None if settings.phases == "both" else settings.phases
    rollout = Rollout(controller, scenario, served, seed, profile, only, settings.control_interval_s)
    counted = rollout.run(count_drain=True)
    job = RunJob(scenario=str(placement), controller=policy, seed=seed, trace=str(trace))
    return outcome_of(rollout, counted, job, config_hash(scenario))
