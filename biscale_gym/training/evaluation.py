"""How a policy is judged: energy against references' on the same episodes, and whether it keeps the SLO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

import biscale_gym
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.mlp import ClockMLP
from biscale_gym.envs.policies import ControllerPolicy, HighestClock, PlannerPolicy
from biscale_gym.envs.settings import TRACES
from biscale_gym.envs.shield import NO_SHIELD
from biscale_gym.planning import table_cache
from biscale_gym.sb3 import GymnasiumVecEnv
from biscale_gym.training.algorithms import find_algorithm
from biscale_gym.training.environments import PLACEMENT, env_arguments, make_part
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.export import clock_model
from biscale_gym.training.settings import TrainingSettings
from biscale_gym.training.watching import Watch

ENERGY = {"BiScale/Prefill-v0": "prefill_energy_j", "BiScale/Decode-v0": "decode_energy_j"}
"""What an environment of one phase is judged by; the others by ``total_energy_j``."""
ATTAINMENTS = {"BiScale/Prefill-v0": ("ttft_attainment",), "BiScale/Decode-v0": ("tpot_attainment",)}
"""Shares within each SLO that counts there; of the others both."""
SHOWN = {"BiScale/Prefill-v0": "ttft_attainment", "BiScale/Decode-v0": "tpot_attainment"}
"""The share that is held against the reference's; of the others ``joint_attainment``."""
MAX_CLOCK = "max-clock"
POLICY = "policy"
"""What is evaluated, beside the references' names."""
LATE = 100.0
"""More than any energy over a reference's, or megajoules of an episode."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Played:
    """What an agent did in the episodes of one scenario.

    Attributes:
        energy_j: of each episode.
        requests: judged in each.
        shares: each SLO's share of requests within it, pooled over the episodes, and ``shown``, the one for tables.
        mean_return: undiscounted sum of the environment's rewards, mean over episodes.
    """

    energy_j: list[float]
    requests: list[float]
    shares: dict[str, float]
    mean_return: float

    @property
    def attainment(self) -> float:
        """The share of requests within the SLO (both, where there are two)."""
        return self.shares["shown"]


@dataclass(frozen=True)
class Score:
    """A policy's evaluation.

    Attributes:
        keeps_slo: in every scenario.
        energy: mean over all episodes of energy over the last reference's; in MJ per episode without references.
        ratios: the same over each reference.
        attainment: the least of any scenario.
        mean_return: over all scenarios.
        scenarios: figures of each.
    """

    keeps_slo: bool
    energy: float
    ratios: dict[str, float]
    attainment: float
    mean_return: float
    scenarios: dict[str, dict[str, float]]

    @property
    def rank(self) -> tuple[bool, float]:
        """Greater is better: least energy among those that keep the SLO; without any, the greatest attainment."""
        return self.keeps_slo, -self.energy if self.keeps_slo else self.attainment

    @property
    def objective(self) -> float:
        """The same order as one number to be minimised, for searches: the energy; above ``LATE`` without the SLO."""
        return self.energy if self.keeps_slo else LATE + 100.0 * (1.0 - self.attainment)

    def values(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """Flat, for a tracker."""
        flat = {f"energy_over_{name}": ratio for name, ratio in self.ratios.items()}
        flat |= {"attainment": self.attainment, "keeps_slo": float(self.keeps_slo), "return": self.mean_return}
        if not self.ratios:
            flat["energy_mj"] = self.energy
        for scenario, figures in self.scenarios.items():
            flat |= {f"{scenario}/{name}": value for name, value in figures.items()}
        return flat


Predict = Callable[[Any, Any, NDArray[np.bool_]], tuple[Any, Any]]


def _begin(envs: GymnasiumVecEnv, settings: TrainingSettings) -> Any:
    """Episode n in lane n; returns the observations."""
    evaluation = settings.evaluation
    traces = 1 if settings.env.get("trace") is not None else TRACES[evaluation.split]
    envs.seed(evaluation.seed)
    envs.set_options([{"split": evaluation.split, "trace_seed": lane % traces} for lane in range(envs.num_envs)])
    return envs.reset()


def _play(envs: GymnasiumVecEnv, settings: TrainingSettings, predict: Predict, watch: Watch | None = None) -> Played:
    """Every lane's first episode, of which ``watch`` sees lane 0's; what a lane does after it is not looked at."""
    observations = _begin(envs, settings)
    lanes = envs.num_envs
    metrics: list[dict[str, float] | None] = [None] * lanes
    returns = np.zeros(lanes)
    going_on = np.ones(lanes, np.bool_)
    starts = np.ones(lanes, np.bool_)
    memory: Any = None
    while going_on.any():
        if watch is not None:
            _look(envs, watch)
        actions, memory = predict(observations, memory, starts)
        observations, rewards, starts, infos = envs.step(actions)
        returns += rewards * going_on
        for lane in np.flatnonzero(starts & going_on):
            metrics[lane] = infos[lane]["episode_metrics"]
        going_on &= ~starts
    return _pooled(settings.env_id, [one for one in metrics if one is not None], float(returns.mean()))


def _look(envs: GymnasiumVecEnv, watch: Watch) -> None:
    try:
        simulator = envs.get_attr("simulator", 0)[0]
    except EnvironmentUsageError:  # of Placement, before its first window
        return
    watch.look(simulator, envs.get_attr("episode", 0)[0])


def _pooled(env_id: str, metrics: Sequence[dict[str, float]], mean_return: float) -> Played:
    requests = np.array([one["requests_judged"] for one in metrics])

    def pooled(name: str) -> float:
        return float(
            sum(one.get(name, 1.0) * count for one, count in zip(metrics, requests, strict=True)) / requests.sum()
        )

    names = ATTAINMENTS.get(env_id, ("ttft_attainment", "tpot_attainment"))
    shares = {name: pooled(name) for name in names}
    shares["shown"] = pooled(SHOWN.get(env_id, "joint_attainment"))
    energy = [one[ENERGY.get(env_id, "total_energy_j")] for one in metrics]
    return Played(energy, requests.tolist(), shares, mean_return)


def _changed(settings: TrainingSettings) -> dict[str, Any]:
    """Environment settings of an evaluation that differ from training's."""
    changed = dict(settings.evaluation.env)
    if settings.evaluation.episode_s is not None:
        changed["episode_s"] = settings.evaluation.episode_s
    return changed


