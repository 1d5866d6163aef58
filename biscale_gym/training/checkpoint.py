"""Checkpoints: one folder each, there whole or not at all.

A checkpoint is written beside its final name, every file is synced to disk, and the folder renamed; the last two are
kept. Nothing is unpickled: ``model.pt`` is read with ``weights_only``, the rest is arrays (``.npz``) and JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import recursive_getattr

from biscale_gym.envs.saved import Saved
from biscale_gym.training.environments import LanesVecEnv
from biscale_gym.training.errors import TrainingError

KEPT = 2
COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "_episode_num",
    "_current_progress_remaining",
    "_n_calls",
    "exploration_rate",
)
"""Numbers of SB3's algorithms that decide how training goes on; each algorithm has some of them."""
REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "discounts")


@dataclass
class Checkpoint:
    """Everything that decides how a run goes on.

    Attributes:
        tensors: of the model, its optimisers and its memory.
        lanes: of the environments.
        replay: of the replay buffer; empty without one.
        values: all the rest, as JSON holds it.
    """

    tensors: dict[str, Any]
    lanes: Saved
    replay: dict[str, NDArray[Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def random_states(model: BaseAlgorithm) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(as JSON, as tensors) of every generator that training draws from: Python's, NumPy's, torch's, the actions'."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the one SB3 draws from
    python_state = random.getstate()
    values = {
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "actions": _as_json(model.action_space.np_random.bit_generator.state),
    }
    return values, {"torch": torch.get_rng_state()}


def set_random_states(model: BaseAlgorithm, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Set what ``random_states`` read."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    model.action_space.np_random.bit_generator.state = values["actions"]
    torch.set_rng_state(tensors["torch"])


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def model_state(model: BaseAlgorithm) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, numbers) of a model between two iterations."""
    _, variables = model._get_torch_save_params()
    tensors: dict[str, Any] = {
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name).detach().clone() for name in variables or ()},
        "observations": torch.as_tensor(np.asarray(model._last_obs)),
        "episode_starts": torch.as_tensor(np.asarray(model._last_episode_starts)),
    }
    memory = getattr(model, "_last_lstm_states", None)
    if memory is not None:
        tensors["memory"] = {"pi": list(memory.pi), "vf": list(memory.vf)}
    counters = {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)}
    return tensors, counters


def set_model_state(model: BaseAlgorithm, tensors: dict[str, Any], counters: dict[str, Any]) -> None:
    """Set what ``model_state`` read."""
    model.set_parameters(tensors["parameters"], exact_match=True, device="cpu")
    for name, value in tensors["variables"].items():
        recursive_getattr(model, name).data[...] = value
    model._last_obs = tensors["observations"].numpy()
    model._last_episode_starts = tensors["episode_starts"].numpy()
    if "memory" in tensors:
        kept: Any = model._last_lstm_states  # type: ignore[attr-defined]
        model._last_lstm_states = type(kept)(  # type: ignore[attr-defined]
            tuple(tensors["memory"]["pi"]), tuple(tensors["memory"]["vf"])
        )
    for name, value in counters.items():
        setattr(model, name, value)


def replay_state(model: BaseAlgorithm) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """(arrays, position) of the replay buffer, what is not yet filled left out; both empty without one."""
    buffer: Any = getattr(model, "replay_buffer", None)
    if buffer is None:
        return {}, {}
    filled = buffer.buffer_size if buffer.full else buffer.pos
    arrays = {name: getattr(buffer, name)[:filled] for name in REPLAY if hasattr(buffer, name)}
    return arrays, {"pos": buffer.pos, "full": buffer.full}


def set_replay_state(model: BaseAlgorithm, arrays: dict[str, NDArray[Any]], position: dict[str, Any]) -> None:
    """Set what ``replay_state`` read."""
    buffer: Any = getattr(model, "replay_buffer", None)
    for name, values in arrays.items():
        getattr(buffer, name)[: len(values)] = values
    for name, value in position.items():
        setattr(buffer, name, value)


def taken(model: BaseAlgorithm, lanes: LanesVecEnv, run: dict[str, Any]) -> Checkpoint:
    """A checkpoint of now.

    Args:
        model: between two iterations.
        lanes: its environments.
        run: what the run itself keeps.
    """
    tensors, counters = model_state(model)
    generators, generator_tensors = random_states(model)
    replay, position = replay_state(model)
    return Checkpoint(
        tensors={**tensors, "generators": generator_tensors},
        lanes=lanes.saved(),
        replay=replay,
        values={"counters": counters, "generators": generators, "replay": position, "run": run},
    )


def restore(checkpoint: Checkpoint, model: BaseAlgorithm, lanes: LanesVecEnv) -> None:
    """Set model and lanes; the generators are set by ``set_generators`` when nothing else will draw from them."""
    lanes.restore_saved(checkpoint.lanes)
    set_model_state(model, checkpoint.tensors, checkpoint.values["counters"])
    set_replay_state(model, checkpoint.replay, checkpoint.values["replay"])


def set_generators(checkpoint: Checkpoint, model: BaseAlgorithm) -> None:
    """Set every random generator."""
    set_random_states(model, checkpoint.values["generators"], checkpoint.tensors["generators"])


def _synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """For ``savez``, whose own keyword is typed too."""
    return dict(arrays)


def write(folder: Path, checkpoint: Checkpoint, step: int) -> Path:
    """Write a checkpoint into ``folder`` and remove older ones; returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:012d}"
    if final.exists():
        return final
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    torch.save(checkpoint.tensors, partial / "model.pt")
    np.savez(partial / "lanes.npz", **_named(checkpoint.lanes.arrays))
    if checkpoint.replay:
        np.savez(partial / "replay.npz", **_named(checkpoint.replay))
    values = {**checkpoint.values, "lanes": checkpoint.lanes.values}
    (partial / "state.json").write_text(json.dumps(values), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _synced(path)
    partial.rename(final)
    _synced(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    return final


def replace_file(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}-partial")
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    _synced(partial)
    partial.replace(path)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder; None: there is none."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def read(path: Path) -> Checkpoint:
    """A checkpoint that ``write`` left.

    Raises:
        TrainingError: a file of it is missing or damaged.
    """
    try:
        tensors = torch.load(path / "model.pt", weights_only=True, map_location="cpu")
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        lanes = _arrays(path / "lanes.npz")
        replay = _arrays(path / "replay.npz") if (path / "replay.npz").exists() else {}
    except Exception as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read ({error}); delete it to go on from an older one"
        ) from error
    return Checkpoint(tensors, Saved(lanes, values.pop("lanes")), replay, values)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}
