"""Settings and presets of training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from biscale_gym.config import ConfigError, load_preset, preset_names, presets_dir, read_yaml
from biscale_gym.control.scenario import load_scenario
from biscale_gym.training.algorithms import ALGORITHMS, checked_hyperparameters
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings
from biscale_gym.training.zoo import with_conf_file

Make = Callable[..., TrainingSettings]
ZOO_NAMES = {"ppo": "ppo", "ppo_lstm": "recurrent-ppo", "qrdqn": "qr-dqn", "sac": "sac", "tqc": "tqc"}


@pytest.mark.parametrize("name", preset_names("training"))
def test_presets_are_valid(name: str) -> None:
    settings = load_preset(TrainingSettings, "training", name)
    assert settings.description
    checked_hyperparameters(settings)
    for scenario in settings.scenarios:
        assert load_scenario(scenario).placement


def test_every_algorithm_has_a_preset() -> None:
    presets = [load_preset(TrainingSettings, "training", name) for name in preset_names("training")]
    assert {preset.algorithm for preset in presets} == set(ALGORITHMS)
    assert all(preset.lanes >= 64 for preset in presets if preset.env_id != "BiScale/Placement-v0")


@pytest.mark.parametrize("name", sorted(ZOO_NAMES))
def test_hyperparameters_in_the_zoos_form_are_those_of_the_presets(name: str, tiny: Make) -> None:
    path = presets_dir() / "training" / "hyperparams" / f"{name}.yml"
    presets = [load_preset(TrainingSettings, "training", one) for one in preset_names("training")]
    entries = read_yaml(path)
    assert entries
    for env_id in entries:
        settings = with_conf_file(tiny({"env_id": env_id, "algorithm": ZOO_NAMES[name]}), path)
        checked_hyperparameters(settings)
        same = ("lanes", "total_steps", "net_arch", "activation", "hyperparameters")
        assert any(
            (preset.env_id, preset.algorithm) == (env_id, settings.algorithm)
            and all(getattr(preset, key) == getattr(settings, key) for key in same)
            for preset in presets
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("normalize: true", "normalize is True"),
        ("policy_kwargs: 'dict(net_arch=[8], ortho_init=False)'", "ortho_init=False cannot be had"),
        ("policy_kwargs: '__import__(\"os\").getcwd()'", r"expected dict\(\.\.\.\)"),
        ("n_envs: 0", "lanes"),
    ],
)
def test_what_the_zoo_has_and_lanes_have_not_is_refused(entry: str, message: str, tiny: Make, tmp_path: Any) -> None:
    path = tmp_path / "ppo.yml"
    path.write_text(f"BiScale/Prefill-v0:\n  {entry}\n")
    with pytest.raises(ConfigError, match=message):
        with_conf_file(tiny(), path)
    path.write_text("BiScale/Prefil-v0: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'BiScale/Prefil-v0'"):
        with_conf_file(tiny(), path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lane": 8}, "lane: unknown key; did you mean 'lanes'?"),
        ({"evaluation.episode": 8}, "evaluation.episode: unknown key; did you mean 'episodes'?"),
        ({"evaluation.split": "train"}, "not trained on"),
        ({"env.scenario": "smoke"}, "env.scenario"),
        ({"env.violation_penalty": 2.0, "constraint": {}}, "both price violations"),
        ({"lanes": 2, "scenarios": ["smoke", "smoke", "smoke"]}, "lanes is 2"),
        ({"discount": "time"}, "discount_per_s"),
        ({"scenario_env": {"smok": {}}}, "scenario_env: did you mean 'smoke'?"),
        ({"scenario_env": {"smoke": {"decide_every": 2}}}, "scenario_env.smoke.decide_every"),
        ({"scenario_env": {"smoke": {"violation_penalty": 2.0}}, "constraint": {}}, "both price violations"),
        ({"scenario_env": {"smoke": {"discount_per_s": 1.0}}, "env.discount_per_s": 0.9, "discount": "time"}, "needs"),
        ({"scenario_env": {"smoke": {"load": [0.5, 1.0]}}, "curriculum": {}}, "both set loads"),
    ],
)
def test_wrong_settings_are_told_in_one_message(changed: dict[str, Any], message: str, tiny: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(changed)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algorithm": "pppo"}, "no algorithm 'pppo'; did you mean 'ppo'?"),
        ({"hyperparameters.n_step": 8}, "ppo has no 'n_step'; did you mean 'n_steps'?"),
        ({"hyperparameters.batch_size": 100}, "expected a divisor of that, for instance 64"),
        ({"hyperparameters.learning_rate": "lin_fast"}, "expected a number, or lin_X"),
        ({"hyperparameters.policy_kwargs": {}}, "use net_arch, activation, lstm_size and quantiles"),
        ({"hyperparameters.use_sde": True}, "a checkpoint does not hold its noise"),
    ],
)
def test_wrong_hyperparameters_are_told_in_one_message(changed: dict[str, Any], message: str, tiny: Make) -> None:
    with pytest.raises(TrainingError) as caught:
        checked_hyperparameters(tiny(changed))
    assert message in str(caught.value)


def test_schedules_and_numbers_as_yaml_writes_them(tiny: Make) -> None:
    found = checked_hyperparameters(
        tiny({"hyperparameters.learning_rate": "lin_4e-4", "hyperparameters.gamma": "9e-1"})
    )
    assert [found["learning_rate"](left) for left in (1.0, 0.5, 0.0)] == pytest.approx([4e-4, 2e-4, 0.0])
    assert found["gamma"] == 0.9


def test_wrappers_have_short_forms(tiny: Make) -> None:
    settings = tiny({"wrappers": ["ContinuousClocks", {"History": {"k": 2}}]})
    assert [(one.name, one.arguments) for one in settings.wrappers] == [("ContinuousClocks", {}), ("History", {"k": 2})]