def _reference(settings: TrainingSettings, scenario: str, name: str, watch: Watch | None = None) -> Played:
    """What a reference does on the evaluation's episodes; ``watch`` sees the first one."""
    changed = _changed(settings)
    if settings.env_id == PLACEMENT:
        return _planned(settings, scenario, name, changed, watch)

    def lanes(**more: Any) -> GymnasiumVecEnv:
        return make_part(settings, scenario, settings.evaluation.episodes, wrapped=False, **{**changed, **more})

    envs = lanes()
    if name == MAX_CLOCK:
        agent: Any = HighestClock(envs)
    else:
        agent = ControllerPolicy(name, envs)
        if settings.env_id in ENERGY:
            # Asked at the points that it wants: as good as it is in a comparison.
            prefill = settings.env_id == "BiScale/Prefill-v0"
            points = agent.prefill_points if prefill else agent.decode_points
            envs = lanes(decision_points=points, decide_every=1)
            agent = ControllerPolicy(name, envs)
    return _play(envs, settings, lambda observations, memory, starts: agent.predict(observations), watch)


class _Guarded:
    """A clock model as a controller, its shield included: what a comparison would run."""

    name = "trained"
    replans = False

    def __init__(self, clocks: ClockMLP) -> None:
        self._clocks = clocks

    def plan(self, context: PlanContext) -> Placement:
        """Not asked: the environment's instance is placed."""
        raise NotImplementedError

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """The model's policy, for its phase."""
        slo, clocks = context.scenario.slo, self._clocks
        if clocks.phase == "prefill":
            return clocks.policy(context.clocks_mhz, slo.ttft_s), None
        return None, clocks.policy(context.clocks_mhz, slo.tpot_s)


