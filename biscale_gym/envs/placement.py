"""``BiScale/Placement-v0``: the placement of the next window, an instance at a time; ``commit`` plays the window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import PHASES, Placement, PlacementError, layout
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import ConfigError, validate
from biscale_gym.control.controllers import Controller, make_controller
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.cluster_layout import SLOTS_PER_PHASE
from biscale_gym.envs.episodes import Episode, EpisodeSource
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.lanes import overdue
from biscale_gym.envs.layout import numbered
from biscale_gym.envs.placement_layout import MOST_INSTANCES, PAST_WINDOWS, PEAKS_S, log_rate, placement_entries
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
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, fitting_degrees
from biscale_gym.planning.relaxation import usable_table

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
        self.classes = self._class_table()
        self.observation_entries = placement_entries(len(self.classes))
        self.observation_names = numbered(self.observation_entries)
        low = np.concatenate([np.full(entry.size, entry.low) for entry in self.observation_entries])
        high = np.concatenate([np.full(entry.size, entry.high) for entry in self.observation_entries])
        self.observation_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
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
    def commit(self) -> int:
        """The action that plays the window."""
        return len(self.classes)

    @property
    def simulator(self) -> Simulator:
        """The modelled cluster.

        Raises:
            EnvironmentUsageError: before the first commit of an episode.
        """
        if self._simulator is None:
            raise EnvironmentUsageError("no window has been committed yet")
        return self._simulator

    def _class_table(self) -> tuple[InstanceClass, ...]:
        cluster, settings, clocks = self.scenario.cluster, self.settings, tuple(self.scenario.clocks_mhz)
        measurement = Measurement(
            profile=self.profile,
            cluster=cluster,
            slo=self.scenario.slo,
            training=self.source.training(),
            headroom=settings.headroom,
            quantile=settings.quantile,
            requests_per_probe=settings.requests_per_probe,
            warmup_s=settings.probe_warmup_s,
            rate_tolerance=settings.rate_tolerance,
            seed=settings.table_seed,
            tpot_definition=self.scenario.tpot_definition,
        )
        columns = tuple(
            Column(phase, tp, 1, clocks)
            for phase in PHASES
            for tp in fitting_degrees(self.profile, phase, cluster.gpus_per_node)
        )
        table, _ = usable_table(measurement, columns)
        return tuple(table)

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

    def _placed(self, chosen: Sequence[int]) -> Placement:
        """The instances of the chosen classes: prefill first, large ones first; requests are shared by R_c."""
        rows = sorted(
            (self.classes[number] for number in chosen),
            key=lambda row: (PHASES.index(row.phase), -row.gpus, -row.clock_mhz),
        )
        return Placement(tuple(row.spec() for row in rows))

    def _fits(self, chosen: Sequence[int]) -> bool:
        cluster = self.scenario.cluster
        phases = [self.classes[number].phase for number in chosen]
        if any(phases.count(phase) > SLOTS_PER_PHASE for phase in PHASES):
            return False
        placement = self._placed(chosen)
        if placement.gpus > cluster.gpus:
            return False
        try:
            layout(placement, cluster.nodes, cluster.gpus_per_node)
        except PlacementError:
            return False
        return True

    def action_masks(self) -> NDArray[np.bool_]:
        """What may be done now: bool[classes + 1].

        A class fits if the GPUs of the nodes hold one more instance of it and leave room for the phase that has none;
        the commit is allowed once both phases have an instance.
        """
        masks = np.zeros(len(self.classes) + 1, dtype=np.bool_)
        phases = {self.classes[number].phase for number in self.chosen}
        smallest = {
            phase: min((row.gpus, number) for number, row in enumerate(self.classes) if row.phase == phase)[1]
            for phase in PHASES
        }
        fitting: dict[tuple[str, int], bool] = {}
        for number, row in enumerate(self.classes):
            kind = (row.phase, row.gpus)
            if kind not in fitting:
                missing = [smallest[phase] for phase in PHASES if phase not in {*phases, row.phase}]
                fitting[kind] = self._fits([*self.chosen, number, *missing])
            masks[number] = fitting[kind] and row.rate_rps > 0.0
        masks[self.commit] = len(phases) == len(PHASES)
        return masks

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
        placement = self._placed(self.chosen)
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

    def _counts(self, placement: Placement | None) -> NDArray[np.float64]:
        counts = np.zeros(len(self.classes))
        for spec in placement.instances if placement is not None else ():
            for number, row in enumerate(self.classes):
                if (row.phase, row.tp, row.pp, row.clock_mhz) == (spec.phase, spec.tp, spec.pp, spec.clock_mhz):
                    counts[number] += 1
        return counts

    def _past(self) -> tuple[list[float], list[float]]:
        """Mean rates of the last windows, latest first, and the last one's busiest stretches [requests/s]."""
        assert self.demand is not None
        window_s = self.scenario.window_s
        past = [self.demand.arrivals_s(number) for number in range(max(0, self.window - PAST_WINDOWS), self.window)]
        rates = [len(arrivals) / window_s for arrivals in reversed(past)]
        peaks = [0.0] * len(PEAKS_S)
        if past and len(past[-1]):
            for position, length_s in enumerate(PEAKS_S):
                bins = np.arange(0.0, window_s + length_s, length_s)
                peaks[position] = float(np.histogram(past[-1], bins)[0].max()) / length_s
        return rates + [0.0] * (PAST_WINDOWS - len(rates)), peaks

    def _observe(self) -> Observation:
        assert self.demand is not None
        rates, peaks = self._past()
        counts = np.bincount(self.chosen, minlength=len(self.classes)).astype(np.float64)
        own_rates = np.array([row.rate_rps for row in self.classes])
        gpus = np.array([row.gpus for row in self.classes])
        capacity = [
            float(sum(counts[number] * row.rate_rps for number, row in enumerate(self.classes) if row.phase == phase))
            for phase in PHASES
        ]
        cluster_gpus = self.scenario.cluster.gpus
        values = np.concatenate(
            [
                [self.scenario.slo.ttft_s, self.scenario.slo.tpot_s / 0.1],
                [self.window / len(self.demand.borders_s)],
                [log_rate(self.demand.mean_rate_rps)],
                log_rate(np.array(rates)),
                log_rate(np.array(peaks)),
                [(cluster_gpus - float(counts @ gpus)) / cluster_gpus],
                log_rate(np.array(capacity)),
                counts / MOST_INSTANCES,
                self._counts(self.placement) / MOST_INSTANCES,
                gpus / 8.0,
                log_rate(own_rates),
                np.array([row.joules_per_request for row in self.classes]) / 200.0,
            ]
        )
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        observation: Observation = np.clip(np.nan_to_num(values), space.low, space.high).astype(np.float32)
        return observation

    def render(self) -> str | None:
        """A line: the window, what is chosen for it, and what may still be added."""
        if self.render_mode != "ansi":
            return None
        chosen = self._placed(self.chosen).describe() if self.chosen else "nothing yet"
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
