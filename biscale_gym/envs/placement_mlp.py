"""A trained placement policy outside of its environment: a network over the same observation, under the same masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.settings import SloSettings
from biscale_gym.config import validate
from biscale_gym.envs import placement_layout
from biscale_gym.envs.network import ModelError, Network, check_slo, read_model, write_model
from biscale_gym.envs.placement_choice import PlacementChoice, WindowView
from biscale_gym.envs.settings import ClassTableSettings

FORMAT = "placement 1"
Range = tuple[float, float]
Kind = tuple[str, int, int, int]
"""Phase, TP, pipeline stages, clock (MHz)."""


def kinds_of(choice: PlacementChoice) -> tuple[Kind, ...]:
    """What the actions of a choice add, in order."""
    return tuple((row.phase, row.tp, row.pp, row.clock_mhz) for row in choice.classes)


@dataclass(frozen=True)
class PlacementMLP:
    """A placement policy.

    Attributes:
        kinds: what its outputs but the last add; the last commits.
        slo_s: least and greatest TTFT SLO, and TPOT SLO, that it was trained for.
        table: how the class tables that it sees are measured.
        network: its layers.
        about: how it was made, for people.

    Raises:
        ModelError: the network takes or gives other numbers than these classes need.
    """

    kinds: tuple[Kind, ...]
    slo_s: tuple[Range, Range]
    table: ClassTableSettings
    network: Network
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = sum(entry.size for entry in placement_layout.placement_entries(len(self.kinds)))
        self.network.check(inputs, len(self.kinds) + 1, f"a placement policy over {len(self.kinds)} classes")

    def check_slo(self, slo: SloSettings) -> None:
        """Refuse an SLO that it was not trained for.

        Raises:
            ModelError: so it is.
        """
        for name, limits, own in zip(("TTFT", "TPOT"), self.slo_s, (slo.ttft_s, slo.tpot_s), strict=True):
            check_slo("placement", f"{name} SLOs", limits, own)

    def plan(self, choice: PlacementChoice, view: WindowView) -> Placement:
        """The most likely placement: the allowed action of the greatest output, until that is the commit.

        Raises:
            ModelError: the cluster's classes are not those that the network's outputs stand for.
        """
        kinds = kinds_of(choice)
        if kinds != self.kinds:
            told = "in another order"
            if other := sorted({*kinds} ^ {*self.kinds}):
                phase, tp, _, clock_mhz = other[0]
                told = f"only one of them has {phase} TP{tp} at {clock_mhz} MHz"
            raise ModelError(
                f"the placement model chooses among {len(self.kinds)} classes, the run has {len(kinds)}; {told}"
            )
        chosen: list[int] = []
        while True:
            outputs = self.network.outputs(choice.observe(view, chosen)[None])[0]
            action = int(np.argmax(np.where(choice.masks(chosen), outputs, -np.inf)))
            if action == choice.commit:
                return choice.placed(chosen)
            chosen.append(action)

    def save(self, path: Path) -> None:
        """Write ``path`` with the suffixes .safetensors and .json."""
        description = {
            "observation_version": placement_layout.VERSION,
            "kinds": [list(kind) for kind in self.kinds],
            "slo_s": [list(limits) for limits in self.slo_s],
            "table": self.table.model_dump(mode="json"),
            "about": self.about,
        }
        write_model(path, FORMAT, self.network, description)


def load_placement_model(path: Path) -> PlacementMLP:
    """Read a model.

    Args:
        path: of either file, or of both without suffix.

    Raises:
        ModelError: a file is missing or altered, or is of another format or observation than this version's.
    """
    stored = read_model(path, [FORMAT], placement_layout.VERSION)
    stem, described = stored.stem, stored.described
    try:
        kinds = tuple((str(phase), int(tp), int(pp), int(mhz)) for phase, tp, pp, mhz in described["kinds"])
        ttft_s, tpot_s = (tuple(map(float, limits)) for limits in described["slo_s"])
        table = validate(ClassTableSettings, described["table"], f"{stem}.json, table")
        return PlacementMLP(
            kinds, ((ttft_s[0], ttft_s[1]), (tpot_s[0], tpot_s[1])), table, stored.network, described["about"]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{stem}: not a whole model ({error})") from error
