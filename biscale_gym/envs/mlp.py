"""A learned clock policy as a compiled one: a network over an environment's observation.

It is a multi-layer perceptron, and may begin with an LSTM, whose state is then part of each instance's memory.

The same encoder writes the observation in training and in service, and the same weights answer, so a policy that was
trained in an environment acts in a comparison as it did there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import Phase
from biscale_gym.cluster.policy import MEMORY_SIZE, POLICY_SIGNATURE
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.envs import layout
from biscale_gym.envs.encoding import encode_decode, encode_prefill, encoder_params, grid_of
from biscale_gym.envs.network import (
    Activation,
    Lstm,
    Matrix,
    ModelError,
    Network,
    check_slo,
    grid_in,
    read_model,
    write_model,
)
from biscale_gym.envs.shield import NO_SHIELD, ShieldSettings, guarded, raised_decode, raised_prefill, shield_params
from biscale_gym.envs.shield import SIZE as SHIELD

Vector = NDArray[np.float64]
Head = Literal["argmax", "squashed", "clipped"]

ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh")
HEADS: tuple[Head, ...] = ("argmax", "squashed", "clipped")
FORMAT, RECURRENT_FORMAT = 1, "lstm 1"
"""Of the two files, without and with an LSTM."""

# Params after the encoder's and the shield's.
ACTIVATION = SHIELD
EVERY = SHIELD + 1
HEAD = SHIELD + 2
OBSERVED = SHIELD + 3
"""How many numbers the observation has."""
UNITS = SHIELD + 4
"""Of the LSTM; 0: there is none."""
LAYERS = SHIELD + 5
"""How many layers; then inputs of the first, outputs of each, the LSTM's weights [inputs, 4 units] and [units, 4 units]
and its bias, and each layer's weights [inputs, outputs] and biases."""

# Memory after everybody else's: the LSTM's cells, then its last outputs.
STATE = MEMORY_SIZE

# Memory, below the encoder's.
KEPT_FOR = 0
"""Decisions since the last choice, plus 1; 0 before the first."""
KV_GUARDED = 1


@dataclass(frozen=True)
class ClockMLP:
    """One phase's learned clock policy.

    Attributes:
        phase: whose clocks.
        clocks_mhz: the grid that its outputs stand for, ascending.
        slo_s: least and greatest SLO of the phase (TTFT or TPOT) that it was trained for.
        weights: float32[inputs, outputs] of each layer.
        biases: float32[outputs] of each layer.
        activation: between layers.
        lstm: what is before the layers; None: nothing, they take the observation itself.
        head: ``argmax``: an output per clock, the greatest counts. ``clipped``: one output, cut to [-1, 1], says a
            clock between the lowest (-1) and the highest (1), and the nearest of the grid counts, as with the wrapper
            ``ContinuousClocks``. ``squashed``: the same, of the output's tanh.
        decision_points: when it is asked, beside a batch about to start.
        decide_every: batches, or decode iterations, from one choice to the next; the clock is kept in between.
        shield: what overrules it.
        about: how it was made, for people.
    """

    phase: Phase
    clocks_mhz: tuple[int, ...]
    slo_s: tuple[float, float]
    weights: tuple[Matrix, ...]
    biases: tuple[NDArray[np.float32], ...]
    activation: Activation = "relu"
    head: Head = "argmax"
    decision_points: tuple[str, ...] = ("boundary", "idle")
    decide_every: int = 1
    shield: ShieldSettings = NO_SHIELD
    about: dict[str, Any] = field(default_factory=dict)
    lstm: Lstm | None = None

    def __post_init__(self) -> None:
        outputs = len(self.clocks_mhz) if self.head == "argmax" else 1
        what = f"a {self.phase} policy over {len(self.clocks_mhz)} clocks"
        inputs = layout.size(self.phase, len(self.clocks_mhz))
        if self.lstm is not None:
            self.lstm.check(inputs)
            inputs = self.lstm.units
        self.network.check(inputs, outputs, what)

    @property
    def network(self) -> Network:
        """The layers."""
        return Network(self.weights, self.biases, self.activation)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        recurrent = () if self.lstm is None else (self.lstm.inputs, self.lstm.hidden, self.lstm.bias)
        return sum(array.size for array in (*self.weights, *self.biases, *recurrent))

    def actions(self, observations: Matrix) -> NDArray[np.int64]:
        """The network's clocks: float[N, size] to int64[N], indices into ``clocks_mhz``; no shield.

        Raises:
            ModelError: it has a state, so that one observation does not say what it does.
        """
        if self.lstm is not None:
            raise ModelError("a policy with a state answers sequences, not single observations")
        found = self.network.outputs(observations)
        if self.head == "argmax":
            return np.asarray(np.argmax(found, axis=1), np.int64)
        clocks = np.array(self.clocks_mhz, np.float64)
        number = np.tanh(found[:, 0]) if self.head == "squashed" else np.clip(found[:, 0], -1.0, 1.0)
        mhz = clocks[0] + 0.5 * (number + 1.0) * (clocks[-1] - clocks[0])
        return np.asarray(np.searchsorted(0.5 * (clocks[1:] + clocks[:-1]), mhz, side="left"), np.int64)

    def policy(self, clocks_mhz: Sequence[int], slo_s: float) -> PhasePolicy:
        """The compiled policy of a run.

        Args:
            clocks_mhz: the run's ascending clock list.
            slo_s: its SLO of the phase.

        Raises:
            ModelError: the run lacks a clock of the grid, or its SLO is outside what the model was trained for.
        """
        grid = grid_in(clocks_mhz, self.clocks_mhz, self.phase)
        check_slo(self.phase, "SLOs", self.slo_s, slo_s)
        points = self.decision_points
        return PhasePolicy(
            function=prefill_clock if self.phase == "prefill" else decode_clock,
            params=self._params(clocks_mhz, grid),
            on_arrival="arrival" in points,
            on_overrun="overrun" in points,
            on_idle="idle" in points,
            slack=self.phase == "decode",
            memory=MEMORY_SIZE if self.lstm is None else STATE + 2 * self.lstm.units,
        )

    def _params(self, clocks_mhz: Sequence[int], grid: Sequence[int]) -> Vector:
        encoder = encoder_params(clocks_mhz, grid)
        head = [
            *shield_params(self.shield),
            ACTIVATIONS.index(self.activation),
            self.decide_every,
            HEADS.index(self.head),
            layout.size(self.phase, len(self.clocks_mhz)),
            0 if self.lstm is None else self.lstm.units,
            len(self.weights),
            self.weights[0].shape[0],
            *(len(bias) for bias in self.biases),
        ]
        layers = [part.ravel() for pair in zip(self.weights, self.biases, strict=True) for part in pair]
        if self.lstm is not None:
            layers = [self.lstm.inputs.ravel(), self.lstm.hidden.ravel(), self.lstm.bias, *layers]
        return np.concatenate([encoder, np.array(head, np.float64), *layers]).astype(np.float64)

    def save(self, path: Path) -> None:
        """Write ``path`` with the suffixes .safetensors and .json."""
        description = {
            "observation_version": layout.VERSION,
            "phase": self.phase,
            "clocks_mhz": list(self.clocks_mhz),
            "slo_s": list(self.slo_s),
            "head": self.head,
            "decision_points": list(self.decision_points),
            "decide_every": self.decide_every,
            "shield": self.shield.model_dump(),
            "about": self.about,
        }
        write_model(path, FORMAT if self.lstm is None else RECURRENT_FORMAT, self.network, description, self.lstm)


