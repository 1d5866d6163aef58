"""Controllers are found by installed name or ``module:Class``, and anything else is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from biscale_gym.cluster.placement import Placement
from biscale_gym.cluster.simulator import ClusterError
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import (
    Controller,
    ControllerError,
    PlanContext,
    controller_names,
    find_controller,
    make_controller,
    parsed_variant,
    split_names,
)
from biscale_gym.control.scenario import load_scenario
from biscale_gym.profiles import load_profile
from biscale_gym.traces import Trace


class Mine:
    """The least that a controller is."""

    name = "mine"
    replans = False

    def __init__(self, answer: int = 42) -> None:
        self.answer = answer

    def plan(self, context: PlanContext) -> Placement:
        return Placement(())

    def policies(self, context: PlanContext) -> tuple[None, None]:
        return (None, None)


class Planless:
    """No controller: it cannot plan."""

    name = "planless"
    replans = False

    def policies(self, context: PlanContext) -> tuple[None, None]:
        return (None, None)


@pytest.mark.parametrize("name", ["biscale", "distserve", "max-clock", "place-only", "static"])
def test_an_installed_name_gives_its_class(name: str) -> None:
    assert name in controller_names()
    controller = find_controller(name)()
    assert isinstance(controller, Controller)
    assert controller.name == name


def test_a_module_and_class_is_found_and_takes_settings() -> None:
    assert find_controller(f"{__name__}:Mine") is Mine
    controller: Any = make_controller(f"{__name__}:Mine", {"answer": 7})
    assert controller.answer == 7


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ControllerError, match=r"^no controller 'bisacle'; did you mean 'biscale'\? valid: .*static"):
        find_controller("bisacle")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.to:Find", "No module named 'nowhere'"),
        ("agents.biscale:BiScal", "module 'agents.biscale' has no attribute 'BiScal'"),
        ("agents.biscale:", "module 'agents.biscale' has no attribute ''"),
        (":BiScale", "Empty module name"),
        (".biscale:BiScale", "relative import"),
    ],
)
def test_a_module_or_class_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ControllerError, match=f"^controller '{name}' cannot be loaded: .*{message}"):
        find_controller(name)


def test_a_module_that_breaks_on_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_import.py").write_text("raise ImportError('half a driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ControllerError, match=r"^controller 'breaks_on_import:X' cannot be loaded: half a driver$"):
        find_controller("breaks_on_import:X")
    assert "breaks_on_import" not in sys.modules


@pytest.mark.parametrize("name", [f"{__name__}:Planless", "builtins:dict", "collections:Counter"])
def test_a_class_that_is_no_controller_is_refused(name: str) -> None:
    with pytest.raises(ControllerError, match=rf"^'{name}' is no controller: it needs name, replans, plan\(\) and pol"):
        make_controller(name)


def test_what_is_no_class_is_refused() -> None:
    with pytest.raises(ControllerError, match=r"^controller 'math:pi': 'float' object is not callable"):
        make_controller("math:pi")


def test_settings_that_a_controller_does_not_take_are_named() -> None:
    with pytest.raises(ControllerError, match="unexpected keyword argument 'question'"):
        make_controller(f"{__name__}:Mine", {"question": 6})
    with pytest.raises(ConfigError, match=r"planer: unknown key; did you mean 'planner'\?"):
        make_controller("static", {"planer": "given"})


def test_a_plan_knows_the_last_rate_and_the_runs_clocks() -> None:
    scenario = load_scenario("smoke")
    profile = load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
    training = Trace([0.0], [1], [1])
    first = PlanContext(scenario, profile, training, 20.0, clocks_mhz=(705, 1410))
    assert first.last_rate_rps == 20.0
    assert PlanContext(scenario, profile, training, 20.0, history_rps=(3.0, 5.0)).last_rate_rps == 5.0
    assert first.clock_index(1410) == 1
    with pytest.raises(ClusterError, match="the run has no clock 1400 MHz; the nearest is 1410"):
        first.clock_index(1400)


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("biscale", "biscale", {}),
        ("module:Class", "module:Class", {}),
        ("biscale[decode.headroom=0.85]", "biscale", {"decode": {"headroom": 0.85}}),
        (
            "learned[prefill=a/b, load.keep_within=0, load.price_j=1.0e3]",
            "learned",
            {"prefill": "a/b", "load": {"keep_within": 0, "price_j": 1000.0}},
        ),
        ("static[instances=[{phase: prefill, tp: 2}]]", "static", {"instances": [{"phase": "prefill", "tp": 2}]}),
    ],
)
def test_settings_follow_a_controllers_name_in_brackets(text: str, name: str, settings: dict[str, Any]) -> None:
    assert parsed_variant(text) == (name, settings)


def test_commas_in_brackets_part_no_names() -> None:
    assert split_names("distserve, learned[prefill=a,decode=b],biscale") == [
        "distserve",
        "learned[prefill=a,decode=b]",
        "biscale",
    ]


def test_an_open_bracket_is_refused() -> None:
    with pytest.raises(ControllerError, match="closing bracket"):
        parsed_variant("biscale[decode.headroom=0.85")
