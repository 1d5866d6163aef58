"""Lanes of one or several scenarios as one vector environment for SB3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from biscale_gym.config import nearest
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.saved import Saved, joined, restore_lanes, saved_lanes
from biscale_gym.envs.settings import RewardSettings
from biscale_gym.envs.shield import NO_SHIELD
from biscale_gym.envs.wrappers import vector as vector_wrappers
from biscale_gym.sb3 import GymnasiumVecEnv
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings, WrapperSettings

WRAPPERS = ("ClockDeltas", "ContinuousClocks", "CostConstrained", "EnergyPerRequest", "History", "SlackShaping")
PLACEMENT = "BiScale/Placement-v0"
INSTANCES = {"BiScale/Prefill-v0": "prefill", "BiScale/Decode-v0": "decode"}
"""Environments of one instance, and its phase."""
SUMMED = ("energy_j", "violations", "completed", "dt_s")
"""Terms of steps that the lanes add up."""


class LanesVecEnv(VecEnv):
    """Vector environments of several scenarios side by side, first the first one's lanes.

    ``totals`` sums terms and rewards of all lanes since ``begin_tally``. ``discounts`` float64[N] is the last step's
    ``info["discount"]``. ``multiplier`` is what a violation costs on top of the environments' own reward.

    Args:
        parts: of equal spaces.
        bootstrap: whether infos of ended lanes say ``TimeLimit.truncated``, on which SB3 bootstraps with its gamma. If
            not, ``ended`` holds (lane, last observation) of the lanes that ended in the last step.
    """

    def __init__(self, parts: Sequence[GymnasiumVecEnv], bootstrap: bool = True) -> None:
        self.parts = list(parts)
        self.bootstrap = bootstrap
        self.multiplier = 0.0
        self.starts = np.cumsum([0, *(part.num_envs for part in self.parts)])
        self.ended: list[tuple[int, NDArray[Any]]] = []
        super().__init__(int(self.starts[-1]), self.parts[0].observation_space, self.parts[0].action_space)
        self.discounts = np.ones(self.num_envs)
        self.begin_tally()

    def begin_tally(self) -> None:
        """Sums from zero."""
        self.totals = {**dict.fromkeys(SUMMED, 0.0), "reward": 0.0, "steps": 0.0}

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Lane n begins with ``seed + n``, whatever its scenario."""
        told = super().seed(seed)
        for part, start in zip(self.parts, self.starts, strict=False):
            part.seed(None if seed is None else seed + int(start))
        return told

    def reset(self) -> Any:
        """Begin an episode in every lane: float32[N, size]."""
        observations = np.concatenate([part.reset() for part in self.parts])
        self.reset_infos = [info for part in self.parts for info in part.reset_infos]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: NDArray[Any]) -> None:
        """Hand every part its actions."""
        for part, start in zip(self.parts, self.starts, strict=False):
            part.step_async(actions[start : start + part.num_envs])

    def step_wait(self) -> VecEnvStepReturn:
        """Step every lane: float32[N, size], float32[N], bool[N], N infos."""
        stepped = [part.step_wait() for part in self.parts]
        observations = np.concatenate([one[0] for one in stepped])
        rewards = np.concatenate([one[1] for one in stepped])
        dones = np.concatenate([one[2] for one in stepped])
        infos = [info for one in stepped for info in one[3]]
        self._add(rewards, dones, infos)
        self.ended = []
        for lane in np.flatnonzero(dones):
            if not self.bootstrap:
                self.ended.append((int(lane), infos[lane]["terminal_observation"]))
                del infos[lane]["TimeLimit.truncated"]
        return observations, rewards, dones, infos

    def _add(self, rewards: NDArray[np.float32], dones: NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Sum the step's terms, and charge its violations."""
        terms = {name: self._term(name, dones, infos, 0.0) for name in (*SUMMED, "cost")}
        self.discounts = self._term("discount", dones, infos, 1.0)
        if self.multiplier > 0.0:
            rewards -= (self.multiplier * terms["cost"]).astype(np.float32)
        for name in SUMMED:
            self.totals[name] += float(terms[name].sum())
        self.totals["reward"] += float(rewards.sum(dtype=np.float64))
        self.totals["steps"] += self.num_envs

    def _term(self, name: str, dones: NDArray[np.bool_], infos: list[dict[str, Any]], none: float) -> Any:
        own = [np.asarray(part.infos.get(name, np.full(part.num_envs, none)), np.float64) for part in self.parts]
        values = np.concatenate(own)
        for lane in np.flatnonzero(dones):
            values[lane] = infos[lane].get(name, none)
        return values

    def set_load(self, low: float, high: float) -> None:
        """Range of ``load`` that episodes from now on draw from."""
        for part in self.parts:
            for source in {id(one): one for one in map(_source, part.get_attr("unwrapped"))}.values():
                source.settings = source.settings.model_copy(update={"load": (low, high)})

    def saved(self) -> Saved:
        """All lanes in the middle of their episodes."""
        return joined({str(number): saved_lanes(part.envs) for number, part in enumerate(self.parts)})

    def restore_saved(self, saved: Saved) -> None:
        """Go on from what ``saved`` kept."""
        for number, part in enumerate(self.parts):
            restore_lanes(part.envs, saved.under(str(number)))

    def close(self) -> None:
        """Close all parts."""
        for part in self.parts:
            part.close()

    def _chosen(self, indices: VecEnvIndices) -> list[tuple[GymnasiumVecEnv, int]]:
        found = []
        for lane in self._get_indices(indices):
            part = int(np.searchsorted(self.starts, lane, side="right")) - 1
            found.append((self.parts[part], int(lane - self.starts[part])))
        return found

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each chosen lane's environment."""
        if indices is None:
            return [value for part in self.parts for value in part.get_attr(attr_name)]
        return [part.get_attr(attr_name, lane)[0] for part, lane in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all lanes' environments.

        Raises:
            EnvironmentUsageError: for some lanes only.
        """
        if indices is not None:
            raise EnvironmentUsageError(f"set_attr: set {attr_name!r} for all lanes (indices=None)")
        for part in self.parts:
            part.set_attr(attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """What a method of each chosen lane's environment returns."""
        if indices is None:
            return [row for part in self.parts for row in part.env_method(method_name, *args, **kwargs)]
        return [part.env_method(method_name, *args, indices=lane, **kwargs)[0] for part, lane in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> Any:
        """False for each chosen lane."""
        return [False] * len(self._chosen(indices))


def _source(env: Any) -> Any:
    """Where an environment's episodes are drawn."""
    return env.setting.source if hasattr(env, "setting") else env.source


def _wrapped(envs: gymnasium.vector.VectorEnv[Any, Any, Any], wrapper: WrapperSettings) -> Any:
    if wrapper.name not in WRAPPERS:
        hint = "it needs environments one by one, lanes are stepped together; " if wrapper.name == "FrameSkip" else ""
        raise TrainingError(f"no wrapper {wrapper.name!r} of lanes; {hint}{nearest(wrapper.name, list(WRAPPERS))}")
    try:
        return getattr(vector_wrappers, wrapper.name)(envs, **wrapper.arguments)
    except TypeError as error:
        raise TrainingError(f"wrapper {wrapper.name}: {error}") from error


def env_arguments(settings: TrainingSettings, scenario: str) -> dict[str, Any]:
    """Keyword settings of a scenario's environment, with the price of violations that the constraint asks for.

    Raises:
        ConfigError: an unknown scenario.
        TrainingError: the price counts in requests of which there is no rate.
    """
    arguments = {**settings.env, **settings.scenario_env.get(scenario, {})}
    constraint = settings.constraint
    if constraint is None:
        return arguments
    if constraint.unit == "request":
        reference_w = float(arguments.get("reference_w_per_gpu", RewardSettings().reference_w_per_gpu))
        arguments["reference_w_per_gpu"] = reference_w * _between_requests_s(settings, scenario, arguments)
    return {**arguments, "violation_penalty": constraint.penalty if constraint.kind == "penalty" else 0.0}


def _between_requests_s(settings: TrainingSettings, scenario: str, arguments: dict[str, Any]) -> float:
    """Mean time between two requests of what a reward is about, an instance or the cluster, at the whole rate."""
    if settings.env_id == PLACEMENT:
        raise TrainingError(f"constraint.unit request: rewards of {PLACEMENT} are shares of a window; use second")
    if arguments.get("trace") is not None and arguments.get("rate_rps") is None:
        raise TrainingError("constraint.unit request: a recorded trace has a rate of its own; set env.rate_rps")
    served = load_scenario(scenario, arguments.get("overrides"))
    phase = INSTANCES.get(settings.env_id)
    sharing = 1 if phase is None else sum(spec.count for spec in served.placement if spec.phase == phase)
    return sharing / float(arguments.get("rate_rps") or served.rate_rps)


def make_part(
    settings: TrainingSettings, scenario: str, lanes: int, wrapped: bool = True, **changed: Any
) -> GymnasiumVecEnv:
    """Lanes of one scenario.

    Args:
        settings: of the run.
        scenario: one of its scenarios.
        lanes: how many.
        wrapped: whether in the run's wrappers.
        changed: environment settings in place of the run's.

    Raises:
        TrainingError: an unknown wrapper, or wrong arguments of one.
        ConfigError, EnvironmentUsageError, gymnasium.error.Error: as making the environment.
    """
    arguments = {**env_arguments(settings, scenario), **changed}
    if settings.env_id != PLACEMENT:
        arguments = {"threads": settings.threads, **arguments}
    try:
        envs = gymnasium.make_vec(
            settings.env_id, lanes, vectorization_mode="vector_entry_point", scenario=scenario, **arguments
        )
    except gymnasium.error.Error as error:
        known = sorted(name for name in gymnasium.registry if name.startswith("BiScale/"))
        raise TrainingError(f"env_id: {error}; {nearest(settings.env_id, known)}") from error
    if wrapped:
        for wrapper in settings.wrappers:
            envs = _wrapped(envs, wrapper)
    return GymnasiumVecEnv(envs, keep_infos=True)


def make_lanes(settings: TrainingSettings) -> LanesVecEnv:
    """All lanes of a run.

    Raises:
        TrainingError: scenarios with different spaces; a shield where there can be none; as ``make_part``.
    """
    count = len(settings.scenarios)
    shares = [settings.lanes // count + (number < settings.lanes % count) for number in range(count)]
    shielded: dict[str, Any] = {}
    if settings.shield != NO_SHIELD:
        if settings.env_id not in INSTANCES:
            raise TrainingError(
                f"shield: only clock policies of one instance have one ({', '.join(INSTANCES)}), not {settings.env_id}"
            )
        # The evaluation's environments have none: there the exported policy is played, which has its own.
        if settings.train_shielded:
            shielded["shield"] = settings.shield.model_dump()
    parts = [
        make_part(settings, name, lanes, **shielded) for name, lanes in zip(settings.scenarios, shares, strict=True)
    ]
    first = parts[0]
    for name, part in zip(settings.scenarios, parts, strict=True):
        if part.observation_space != first.observation_space or part.action_space != first.action_space:
            raise TrainingError(
                f"scenarios {settings.scenarios[0]!r} and {name!r} cannot be trained on together: their spaces differ "
                f"({first.observation_space.shape}, {first.action_space} and {part.observation_space.shape}, "
                f"{part.action_space}); scenarios with the same clocks_mhz have the same"
            )
    return LanesVecEnv(parts, bootstrap=settings.discount == "step")
