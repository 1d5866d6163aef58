"""Plan the placement that a scenario's environments start from, and write it into the scenario's file.

    python scripts/freeze_placements.py --scenario paper-67

BiScale's first tier plans for the scenario's own mean rate, from the training split alone. Everything else in the file
stays as it is.
"""

from __future__ import annotations

import tyro
from rich.console import Console

from biscale_gym.cluster.placement import Placement
from biscale_gym.config import presets_dir
from biscale_gym.control.controllers import PlanContext, make_controller
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.profiles import load_profile

KEYS = ("placement:", "placement_from:")


def planned(scenario: ScenarioSettings, controller: str) -> Placement:
    """The controller's first placement for the scenario's mean rate."""
    cluster = scenario.cluster
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    requests = requests_for(scenario, profile, "train", 0, None, None)
    clocks_mhz = tuple(sorted({*scenario.clocks_mhz, scenario.top_clock_mhz}))
    context = PlanContext(scenario, profile, requests.training, scenario.rate_rps, clocks_mhz=clocks_mhz)
    return make_controller(controller).plan(context)


def as_yaml(placement: Placement) -> list[str]:
    """Lines of the file, equal instances in one."""
    lines = ["placement:"]
    for spec in dict.fromkeys(placement.instances):
        count = placement.instances.count(spec)
        entries = [f"phase: {spec.phase}", f"tp: {spec.tp}", f"clock_mhz: {spec.clock_mhz}", f"count: {count}"]
        if spec.weight != 1.0:
            entries.append(f"weight: {spec.weight:.6g}")
        lines.append(f"  - {{{', '.join(entries)}}}")
    return lines


def without_placement(text: str) -> list[str]:
    """The file's lines but those of the placement."""
    kept = []
    inside = False
    for line in text.splitlines():
        inside = line.startswith(KEYS) or (inside and line.startswith((" ", "-")))
        if not inside:
            kept.append(line)
    return kept


def main(scenario: str = "paper-67", controller: str = "biscale") -> None:
    """Plan and write.

    Args:
        scenario: preset in configs/scenarios.
        controller: whose placement.
    """
    placement = planned(load_scenario(scenario), controller)
    path = presets_dir() / "scenarios" / f"{scenario}.yaml"
    command = f"python scripts/freeze_placements.py --scenario {scenario}"
    command += "" if controller == "biscale" else f" --controller {controller}"
    lines = [*without_placement(path.read_text(encoding="utf-8")), *as_yaml(placement), f"placement_from: {command}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Console().print(f"{path}: {placement.describe()}")


if __name__ == "__main__":
    tyro.cli(main)