def _guarded(settings: TrainingSettings, scenario: str, clocks: ClockMLP, watch: Watch | None = None) -> Played:
    """A clock model with its shield on the evaluation's episodes, asked at every decision point of its own."""
    changed = {**_changed(settings), "decision_points": clocks.decision_points, "decide_every": 1}
    envs = make_part(settings, scenario, settings.evaluation.episodes, wrapped=False, **changed)
    agent = ControllerPolicy(_Guarded(clocks), envs)
    return _play(envs, settings, lambda observations, memory, starts: agent.predict(observations), watch)


def _planned(
    settings: TrainingSettings, scenario: str, name: str, changed: dict[str, Any], watch: Watch | None
) -> Played:
    """A planner's episodes. ``max-clock`` is DistServe's placement, its clocks held at the top of the grid."""
    arguments = {**env_arguments(settings, scenario), **changed}
    if name == MAX_CLOCK:
        top = {"top_clock_mhz": max(load_scenario(scenario, arguments.get("overrides")).clocks_mhz)}
        arguments |= {"clocks": "hold", "overrides": {**(arguments.get("overrides") or {}), **top}}
    env = gymnasium.make(settings.env_id, scenario=scenario, **arguments)
    agent = PlannerPolicy("distserve" if name == MAX_CLOCK else name, env)
    evaluation = settings.evaluation
    traces = 1 if settings.env.get("trace") is not None else TRACES[evaluation.split]
    metrics, returns = [], []
    for number in range(evaluation.episodes):
        options = {"split": evaluation.split, "trace_seed": number % traces}
        observation, _ = env.reset(seed=evaluation.seed + number, options=options)
        total, over = 0.0, False
        info: dict[str, Any] = {}
        while not over:
            observation, reward, _, over, info = env.step(agent.predict(observation)[0])
            total += float(reward)
        if watch is not None:
            bare: Any = env.unwrapped
            watch.look(bare.simulator, bare.episode)
        metrics.append(info["episode_metrics"])
        returns.append(total)
    return _pooled(settings.env_id, metrics, float(np.mean(returns)))


