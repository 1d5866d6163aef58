"""Environments with a fault each, for the tests of the checks; importing this registers ``Broken/NAME-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from biscale_gym.envs.instance import PrefillEnv, PrefillVectorEnv


class LeakyReset(PrefillEnv):
    resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        obs, info = super().reset(seed=seed, options=options)
        self.resets += 1
        if self.resets > 1:
            obs[12] += np.float32(0.001)
        return obs, info


class DeafToSeeds(PrefillEnv):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=None, options=options)


class LeftoverReward(PrefillEnv):
    """The first reward of an episode holds the rest of the one before."""

    left = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.at = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.at += 1
        if self.at == 3:
            reward += self.left
            self.left = 1e-12
        return obs, reward, terminated, truncated, info


class HashSeeded(PrefillEnv):
    """Draws by Python's hash, which differs between processes."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=None if seed is None else hash(f"episode {seed}") % 2**31, options=options)


class _Told(PrefillEnv):
    """Changes what a step tells."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return self.told(obs, reward, terminated, truncated, info)

    def told(self, *told: Any) -> Any:
        raise NotImplementedError


class WrongEnergy(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, terminated, truncated, {**info, "energy_j": info["energy_j"] * (1.0 + 1e-6)}


class EnergyOfTheLastStepIsLost(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, terminated, truncated, {**info, "energy_j": 0.0} if truncated else info


class NoViolations(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, terminated, truncated, {**info, "violations": 0.0}


class CountsTwice(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, terminated, truncated, {**info, "completed": 2.0 * info["completed"]}


class WrongTime(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, terminated, truncated, {**info, "dt_s": info["dt_s"] + 1e-6}


class Terminates(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, reward, truncated, False, info


class OutsideItsSpace(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        obs[7] = 1.5
        return obs, reward, terminated, truncated, info


class NotANumber(_Told):
    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        return obs, float("nan"), terminated, truncated, info


class LosesRequests(_Told):
    """Two requests vanish from the ledger without being counted."""

    def told(self, obs: Any, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> Any:
        if truncated:
            requests = self.simulator.state.req
            done = np.flatnonzero(requests["status"] == requests["status"].max())[:2]
            requests["status"][done] = 0
        return obs, reward, terminated, truncated, info


class SnapshotWithoutItsLane(PrefillEnv):
    _changing = ("episode", "_start", "_obs", "_terms", "_over")


class SnapshotWithoutItsGenerator(PrefillEnv):
    def restore(self, snapshot: Any) -> None:
        drawn = self.np_random.bit_generator.state
        super().restore(snapshot)
        self.np_random.bit_generator.state = drawn


class SnapshotThatDisturbs(PrefillEnv):
    def snapshot(self) -> Any:
        self._lane["at_s"] -= 1e-9
        return super().snapshot()


class SnapshotOnce(PrefillEnv):
    """What is restored is the snapshot itself, so playing on spoils it."""

    def restore(self, snapshot: Any) -> None:
        super().restore(snapshot)
        for name, value in snapshot.parts.items():
            setattr(self, name, value)


class ShiftedSeeds(PrefillVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=None if seed is None else [seed + 2 * lane for lane in range(self.num_envs)])


class MixedRewards(PrefillVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        return obs, rewards[::-1].copy(), terminated, truncated, infos


class FinalObsOfTheNewEpisode(PrefillVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        for lane in np.flatnonzero(truncated):
            infos["final_obs"][lane] = obs[lane]
        return obs, rewards, terminated, truncated, infos


class NoFinalMetrics(PrefillVectorEnv):
    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = super().step(actions)
        infos.get("final_info", {}).pop("episode_metrics", None)
        infos.get("final_info", {}).pop("_episode_metrics", None)
        return obs, rewards, terminated, truncated, infos


class SameSeedAfterReset(PrefillVectorEnv):
    """The second episode of a lane is drawn anew from the generator's start."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.first_seed = seed
        return super().reset(seed=seed, options=options)

    def _begin(self, lane: int, options: Any) -> Any:
        self._generators[lane] = np.random.default_rng(self.first_seed + lane)
        return super()._begin(lane, options)


SINGLE = (
    LeakyReset,
    DeafToSeeds,
    LeftoverReward,
    HashSeeded,
    WrongEnergy,
    EnergyOfTheLastStepIsLost,
    NoViolations,
    CountsTwice,
    WrongTime,
    Terminates,
    OutsideItsSpace,
    NotANumber,
    LosesRequests,
    SnapshotWithoutItsLane,
    SnapshotWithoutItsGenerator,
    SnapshotThatDisturbs,
    SnapshotOnce,
)
VECTOR = (ShiftedSeeds, MixedRewards, FinalObsOfTheNewEpisode, NoFinalMetrics, SameSeedAfterReset)

for _fault in SINGLE:
    gymnasium.register(f"Broken/{_fault.__name__}-v0", entry_point=f"{__name__}:{_fault.__name__}")
for _vector in VECTOR:
    gymnasium.register(
        f"Broken/{_vector.__name__}-v0",
        entry_point="biscale_gym.envs.instance:PrefillEnv",
        vector_entry_point=f"{__name__}:{_vector.__name__}",
    )
