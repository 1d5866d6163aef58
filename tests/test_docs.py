"""The pages say what is true: their links, commands, tables of settings and features, and the programs in them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import tyro
import yaml
from pydantic import BaseModel

from agents.learned import LearnedSettings, LoadPlacementSettings
from agents.settings import DecodeSlackSettings, PrefillMPCSettings, Tier1Settings
from baselines.distserve import DistServePP, DistServeSettings
from baselines.placements import InstanceSettings, PlacementSettings
from baselines.static import StaticSettings
from biscale_gym import cli
from biscale_gym.cluster import features
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.config import preset_names
from biscale_gym.control.controllers import Controller, PlanContext, parsed_variant, split_names
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.profiles import kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
POLICIES = (ROOT / "docs" / "policies.md").read_text()
CONTROLLERS = (ROOT / "docs" / "controllers.md").read_text()


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def rows(page: str, first: str = "") -> list[list[str]]:
    """Cells of all table rows, or of those of the table whose first heading starts so."""
    found, inside = [], not first
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = not first
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        inside = inside or cells[0].startswith(first)
        if inside:
            found.append(cells)
    return found


# -- links and commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``biscale-gym ...`` of the pages, without those that only say where something goes (… or COMMAND)."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(r"^    (?:\w+=\S+ )*biscale-gym (.*)$", text, re.MULTILINE)
        for command in lines + re.findall(r"`biscale-gym ([^`]+)`", text):
            if "…" not in command and "COMMAND" not in command:
                yield page_id(page), shlex.split(command, comments=True)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The function behind a command line, and its own arguments."""
    names = {"list": "list_", "trace": words[1] if words[0] == "trace" else ""}
    return getattr(cli, names.get(words[0], words[0])), words[2:] if words[0] == "trace" else words[1:]


@pytest.mark.parametrize(("page", "words"), [pytest.param(*c, id=f"{c[0]}: {' '.join(c[1])}") for c in commands()])
def test_commands_are_understood(page: str, words: list[str]) -> None:
    function, arguments = command_of(words)
    if not arguments:
        return  # the command is mentioned

    @functools.wraps(function)
    def parsed(**values: Any) -> dict[str, Any]:
        return values

    values = tyro.cli(parsed, args=arguments)
    if "scenario" in values:
        assert set(values["scenario"].split(",")) <= set(preset_names("scenarios"))
    if "controllers" in values:
        variants = [parsed_variant(text)[0] for text in split_names(values["controllers"])]
        installed = [name for name in variants if ":" not in name]
        assert set(installed) <= set(entry_points())


# -- docs/controllers.md -----------------------------------------------------------------------------------------------


def entry_points() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = project["entry-points"]["biscale_gym.controllers"]
    return found


def test_every_controller_has_a_row() -> None:
    told = {name.strip("`"): module.strip("`") for name, module, *_ in rows(CONTROLLERS, "name")[2:]}
    assert told == {name: target.partition(":")[0] for name, target in entry_points().items()}


def defaults_told(table: str) -> dict[str, Any]:
    """Default by setting of one table; what a cell adds in parentheses is a comment."""
    told: dict[str, Any] = {}
    for names, values, *_ in rows(CONTROLLERS, f"setting ({table})")[2:]:
        listed = re.findall(r"`(\w+)`", names)
        value = re.sub(r"(\d),(\d{3})", r"\1\2", values.partition(" (")[0])
        each = value.split(", ") if len(listed) > 1 else [value]
        told |= dict(zip(listed, map(yaml.safe_load, each), strict=True))
    return told


@pytest.mark.parametrize(
    ("table", "settings", "inherited"),
    [
        ("`tier1`", Tier1Settings, None),
        ("`prefill`", PrefillMPCSettings, None),
        ("`decode`", DecodeSlackSettings, None),
        ("`distserve`", DistServeSettings, None),
        ("`max-clock`, `static`", PlacementSettings, None),
        ("`static`", StaticSettings, PlacementSettings),
        ("`learned`", LearnedSettings, None),
        ("`learned.load`", LoadPlacementSettings, None),
    ],
)
def test_every_setting_has_its_default(
    table: str, settings: type[BaseModel], inherited: type[BaseModel] | None
) -> None:
    own = settings.model_fields.keys() - (inherited.model_fields.keys() if inherited else ())
    assert defaults_told(table) == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings().model_dump().items()
        if name in own and not isinstance(value, dict)
    }


