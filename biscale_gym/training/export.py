"""A trained model for use without torch: the compiled clock policy's files, and ONNX.

No statistics of the training are needed: observations are scaled in the environment, by fixed and documented units.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm

from biscale_gym.config import config_hash
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs.cluster import ClusterSetting
from biscale_gym.envs.cluster_mlp import ClusterMLP
from biscale_gym.envs.mlp import ClockMLP, Head
from biscale_gym.envs.network import Activation, Lstm, Network
from biscale_gym.envs.placement import PlacementEnv
from biscale_gym.envs.placement_mlp import PlacementMLP, kinds_of
from biscale_gym.envs.settings import ClassTableSettings, ClusterEnvSettings
from biscale_gym.fingerprint import fingerprint
from biscale_gym.training.settings import TrainingSettings

POLICY, ONNX = "policy", "policy.onnx"
PHASES = {"BiScale/Prefill-v0": "prefill", "BiScale/Decode-v0": "decode"}
REWARD_WRAPPERS = ("SlackShaping", "CostConstrained", "EnergyPerRequest")
"""Wrappers that change neither observations nor actions."""

Layers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Weights [inputs, outputs] and biases [outputs]."""


def _linear(*modules: torch.nn.Module) -> Layers:
    """The linear layers of some modules, in order."""
    found = [one for module in modules for one in module.modules() if isinstance(one, torch.nn.Linear)]
    return [(one.weight.detach().cpu().numpy().T.copy(), one.bias.detach().cpu().numpy().copy()) for one in found]


def _averaged(layers: Layers, quantiles: int) -> Layers:
    """A last layer that gives quantiles of every action's return, as one that gives their mean."""
    weights, biases = layers[-1]
    mean = weights.reshape(len(weights), quantiles, -1).mean(axis=1), biases.reshape(quantiles, -1).mean(axis=0)
    return [*layers[:-1], mean]


def network(model: BaseAlgorithm, algorithm: str) -> Layers:
    """The layers from an observation, or from the LSTM's output, to what the policy decides by."""
    policy: Any = model.policy
    if algorithm in ("ppo", "maskable-ppo", "recurrent-ppo"):
        return _linear(policy.mlp_extractor.policy_net, policy.action_net)
    if algorithm == "qr-dqn":
        return _averaged(_linear(policy.quantile_net.quantile_net), policy.quantile_net.n_quantiles)
    assert algorithm in ("sac", "tqc"), algorithm
    return _linear(policy.actor.latent_pi, policy.actor.mu)


def lstm(model: BaseAlgorithm, algorithm: str) -> Lstm | None:
    """The layer with a state before those of ``network``; None for a policy without."""
    if algorithm != "recurrent-ppo":
        return None
    policy: Any = model.policy
    told = {name: value.detach().cpu().numpy() for name, value in policy.lstm_actor.named_parameters()}
    return Lstm(
        np.ascontiguousarray(told["weight_ih_l0"].T),
        np.ascontiguousarray(told["weight_hh_l0"].T),
        told["bias_ih_l0"] + told["bias_hh_l0"],
    )


def clock_model(model: BaseAlgorithm, settings: TrainingSettings, about: dict[str, Any]) -> ClockMLP | None:
    """A trained model as a compiled clock policy; None where it has no such form.

    That is: a policy of more than one instance, or with other observations or actions than clocks.
    """
    phase, layers = PHASES.get(settings.env_id), network(model, settings.algorithm)
    wrappers = [wrapper.name for wrapper in settings.wrappers]
    continuous = "ContinuousClocks" in wrappers
    if phase is None or any(name not in (*REWARD_WRAPPERS, "ContinuousClocks") for name in wrappers):
        return None
    head: Head = "argmax"
    if continuous:
        head = "squashed" if settings.algorithm in ("sac", "tqc") else "clipped"
    scenarios = [load_scenario(name, settings.env.get("overrides")) for name in settings.scenarios]
    slos_s = [scenario.slo.ttft_s if phase == "prefill" else scenario.slo.tpot_s for scenario in scenarios]
    activation: Activation = settings.activation
    return ClockMLP(
        phase=phase,  # type: ignore[arg-type]
        clocks_mhz=tuple(scenarios[0].clocks_mhz),
        slo_s=(min(slos_s), max(slos_s)),
        weights=tuple(weights for weights, _ in layers),
        biases=tuple(biases for _, biases in layers),
        activation=activation,
        head=head,
        decision_points=tuple(settings.env.get("decision_points", ("boundary", "idle"))),
        decide_every=int(settings.env.get("decide_every", 1)),
        shield=settings.shield,
        about=about,
        lstm=lstm(model, settings.algorithm),
    )


def _slos_s(settings: TrainingSettings) -> tuple[tuple[float, float], tuple[float, float]]:
    """Least and greatest TTFT SLO, and TPOT SLO, of a run's scenarios."""
    slos = [load_scenario(name, settings.env.get("overrides")).slo for name in settings.scenarios]
    return (
        (min(slo.ttft_s for slo in slos), max(slo.ttft_s for slo in slos)),
        (min(slo.tpot_s for slo in slos), max(slo.tpot_s for slo in slos)),
    )


