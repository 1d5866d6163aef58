"""A multi-layer perceptron in two files, weights (safetensors) and description (JSON); nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Activation = Literal["relu", "tanh"]


class ModelError(ValueError):
    """A model that cannot be read, or does not fit the run; the message names the file and what would fit."""


@dataclass(frozen=True)
class Network:
    """Linear layers with an activation between them.

    Attributes:
        weights: float32[inputs, outputs] of each layer.
        biases: float32[outputs] of each layer.
        activation: between layers.
    """

    weights: tuple[Matrix, ...]
    biases: tuple[Matrix, ...]
    activation: Activation = "relu"

    def check(self, inputs: int, outputs: int, what: str) -> None:
        """Refuse other shapes, and weights that are no numbers.

        Raises:
            ModelError: ``what`` takes ``inputs`` numbers and gives ``outputs``, and these layers do not.
        """
        sizes = [inputs, *(len(bias) for bias in self.biases)]
        shapes = [weight.shape for weight in self.weights]
        if shapes != list(pairwise(sizes)) or sizes[-1] != outputs:
            raise ModelError(
                f"{what} takes {inputs} numbers and gives {outputs}; the layers are {shapes} with {sizes[1:]} biases"
            )
        if not all(np.isfinite(array).all() for array in (*self.weights, *self.biases)):
            raise ModelError("a weight is not finite")

    def outputs(self, rows: Matrix) -> NDArray[np.float64]:
        """float[N, inputs] to float64[N, outputs]."""
        values = np.asarray(rows, np.float64)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number:
                values = np.maximum(values, 0.0) if self.activation == "relu" else np.tanh(values)
            values = values @ weight.astype(np.float64) + bias
        return values


def write_network(path: Path, network: Network, form: str | int, description: dict[str, Any]) -> None:
    """Write ``path`` with the suffixes .safetensors and .json.

    Args:
        path: of both files.
        network: the weights.
        form: what a reader must ask for (``read_network``).
        description: more for the JSON; ``observation_version`` must be among it.
    """
    from safetensors.numpy import save

    tensors = {f"weight{n}": np.ascontiguousarray(weight) for n, weight in enumerate(network.weights)}
    tensors |= {f"bias{n}": np.ascontiguousarray(bias) for n, bias in enumerate(network.biases)}
    data = save(tensors)
    told = {
        "format": form,
        **description,
        "activation": network.activation,
        "layers": len(network.weights),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".safetensors").write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_network(path: Path, form: str | int, observation_version: int) -> tuple[Path, Network, dict[str, Any]]:
    """Read a model's files.

    Args:
        path: of either file, or of both without suffix.
        form: which the reader understands.
        observation_version: which it would feed the network with.

    Returns:
        The path without suffix, the weights, and the description.

    Raises:
        ModelError: a file is missing or altered, or of another form or observation.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    stem = path.with_suffix("") if path.suffix in {".safetensors", ".json"} else path
    try:
        described = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        data = stem.with_suffix(".safetensors").read_bytes()
    except FileNotFoundError as error:
        near = sorted(found.stem for found in stem.parent.glob("*.safetensors")) if stem.parent.is_dir() else []
        raise ModelError(
            f"{error.filename}: no such file; models in {stem.parent}: {', '.join(near) or 'none'}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{stem}.json cannot be read: {error}") from error
    if described.get("format") != form:
        raise ModelError(f"{stem}.json has format {described.get('format')!r}, this version reads {form!r} here")
    if described["observation_version"] != observation_version:
        raise ModelError(
            f"{stem} was trained on observation version {described['observation_version']}, this version makes "
            f"{observation_version}: train it again"
        )
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise ModelError(f"{stem}.safetensors is not the file that {stem.name}.json describes: its SHA-256 differs")
    try:
        tensors = load(data)
        layers = range(int(described["layers"]))
        network = Network(
            tuple(tensors[f"weight{n}"] for n in layers),
            tuple(tensors[f"bias{n}"] for n in layers),
            described["activation"],
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ModelError(f"{stem}: not a whole model ({error})") from error
    return stem, network, described
