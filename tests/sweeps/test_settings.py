from __future__ import annotations

from typing import Any

import pytest

from biscale_gym.config import ConfigError, load_preset, preset_names, replaced, validate
from biscale_gym.sweeps.settings import Parameter, SweepSettings, load_sweep
from biscale_gym.training.settings import TrainingSettings

SWEEP: dict[str, Any] = {
    "name": "some",
    "command": ["${program}", "train", "smoke", "--set", "${args_no_hyphens}"],
    "metric": {"name": "best/objective"},
    "parameters": {"seed": {"values": [0, 1]}},
}


@pytest.mark.parametrize("name", preset_names("sweeps"))
def test_presets(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.name == name
    assert sweep.description
    assert sweep.run_cap or sweep.grid_size
    for end in (0, -1):
        settings = {
            key: (parameter.min, parameter.max)[end] if parameter.choices is None else parameter.choices[end]
            for key, parameter in sweep.parameters.items()
        }
        preset = load_preset(TrainingSettings, "training", sweep.preset)
        validate(TrainingSettings, replaced(preset.model_dump(mode="json"), settings, sweep.preset), sweep.preset)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"value": 3}, "constant"),
        ({"values": [[64, 64], [128]]}, "categorical"),
        ({"min": 1, "max": 4}, "int_uniform"),
        ({"min": 1, "max": 4.0}, "uniform"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, "q_uniform"),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "log_uniform_values"),
    ],
)
def test_the_distribution_is_told_by_the_keys(given: dict[str, Any], kind: str) -> None:
    assert Parameter(**given).kind == kind


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "uniform takes max, min; found nothing"),
        ({"min": 1}, "uniform takes max, min; found min"),
        ({"value": 1, "values": [1]}, "constant takes value; found value, values"),
        ({"values": []}, "values is empty"),
        ({"min": 3, "max": 3}, "min 3 is not below max 3"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min 0: a logarithm needs more than 0"),
        ({"distribution": "q_uniform", "min": 0, "max": 1}, "q_uniform takes max, min, q; found max, min"),
        ({"distribution": "log_normal", "mu": 0}, "parameters.seed.distribution: Input should be 'constant'"),
        ({"valeu": 1}, "unknown key; did you mean 'value'"),
    ],
)
def test_a_wrong_parameter_is_named(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml: parameters\.seed") as raised:
        validate(SweepSettings, {**SWEEP, "parameters": {"seed": given}}, "sweep.yaml")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    "command", [["smoke", "--set", "${args_no_hyphens}"], ["train", "smoke"], ["train", "smoke", "${args_no_hyphens}"]]
)
def test_a_command_that_does_not_train_is_refused(command: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"command must hold: train, a training preset"):
        validate(SweepSettings, {**SWEEP, "command": command}, "sweep.yaml")


def test_a_grid_has_no_ranges() -> None:
    parameters = {"seed": {"values": [0, 1]}, "lanes": {"min": 1, "max": 4}}
    with pytest.raises(ConfigError, match=r"parameters.lanes: a grid needs values"):
        validate(SweepSettings, {**SWEEP, "method": "grid", "parameters": parameters}, "sweep.yaml")
    parameters["lanes"] = {"values": [1, 2, 3]}
    assert validate(SweepSettings, {**SWEEP, "method": "grid", "parameters": parameters}, "sweep.yaml").grid_size == 6