def load_model(path: Path) -> ClockMLP:
    """Read a model.

    Args:
        path: of either file, or of both without suffix.

    Raises:
        ModelError: a file is missing or altered, or is of another format or observation than this version's.
    """
    stored = read_model(path, [FORMAT, RECURRENT_FORMAT], layout.VERSION)
    network, described = stored.network, stored.described
    try:
        return ClockMLP(
            phase=described["phase"],
            clocks_mhz=tuple(described["clocks_mhz"]),
            slo_s=cast(tuple[float, float], tuple(described["slo_s"])),
            weights=network.weights,
            biases=network.biases,
            activation=network.activation,
            head=described["head"],
            decision_points=tuple(described["decision_points"]),
            decide_every=int(described["decide_every"]),
            shield=ShieldSettings(**described["shield"]),
            about=described["about"],
            lstm=stored.lstm,
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"{stored.stem}: not a whole model ({error})") from error


@njit(cache=True, error_model="numpy")
def _nearest(params: Vector, number: float) -> int:
    """Position in the grid of the clock nearest to a number in [-1, 1]; half-way between two, the lower."""
    grid, n = grid_of(params)
    low, high = params[1 + int(params[grid])], params[1 + int(params[grid + n - 1])]
    mhz = low + 0.5 * (number + 1.0) * (high - low)
    position = 0
    while (
        position < n - 1
        and 0.5 * (params[1 + int(params[grid + position])] + params[1 + int(params[grid + position + 1])]) < mhz
    ):
        position += 1
    return position


