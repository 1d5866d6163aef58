"""Many environments at once, of any setting: one compiled call steps them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from biscale_gym.cluster import handle
from biscale_gym.cluster.engine import DECISION
from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.pages import on_large_pages
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.errors import EnvironmentUsageError, refused_action
from biscale_gym.envs.saved import (
    Saved,
    joined,
    restore_simulators,
    restored_generator,
    restored_ledger,
    restored_placement,
    saved_generator,
    saved_ledger,
    saved_placement,
    saved_simulators,
)
from biscale_gym.envs.setting import Setting
from biscale_gym.envs.single import Observation

Actions = NDArray[np.int64]
LANES_PER_THREAD = 128
"""Fewer lanes are not worth a thread's start."""


class NativeVectorEnv(VectorEnv[Observation, Actions, Any]):
    """``num_envs`` independent environments; an ended one begins anew within the same step.

    Lane n with seed s is the single environment with seed s: same draws, same numbers, however many lanes there are and
    on however many threads.

    Args:
        num_envs: lanes.
        scenario: preset or path.
        threads: of the compiled step; None: as many as pay.
        render_mode: none is offered.
        settings: as of the single environment.

    Raises:
        ConfigError: as the single environment.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as Gymnasium declares it
    setting_type: ClassVar[type[Setting]]

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str = "paper-67",
        threads: int | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        if num_envs < 1:
            raise EnvironmentUsageError(f"num_envs is {num_envs}, expected at least 1")
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.setting = self.setting_type(scenario, settings)
        self.single_observation_space = self.setting.observation_space
        self.single_action_space = self.setting.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._parallel = (min(cores, num_envs // LANES_PER_THREAD) if threads is None else threads) > 1
        self.episodes: list[Episode | None] = [None] * num_envs
        self.placements: list[Placement] = [self.setting.placement] * num_envs
        self.simulators: list[Simulator | None] = [None] * num_envs
        self._starts: list[InstanceLedger | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._rooms: NDArray[np.uint8] | None = None
        self._handles = np.zeros((num_envs, handle.SIZE), np.int64)
        self._lanes = np.zeros(num_envs, self.setting.lane_dtype)
        self._obs = np.zeros((num_envs, *self.setting.observation_shape), np.float32)
        self._terms = np.zeros((num_envs, self.setting.terms))
        self._reached = np.zeros(num_envs, np.int64)
        self._everyone = np.ones(num_envs, np.bool_)
        self._mask_names = [f"_{name}" for name in self.setting.term_columns]
        self._begun = False

    def slots_of(self, lane: int) -> NDArray[np.int64]:
        """The instance in each slot of a lane of a cluster environment: int64[SLOTS], -1: none."""
        slots: NDArray[np.int64] = self._lanes[lane]["slots"].copy()
        return slots

    def _begin(self, lane: int, options: dict[str, Any] | None) -> dict[str, Any]:
        """A new episode of one lane, to its first decision; returns its info."""
        generator = self._generators[lane]
        assert generator is not None
        episode = self.setting.source.draw(generator, options)
        self.placements[lane] = self.setting.placement_of(episode)
        simulator = self.setting.simulator(episode, self.placements[lane])
        self._settle(lane, simulator)
        one = slice(lane, lane + 1)
        self._starts[lane] = self.setting.begin(self._lanes[one], simulator, episode)
        self._handles[lane] = simulator.handle()
        self.episodes[lane], self.simulators[lane] = episode, simulator
        self.setting.first(self._handles[lane], self._lanes[one], self._obs[lane], self._terms[lane])
        return episode.info

    def _settle(self, lane: int, simulator: Simulator) -> None:
        """Give a simulator its lane's room; the lane's last one, which somebody may still read, gets its own."""
        last = self.simulators[lane]
        if last is not None:
            last.settle(np.empty(last.room_bytes, np.uint8))
        if self._rooms is None:
            room_bytes = simulator.room_bytes
            self._rooms = on_large_pages(self.num_envs * room_bytes).reshape(self.num_envs, room_bytes)
        simulator.settle(self._rooms[lane])

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every lane.

        Args:
            seed: lane n gets ``seed + n``, or the n-th of a sequence; None: generators go on.
            options: as of the single environment; ``reset_mask`` bool[num_envs] names the lanes to reset.

        Raises:
            EnvironmentUsageError: seeds or mask of another length.
            ConfigError, TraceError: an unknown option, or an episode that cannot be.
        """
        seeds = [seed + lane if isinstance(seed, int) else None for lane in range(self.num_envs)]
        if seed is not None and not isinstance(seed, int):
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise EnvironmentUsageError(f"{len(seeds)} seeds for {self.num_envs} lanes")
        chosen = self._everyone
        if options is not None and "reset_mask" in options:
            options = dict(options)
            chosen = np.asarray(options.pop("reset_mask"), dtype=np.bool_)
            if chosen.shape != (self.num_envs,):
                raise EnvironmentUsageError(f"reset_mask has shape {chosen.shape}, expected ({self.num_envs},)")
        infos: dict[str, Any] = {}
        for lane in np.flatnonzero(chosen):
            if seeds[lane] is not None or self._generators[lane] is None:
                self._generators[lane], _ = seeding.np_random(seeds[lane])
            info = self._begin(int(lane), options)
            infos = self._add_info(infos, {**info, **self.setting.info(self._terms[lane])}, int(lane))
        self._begun = None not in self.simulators
        return self._obs.copy(), infos

    def step(
        self, actions: Actions
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Answer every lane's decision.

        Returns:
            float32[N, size], float64[N], bool[N], bool[N], info of arrays; an ended lane's last observation and info
            are in ``final_obs`` and ``final_info``.

        Raises:
            EnvironmentUsageError: a lane has never been reset, or an action is no clock index; no lane has moved then.
        """
        truncated = self._advance(actions)
        everyone = self._everyone.copy()
        infos: dict[str, Any] = {}
        columns = self._terms.T.copy()
        for (name, column), mask_name in zip(self.setting.term_columns.items(), self._mask_names, strict=True):
            infos[name], infos[mask_name] = columns[column], everyone
        rewards = columns[self.setting.reward_column].copy()
        never = np.zeros(self.num_envs, np.bool_)
        if truncated is None:
            return self._obs.copy(), rewards, never, never.copy(), infos
        self._end_episodes(truncated, infos)
        return self._obs.copy(), rewards, never, truncated, infos

    def step_quietly(
        self, actions: Actions
    ) -> tuple[Observation, NDArray[np.float32], NDArray[np.bool_], dict[str, Any]]:
        """As ``step`` for who reads nothing but what learning needs, which is faster.

        Returns:
            float32[N, size], float32[N], bool[N]: truncated, and an info of ended lanes alone.

        Raises: as ``step``.
        """
        truncated = self._advance(actions)
        rewards = self._terms[:, self.setting.reward_column].astype(np.float32)
        if truncated is None:
            return self._obs.copy(), rewards, np.zeros(self.num_envs, np.bool_), {}
        infos: dict[str, Any] = {}
        self._end_episodes(truncated, infos)
        return self._obs.copy(), rewards, truncated, infos

    def _advance(self, actions: Actions) -> NDArray[np.bool_] | None:
        """Step every lane; returns which of them ended, None where none did."""
        if not self._begun:
            raise EnvironmentUsageError("not every lane has been reset yet: call reset() first")
        chosen = np.ascontiguousarray(actions, dtype=np.int64)
        if chosen.shape != self.action_space.shape:
            raise EnvironmentUsageError(f"actions have shape {chosen.shape}, expected {self.action_space.shape}")
        ended = self.setting.step_all(
            self._parallel, self._handles, self._lanes, chosen, self._obs, self._terms, self._reached
        )
        if ended < 0:
            raise refused_action(chosen, self.setting.scenario.clocks_mhz)
        truncated = self._reached != DECISION if ended else None
        if self.setting.replans:
            self._turn_windows(self._everyone if truncated is None else ~truncated)
        return truncated

    def _turn_windows(self, going_on: NDArray[np.bool_]) -> None:
        """Let the lanes that stand at the border of a window change their placement."""
        for lane in np.flatnonzero(going_on & (self._lanes["at_s"] >= self._lanes["border_s"])):
            simulator, episode = self.simulators[lane], self.episodes[lane]
            assert simulator is not None
            assert episode is not None
            row = self._lanes[lane : lane + 1]
            placement = self.setting.turn(simulator, episode, self.placements[lane], row, self._obs[lane])
            self.placements[lane] = placement
            self._handles[lane] = simulator.handle()

    def _end_episodes(self, truncated: NDArray[np.bool_], infos: dict[str, Any]) -> None:
        """Report the lanes that ended, and begin anew there."""
        for lane in np.flatnonzero(truncated):
            simulator, episode, start = self.simulators[lane], self.episodes[lane], self._starts[lane]
            assert simulator is not None
            assert episode is not None
            assert start is not None
            metrics = self.setting.metrics(simulator, episode, start)
            final = {**self.setting.info(self._terms[lane]), "episode_metrics": metrics}
            last = {"final_obs": self._obs[lane].copy(), "final_info": final}
            self._add_info(infos, {**last, **self._begin(int(lane), None)}, int(lane))

    def saved(self) -> Saved:
        """Every lane in the middle of its episode, and all that decides the episodes after it.

        Raises:
            EnvironmentUsageError: a lane has never been reset.
        """
        if not self._begun:
            raise EnvironmentUsageError("not every lane has been reset yet: call reset() first")
        lanes = []
        simulators: list[Simulator] = []
        everything = zip(self._generators, self.episodes, self.placements, self.simulators, self._starts, strict=True)
        for generator, episode, placement, simulator, start in everything:
            assert generator is not None
            assert episode is not None
            assert simulator is not None
            assert start is not None
            simulators.append(simulator)
            lanes.append(
                {
                    "generator": saved_generator(generator),
                    "episode": episode.info,
                    "placement": saved_placement(placement),
                    "start": saved_ledger(start),
                }
            )
        rows = {"lanes": self._lanes.copy(), "obs": self._obs.copy(), "terms": self._terms.copy()}
        return joined({"rows": Saved(rows, {"lanes": lanes}), "simulators": saved_simulators(simulators)})

    def restore_saved(self, saved: Saved) -> None:
        """Go on from what ``saved`` kept of a vector made with the same arguments, in this or another process.

        Raises:
            EnvironmentUsageError: it had another number of lanes.
        """
        rows = saved.under("rows")
        lanes = rows.values["lanes"]
        if len(lanes) != self.num_envs:
            raise EnvironmentUsageError(f"{len(lanes)} lanes were saved, this vector has {self.num_envs}")
        simulators: list[Simulator] = []
        for lane, told in enumerate(lanes):
            self._generators[lane] = restored_generator(told["generator"])
            episode = self.setting.source.draw(np.random.default_rng(0), told["episode"])
            placement = restored_placement(told["placement"])
            assert placement is not None
            simulators.append(self.setting.simulator(episode, placement))
            self.episodes[lane], self.placements[lane] = episode, placement
            self._starts[lane] = restored_ledger(told["start"])
        restore_simulators(simulators, saved.under("simulators"))
        for lane, simulator in enumerate(simulators):
            self._settle(lane, simulator)
            self._handles[lane] = simulator.handle()
        self.simulators = list(simulators)
        self._lanes[:], self._obs[:], self._terms[:] = (rows.arrays[name] for name in ("lanes", "obs", "terms"))
        self._begun = True
