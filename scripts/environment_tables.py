"""Write what the code says of the environments into their pages: observation, action and setting tables.

    python scripts/environment_tables.py

A page has a table between ``<!-- NAME -->`` and ``<!-- /NAME -->``; the names of a page are those of ``tables``. Sizes
are those of the default scenario. tests/test_environment_docs.py fails while a page differs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs import cluster_layout, layout
from biscale_gym.envs.layout import Entry
from biscale_gym.envs.placement_layout import placement_entries
from biscale_gym.envs.settings import ClusterEnvSettings, InstanceEnvSettings, PlacementEnvSettings
from biscale_gym.live.settings import LiveEnvSettings
from biscale_gym.planning.classes import fitting_degrees
from biscale_gym.profiles import load_profile

PAGES = Path(__file__).resolve().parents[1] / "docs" / "environments"
SCENARIO = "paper-67"
ENTRY_HEADING = ("index", "name", "meaning", "range")
SETTING_HEADING = ("setting", "default", "meaning")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _span(start: int, size: int) -> str:
    return str(start) if size == 1 else f"{start}–{start + size - 1}"


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _entry_rows(entries: Sequence[Entry], at: int = 0) -> list[list[str]]:
    rows = []
    for entry in entries:
        span = f"{_number(entry.low)} … {_number(entry.high)}"
        rows.append([_span(at, entry.size), f"`{entry.name}`", entry.meaning, span])
        at += entry.size
    return rows


def instance_entries(phase: Phase) -> str:
    """Observation of an environment of one instance."""
    return _table(ENTRY_HEADING, _entry_rows(layout.entries(phase, len(load_scenario(SCENARIO).clocks_mhz))))


def slot_entries(phase: Phase) -> str:
    """Observation of one slot of the cluster; indices from the slot's start."""
    return _table(("index in the slot", *ENTRY_HEADING[1:]), _entry_rows(cluster_layout.slot_entries(phase)))


def cluster_entries() -> str:
    """What of the cluster's observation is where, and the totals."""
    each, slots = cluster_layout.SLOTS_PER_PHASE, []
    for position, phase in enumerate(PHASES):
        start, size = cluster_layout.slot_start(position * each), cluster_layout.slot_size(position * each)
        meaning = f"{phase} slots 0–{each - 1}, {size} numbers each: slot n at {start} + {size} n"
        slots.append([_span(start, each * size), f"`{phase}[n]`", meaning, "as below, and 0"])
    return _table(ENTRY_HEADING, slots + _entry_rows(cluster_layout.total_entries(), cluster_layout.TOTALS))


def placement_columns() -> list[tuple[Phase, int]]:
    """Phase and TP of the classes, which come one per clock of the grid, in order."""
    scenario = load_scenario(SCENARIO)
    cluster = scenario.cluster
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    return [(phase, tp) for phase in PHASES for tp in fitting_degrees(profile, phase, cluster.gpus_per_node)]


def placement_observation() -> str:
    """Observation of the placement environment."""
    classes = len(placement_columns()) * len(load_scenario(SCENARIO).clocks_mhz)
    return _table(ENTRY_HEADING, _entry_rows(placement_entries(classes)))


def clock_actions() -> str:
    """What every index of a clock means."""
    clocks = load_scenario(SCENARIO).clocks_mhz
    return _table(("action", "clock [MHz]"), [[str(action), str(clock)] for action, clock in enumerate(clocks)])


def slot_actions() -> str:
    """Which number of the cluster's action is whose clock."""
    each, clocks = cluster_layout.SLOTS_PER_PHASE, load_scenario(SCENARIO).clocks_mhz
    listed = ", ".join(str(clock) for clock in clocks)
    rows = [
        [_span(position * each, each), f"clock of {phase} slots {_span(0, each)}",
         f"0 … {len(clocks) - 1}: {listed} MHz"]
        for position, phase in enumerate(PHASES)
    ]  # fmt: skip
    return _table(("number of the action", "meaning", "values"), rows)


def class_actions() -> str:
    """Which action adds an instance of which class."""
    clocks = load_scenario(SCENARIO).clocks_mhz
    columns = placement_columns()
    listed = ", ".join(str(clock) for clock in clocks)
    rows = [
        [
            _span(number * len(clocks), len(clocks)),
            f"add a {phase} instance of TP{tp} with base clock {listed} MHz",
        ]
        for number, (phase, tp) in enumerate(columns)
    ]
    rows.append([str(len(columns) * len(clocks)), "commit: play the window"])
    return _table(("action", "meaning"), rows)


def _documented(model: type[BaseModel]) -> Iterator[tuple[list[str], str]]:
    """Names and meaning of every line of the Attributes sections of a model and its bases, bases last."""
    seen: set[str] = set()
    for one in model.__mro__:
        section = (inspect.getdoc(one) or "").partition("Attributes:\n")[2] if issubclass(one, BaseModel) else ""
        joined = re.sub(r"\n {8,}", " ", section)
        for line in joined.splitlines():
            names, _, meaning = line.strip().partition(": ")
            fresh = [name for name in names.split(", ") if name in model.model_fields and name not in seen]
            seen |= set(fresh)
            if fresh:
                yield fresh, meaning
    missing = model.model_fields.keys() - seen
    assert not missing, f"{model.__name__} does not say what {sorted(missing)} are"


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    nothing = value is None or (isinstance(value, BaseModel) and value == type(value)())
    return "none" if nothing else str(value)


def setting_rows(model: type[BaseModel]) -> str:
    """Settings with defaults and meaning; what the docstring tells together shares a row."""
    fields = model.model_fields
    rows = [
        [
            ", ".join(f"`{name}`" for name in names),
            ", ".join(_default(fields[name].default) for name in names),
            meaning.replace("``", "`"),
        ]
        for names, meaning in _documented(model)
    ]
    return _table(SETTING_HEADING, rows)


def tables() -> dict[str, dict[str, str]]:
    """The tables of every page, by name."""
    instance = {"actions": clock_actions(), "settings": setting_rows(InstanceEnvSettings)}
    return {
        "prefill": {"entries": instance_entries("prefill"), **instance},
        "decode": {"entries": instance_entries("decode"), **instance},
        "cluster": {
            "entries": cluster_entries(),
            "prefill-slot": slot_entries("prefill"),
            "decode-slot": slot_entries("decode"),
            "actions": slot_actions(),
            "settings": setting_rows(ClusterEnvSettings),
        },
        "live": {"settings": setting_rows(LiveEnvSettings)},
        "placement": {
            "entries": placement_observation(),
            "actions": class_actions(),
            "settings": setting_rows(PlacementEnvSettings),
        },
    }


def filled(page: str, named: dict[str, str]) -> str:
    """The page with every table in its place.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, table in named.items():
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        if len(re.findall(pattern, page, re.DOTALL)) != 1:
            raise ValueError(f"expected <!-- {name} --> ... <!-- /{name} --> once")
        text = f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->"
        page = re.sub(pattern, lambda _, text=text: text, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def main() -> None:
    """Fill every page."""
    for name, named in tables().items():
        path = PAGES / f"{name}.md"
        path.write_text(filled(path.read_text(), named))


if __name__ == "__main__":
    main()
