"""Stable-Baselines3 on the native vector environments: ``make_vec_env``.

SB3 takes no ``gymnasium.vector`` environment. Its own ``make_vec_env`` would step one single environment after another
from Python; here one compiled call steps all lanes.

    from stable_baselines3 import PPO
    from biscale_gym.sb3 import make_vec_env

    PPO("MlpPolicy", make_vec_env("BiScale/Prefill-v0", 64, seed=0), n_steps=128, batch_size=2048, n_epochs=4)

This is the only module that imports SB3, and with it torch (extra ``train``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray

from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.vector import NativeVectorEnv
from biscale_gym.envs.vector_info import lane_info

try:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn
except ImportError as error:
    raise ImportError(
        f"biscale_gym.sb3 needs Stable-Baselines3 and torch ({error}): pip install 'biscale-gym[train]'"
    ) from error

_OF_A_LANE = {
    "simulator": "simulators",
    "episode": "episodes",
}
"""Attributes of a single environment that differ between lanes, and the vector environment's lists of them."""
_OF_ALL = {"observation_space": "single_observation_space", "action_space": "single_action_space"}
"""Attributes of a single environment that the vector environment has by another name."""


class GymnasiumVecEnv(VecEnv):
    """A vector environment of this project as SB3 knows them; nothing is copied per lane.

    At an episode's end the lane's info holds ``terminal_observation``, ``TimeLimit.truncated`` (always True),
    ``episode_metrics`` and the last step's terms.

    Args:
        envs: a native vector environment, or Gymnasium's SyncVectorEnv; ended lanes are reset within the same step.
        step_infos: whether the infos of other steps hold their terms, too. They are empty otherwise: making the
            dictionaries takes longer than stepping the lanes.
        keep_infos: whether Gymnasium's own infos of the last step, an array per term, stay in ``infos``.
    """

    def __init__(
        self,
        envs: gymnasium.vector.VectorEnv[Any, Any, Any],
        step_infos: bool = False,
        keep_infos: bool = False,
    ) -> None:
        self.envs = envs
        self.step_infos = step_infos
        self.keep_infos = keep_infos
        self.spec = envs.spec
        self.infos: dict[str, Any] = {}
        """With ``keep_infos``; an ended lane's may be of its new episode."""
        self._actions: NDArray[Any] | None = None
        self._begun = False
        # What a native step tells of every lane; others tell of each lane what they like.
        self._terms = tuple(envs.setting.term_columns) if isinstance(envs, NativeVectorEnv) else ()
        self._quietly: Callable[[Any], Any] | None = None
        if isinstance(envs, NativeVectorEnv) and not (step_infos or keep_infos):
            self._quietly = envs.step_quietly
        self._nothing: list[dict[str, Any]] = [{} for _ in range(envs.num_envs)]
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> VecEnvObs:
        """Begin an episode in every lane, with the seeds and options set before; both serve once.

        Returns:
            float32[N, size].
        """
        seeds = list(self._seeds)
        waiting = list(range(self.num_envs))
        obs: Any = None
        if not self._begun and isinstance(self.envs, SyncVectorEnv):
            # It has no observation of lanes that were never reset, and a reset of some asks for all.
            self.envs.reset(seed=seeds)
        self._begun = True
        while waiting:
            # Lanes with the same options in one call: mostly all of them.
            options = self._options[waiting[0]]
            alike = [lane for lane in waiting if self._options[lane] == options]
            waiting = [lane for lane in waiting if lane not in alike]
            given = dict(options)
            if len(alike) < self.num_envs:
                given["reset_mask"] = np.isin(np.arange(self.num_envs), alike)
            obs, infos = self.envs.reset(seed=seeds, options=given)  # type: ignore[arg-type]
            for lane in alike:
                self.reset_infos[lane] = lane_info(infos, lane)
        self._reset_seeds()
        self._reset_options()
        return obs  # type: ignore[no-any-return]

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions of ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every lane.

        Returns:
            float32[N, size], float32[N], bool[N], N infos. Infos that tell nothing are the same objects in every step;
            what somebody writes into one is gone with the next step.
        """
        if self._quietly is not None:
            obs, rewards, ended, infos = self._quietly(self._actions)
        else:
            obs, rewards, _, ended, infos = self.envs.step(self._actions)
            rewards = rewards.astype(np.float32)
        if self.keep_infos:
            self.infos = infos
        if self.step_infos:
            told = [lane_info(infos, lane) for lane in range(self.num_envs)]
        else:
            if any(self._nothing):
                self._nothing = [{} for _ in range(self.num_envs)]
            told = self._nothing
        if infos:
            told = told.copy()
            for lane in np.flatnonzero(ended):
                told[lane] = self._terminal(lane_info(infos, int(lane)), int(lane))
        return obs, rewards, ended, told

    def _terminal(self, told: dict[str, Any], lane: int) -> dict[str, Any]:
        """The last info of an ended lane's episode; what else its info tells is of the new one."""
        last: dict[str, Any] = told.pop("final_info")
        last["terminal_observation"] = told.pop("final_obs")
        last["TimeLimit.truncated"] = True
        self.reset_infos[lane] = {name: value for name, value in told.items() if name not in self._terms}
        return last

    def close(self) -> None:
        """Close the vector environment."""
        self.envs.close()

    def _chosen(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each chosen lane's environment: its own ``simulator`` and ``episode``; others are shared.

        Raises:
            AttributeError: there is none.
        """
        chosen = self._chosen(indices)
        if isinstance(self.envs, SyncVectorEnv):
            return [self.envs.envs[lane].get_wrapper_attr(attr_name) for lane in chosen]
        if attr_name in _OF_A_LANE:
            values = self._shared(_OF_A_LANE[attr_name])
            return [values[lane] for lane in chosen]
        return [self._shared(_OF_ALL.get(attr_name, attr_name))] * len(chosen)

    def _shared(self, name: str) -> Any:
        """An attribute of the vector environment: the outermost wrapper's that has one."""
        return getattr(self.envs, name) if hasattr(self.envs, name) else getattr(self.envs.unwrapped, name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the chosen lanes' environments; in a native vector environment they share it.

        Raises:
            EnvironmentUsageError: a shared one for some lanes only, or one that each lane's episode has of its own.
        """
        if isinstance(self.envs, SyncVectorEnv):
            for lane in self._chosen(indices):
                self.envs.envs[lane].set_wrapper_attr(attr_name, value)
            return
        if set(self._chosen(indices)) != set(range(self.num_envs)):
            raise EnvironmentUsageError(f"set_attr: lanes share {attr_name!r}; set it for all of them (indices=None)")
        if attr_name in _OF_A_LANE:
            raise EnvironmentUsageError(f"set_attr: {attr_name!r} belongs to each lane's episode and cannot be set")
        setattr(self.envs, _OF_ALL.get(attr_name, attr_name), value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """What a method of each chosen lane's environment returns, e.g. ``action_masks``.

        Of a native vector environment: the rows of what its own method of that name returns for all lanes.

        Raises:
            AttributeError: there is no such method.
            EnvironmentUsageError: it does not return one row per lane.
        """
        if isinstance(self.envs, SyncVectorEnv):
            methods = self.get_attr(method_name, indices)
            return [method(*method_args, **method_kwargs) for method in methods]
        rows = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        if not isinstance(rows, (Sequence, np.ndarray)) or len(rows) != self.num_envs:
            raise EnvironmentUsageError(
                f"env_method: {method_name!r} does not return a row for each of the {self.num_envs} lanes"
            )
        return [rows[lane] for lane in self._chosen(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """False for each chosen lane: lanes have no wrappers of their own."""
        return [False] * len(self._chosen(indices))

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """An RGB image of each lane; None where ``render_mode`` is not ``rgb_array``."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"get_images: render_mode is {self.render_mode!r}, expected 'rgb_array'", stacklevel=2)
            return [None] * self.num_envs
        images: Any = self.envs.render()
        return list(images)


def make_vec_env(
    env_id: str, n_envs: int = 1, seed: int | None = None, step_infos: bool = False, **env_kwargs: Any
) -> GymnasiumVecEnv:
    """A VecEnv for SB3 over an id's own vector environment.

    Args:
        env_id: e.g. ``BiScale/Prefill-v0``.
        n_envs: lanes.
        seed: lane n begins with ``seed + n``; None: random.
        step_infos: whether every step's info holds its terms (energy, violations, …), at some cost in speed.
        env_kwargs: settings of the environment.

    Raises:
        gymnasium.error.Error: the id is unknown, or has no vector environment.
        ConfigError: as the environment.
    """
    envs = gymnasium.make_vec(env_id, n_envs, vectorization_mode="vector_entry_point", **env_kwargs)
    vec_env = GymnasiumVecEnv(envs, step_infos)
    if seed is not None:
        vec_env.seed(seed)
    return vec_env
