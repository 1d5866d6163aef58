"""A trained policy of ``BiScale/Cluster-v0`` outside of its environment: the clocks of all instances at once.

The environment's own compiled code writes the observation and asks for the clocks, so the policy sees and does in a
comparison what it saw and did there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.settings import SloSettings
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.cluster.state import ACTIVE
from biscale_gym.envs import cluster_layout as layout
from biscale_gym.envs.cluster_lanes import CLUSTER_LANE, choose_clocks, turn_cluster
from biscale_gym.envs.encoding import encoder_params
from biscale_gym.envs.network import Matrix, ModelError, Network, check_slo, grid_in, read_model, write_model

FORMAT = "cluster 1"
Range = tuple[float, float]


@dataclass(frozen=True)
class ClusterMLP:
    """A policy of all clocks at once.

    Attributes:
        clocks_mhz: the grid that its outputs stand for, ascending: one output per slot and clock, slot by slot.
        slo_s: least and greatest TTFT SLO, and TPOT SLO, that it was trained for.
        interval_s: from one decision to the next.
        network: its layers.
        about: how it was made, for people.

    Raises:
        ModelError: the network takes or gives other numbers than that.
    """

    clocks_mhz: tuple[int, ...]
    slo_s: tuple[Range, Range]
    interval_s: float
    network: Network
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"a policy of {layout.SLOTS} slots over {len(self.clocks_mhz)} clocks"
        self.network.check(layout.SIZE, layout.SLOTS * len(self.clocks_mhz), what)

    def actions(self, observations: Matrix) -> NDArray[np.int64]:
        """float[N, size] to int64[N, SLOTS], indices into ``clocks_mhz``: the greatest output of each slot."""
        outputs = self.network.outputs(observations)
        return np.asarray(outputs.reshape(len(outputs), layout.SLOTS, -1).argmax(axis=2), np.int64)

    def policy(self, clocks_mhz: Sequence[int], slo: SloSettings) -> ClusterClocks:
        """What decides in a run.

        Args:
            clocks_mhz: the run's ascending clock list.
            slo: the run's.

        Raises:
            ModelError: the run lacks a clock of the grid, or its SLO is outside what the model was trained for.
        """
        grid = grid_in(clocks_mhz, self.clocks_mhz, "cluster")
        for name, limits, own_s in zip(("TTFT", "TPOT"), self.slo_s, (slo.ttft_s, slo.tpot_s), strict=True):
            check_slo("cluster", f"{name} SLOs", limits, own_s)
        return ClusterClocks(self, encoder_params(clocks_mhz, grid))

    def save(self, path: Path) -> None:
        """Write ``path`` with the suffixes .safetensors and .json."""
        description = {
            "observation_version": layout.VERSION,
            "clocks_mhz": list(self.clocks_mhz),
            "slo_s": [list(limits) for limits in self.slo_s],
            "interval_s": self.interval_s,
            "about": self.about,
        }
        write_model(path, FORMAT, self.network, description)


class ClusterClocks:
    """A policy at work on one cluster after another (``biscale_gym.control.controllers.ClusterPolicy``).

    Args:
        model: whose answers they are.
        params: ``encoding.encoder_params`` of the run's clocks and the model's grid.
    """

    def __init__(self, model: ClusterMLP, params: NDArray[np.float64]) -> None:
        self.interval_s = model.interval_s
        self.observation = np.zeros(layout.SIZE, np.float32)
        """The last one."""
        self._model = model
        self._params = params
        self._lane = np.zeros(1, CLUSTER_LANE)
        self._checked = -1

    def begin(self, simulator: Simulator) -> None:
        """Take over a cluster: nobody else decides, and nothing is remembered of another one."""
        simulator.set_policies(None, PhasePolicy(slack=True), only_when_told=True)
        self._lane[:] = np.zeros(1, CLUSTER_LANE)
        self._lane["interval_s"] = self.interval_s
        self._checked = -1

    def decide(self, simulator: Simulator) -> None:
        """Observe the cluster and ask for the clocks that the model chooses.

        Raises:
            ModelError: the placement has more instances of a phase than there are slots.
        """
        handle = simulator.handle()
        turn_cluster(handle, self._lane, self._params, self.observation)
        self._check_slots(simulator)
        choose_clocks(handle, self._lane, self._params, self._model.actions(self.observation[None])[0])

    def _check_slots(self, simulator: Simulator) -> None:
        """Once for every placement: instances come with a placement alone."""
        count = len(simulator.lanes)
        if count == self._checked:
            return
        self._checked = count
        status = simulator.state.inst["status"][:count]
        present = int(np.count_nonzero((status >= 1) & (status <= ACTIVE)))
        if present > np.count_nonzero(self._lane["slots"][0] >= 0):
            raise ModelError(
                f"the cluster model knows {layout.SLOTS_PER_PHASE} instances of a phase; the placement at "
                f"{simulator.now_s:g} s has {present} in all, more of one phase than that"
            )


def load_cluster_model(path: Path) -> ClusterMLP:
    """Read a model.

    Args:
        path: of either file, or of both without suffix.

    Raises:
        ModelError: a file is missing or altered, or is of another format or observation than this version's.
    """
    stored = read_model(path, [FORMAT], layout.VERSION)
    described = stored.described
    try:
        ttft_s, tpot_s = (tuple(map(float, limits)) for limits in described["slo_s"])
        return ClusterMLP(
            tuple(map(int, described["clocks_mhz"])),
            ((ttft_s[0], ttft_s[1]), (tpot_s[0], tpot_s[1])),
            float(described["interval_s"]),
            stored.network,
            described["about"],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{stored.stem}: not a whole model ({error})") from error
