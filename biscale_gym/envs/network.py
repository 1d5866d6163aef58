"""Networks in two files, weights (safetensors) and description (JSON); nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]
Activation = Literal["relu", "tanh"]


class ModelError(ValueError):
    """A model that cannot be read, or does not fit the run; the message names the file and what would fit."""


@dataclass(frozen=True)
class Lstm:
    """A layer of long short-term memory cells (S. Hochreiter, J. Schmidhuber, Neural Computation 9, 1997), as torch's.

    Attributes:
        inputs: float32[inputs, 4 units], of the gates input, forget, cell and output, in this order.
        hidden: float32[units, 4 units], the same of the last output.
        bias: float32[4 units], the sum of torch's two.
    """

    inputs: Matrix
    hidden: Matrix
    bias: Matrix

    @property
    def units(self) -> int:
        """How many cells."""
        return len(self.hidden)

    def check(self, inputs: int) -> None:
        """Refuse other shapes, and weights that are no numbers.

        Raises:
            ModelError: it does not take ``inputs`` numbers.
        """
        gates = 4 * self.units
        shapes = [self.inputs.shape, self.hidden.shape, self.bias.shape]
        if shapes != [(inputs, gates), (self.units, gates), (gates,)]:
            raise ModelError(f"an LSTM of {self.units} units over {inputs} numbers has no arrays of shapes {shapes}")
        _check_finite(self.inputs, self.hidden, self.bias)


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
        _check_finite(*self.weights, *self.biases)

    def outputs(self, rows: Matrix) -> NDArray[np.float64]:
        """float[N, inputs] to float64[N, outputs]."""
        values = np.asarray(rows, np.float64)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number:
                values = np.maximum(values, 0.0) if self.activation == "relu" else np.tanh(values)
            values = values @ weight.astype(np.float64) + bias
        return values


def check_slo(model: str, kind: str, limits: tuple[float, float], own_s: float) -> None:
    """Refuse an SLO that a model was not trained for.

    Raises:
        ModelError: ``own_s`` is outside of ``limits``.
    """
    low, high = limits
    if not low * (1.0 - 1e-9) <= own_s <= high * (1.0 + 1e-9):
        raise ModelError(
            f"the {model} model was trained for {kind} from {low:g} to {high:g} s, the run has {own_s:g} s"
        )


def grid_in(clocks_mhz: Sequence[int], grid_mhz: Sequence[int], model: str) -> list[int]:
    """Where the clocks that a model chooses from are in the run's list.

    Raises:
        ModelError: one is not there.
    """
    missing = [clock for clock in grid_mhz if clock not in clocks_mhz]
    if missing:
        raise ModelError(
            f"the {model} model chooses from {list(grid_mhz)} MHz, the run has no "
            f"{', '.join(map(str, missing))} MHz (it has {list(clocks_mhz)}); train one on this grid"
        )
    return [list(clocks_mhz).index(clock) for clock in grid_mhz]


def _check_finite(*arrays: Matrix) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ModelError("a weight is not finite")


@dataclass(frozen=True)
class Stored:
    """What a model's files hold.

    Attributes:
        stem: their path without suffix.
        network: the layers.
        lstm: what is before them; None: nothing.
        described: the description.
    """

    stem: Path
    network: Network
    lstm: Lstm | None
    described: dict[str, Any]


def write_model(
    path: Path, form: str | int, network: Network, description: Mapping[str, Any], lstm: Lstm | None = None
) -> None:
    """Write ``path`` with the suffixes .safetensors and .json.

    Args:
        path: of both files.
        form: what a reader must know of (``read_model``).
        network: the layers.
        description: more for the JSON; ``observation_version`` must be among it.
        lstm: a layer before them.
    """
    from safetensors.numpy import save

    tensors = {f"weight{n}": np.ascontiguousarray(weight) for n, weight in enumerate(network.weights)}
    tensors |= {f"bias{n}": np.ascontiguousarray(bias) for n, bias in enumerate(network.biases)}
    if lstm is not None:
        tensors |= {f"lstm_{name}": np.ascontiguousarray(getattr(lstm, name)) for name in ("inputs", "hidden", "bias")}
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


def read_model(path: Path, forms: Collection[str | int], observation_version: int) -> Stored:
    """Read a model's files.

    Args:
        path: of either file, or of both without suffix.
        forms: which the reader understands.
        observation_version: which it would feed the network with.

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
    if described.get("format") not in forms:
        known = " or ".join(repr(form) for form in forms)
        raise ModelError(f"{stem}.json has format {described.get('format')!r}, this version reads {known} here")
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
        lstm = None
        if "lstm_hidden" in tensors:
            lstm = Lstm(tensors["lstm_inputs"], tensors["lstm_hidden"], tensors["lstm_bias"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ModelError(f"{stem}: not a whole model ({error})") from error
    return Stored(stem, network, lstm, described)