def cluster_model(model: BaseAlgorithm, settings: TrainingSettings, about: dict[str, Any]) -> ClusterMLP | None:
    """A trained model as a policy of all clocks at once; None where it has no such form: a grid of clocks, no state."""
    if settings.env_id != ClusterSetting.env_id or not isinstance(model.action_space, spaces.MultiDiscrete):
        return None
    if any(wrapper.name not in REWARD_WRAPPERS for wrapper in settings.wrappers):
        return None
    if lstm(model, settings.algorithm) is not None:
        return None
    layers = network(model, settings.algorithm)
    activation: Activation = settings.activation
    return ClusterMLP(
        clocks_mhz=tuple(load_scenario(settings.scenarios[0], settings.env.get("overrides")).clocks_mhz),
        slo_s=_slos_s(settings),
        interval_s=float(settings.env.get("interval_s", ClusterEnvSettings().interval_s)),
        network=Network(tuple(weights for weights, _ in layers), tuple(biases for _, biases in layers), activation),
        about=about,
    )


def placement_model(model: BaseAlgorithm, settings: TrainingSettings, about: dict[str, Any]) -> PlacementMLP | None:
    """A trained model as a planner; None where it has no such form: only networks that are trained under masks do."""
    layers = network(model, settings.algorithm)
    if settings.env_id != PlacementEnv.env_id or settings.algorithm != "maskable-ppo":
        return None
    if any(wrapper.name not in REWARD_WRAPPERS for wrapper in settings.wrappers):
        return None
    env = PlacementEnv(settings.scenarios[0], **settings.env)
    activation: Activation = settings.activation
    return PlacementMLP(
        kinds=kinds_of(env.choice),
        slo_s=_slos_s(settings),
        table=ClassTableSettings(**env.settings.model_dump(include=set(ClassTableSettings.model_fields))),
        network=Network(tuple(weights for weights, _ in layers), tuple(biases for _, biases in layers), activation),
        about=about,
    )


def write_onnx(path: Path, layers: Layers, activation: Activation, space: spaces.Space[Any], head: Head) -> None:
    """Write the network as ONNX: ``observation`` float32[N, size] to ``output``, and for one clock to ``action``.

    ``action`` is int64[N], the index of the greatest output, or float32[N, 1] in [-1, 1] where clocks are continuous.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    value = "observation"
    for number, (weights, biases) in enumerate(layers):
        constants += [
            numpy_helper.from_array(np.ascontiguousarray(weights), f"weight{number}"),
            numpy_helper.from_array(np.ascontiguousarray(biases), f"bias{number}"),
        ]
        last = number == len(layers) - 1
        target = "output" if last else f"layer{number}"
        nodes.append(helper.make_node("Gemm", [value, f"weight{number}", f"bias{number}"], [target]))
        value = target
        if not last:
            nodes.append(helper.make_node("Relu" if activation == "relu" else "Tanh", [value], [f"{value}_active"]))
            value = f"{value}_active"
    size, width = layers[0][0].shape[0], layers[-1][0].shape[1]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", width])]
    if isinstance(space, spaces.Discrete):
        nodes.append(helper.make_node("ArgMax", ["output"], ["action"], axis=1, keepdims=0))
        outputs.append(helper.make_tensor_value_info("action", TensorProto.INT64, ["N"]))
    elif isinstance(space, spaces.Box):
        if head == "squashed":
            nodes.append(helper.make_node("Tanh", ["output"], ["action"]))
        else:
            constants += [numpy_helper.from_array(np.array(end, np.float32), f"end{end:+.0f}") for end in (-1.0, 1.0)]
            nodes.append(helper.make_node("Clip", ["output", "end-1", "end+1"], ["action"]))
        outputs.append(helper.make_tensor_value_info("action", TensorProto.FLOAT, ["N", width]))
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["N", size])],
        outputs,
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made)
    path.write_bytes(made.SerializeToString())


def export_model(model: BaseAlgorithm, settings: TrainingSettings, folder: Path, made: dict[str, Any]) -> list[str]:
    """Write what forms the model has into its folder.

    Args:
        model: trained.
        settings: of its run.
        folder: of the model.
        made: step, score and seed, for the description.

    Returns:
        The names written: ``policy.safetensors`` and ``policy.json`` (clocks or placements for ``compare``),
        ``policy.onnx`` (of a policy without a state).
    """
    names = []
    if lstm(model, settings.algorithm) is None:
        names.append(ONNX)
        head: Head = "squashed" if settings.algorithm in ("sac", "tqc") else "clipped"
        layers = network(model, settings.algorithm)
        write_onnx(folder / ONNX, layers, settings.activation, model.action_space, head)
    told = settings.model_dump(mode="json")
    about = {**made, "settings": told, "settings_hash": config_hash(told), "fingerprint": fingerprint()}
    forms = (clock_model, cluster_model, placement_model)
    compiled = next((made for made in (form(model, settings, about) for form in forms) if made is not None), None)
    if compiled is not None:
        compiled.save(folder / POLICY)
        names += [f"{POLICY}.safetensors", f"{POLICY}.json"]
    return names