@njit(cache=True, error_model="numpy")
def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), which exp of a large number cannot spoil."""
    return float(0.5 + 0.5 * np.tanh(0.5 * x))


@njit(cache=True, error_model="numpy")
def _remember(params: Vector, at: int, units: int, memory: Vector, row: NDArray[np.float32]) -> None:
    """One step of the LSTM whose weights begin at ``at``; its state is in the memory."""
    gates = np.empty(4 * units)
    hidden = at + row.size * 4 * units
    bias = hidden + units * 4 * units
    for k in range(4 * units):
        gates[k] = params[bias + k]
    for n in range(row.size):
        x = row[n]
        if x != 0.0:
            for k in range(4 * units):
                gates[k] += x * params[at + n * 4 * units + k]
    for n in range(units):
        x = memory[STATE + units + n]
        if x != 0.0:
            for k in range(4 * units):
                gates[k] += x * params[hidden + n * 4 * units + k]
    for n in range(units):
        cell = _sigmoid(gates[units + n]) * memory[STATE + n] + _sigmoid(gates[n]) * np.tanh(gates[2 * units + n])
        memory[STATE + n] = cell
        memory[STATE + units + n] = _sigmoid(gates[3 * units + n]) * np.tanh(cell)


@njit(cache=True, error_model="numpy")
def position_of(params: Vector, head: int, memory: Vector, values: Vector, row: NDArray[np.float32]) -> int:
    """Position in the grid of the network's clock: of the greatest output, the first of equals, or the nearest.

    Args:
        params: of the policy.
        head: where those after the encoder's begin.
        memory: of the instance; the LSTM's state is read and written.
        values: float64[2 x widest layer], to be overwritten.
        row: float32[size], the observation.
    """
    layers = int(params[head + LAYERS])
    sizes = head + LAYERS + 1
    at = sizes + layers + 1
    inputs = int(params[sizes])
    units = int(params[head + UNITS])
    if units > 0:
        _remember(params, at, units, memory, row)
        for n in range(inputs):
            values[n] = memory[STATE + units + n]
        at += (row.size + units + 1) * 4 * units
    else:
        for n in range(inputs):
            values[n] = row[n]
    width = values.size // 2
    source, target = 0, width
    for layer in range(layers):
        outputs = int(params[sizes + 1 + layer])
        bias = at + inputs * outputs
        for j in range(outputs):
            values[target + j] = params[bias + j]
        for i in range(inputs):
            x = values[source + i]
            if x != 0.0:
                first = at + i * outputs
                for j in range(outputs):
                    values[target + j] += x * params[first + j]
        if layer < layers - 1:
            if params[head + ACTIVATION] == 0.0:
                for j in range(outputs):
                    values[target + j] = max(0.0, values[target + j])
            else:
                for j in range(outputs):
                    values[target + j] = np.tanh(values[target + j])
        at = bias + outputs
        inputs = outputs
        source, target = target, source
    kind = int(params[head + HEAD])
    if kind > 0:
        squashed = np.tanh(values[source]) if kind == 1 else min(1.0, max(-1.0, values[source]))
        return int(_nearest(params, squashed))
    best = 0
    for j in range(1, inputs):
        if values[source + j] > values[source + best]:
            best = j
    return best


@njit(cache=True, error_model="numpy")
def _widest(params: Vector, head: int) -> int:
    layers = int(params[head + LAYERS])
    widest = 0
    for n in range(layers + 1):
        widest = max(widest, int(params[head + LAYERS + 1 + n]))
    return widest


@njit(cache=True, error_model="numpy")
def _kept(obs: Vector, memory: Vector, every: int) -> bool:
    """Whether the clock chosen before still holds; counts the decisions."""
    if int(obs[f.REASON]) == f.BOUNDARY and 0.0 < memory[KEPT_FOR] < every:
        memory[KEPT_FOR] += 1.0
        return True
    memory[KEPT_FOR] = 1.0 if int(obs[f.REASON]) == f.BOUNDARY else 0.0
    return False


@njit(POLICY_SIGNATURE, cache=True, error_model="numpy")
def prefill_clock(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The network's clock for a prefill instance."""
    grid, n = grid_of(params)
    head = grid + n
    clock = int(obs[f.TARGET])
    if not _kept(obs, memory, int(params[head + EVERY])):
        row = np.empty(int(params[head + OBSERVED]), np.float32)
        encode_prefill(obs, memory, params, model, row)
        values = np.empty(2 * _widest(params, head))
        clock = int(params[grid + position_of(params, head, memory, values, row)])
    return int(raised_prefill(obs, params, model, clock))


@njit(POLICY_SIGNATURE, cache=True, error_model="numpy")
def decode_clock(obs: Vector, memory: Vector, params: Vector, model: Vector) -> int:
    """The network's clock for a decode instance."""
    grid, n = grid_of(params)
    head = grid + n
    idle = int(obs[f.REASON]) == f.IDLE
    memory[KV_GUARDED] = 1.0 if guarded(obs, params, memory[KV_GUARDED] > 0.0) else 0.0
    kept = _kept(obs, memory, int(params[head + EVERY]))
    if memory[KV_GUARDED] > 0.0 and not idle:
        return int(params[grid + n - 1])
    clock = int(obs[f.TARGET])
    if not kept:
        row = np.empty(int(params[head + OBSERVED]), np.float32)
        encode_decode(obs, memory, params, model, row)
        values = np.empty(2 * _widest(params, head))
        clock = int(params[grid + position_of(params, head, memory, values, row)])
    return int(raised_decode(obs, params, model, clock))
