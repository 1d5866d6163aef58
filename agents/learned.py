"""Learned policies as a controller: trained clocks in both phases, on placements planned for them.

The models are networks over the environments' observation (:mod:`biscale_gym.envs.mlp`), compiled, asked at the same
decision points as in training; or one network decides the clocks of all instances at once
(:mod:`biscale_gym.envs.cluster_mlp`). The placements are those of load curves measured under the clocks that will
run (:mod:`agents.load_placement`), of BiScale's tier 1, or of a trained placement policy
(:mod:`biscale_gym.envs.placement_mlp`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from agents.biscale import decode_policy, prefill_policy
from agents.errors import AgentError
from agents.forecast import forecast_load_rps
from agents.load_placement import plan_load
from agents.placement import Tier1, measurement_of
from agents.settings import BiScaleSettings, Tier1Settings
from biscale_gym.cluster.placement import PHASES, Phase, Placement
from biscale_gym.cluster.simulator import PhasePolicy, lowest_idle_power_w
from biscale_gym.config import Settings, nearest, validate
from biscale_gym.control.controllers import PlanContext
from biscale_gym.envs import encoding, mlp
from biscale_gym.envs.cluster_mlp import ClusterClocks, load_cluster_model
from biscale_gym.envs.mlp import ClockMLP, load_model
from biscale_gym.envs.placement_choice import PlacementChoice, WindowView, placement_choice
from biscale_gym.envs.placement_mlp import PlacementMLP, load_placement_model
from biscale_gym.planning import table_cache
from biscale_gym.planning.classes import fitting_degrees
from biscale_gym.planning.curves import CurvePolicy, LoadCurve, load_curves

MODELS = Path(__file__).parent / "models"
BISCALE = "biscale"
"""In place of a model: BiScale's own clocks of that phase, or its placements."""
LOAD_CURVES = "load-curves"


class LoadPlacementSettings(Settings):
    """Tier 1 from load curves (:mod:`agents.load_placement`)."""

    price_j: float = Field(default=1000.0, ge=0.0)
    """Joules that a request outside its SLO counts."""
    shares: int = Field(default=24, ge=2)
    """Into how many parts a phase's rate is divided among its instances."""
    keep_within: float = Field(default=0.1, ge=0.0)
    """The present instances stay while their cost is within this share of the optimum's."""
    forecast_error: float = Field(default=0.1, ge=0.0)
    """Relative standard deviation of the forecast's error."""
    forecast: Tier1Settings = Tier1Settings(forecast="ewma", ewma_weight=0.3)
    """Forecast, and how long curves are measured."""


class LearnedSettings(Settings):
    """The learned controller."""

    prefill: str = "prefill"
    """Model of the prefill clocks: a shipped one's name, a path, or ``biscale`` for model predictive control."""
    decode: str = "decode"
    """Model of the decode clocks: as for prefill; ``biscale`` is the slack rule."""
    cluster: str | None = None
    """Path of a model of all clocks at once, in place of the two above."""
    placement: str | None = None
    """``load-curves``, ``biscale`` for its tier 1, or the path of a trained placement policy; None: ``load-curves``, or
    ``biscale`` for a model of all clocks at once, under which no single instance can be measured."""
    load: LoadPlacementSettings = LoadPlacementSettings()
    biscale: BiScaleSettings = BiScaleSettings()
    """Of whatever is BiScale's."""


def shipped_models() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.stem for path in MODELS.glob("*.safetensors"))


def _is_path(name: str) -> bool:
    return "/" in name or bool(Path(name).suffix)


def _policy_path(name: str) -> Path:
    path = Path(name)
    # A training run's folder of a model holds it under this name.
    return path / "policy" if path.is_dir() else path


def find_planner(name: str) -> PlacementMLP | None:
    """A trained placement policy by path; None where ``name`` is a planner's.

    Raises:
        AgentError: neither.
        ModelError: it cannot be read.
    """
    if name in (LOAD_CURVES, BISCALE):
        return None
    if not _is_path(name):
        raise AgentError(f"no placement {name!r}; {nearest(name, [LOAD_CURVES, BISCALE])}, or give a model's path")
    return load_placement_model(_policy_path(name))


def find_model(name: str, phase: Phase) -> ClockMLP:
    """A model by shipped name or path.

    Raises:
        AgentError: no such model, or one of the other phase.
        ModelError: it cannot be read.
    """
    if name in shipped_models():
        path = MODELS / name
    elif _is_path(name):
        path = _policy_path(name)
    else:
        raise AgentError(f"no shipped model {name!r}; {nearest(name, [*shipped_models(), BISCALE])}, or give a path")
    model = load_model(path)
    if model.phase != phase:
        raise AgentError(f"{path} is a {model.phase} model, a {phase} model is needed")
    return model


def _check_alone(settings: LearnedSettings) -> None:
    """Refuse settings that a model of all clocks at once leaves no room for.

    Raises:
        AgentError: one of them is set.
    """
    for name in ("prefill", "decode"):
        if name in settings.model_fields_set:
            raise AgentError(f"cluster is a model of all clocks at once, and {name} is set, too; keep one of them")
    if settings.placement == LOAD_CURVES:
        raise AgentError(
            "placement load-curves is planned with single instances measured under their clock policies, cluster "
            "decides all clocks at once; use placement=biscale, or a placement model's path"
        )