def test_what_else_the_page_tells_of_settings() -> None:
    for name in InstanceSettings.model_fields:
        assert f"`{name}`" in CONTROLLERS
    stages = DistServePP().settings.pipeline_stages
    assert f"`distserve-pp`: {list(stages)}" in CONTROLLERS


# -- docs/policies.md --------------------------------------------------------------------------------------------------


def test_every_feature_is_told_with_its_value() -> None:
    for name, value in vars(features).items():
        if name.isupper():
            assert re.search(rf"`(features\.)?{name}` (\| {value} \||\({value}\))", POLICIES), f"{name} = {value}"
    assert f"`MEMORY_SIZE` ({MEMORY_SIZE})" in POLICIES


def test_features_of_a_phase_are_told_so() -> None:
    source = inspect.getsource(features)
    parts = re.split(r"^# (Entries common to both phases|Decode|Prefill)\.$", source, flags=re.MULTILINE)[1:]
    phases = {"Entries common to both phases": "both", "Decode": "decode", "Prefill": "prefill"}
    told = {cells[0].strip("`"): cells[3] for cells in rows(POLICIES, "entry")[2:]}
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        for name in re.findall(r"^([A-Z_]+) = ", part, re.MULTILINE):
            if name in told:
                assert told[name] == phases[heading], name
    assert len(told) == 30


def test_every_kernel_is_told_with_its_arguments() -> None:
    for name, function in vars(kernels).items():
        if (
            hasattr(function, "py_func")
            and function.py_func.__module__ == kernels.__name__
            and not name.startswith("_")
        ):
            assert f"`{name}({', '.join(inspect.signature(function.py_func).parameters)})`" in POLICIES


def test_what_controllers_answer_and_know_is_told() -> None:
    told = {cells[0].strip("`").partition("(")[0] for cells in rows(POLICIES)}
    members = {name for name in {*vars(Controller), *Controller.__annotations__} if not name.startswith("_")}
    known = {name for name in vars(PlanContext) if not name.startswith("_")}
    assert members | known | {field.name for field in dataclasses.fields(PlanContext)} <= told
    subscribed = [field.name for field in dataclasses.fields(PhasePolicy)]
    assert f"`PhasePolicy({', '.join(subscribed)})`" in POLICIES


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page's first program as a module; yields the second, which imports it."""
    module, stepwise = re.findall(r"^```python\n(.*?)^```", POLICIES, re.MULTILINE | re.DOTALL)
    (tmp_path / "step_down.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    yield stepwise
    monkeypatch.delitem(sys.modules, "step_down", raising=False)


@pytest.mark.usefixtures("example")
def test_the_example_serves_and_moves_clocks() -> None:
    outcome = run(RunJob(scenario="smoke", controller="step_down:StepDown", controller_settings={"slack": 0.9}))
    assert outcome.row["requests_finished"] == outcome.row["requests_arrived"] > 0
    clocks, labels = outcome.timeline["clock_mhz"], outcome.timeline["label"]
    for label, clock in zip(labels, clocks.T, strict=True):
        assert (np.unique(clock).size > 1) == label.startswith("decode"), label


def test_stepwise_is_the_same_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(example, "docs/policies.md", "exec"), names)
    stepwise: Simulator = names["simulator"]
    assert f"'finished': {len(names['trace'])}" in capsys.readouterr().out
    compiled = Simulator(
        names["cluster"],
        names["profile"],
        names["placement"],
        names["trace"],
        names["clocks_mhz"],
        names["scenario"].slo,
    )
    compiled.set_policies(None, PhasePolicy(names["step_down"], names["params"]))
    assert compiled.run() is None
    np.testing.assert_allclose(stepwise.requests().finish_s, compiled.requests().finish_s, rtol=1e-9)
    assert stepwise.instances().clock_changes.tolist() == compiled.instances().clock_changes.tolist()
    assert compiled.instances().clock_changes.sum() > 0
