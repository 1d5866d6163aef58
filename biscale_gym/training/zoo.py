"""Hyper-parameters in the form of RL Baselines3 Zoo: a YAML file per algorithm, keyed by environment id.

``configs/training/hyperparams`` holds such files; ``python -m rl_zoo3.train --conf-file`` takes them too. What the Zoo
evaluates as Python (``policy_kwargs``) is read here as a literal, and nothing else is.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from biscale_gym.config import ConfigError, nearest, read_yaml, validate
from biscale_gym.training.settings import TrainingSettings

_RENAMED = {"n_envs": "lanes", "n_timesteps": "total_steps"}
_IGNORED_IF = {"normalize": (False,), "policy": None}
"""Keys of the Zoo's own that change nothing here; the values for which that is so, None: any."""
_POLICY = {"net_arch": "net_arch", "lstm_hidden_size": "lstm_size", "n_quantiles": "quantiles"}
_ACTIVATIONS = {"nn.Tanh": "tanh", "nn.ReLU": "relu", "th.nn.Tanh": "tanh", "th.nn.ReLU": "relu"}


def with_conf_file(settings: TrainingSettings, path: Path) -> TrainingSettings:
    """The settings with the hyper-parameters that a file in the Zoo's form has for their environment.

    Lanes, steps, hidden layers, wrappers and the algorithm's hyper-parameters come from the file; the algorithm itself,
    scenarios and all else stay.

    Raises:
        ConfigError: the file has no entry for the environment, or one that cannot be had here.
    """
    entries = read_yaml(path)
    if settings.env_id not in entries:
        raise ConfigError(f"{path}: no entry for {settings.env_id}; {nearest(settings.env_id, sorted(entries))}")
    values = settings.model_dump(mode="json")
    values |= {"hyperparameters": {}, "wrappers": []}
    where = f"{path}: {settings.env_id}"
    for name, value in entries[settings.env_id].items():
        if name in _RENAMED:
            values[_RENAMED[name]] = int(float(value))
        elif name == "policy_kwargs":
            values |= _policy(value, where)
        elif name == "env_wrapper":
            values["wrappers"] = _wrappers(value)
        elif name not in _IGNORED_IF:
            values["hyperparameters"][name] = value
        elif _IGNORED_IF[name] is not None and value not in (_IGNORED_IF[name] or ()):
            raise ConfigError(f"{where}: {name} is {value!r}: observations have fixed scales here, expected false")
    return validate(TrainingSettings, values, where)


def _policy(value: Any, where: str) -> dict[str, Any]:
    """What settings a text says, like ``dict(net_arch=[64, 64], activation_fn=nn.Tanh)``."""
    found: dict[str, Any] = {}
    try:
        call = ast.parse(str(value).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "dict" or call.args:
            raise ValueError("expected dict(...)")
        for keyword in call.keywords:
            if keyword.arg in _POLICY:
                found[_POLICY[keyword.arg]] = ast.literal_eval(keyword.value)
            elif keyword.arg == "activation_fn" and ast.unparse(keyword.value) in _ACTIVATIONS:
                found["activation"] = _ACTIVATIONS[ast.unparse(keyword.value)]
            else:
                raise ValueError(
                    f"{ast.unparse(keyword)} cannot be had; valid: {', '.join((*_POLICY, 'activation_fn'))}"
                )
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: policy_kwargs {value!r}: {error}") from error
    return found


def _wrappers(value: Any) -> list[Any]:
    """Wrappers by the last part of their dotted names."""
    listed = value if isinstance(value, list) else [value]
    found: list[Any] = []
    for one in listed:
        name, arguments = next(iter(one.items())) if isinstance(one, dict) else (one, {})
        found.append({"name": str(name).rpartition(".")[2], "arguments": arguments or {}})
    return found
