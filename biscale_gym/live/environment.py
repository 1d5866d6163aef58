"""``BiScale/Live-v0``: ``BiScale/Cluster-v0`` on running vLLM workers, in real time.

Spaces, reward and info are Cluster-v0's; the observation goes through its compiled code (``live.mirror``). A client
thread replays the episode's trace open loop, whatever the agent does; a step asks the workers for clocks and waits for
the end of the control interval.
"""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import Phase, Placement
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import ConfigError, load_preset
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.rollout import Timeline
from biscale_gym.envs import cluster_lanes as lanes
from biscale_gym.envs.cluster import ClusterSetting
from biscale_gym.envs.episodes import Episode
from biscale_gym.envs.errors import EnvironmentUsageError, no_render_mode, refused_action
from biscale_gym.live.episode_records import EpisodeRecord
from biscale_gym.live.errors import LiveError
from biscale_gym.live.messages import Variant
from biscale_gym.live.mirror import Seen, mirror, mirror_requests
from biscale_gym.live.pool import Pool, clock_mode
from biscale_gym.live.replay import Outcome, Replay
from biscale_gym.live.settings import LiveEnvSettings, LiveSettings
from biscale_gym.live.vllm_adapter.install import require_vllm, versions

Observation = npt.NDArray[np.float32]
LOOK_S = 0.05
"""How often a waiting step looks whether the workers are all right."""


class LiveSetting(ClusterSetting):
    """A cluster whose instances are live workers."""

    env_id = "BiScale/Live-v0"
    settings_type = LiveEnvSettings

    def __init__(self, scenario: str, settings: dict[str, Any]) -> None:
        super().__init__(scenario, settings)
        if any(spec.pp > 1 for spec in self.placement.instances):
            raise ConfigError(
                f"environment {self.env_id}: scenario {scenario!r} has pipelined instances "
                f"({self.placement.describe()}); live workers have one stage"
            )
        self.workers = load_preset(LiveSettings, "live", self.settings.workers)
        idle_gpus = self.scenario.cluster.gpus - self.placement.gpus
        if self.workers.device.kind == "nvml" and idle_gpus:
            raise ConfigError(
                f"environment {self.env_id}: {idle_gpus} GPUs of scenario {scenario!r} belong to no instance: "
                "their joules would be modelled among measured ones; give the cluster as many as its placement takes"
            )
        self.workers.deal(self.scenario.placement)
        if self.settings.governor is not None:
            Variant.parsed(self.settings.governor).make()

    @property
    def governed(self) -> tuple[Phase, ...]:
        """Phases whose clocks are a governor's."""
        governed: tuple[Phase, ...] = self.settings.governed
        return governed if self.settings.governor is not None else ()

    def blank(self, episode: Episode) -> Simulator:
        """A simulator of the placement that has not run; workers are mirrored into it."""
        return self._new_simulator(episode, self.placement, None)

    def context(self) -> PlanContext:
        """What governors know."""
        return PlanContext(
            scenario=self.scenario,
            profile=self.profile,
            training=self.source.training(),
            mean_rate_rps=self.settings.rate_rps or self.scenario.rate_rps,
            clocks_mhz=self.clocks_mhz,
        )

    def chosen_mhz(self, action: Any, slots: npt.NDArray[np.int64]) -> dict[int, int]:
        """An action's clock by instance.

        Args:
            action: int[SLOTS], indices into the grid; those of empty slots are ignored, but must be indices.
            slots: int64[SLOTS], the instance in each slot, -1: none.

        Raises:
            EnvironmentUsageError: it is no action; the nearest is named.
        """
        chosen = np.asarray(action)
        if chosen.shape != self.action_shape or chosen.dtype.kind not in "iu":
            raise EnvironmentUsageError(
                f"action {action!r} is no action: expected {self.action_shape[0]} whole numbers, a clock per slot"
            )
        if chosen.min() < 0 or chosen.max() >= len(self.grid):
            raise refused_action(action, self.scenario.clocks_mhz)
        return {int(slots[slot]): self.scenario.clocks_mhz[chosen[slot]] for slot in np.flatnonzero(slots >= 0)}


