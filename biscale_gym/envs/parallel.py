"""The cluster as a PettingZoo parallel environment: an agent per instance, one team reward."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from biscale_gym.cluster.placement import PHASES
from biscale_gym.config import ConfigError
from biscale_gym.envs import cluster_layout as layout
from biscale_gym.envs.cluster import ClusterEnv

try:
    from pettingzoo import ParallelEnv
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ConfigError(
        "the multi-agent environment needs PettingZoo: pip install 'biscale-gym[multi-agent]' (or pettingzoo)"
    ) from error

Observation = NDArray[np.float32]


class ClusterParallelEnv(ParallelEnv):  # type: ignore[misc]
    """``BiScale/Cluster-v0`` with an agent for every instance of the scenario's placement.

    Agents are named ``prefill_0``, ..., ``decode_0``, ...; each sees its slot of the cluster's observation and the
    totals, and chooses a clock. All get the cluster's reward; an agent's own joules are in its info.

    Args:
        scenario: preset or path.
        render_mode: as of the cluster environment.
        settings: as of the cluster environment.

    Raises:
        ConfigError: as the cluster environment.
    """

    metadata: dict[str, Any] = {"name": "biscale_cluster_v0", "is_parallelizable": True, "render_modes": []}  # noqa: RUF012 - as PettingZoo declares it

    def __init__(self, scenario: str = "paper-67", render_mode: str | None = None, **settings: Any) -> None:
        self.env = ClusterEnv(scenario, render_mode, **settings)
        if self.env.setting.replans:
            raise ConfigError(
                f"the multi-agent environment has an agent per instance of one placement, planner "
                f"{settings['planner']!r} changes it; leave planner out, or use BiScale/Cluster-v0"
            )
        self.render_mode = render_mode
        placement = self.env.setting.placement
        self.slots = {
            f"{phase}_{number}": layout.SLOTS_PER_PHASE * PHASES.index(phase) + number
            for phase in PHASES
            for number in range(sum(spec.pp for spec in placement.of(phase)))
        }
        self.possible_agents = list(self.slots)
        self.agents: list[str] = []
        clocks = len(self.env.setting.grid)
        self.observation_spaces = {
            agent: spaces.Box(*layout.agent_bounds(slot), dtype=np.float32) for agent, slot in self.slots.items()
        }
        self.action_spaces = {agent: spaces.Discrete(clocks) for agent in self.slots}
        self._energy_j: dict[str, float] = {}

    def observation_space(self, agent: str) -> spaces.Box:
        """The agent's slot and the totals."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete[Any]:
        """Index of a clock."""
        return self.action_spaces[agent]

    def _split(self, obs: Observation) -> dict[str, Observation]:
        totals = obs[layout.TOTALS :]
        split = {}
        for agent, slot in self.slots.items():
            start = layout.slot_start(slot)
            split[agent] = np.concatenate([obs[start : start + layout.slot_size(slot)], totals])
        return split

    def _own_energy_j(self) -> dict[str, float]:
        energy_j = self.env.simulator.instances().energy_j.sum(axis=1)
        instances = self.env.slots_of()
        return {agent: float(energy_j[instances[slot]]) for agent, slot in self.slots.items()}

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Observation], dict[str, dict[str, Any]]]:
        """Begin an episode; arguments and errors as of the cluster environment."""
        # PettingZoo's own conformance test hands every environment an option of this name.
        known = {name: value for name, value in (options or {}).items() if name != "options"}
        obs, info = self.env.reset(seed=seed, options=known)
        self.agents = list(self.possible_agents)
        self._energy_j = self._own_energy_j()
        return self._split(obs), {agent: dict(info) for agent in self.agents}

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Observation], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Every agent's clock, and a control interval.

        Raises:
            KeyError: an agent's action is missing.
            EnvironmentUsageError: an action is no index of a clock, or the episode is over.
        """
        clocks = np.zeros(layout.SLOTS, dtype=np.int64)
        for agent in self.agents:
            clocks[self.slots[agent]] = int(actions[agent])
        obs, reward, _, truncated, info = self.env.step(clocks)
        own = self._own_energy_j()
        acted = self.agents
        infos = {agent: {**info, "own_energy_j": own[agent] - self._energy_j[agent]} for agent in acted}
        self._energy_j = own
        if truncated:
            self.agents = []
        split = self._split(obs)
        return (
            {agent: split[agent] for agent in acted},
            dict.fromkeys(acted, reward),
            dict.fromkeys(acted, False),
            dict.fromkeys(acted, truncated),
            infos,
        )

    def render(self) -> Any:
        """As the cluster environment."""
        return self.env.render()

    def close(self) -> None:
        """Release what rendering holds."""
        self.env.close()


def parallel_env(scenario: str = "paper-67", render_mode: str | None = None, **settings: Any) -> ClusterParallelEnv:
    """The cluster's multi-agent environment, as PettingZoo's modules name it."""
    return ClusterParallelEnv(scenario, render_mode, **settings)