class Learned:
    """Learned clocks, and a placement planned for them.

    Args:
        settings: values of :class:`LearnedSettings`.

    Raises:
        ConfigError: an unknown setting, or a wrong value.
        AgentError, ModelError: a model that is not there, or cannot be used.
    """

    name = "learned"
    replans = True

    def __init__(self, **settings: object) -> None:
        self.settings = validate(LearnedSettings, dict(settings), "controller 'learned'")
        own: dict[Phase, str] = {"prefill": self.settings.prefill, "decode": self.settings.decode}
        self._placement = self.settings.placement or (LOAD_CURVES if self.settings.cluster is None else BISCALE)
        self._cluster = None
        if self.settings.cluster is not None:
            _check_alone(self.settings)
            self._cluster = load_cluster_model(_policy_path(self.settings.cluster))
            own = {}
        self._models = {phase: find_model(name, phase) for phase, name in own.items() if name != BISCALE}
        self._planner = find_planner(self._placement)
        self._choice: PlacementChoice | None = None
        self._tier1 = Tier1(self.settings.biscale.tier1)
        self._curves: tuple[LoadCurve, ...] | None = None
        self._notes: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What readers of a run's record must know."""
        return [*self._notes, *self._tier1.notes]

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Tier 2's clock policies; none where one model decides all clocks at once.

        Raises:
            ModelError: a model does not fit the run's clocks or SLO.
        """
        if self._cluster is not None:
            return None, None
        slo, biscale = context.scenario.slo, self.settings.biscale
        prefill, decode = self._models.get("prefill"), self._models.get("decode")
        return (
            prefill.policy(context.clocks_mhz, slo.ttft_s)
            if prefill is not None
            else prefill_policy(biscale.prefill, context),
            decode.policy(context.clocks_mhz, slo.tpot_s)
            if decode is not None
            else decode_policy(biscale.decode, context),
        )

    def cluster_policy(self, context: PlanContext) -> ClusterClocks | None:
        """Tier 2 where one model decides all clocks at once.

        Raises:
            ModelError: it does not fit the run's clocks or SLO.
        """
        return None if self._cluster is None else self._cluster.policy(context.clocks_mhz, context.scenario.slo)

    def curves(self, context: PlanContext) -> tuple[LoadCurve, ...]:
        """The load curves under this controller's clocks, which stay the same during a run."""
        if self._curves is None:
            cluster = context.scenario.cluster
            served = dict(zip(PHASES, self._served(context), strict=True))
            kinds: Sequence[tuple[Phase, int]] = [
                (phase, tp) for phase in PHASES for tp in fitting_degrees(context.profile, phase, cluster.gpus_per_node)
            ]
            self._curves = load_curves(
                measurement_of(context, self.settings.load.forecast), kinds, served, context.scenario.window_s
            )
        return self._curves

    def _served(self, context: PlanContext) -> list[CurvePolicy]:
        code = table_cache.source_digest(Path(__file__).parent, Path(encoding.__file__), Path(mlp.__file__))
        found = []
        for policy in self.policies(context):
            assert policy is not None
            found.append(CurvePolicy(policy, context.clocks_mhz, self._start_mhz(context), code))
        return found

    def _start_mhz(self, context: PlanContext) -> int:
        """Clock of a new instance, until its first decision."""
        return context.scenario.clocks_mhz[-1]

    def plan(self, context: PlanContext) -> Placement:
        """The placement for the next window.

        Raises:
            AgentError: one instance of each phase does not fit on the cluster.
            ModelError: the trained placement policy does not fit the run.
        """
        if self._planner is not None:
            return self._chosen(self._planner, context)
        if self._placement == BISCALE:
            return self._tier1.plan(context)
        load, cluster = self.settings.load, context.scenario.cluster
        loads_rps = {phase: forecast_load_rps(load.forecast, context, phase) for phase in PHASES}
        plan = plan_load(
            self.curves(context),
            cluster.nodes * cluster.gpus_per_node,
            loads_rps,
            load.price_j,
            lowest_idle_power_w(context.profile),
            load.shares,
            context.previous,
            load.keep_within,
            load.forecast_error,
        )
        if not plan.carries:
            told = " and ".join(f"{load_rps:.2f} ({phase})" for phase, load_rps in loads_rps.items())
            self._notes.append(f"window {len(context.history_rps)}: no placement carries {told} mean requests/s")
        start_mhz = self._start_mhz(context)
        return plan.placement(dict.fromkeys(PHASES, start_mhz))

    def _chosen(self, planner: PlacementMLP, context: PlanContext) -> Placement:
        """A trained policy's placement for the next window."""
        scenario = context.scenario
        if self._choice is None:
            planner.check_slo(scenario.slo)
            self._choice, notes = placement_choice(scenario, context.profile, context.training, planner.table)
            self._notes += notes
        past = len(context.history_rps)
        view = WindowView(
            # A recorded trace may be longer than the scenario says.
            share=min(1.0, past / math.ceil(scenario.duration_s / scenario.window_s)),
            mean_rate_rps=context.mean_rate_rps,
            past_rps=context.history_rps,
            last_arrivals_s=context.last_arrivals_s,
            window_s=scenario.window_s,
            previous=context.previous,
        )
        return planner.plan(self._choice, view)
