"""Controllers as agents: what decides clocks in a comparison also answers an environment, through ``predict``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.handle import Handle, handle_of
from biscale_gym.cluster.policy import hold
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.cluster.state import State
from biscale_gym.control.controllers import Controller, PlanContext, instance_policies, make_controller
from biscale_gym.envs.consult import NOBODY, consult_pending, consult_slots
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.placement import PlacementEnv
from biscale_gym.envs.setting import Setting

Actions = NDArray[np.int64]


def setting_of(env: Any) -> Setting:
    """The setting of an environment: single, native vector, or a Stable-Baselines3 vector of either; wrapped or not.

    Raises:
        EnvironmentUsageError: none of BiScale Gym's.
    """
    found = getattr(getattr(env, "unwrapped", env), "setting", None)
    if found is None and hasattr(env, "get_attr"):
        found = env.get_attr("setting")[0]
    if not isinstance(found, Setting):
        raise EnvironmentUsageError(f"{env!r} is no environment of BiScale Gym")
    return found


def simulators_of(env: Any) -> list[Simulator]:
    """The simulators behind an environment's lanes, as they are now.

    Raises:
        EnvironmentUsageError: it has not been reset yet.
    """
    bare = getattr(env, "unwrapped", env)
    if hasattr(bare, "simulators"):
        found = list(bare.simulators)
    elif hasattr(bare, "simulator"):
        found = [bare.simulator]
    else:
        found = list(env.get_attr("simulator"))
    if any(simulator is None for simulator in found):
        raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
    return found


class ControllerPolicy:
    """A controller's compiled clock policies as an agent of an environment.

    It answers for the lanes of the environment that it was made for, from the same features and with the same memory as
    in a comparison; the observation that it is handed is not looked at. ``decision_points`` says at which points the
    controller wants to be asked: an environment of one instance made with them gives it all that it has in a
    comparison.

    Args:
        controller: installed name, ``module:Class``, or a controller.
        env: the environment; it may be wrapped, native vector, or a Stable-Baselines3 ``VecEnv``.
        settings: the controller's keyword settings, where it is named.

    Raises:
        ControllerError: no such controller, it does not take these settings, or it decides all clocks together.
        EnvironmentUsageError: no environment of BiScale Gym's.
    """

    def __init__(self, controller: str | Controller, env: Any, settings: dict[str, Any] | None = None) -> None:
        self._env = env
        setting = setting_of(env)
        made = make_controller(controller, settings) if isinstance(controller, str) else controller
        self.name = made.name
        context = PlanContext(
            scenario=setting.scenario,
            profile=setting.profile,
            training=setting.source.training(),
            mean_rate_rps=setting.settings.rate_rps or setting.scenario.rate_rps,
            clocks_mhz=setting.clocks_mhz,
        )
        prefill, decode = instance_policies(made, context, "an environment")
        self._prefill = prefill or PhasePolicy(function=hold)
        self._decode = decode or PhasePolicy(function=hold)
        self._clocks_mhz = setting.clocks_mhz
        self._action_of = {clock: action for action, clock in enumerate(setting.grid)}
        self._joint = len(setting.action_shape) > 0
        # Handles keep no array alive: the params are kept here, the states with their handles.
        self._params = [np.ascontiguousarray(one.params, dtype=np.float64) for one in (self._prefill, self._decode)]
        self._handles: dict[int, tuple[State, Handle]] = {}

    @staticmethod
    def decision_points(policy: PhasePolicy) -> tuple[str, ...]:
        """At which points a phase's policy wants to be asked, as ``InstanceEnvSettings`` has them."""
        asked = {"arrival": policy.on_arrival, "overrun": policy.on_overrun, "idle": policy.on_idle}
        return ("boundary", *(name for name, wanted in asked.items() if wanted))

    @property
    def prefill_points(self) -> tuple[str, ...]:
        """Of its prefill policy."""
        return self.decision_points(self._prefill)

    @property
    def decode_points(self) -> tuple[str, ...]:
        """Of its decode policy."""
        return self.decision_points(self._decode)

    def _handle(self, lane: int, simulator: Simulator) -> Handle:
        """The lane's simulator with this controller's policies and params in place of the environment's."""
        if lane not in self._handles or self._handles[lane][0] is not simulator.state:
            wide = simulator.state.memory.shape[1]
            wanted = max(self._prefill.memory, self._decode.memory)
            if wanted > wide:
                raise EnvironmentUsageError(
                    f"controller {self.name!r} remembers {wanted} numbers of an instance, environments keep {wide}: "
                    "a policy with a state plays them through its own predict()"
                )
            state = simulator.state._replace(params_prefill=self._params[0], params_decode=self._params[1])
            handle = handle_of(state, self._prefill.function, self._decode.function)
            self._handles[lane] = (simulator.state, handle)
        return self._handles[lane][1]

    def _as_action(self, clock: int) -> int:
        if clock not in self._action_of:
            raise EnvironmentUsageError(
                f"controller {self.name!r} answers {self._clocks_mhz[clock]} MHz, which is no action of the "
                f"environment; valid: {[self._clocks_mhz[index] for index in self._action_of]} MHz"
            )
        return self._action_of[clock]

    def _answer(self, lane: int, simulator: Simulator) -> Any:
        handle = self._handle(lane, simulator)
        if not self._joint:
            clock = consult_pending(handle)
            return 0 if clock == NOBODY else self._as_action(clock)
        slots = simulator_slots(self._env, lane)
        clocks = np.empty_like(slots)
        consult_slots(handle, slots, clocks)
        return [0 if clock == NOBODY else self._as_action(clock) for clock in clocks.tolist()]

    def predict(
        self,
        observation: Any = None,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        """The controller's answer in every lane; arguments and result as Stable-Baselines3 has them.

        Raises:
            EnvironmentUsageError: before the first reset, or the answer is no action of the environment.
        """
        simulators = simulators_of(self._env)
        answers = [self._answer(lane, simulator) for lane, simulator in enumerate(simulators)]
        batched = len(simulators) > 1 or np.ndim(observation) > 1
        return np.asarray(answers if batched else answers[0], dtype=np.int64), state


class HighestClock:
    """Every clock at the top of the environment's list: no control."""

    name = "highest-clock"

    def __init__(self, env: Any) -> None:
        setting = setting_of(env)
        self._answer = np.full(setting.action_shape, len(setting.grid) - 1, dtype=np.int64)
        self._lanes = getattr(env, "num_envs", None)

    def predict(
        self, observation: Any = None, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[Any, Any]:
        """The top clock for every lane and slot; arguments and result as Stable-Baselines3 has them."""
        if self._lanes is None and np.ndim(observation) < 2:
            return self._answer.copy(), state
        return np.repeat(self._answer[None], self._lanes or len(observation), axis=0), state


def simulator_slots(env: Any, lane: int) -> Actions:
    """The instance in each slot of a lane of a cluster environment: int64[SLOTS], -1: none."""
    bare = getattr(env, "unwrapped", env)
    if hasattr(bare, "slots_of"):
        slots: Actions = bare.slots_of(lane)
        return slots
    found: Actions = env.get_attr("unwrapped")[lane].slots_of(0)
    return found


class PlannerPolicy:
    """A controller's placements as an agent of ``BiScale/Placement-v0``: its plan, an instance at a time.

    Args:
        controller: installed name, ``module:Class``, or a controller.
        env: the environment; it may be wrapped.
        settings: the controller's keyword settings, where it is named.

    Raises:
        ControllerError: no such controller, or it does not take these settings.
        EnvironmentUsageError: another environment.
    """

    def __init__(self, controller: str | Controller, env: Any, settings: dict[str, Any] | None = None) -> None:
        self._controller = make_controller(controller, settings) if isinstance(controller, str) else controller
        self.name = self._controller.name
        if not isinstance(env.unwrapped, PlacementEnv):
            raise EnvironmentUsageError(f"{env!r} is no Placement environment")
        self._env: PlacementEnv = env.unwrapped
        self._planned: tuple[Any, int, list[int]] | None = None

    def _plan(self) -> list[int]:
        env = self._env
        assert env.demand is not None
        placement = self._controller.plan(env.demand.context(env.window, env.placement))
        numbers = {(row.phase, row.tp, row.pp, row.clock_mhz): number for number, row in enumerate(env.classes)}
        actions = []
        for spec in placement.instances:
            kind = (spec.phase, spec.tp, spec.pp, spec.clock_mhz)
            if kind not in numbers:
                raise EnvironmentUsageError(
                    f"controller {self.name!r} places {replace(spec, weight=1.0)}, which is no class of the environment"
                )
            actions.append(numbers[kind])
        return [*actions, env.commit]

    def predict(
        self, observation: Any = None, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[Any, Any]:
        """The next instance of the plan, or the commit; arguments and result as Stable-Baselines3 has them.

        Raises:
            EnvironmentUsageError: before the first reset, or the plan holds an instance of no class.
        """
        env = self._env
        if env.episode is None:
            raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
        if self._planned is None or self._planned[0] is not env.episode or self._planned[1] != env.window:
            self._planned = (env.episode, env.window, self._plan())
        action = np.int64(self._planned[2][len(env.chosen)])
        return (action if np.ndim(observation) < 2 else np.array([action])), state
