"""What each algorithm needs: its class, policy, action space, and which of its keyword settings a run may choose."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from biscale_gym.config import nearest
from biscale_gym.training.discount import TimedReplayBuffer, TimedRolloutBuffer
from biscale_gym.training.environments import LanesVecEnv
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.settings import TrainingSettings

ACTIVATIONS = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf")
NOT_CHOSEN = {
    "self": "",
    "policy": "it follows from the algorithm",
    "env": "it is env_id",
    "policy_kwargs": "use net_arch, activation, lstm_size and quantiles",
    "seed": "it is the run's seed",
    "device": "runs train on the CPU",
    "verbose": "runs report themselves",
    "tensorboard_log": "runs are logged by the tracker",
    "stats_window_size": "runs report themselves",
    "rollout_buffer_class": "it follows from discount",
    "rollout_buffer_kwargs": "it follows from discount",
    "replay_buffer_class": "it follows from discount",
    "replay_buffer_kwargs": "it follows from discount",
    "action_noise": "it is an object, which a file cannot hold",
    "use_sde": "a checkpoint does not hold its noise",
    "sde_sample_freq": "a checkpoint does not hold its noise",
    "use_sde_at_warmup": "a checkpoint does not hold its noise",
    "monitor_wrapper": "lanes count for themselves",
    "_init_setup_model": "",
}
"""Arguments of SB3's classes that a run does not choose, and why."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Attributes:
        make: the class.
        policy: name of its policy class.
        spaces: action spaces that it takes.
        on_policy: whether it learns from its own last rollout alone.
        masked: whether it asks for masks of allowed actions, and must have them.
        recurrent: whether its policy has a state.
        quantiles: whether it estimates quantiles of the return.
    """

    make: type[BaseAlgorithm]
    policy: str = "MlpPolicy"
    spaces: tuple[type[spaces.Space[Any]], ...] = (spaces.Discrete, spaces.MultiDiscrete, spaces.Box)
    on_policy: bool = True
    masked: bool = False
    recurrent: bool = False
    quantiles: bool = False


ALGORITHMS = {
    "ppo": Algorithm(PPO),
    "recurrent-ppo": Algorithm(RecurrentPPO, policy="MlpLstmPolicy", recurrent=True),
    "maskable-ppo": Algorithm(MaskablePPO, spaces=(spaces.Discrete,), masked=True),
    "qr-dqn": Algorithm(QRDQN, spaces=(spaces.Discrete,), on_policy=False, quantiles=True),
    "sac": Algorithm(SAC, spaces=(spaces.Box,), on_policy=False),
    "tqc": Algorithm(TQC, spaces=(spaces.Box,), on_policy=False, quantiles=True),
}


def find_algorithm(name: str) -> Algorithm:
    """An algorithm by name.

    Raises:
        TrainingError: there is none; the nearest is named.
    """
    if name not in ALGORITHMS:
        raise TrainingError(f"no algorithm {name!r}; {nearest(name, list(ALGORITHMS))}")
    return ALGORITHMS[name]


def linear(text: str) -> Callable[[float], float]:
    """``lin_X`` as a schedule: X at the beginning, 0 at the end.

    Raises:
        ValueError: it is not of this form.
    """
    kind, _, start = text.partition("_")
    if kind != "lin":
        raise ValueError(text)
    return LinearSchedule(float(start), 0.0, 1.0)


def checked_hyperparameters(settings: TrainingSettings) -> dict[str, Any]:
    """The run's hyper-parameters as keyword arguments of the algorithm's class.

    Raises:
        TrainingError: the class has no such argument, or the run does not choose it; batches that do not fit.
    """
    algorithm = find_algorithm(settings.algorithm)
    parameters = inspect.signature(algorithm.make).parameters
    valid = [name for name in parameters if name not in NOT_CHOSEN]
    arguments: dict[str, Any] = {}
    for name, value in settings.hyperparameters.items():
        if NOT_CHOSEN.get(name):
            raise TrainingError(f"hyperparameters.{name} is not chosen here: {NOT_CHOSEN[name]}")
        if name not in valid:
            raise TrainingError(f"hyperparameters: {settings.algorithm} has no {name!r}; {nearest(name, valid)}")
        arguments[name] = _value(name, value)
    if algorithm.on_policy:
        _check_batches(settings, arguments, parameters)
    return arguments


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if name == "ent_coef" and value.startswith("auto"):
        return value
    try:
        if name not in SCHEDULED:
            return float(value)  # YAML reads 3e-4 as a text
        return linear(value) if value.startswith("lin") else float(value)
    except ValueError:
        form = "a number, or lin_X such as lin_3e-4" if name in SCHEDULED else "a number"
        raise TrainingError(f"hyperparameters.{name} is {value!r}, expected {form}") from None


def _check_batches(settings: TrainingSettings, arguments: dict[str, Any], parameters: Any) -> None:
    """A rollout that is no multiple of the batch leaves a small batch over, with a gradient as noisy."""
    steps = int(arguments.get("n_steps", parameters["n_steps"].default))
    batch = int(arguments.get("batch_size", parameters["batch_size"].default))
    rollout = steps * settings.lanes
    if rollout % batch:
        fitting = max(size for size in range(1, batch + 1) if rollout % size == 0)
        raise TrainingError(
            f"hyperparameters.batch_size is {batch}, a rollout is n_steps x lanes = {steps} x {settings.lanes} = "
            f"{rollout} steps: expected a divisor of that, for instance {fitting}"
        )


def _check_spaces(settings: TrainingSettings, algorithm: Algorithm, envs: LanesVecEnv) -> None:
    space = envs.action_space
    if not isinstance(space, algorithm.spaces):
        fitting = [name for name, one in ALGORITHMS.items() if isinstance(space, one.spaces)]
        hint = "; the wrapper ContinuousClocks makes clocks continuous" if algorithm.spaces == (spaces.Box,) else ""
        raise TrainingError(
            f"algorithm {settings.algorithm} takes no actions of {space}{hint}; those that do: {', '.join(fitting)}"
        )
    has_masks = envs.has_attr("action_masks")
    if algorithm.masked and not has_masks:
        raise TrainingError(f"algorithm {settings.algorithm} needs action masks, {settings.env_id} has none; use ppo")
    if not algorithm.masked and has_masks:
        raise TrainingError(
            f"{settings.env_id} forbids actions by masks: algorithm is {settings.algorithm}, expected maskable-ppo"
        )


def make_model(settings: TrainingSettings, envs: LanesVecEnv) -> BaseAlgorithm:
    """A fresh model on the lanes, its weights drawn from the run's seed.

    Raises:
        TrainingError: the algorithm, its settings and the environment do not fit together.
    """
    algorithm = find_algorithm(settings.algorithm)
    arguments = checked_hyperparameters(settings)
    _check_spaces(settings, algorithm, envs)
    if settings.discount == "time":
        if algorithm.masked or algorithm.recurrent:
            fitting = [name for name, one in ALGORITHMS.items() if not (one.masked or one.recurrent)]
            raise TrainingError(
                f"discount: time is not for {settings.algorithm} but for {', '.join(fitting)}; or set discount: step"
            )
        buffer = "rollout_buffer_class" if algorithm.on_policy else "replay_buffer_class"
        arguments[buffer] = TimedRolloutBuffer if algorithm.on_policy else TimedReplayBuffer
    policy: dict[str, Any] = {
        "net_arch": list(settings.net_arch),
        "activation_fn": ACTIVATIONS[settings.activation],
    }
    if algorithm.recurrent:
        policy["lstm_hidden_size"] = settings.lstm_size
    if algorithm.quantiles:
        policy["n_quantiles"] = settings.quantiles
    try:
        model: BaseAlgorithm = algorithm.make(
            algorithm.policy, envs, policy_kwargs=policy, seed=settings.seed, device="cpu", verbose=0, **arguments
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise TrainingError(f"hyperparameters: {settings.algorithm} refuses them: {error}") from error
    if settings.discount == "time":
        held: Any = model.rollout_buffer if algorithm.on_policy else model.replay_buffer  # type: ignore[attr-defined]
        held.follow(envs, model.policy)
    return model