class LiveEnv(gymnasium.Env[Observation, Any]):
    """vLLM workers that serve a scenario's workload in real time.

    Workers start at the first ``reset`` and serve until ``close``, which gives their clocks back; so does any error.
    Interval agents act through ``step``; controllers that decide before every batch run as governors within the
    workers (``governor``).

    Args:
        scenario: preset or path; its placement says which workers there are.
        render_mode: None; there is nothing to render.
        settings: values of ``LiveEnvSettings``; ``overrides`` replaces scenario settings, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, a wrong value, or a scenario without a placement.
        ControllerError: no such governor.
        LiveError: vLLM is not installed here, or not a version that this was tested with.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it
    _in_time: ClassVar[dict[str, float]] = {"overrun_s": 0.0, "intervals_missed": 0}

    def __init__(self, scenario: str = "live-smoke", render_mode: str | None = None, **settings: Any) -> None:
        if render_mode is not None:
            raise no_render_mode(self.metadata)
        self.setting = LiveSetting(scenario, settings)
        require_vllm(self.setting.workers.engine)
        self.render_mode = None
        self.observation_space = self.setting.observation_space
        self.action_space = self.setting.action_space
        self.episode: Episode | None = None
        self._pool: Pool | None = None
        self._replay: Replay | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        self._cluster: Simulator | None = None
        self._start: InstanceLedger | None = None
        self._lane = np.zeros(1, self.setting.lane_dtype)
        self._obs: Observation = np.zeros(self.setting.observation_shape, np.float32)
        self._terms = np.zeros(self.setting.terms)
        self._over = True
        self._tick = 0
        self._overruns_s: list[float] = []
        self._missed = 0
        self._actions = hashlib.sha256()
        self._timeline = Timeline()

    @property
    def observation_names(self) -> list[str]:
        """A name for every number of the observation, as in ``BiScale/Cluster-v0``."""
        return self.setting.observation_names

    @property
    def placement(self) -> Placement:
        """The scenario's: a worker per instance."""
        return self.setting.placement

    @property
    def pool(self) -> Pool:
        """The workers.

        Raises:
            EnvironmentUsageError: before the first reset, or after ``close``.
        """
        if self._pool is None:
            raise EnvironmentUsageError("the environment has no workers yet (or any more): call reset() first")
        return self._pool

    @property
    def simulator(self) -> Simulator:
        """There is none to be played on.

        Raises:
            EnvironmentUsageError: always.
        """
        raise EnvironmentUsageError(
            "BiScale/Live-v0 has no model behind it; a controller acts on it as a governor: "
            'make it with governor="biscale", say'
        )

    # -- episodes ------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode: workers are started or reused, and serve the warm-up under held clocks.

        An episode in progress is given up.

        Args: as of ``BiScale/Cluster-v0``.

        Raises:
            ConfigError, TraceError: an unknown option, or an episode that cannot be.
            LiveError: a worker does not come up, or died more often than it may. The environment is closed then.
        """
        super().reset(seed=seed)
        self.episode = self.setting.source.draw(self.np_random, options)
        try:
            return self._begin(self.episode)
        except BaseException:
            self.close()
            raise

    def _begin(self, episode: Episode) -> tuple[Observation, dict[str, Any]]:
        self._end_replay()
        setting, settings = self.setting, self.setting.settings
        out = Path(settings.out)
        if self._pool is None:
            self._pool = Pool(setting.scenario, setting.workers, out)
        self._cluster = setting.blank(episode)
        self._record = EpisodeRecord(out)
        held_mhz = {
            worker.setup.name: spec.clock_mhz
            for worker, spec in zip(self._pool.workers, setting.placement.instances, strict=True)
        }
        self._replay = Replay(
            self._pool,
            episode.requests,
            settings.governor,
            setting.context(),
            self._record.folder,
            episode.cluster_seed,
            governed=setting.governed,
            duration_s=episode.end_s,
            held_mhz=held_mhz,
            watched=True,
        )
        self._outcome = self._failure = None
        self._thread = threading.Thread(target=self._serve, args=(self._replay,), name="client", daemon=True)
        self._thread.start()
        while not self._replay.started.wait(LOOK_S):
            self._check()
        self._wait_until(episode.warmup_s)
        self._look()
        self._start = setting.begin(self._lane, self._cluster, episode)
        setting.first(self._cluster.handle(), self._lane, self._obs, self._terms)
        self._over, self._tick, self._missed, self._overruns_s = False, 0, 0, []
        self._actions, self._timeline = hashlib.sha256(), Timeline()
        return self._obs.copy(), {**episode.info, **self._info(), **self._in_time}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Ask for clocks, and wait for the end of the control interval.

        Intervals end at fixed times. An action that comes after the end of its interval is late (``overrun_s``): its
        step goes on to the next end that is still to come, and the ends in between are missed (``intervals_missed``).
        The last step also waits until the requests in flight are finished, at most ``drain_limit_s``; what is spent
        meanwhile is in no step and no figure.

        Raises:
            EnvironmentUsageError: the episode is over, or the action is no index of a clock.
            LiveError: a worker died more often than it may. The environment is closed then.
        """
        if self._over:
            raise EnvironmentUsageError("the episode is over (or was never begun): call reset() first")
        chosen_mhz = self.setting.chosen_mhz(action, self._lane[0]["slots"])
        try:
            return self._step(action, chosen_mhz)
        except BaseException:
            self.close()
            raise

    def _step(self, action: Any, chosen_mhz: dict[int, int]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        assert self._replay is not None
        assert self._cluster is not None
        assert self.episode is not None
        lane, replay = self._lane[0], self._replay
        asked_s = self._now_s()
        for number, worker in enumerate(self.pool.workers):
            if worker.setup.phase not in self.setting.governed:
                replay.hold(worker, chosen_mhz[number])
        interval_s, end_s = float(lane["interval_s"]), self.episode.end_s
        self._tick += 1
        overrun_s = max(0.0, asked_s - (float(lane["start_s"]) + self._tick * interval_s))
        missed = 0 if overrun_s == 0.0 else int(overrun_s // interval_s) + 1
        self._tick += missed
        until_s = min(float(lane["start_s"]) + self._tick * interval_s, end_s)
        self._wait_until(until_s)
        over = until_s >= end_s
        self._look()
        if over:
            mirror_requests(self._cluster, replay.ledger(), replay.counts()["arrived"])
        lanes.tell_cluster(self._cluster.handle(), self._lane, self.setting.params, over, self._obs, self._terms)
        self._actions.update(np.asarray([self._tick, *np.asarray(action).tolist()], np.int64).tobytes())
        self._timeline.add(self._cluster)
        self._overruns_s.append(overrun_s)
        self._missed += missed
        info = {**self._info(), "overrun_s": overrun_s, "intervals_missed": missed}
        if over:
            self._over = True
            info["episode_metrics"] = self._end_episode(self.episode)
        return self._obs.copy(), float(self._terms[self.setting.reward_column]), False, over, info

    def _info(self) -> dict[str, Any]:
        workers = self.pool.workers
        return {**self.setting.info(self._terms), "energy_source": workers[0].source, "clock_mode": clock_mode(workers)}

    def _end_episode(self, episode: Episode) -> dict[str, float]:
        """Wait for the drain; figures, and the record of the episode."""
        assert self._cluster is not None
        assert self._start is not None
        assert self._replay is not None
        assert self._thread is not None
        energy = self._cluster.instances().since(self._start)
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
        self._check()
        assert self._outcome is not None
        figures = self.setting.figures(self._outcome.requests, energy, episode)
        late = [overrun_s for overrun_s in self._overruns_s if overrun_s > 0.0]
        figures |= {
            **self._outcome.figures(),
            "intervals": len(self._overruns_s),
            "intervals_late": len(late),
            "intervals_missed": self._missed,
            "overrun_s": sum(late),
            "overrun_max_s": max(late, default=0.0),
            "drain_s": self._outcome.end_s - episode.end_s,
        }
        actions, timeline = self._actions.hexdigest()[:16], self._timeline.arrays(self._cluster.lanes)
        engine = versions(self.setting.workers.engine)
        self._record.write(self.setting, episode, figures, self._outcome, engine, actions, timeline)
        return figures

    # -- the workers ---------------------------------------------------------------------------------------------------

    def _serve(self, replay: Replay) -> None:
        """The client thread."""
        try:
            self._outcome = replay.run()
        except BaseException as error:
            self._failure = error

    def _check(self) -> None:
        """Raise what the client thread died of."""
        if self._failure is not None:
            raise LiveError(f"serving broke down: {self._failure}") from self._failure

    def _now_s(self) -> float:
        assert self._replay is not None
        return time.monotonic() - self._replay.origin_s

    def _wait_until(self, at_s: float) -> None:
        while (left_s := at_s - self._now_s()) > 0.0:
            self._check()
            time.sleep(min(left_s, LOOK_S))
        self._check()

    def _look(self) -> None:
        """Mirror the workers as they are now."""
        assert self._cluster is not None
        replay = self._replay
        assert replay is not None
        with replay.lock:
            now_s, counts = self._now_s(), replay.counts()
            seen = []
            for worker in self.pool.workers:
                tally, status = replay.tallies[worker.setup.name], worker.status
                seen.append(
                    Seen(
                        status,
                        tally.routed,
                        tally.completed,
                        tally.late,
                        worker.kv_capacity_tokens,
                        tuple(tally.lost),
                        tally.sent[int(status.routed) :],
                    )
                )
        mirror(self._cluster, seen, counts, now_s, replay.origin_s)

    def _end_replay(self) -> None:
        """End the client, if it runs."""
        if self._thread is not None and self._replay is not None:
            self._replay.stop()
            self._thread.join()
        self._thread = self._replay = None

    def close(self) -> None:
        """Give clocks back and end the workers; another ``reset`` starts new ones."""
        self._over = True
        try:
            self._end_replay()
        finally:
            if self._pool is not None:
                self._pool.close()
                self._pool = None