def reference(settings: TrainingSettings, scenario: str, name: str) -> Played:
    """The figures of a reference: ``max-clock``, or a controller's name; played once, then kept on disk.

    Raises:
        ControllerError: no such controller.
    """
    package = Path(biscale_gym.__file__).resolve().parent
    here = package.parent
    folders = [package / part for part in ("traces", "profiles", "cluster", "planning", "control", "envs")]
    key = table_cache.content_key(
        {
            "env_id": settings.env_id,
            "scenario": load_scenario(scenario, settings.env.get("overrides")).model_dump(mode="json"),
            "env": _plain({**env_arguments(settings, scenario), **_changed(settings)}),
            "evaluation": settings.evaluation.model_dump(
                mode="json", include={"split", "episodes", "episode_s", "seed"}
            ),
            "reference": name,
            "code": table_cache.source_digest(*folders, package / "metrics.py", here / "agents", here / "baselines"),
        }
    )
    kept = table_cache.load("references", key)
    if kept is None:
        kept = asdict(_reference(settings, scenario, name))
        table_cache.store("references", key, kept, {"scenario": scenario, "reference": name, "env_id": settings.env_id})
    return Played(**kept)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Evaluator:
    """Evaluates policies of a run, always on the same episodes.

    The environments are made once; references are played, or read from disk, at the first evaluation.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings
        self._envs: dict[str, GymnasiumVecEnv] = {}
        self._references: dict[str, dict[str, Played]] = {}

    def references(self) -> dict[str, dict[str, Played]]:
        """By scenario, then by reference."""
        settings = self._settings
        if not self._references:
            self._references = {
                scenario: {name: reference(settings, scenario, name) for name in settings.evaluation.references}
                for scenario in settings.scenarios
            }
        return self._references

    def score(self, model: Any) -> Score:
        """Evaluate an SB3 model, with its most likely actions; with its shield, where the run gives it one."""
        played = {scenario: self.play(model, scenario) for scenario in self._settings.scenarios}
        return judged(self._settings, played, self.references())

    def play(self, model: Any, scenario: str, watch: Watch | None = None) -> Played:
        """What an SB3 model does on a scenario's episodes; ``watch`` sees the first one."""
        settings = self._settings
        if settings.shield != NO_SHIELD:
            clocks = clock_model(model, settings, {})
            if clocks is None:
                raise TrainingError("shield: only compiled clock policies have one, and this run's wrappers allow none")
            return _guarded(settings, scenario, clocks, watch)
        masked = find_algorithm(settings.algorithm).masked
        if scenario not in self._envs:
            self._envs[scenario] = make_part(settings, scenario, settings.evaluation.episodes, **_changed(settings))
        envs = self._envs[scenario]

        def predict(observations: Any, memory: Any, starts: Any) -> tuple[Any, Any]:
            masks = {"action_masks": np.stack(envs.env_method("action_masks"))} if masked else {}
            found: tuple[Any, Any] = model.predict(observations, memory, starts, deterministic=True, **masks)
            return found

        return _play(envs, settings, predict, watch)


def watched(settings: TrainingSettings, model: Any) -> dict[str, dict[str, Watch]]:
    """The first evaluation episode of every scenario, as an SB3 model and as each reference plays it.

    Returns:
        By scenario, then ``policy`` or the reference's name.
    """
    one = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"episodes": 1})})
    evaluator = Evaluator(one)
    found: dict[str, dict[str, Watch]] = {}
    for scenario in settings.scenarios:
        found[scenario] = {POLICY: Watch()}
        evaluator.play(model, scenario, found[scenario][POLICY])
        for name in settings.evaluation.references:
            found[scenario][name] = Watch()
            _reference(one, scenario, name, found[scenario][name])
    return found


def judged(settings: TrainingSettings, played: dict[str, Played], references: dict[str, dict[str, Played]]) -> Score:
    """What was played, against the references of the same episodes."""
    evaluation = settings.evaluation
    keeps = True
    scenarios: dict[str, dict[str, float]] = {}
    over: dict[str, list[float]] = {name: [] for name in evaluation.references}
    for scenario, own in played.items():
        slos = [share for name, share in own.shares.items() if name != "shown"]
        kept = min(slos) >= evaluation.attainment
        figures = {"attainment": own.attainment, "energy_mj": float(np.mean(own.energy_j)) / 1e6}
        for name in evaluation.references:
            theirs = references[scenario][name]
            ratios = np.array(own.energy_j) / np.array(theirs.energy_j)
            over[name] += ratios.tolist()
            figures |= {f"energy_over_{name}": float(ratios.mean()), f"attainment_of_{name}": theirs.attainment}
        if evaluation.references and evaluation.not_below_reference:
            last = references[scenario][evaluation.references[-1]]
            kept = kept and own.attainment >= last.attainment - evaluation.tolerance
        scenarios[scenario] = {**figures, "keeps_slo": float(kept)}
        keeps = keeps and kept
    means = {name: float(np.mean(ratios)) for name, ratios in over.items()}
    megajoules = float(np.mean([joules for own in played.values() for joules in own.energy_j])) / 1e6
    return Score(
        keeps_slo=keeps,
        energy=means[evaluation.references[-1]] if evaluation.references else megajoules,
        ratios=means,
        attainment=min(own.attainment for own in played.values()),
        mean_return=float(np.mean([own.mean_return for own in played.values()])),
        scenarios=scenarios,
    )
