"""``BiScale/Placement-v0``: the placement of the next window, an instance at a time; ``commit`` plays the window."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import ConfigError, validate
from biscale_gym.control.controllers import Controller, make_controller
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.episodes import Episode, EpisodeSource
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.lanes import overdue
from biscale_gym.envs.layout import numbered
from biscale_gym.envs.placement_choice import WindowView, placement_choice
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
from biscale_gym.envs.setting import decided
from biscale_gym.envs.settings import PlacementEnvSettings
from biscale_gym.envs.snapshots import Snapshots
from biscale_gym.envs.windows import WindowDemand
from biscale_gym.metrics import Counted, measure
from biscale_gym.planning.classes import InstanceClass

Observation = NDArray[np.float32]


class PlacementEnv(Snapshots, gymnasium.Env[Observation, Any]):
    """Tier 1 as an environment: an action adds an instance of a class, the last action commits and plays the window.

    Clocks within the window are another controller's. Observation: ``placement_entries``. Reward of a commit: -(joules
    of the window, GPUs of no instance included) / (all GPUs at the reference power for the window) - penalty x share of
    the window's requests that broke an SLO; adding an instance costs nothing. Class tables are measured, or read from
    disk, when the environment is made.

    Args:
        scenario: preset or path.
        render_mode: "ansi" or None.
        settings: values of ``PlacementEnvSettings``; ``overrides`` replaces scenario settings, dotted.

    Raises:
        ConfigError: an unknown scenario or setting, or a wrong value.
        PlanningError: no class meets the SLO.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012 - as Gymnasium declares it
    env_id = "BiScale/Placement-v0"
    _changing = ("episode", "demand", "placement", "window", "chosen", "_start", "_over")

    def __init__(self, scenario: str = "paper-67", render_mode: str | None = None, **settings: Any) -> None:
        overrides = settings.pop("overrides", None)
        self.scenario = load_scenario(scenario, overrides)
        self.settings = validate(PlacementEnvSettings, settings, f"environment {self.env_id}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"environment {self.env_id}: no render mode {render_mode!r}; valid: ansi, or none")
        self.render_mode = render_mode
        cluster = self.scenario.cluster
        self.profile = cluster.profile()
        self.source = EpisodeSource(self.scenario, self.profile, self.settings, lambda demand, instance: demand)
        if self.source.warmup_s >= self.scenario.window_s:
            raise ConfigError(
                f"environment {self.env_id}: warmup_s is {self.source.warmup_s:g}, expected less than the scenario's "
                f"window_s of {self.scenario.window_s:g}: the first window's placement is in force during the warm-up"
            )
        self.clocks_mhz = tuple(sorted({*self.scenario.clocks_mhz, self.scenario.top_clock_mhz}))
        self._tier2: Controller | None = None
        if self.settings.clocks != "hold":
            self._tier2 = make_controller(self.settings.clocks)
        self.choice, _ = placement_choice(self.scenario, self.profile, self.source.training(), self.settings)
        self.observation_entries = self.choice.entries
        self.observation_names = numbered(self.observation_entries)
        self.observation_space = spaces.Box(*self.choice.ranges(), dtype=np.float32)
        self.action_space = spaces.Discrete(len(self.classes) + 1)
        self.episode: Episode | None = None
        self.demand: WindowDemand | None = None
        self.placement: Placement | None = None
        self.window = 0
        self.chosen: list[int] = []
        self._simulator: Simulator | None = None
        self._start: InstanceLedger | None = None
        self._over = True

    @property
    def classes(self) -> tuple[InstanceClass, ...]:
        """The class table."""
        return self.choice.classes

    @property
    def commit(self) -> int:
        """The action that plays the window."""
        return self.choice.commit

    @property
    def simulator(self) -> Simulator:
        """The modelled cluster.

        Raises:
            EnvironmentUsageError: before the first commit of an episode.
        """
        if self._simulator is None:
            raise EnvironmentUsageError("no window has been committed yet")
        return self._simulator

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode, on an empty cluster.

        Args:
            seed: of everything random from now on.
            options: ``split``, ``trace_seed``, ``load``, ``start_s`` to be taken instead of drawn.

        Raises:
            ConfigError, TraceError: an unknown option, or an episode that cannot be.
        """
        super().reset(seed=seed)
        self._begin(self.source.draw(self.np_random, options))
        assert self.episode is not None
        return self._observe(), {**self.episode.info, **self._window_info()}

    def _begin(self, episode: Episode) -> None:
        self.episode = episode
        rate_rps = (self.settings.rate_rps or self.scenario.rate_rps) * episode.load
        if self.settings.trace is not None:
            rate_rps = episode.requests.rate_rps
        self.demand = WindowDemand(
            self.scenario, self.profile, self.source.training(), self.clocks_mhz, episode, rate_rps
        )
        self.placement, self.window, self.chosen = None, 0, []
        self._simulator, self._start, self._over = None, None, False

    def action_masks(self) -> NDArray[np.bool_]:
        """What may be done now: bool[classes + 1]; see ``PlacementChoice.masks``."""
        return self.choice.masks(self.chosen)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Add an instance, or commit and play the window.

        An action that its mask forbids changes nothing, costs a reward of -1 and is told in ``info["refused"]``.

        Raises:
            EnvironmentUsageError: the episode is over, or there is no such action.
        """
        if self._over:
            raise EnvironmentUsageError("the episode is over (or was never begun): call reset() first")
        number = int(action)
        if not 0 <= number <= self.commit:
            raise EnvironmentUsageError(
                f"action {number} is neither a class nor the commit; the nearest is "
                f"{min(max(number, 0), self.commit)}; valid: 0 to {self.commit}"
            )
        terms = dict.fromkeys(("energy_j", "violations", "cost", "completed", "dt_s"), 0.0)
        if not self.action_masks()[number]:
            info = {**terms, **self._window_info(), "refused": True}
            return self._observe(), -1.0, False, False, info
        if number != self.commit:
            self.chosen.append(number)
            return self._observe(), 0.0, False, False, {**terms, **self._window_info(), "refused": False}
        reward, over, info = self._play()
        if over:
            info["episode_metrics"] = self._metrics()
        return self._observe(), reward, False, over, info

    def _policies(self) -> tuple[Any, Any]:
        assert self.demand is not None
        if self._tier2 is None:
            return None, None
        return self._tier2.policies(self.demand.context(self.window, self.placement))

    def _open(self, placement: Placement) -> Simulator:
        assert self.episode is not None
        drawn = self.episode.profile is not self.profile
        return Simulator(
            self.scenario.cluster,
            self.episode.profile,
            placement,
            self.episode.requests,
            self.clocks_mhz,
            self.scenario.slo,
            self.episode.cluster_seed,
            predicted=self.profile if drawn else None,
            switching=self.episode.switching,
        )

    def _play(self) -> tuple[float, bool, dict[str, Any]]:
        """Put the placement in force and serve its window; returns reward, whether it was the last, and info."""
        assert self.episode is not None
        assert self.demand is not None
        placement = self.choice.placed(self.chosen)
        if self._simulator is None:
            self._simulator = self._open(placement)
            self._simulator.set_policies(*self._policies())
            if self.episode.warmup_s > 0.0:
                self._simulator.run(self.episode.warmup_s)
            self._start = self._simulator.instances()
        elif placement != self.placement:
            self._simulator.reconfigure(placement)
        simulator = self._simulator
        self.placement = placement
        before, counted = simulator.instances(), self._broken()
        arrived_before, finished_before, from_s = (
            int(simulator.state.glob[0]["arrived"]),
            int(simulator.state.glob[0]["finished"]),
            simulator.now_s,
        )
        borders = [*self.demand.borders_s, self.episode.end_s]
        simulator.run(borders[self.window + 1])
        self.window += 1
        self._over = self.window + 1 == len(borders)
        after = simulator.instances().since(before)
        broken = self._broken() - counted + (overdue(simulator.state) if self._over else 0)
        glob = simulator.state.glob[0]
        energy_j = after.phase_energy_j(True) + after.phase_energy_j(False) + after.unallocated_j
        dt_s, arrived = simulator.now_s - from_s, int(glob["arrived"]) - arrived_before
        whole_j = self.settings.reference_w_per_gpu * self.scenario.cluster.gpus * dt_s
        reward = -energy_j / whole_j - self.settings.violation_penalty * broken / max(1, arrived)
        info = {
            "energy_j": energy_j,
            "prefill_energy_j": after.phase_energy_j(True),
            "decode_energy_j": after.phase_energy_j(False),
            "unallocated_energy_j": after.unallocated_j,
            "violations": float(broken),
            "cost": broken / max(1, arrived),
            "completed": float(int(glob["finished"]) - finished_before),
            "dt_s": dt_s,
            "placement": placement.describe(),
            "refused": False,
            **self._window_info(),
        }
        self.chosen = []
        return reward, self._over, info

    def _broken(self) -> int:
        """Phases of requests that broke their SLO, and rejected requests, so far."""
        state = self.simulator.state
        return int(state.inst["late"].sum() + state.glob[0]["rejected"])

    def _window_info(self) -> dict[str, Any]:
        now_s = self._simulator.now_s if self._simulator is not None else 0.0
        return {"window": self.window, "instances": len(self.chosen), "now_s": now_s}

    def _metrics(self) -> dict[str, float]:
        assert self.episode is not None
        assert self._start is not None
        scenario, simulator = self.scenario, self.simulator
        requests = decided(simulator.requests(), scenario.slo, simulator.now_s)
        counted = Counted(self.episode.warmup_s, self.episode.end_s, simulator.instances().since(self._start))
        overhead_s = scenario.cluster.serving_overhead_ms * 1e-3
        row = measure(requests, counted, scenario.slo, scenario.tpot_definition, overhead_s).row
        return {name: float(value) for name, value in row.items() if np.isfinite(value)}

    def _view(self) -> WindowView:
        demand = self.demand
        assert demand is not None
        return WindowView(
            share=self.window / len(demand.borders_s),
            mean_rate_rps=demand.mean_rate_rps,
            past_rps=demand.past_rps(self.window),
            last_arrivals_s=demand.last_arrivals_s(self.window),
            window_s=self.scenario.window_s,
            previous=self.placement,
        )

    def _observe(self) -> Observation:
        return self.choice.observe(self._view(), self.chosen)

    def render(self) -> str | None:
        """A line: the window, what is chosen for it, and what may still be added."""
        if self.render_mode != "ansi":
            return None
        chosen = self.choice.placed(self.chosen).describe() if self.chosen else "nothing yet"
        return f"window {self.window}: {chosen}; {int(self.action_masks()[:-1].sum())} classes still fit"

    def saved(self) -> Saved:
        """The episode as it stands, and all that decides those after it.

        Raises:
            EnvironmentUsageError: before the first reset.
        """
        if self.episode is None:
            raise EnvironmentUsageError("the environment has not been reset yet: call reset() first")
        values = {
            "generator": saved_generator(self.np_random),
            "episode": self.episode.info,
            "placement": saved_placement(self.placement),
            "window": self.window,
            "chosen": list(self.chosen),
            "over": self._over,
            "start": None if self._start is None else saved_ledger(self._start),
        }
        parts = {"own": Saved({}, values)}
        if self._simulator is not None:
            parts["simulator"] = saved_simulators([self._simulator])
        return joined(parts)

    def restore_saved(self, saved: Saved) -> None:
        """Go on from what ``saved`` kept of an environment made with the same arguments, in this or another process."""
        told = saved.under("own").values
        self.np_random = restored_generator(told["generator"])
        self._begin(self.source.draw(np.random.default_rng(0), told["episode"]))
        placement = restored_placement(told["placement"])
        if placement is not None:
            # The policies are those of the first window, as ``_play`` set them.
            self._simulator = self._open(placement)
            self._simulator.set_policies(*self._policies())
            restore_simulators([self._simulator], saved.under("simulator"))
            self._start = restored_ledger(told["start"])
        self.placement, self.window = placement, told["window"]
        self.chosen, self._over = list(told["chosen"]), told["over"]


def placement_vector_env(num_envs: int = 1, **settings: Any) -> SyncVectorEnv:
    """Placement environments side by side: a window is long enough that no more is gained by stepping them at once."""
    return SyncVectorEnv([partial(PlacementEnv, **settings)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
