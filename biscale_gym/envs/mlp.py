"""A learned clock policy as a compiled one: a multi-layer perceptron over an environment's observation.

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
from biscale_gym.cluster.policy import POLICY_SIGNATURE
from biscale_gym.cluster.simulator import PhasePolicy
from biscale_gym.envs import layout
from biscale_gym.envs.encoding import encode_decode, encode_prefill, encoder_params, grid_of
from biscale_gym.envs.network import Activation, Matrix, ModelError, Network, read_network, write_network
from biscale_gym.envs.shield import NO_SHIELD, ShieldSettings, guarded, raised_decode, raised_prefill, shield_params
from biscale_gym.envs.shield import SIZE as SHIELD

Vector = NDArray[np.float64]
Head = Literal["argmax", "squashed", "clipped"]

ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh")
HEADS: tuple[Head, ...] = ("argmax", "squashed", "clipped")
FORMAT = 1
"""Of the two files."""

# Params after the encoder's and the shield's.
ACTIVATION = SHIELD
EVERY = SHIELD + 1
HEAD = SHIELD + 2
LAYERS = SHIELD + 3
"""How many layers; then inputs of the first, outputs of each, and each layer's weights [inputs, outputs] and biases."""

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

    def __post_init__(self) -> None:
        outputs = len(self.clocks_mhz) if self.head == "argmax" else 1
        what = f"a {self.phase} policy over {len(self.clocks_mhz)} clocks"
        self.network.check(layout.size(self.phase, len(self.clocks_mhz)), outputs, what)

    @property
    def network(self) -> Network:
        """The layers."""
        return Network(self.weights, self.biases, self.activation)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return sum(array.size for array in (*self.weights, *self.biases))

    def actions(self, observations: Matrix) -> NDArray[np.int64]:
        """The network's clocks: float[N, size] to int64[N], indices into ``clocks_mhz``; no shield."""
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
        missing = [clock for clock in self.clocks_mhz if clock not in clocks_mhz]
        if missing:
            raise ModelError(
                f"the {self.phase} model chooses from {list(self.clocks_mhz)} MHz, the run has no "
                f"{', '.join(map(str, missing))} MHz (it has {list(clocks_mhz)}); train one on this grid"
            )
        low, high = self.slo_s
        if not low * (1.0 - 1e-9) <= slo_s <= high * (1.0 + 1e-9):
            raise ModelError(
                f"the {self.phase} model was trained for SLOs from {low:g} to {high:g} s, the run has {slo_s:g} s"
            )
        points = self.decision_points
        return PhasePolicy(
            function=prefill_clock if self.phase == "prefill" else decode_clock,
            params=self._params(clocks_mhz),
            on_arrival="arrival" in points,
            on_overrun="overrun" in points,
            on_idle="idle" in points,
            slack=self.phase == "decode",
        )

    def _params(self, clocks_mhz: Sequence[int]) -> Vector:
        encoder = encoder_params(clocks_mhz, [list(clocks_mhz).index(clock) for clock in self.clocks_mhz])
        head = [
            *shield_params(self.shield),
            ACTIVATIONS.index(self.activation),
            self.decide_every,
            HEADS.index(self.head),
            len(self.weights),
            self.weights[0].shape[0],
            *(len(bias) for bias in self.biases),
        ]
        layers = [part.ravel() for pair in zip(self.weights, self.biases, strict=True) for part in pair]
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
        write_network(path, self.network, FORMAT, description)


def load_model(path: Path) -> ClockMLP:
    """Read a model.

    Args:
        path: of either file, or of both without suffix.

    Raises:
        ModelError: a file is missing or altered, or is of another format or observation than this version's.
    """
    stem, network, described = read_network(path, FORMAT, layout.VERSION)
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
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"{stem}: not a whole model ({error})") from error


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
def _position(params: Vector, head: int, values: Vector, row: NDArray[np.float32]) -> int:
    """Position in the grid of the network's clock: of the greatest output, the first of equals, or the nearest."""
    layers = int(params[head + LAYERS])
    sizes = head + LAYERS + 1
    at = sizes + layers + 1
    inputs = int(params[sizes])
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
        row = np.empty(int(params[head + LAYERS + 1]), np.float32)
        encode_prefill(obs, memory, params, model, row)
        values = np.empty(2 * _widest(params, head))
        clock = int(params[grid + _position(params, head, values, row)])
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
        row = np.empty(int(params[head + LAYERS + 1]), np.float32)
        encode_decode(obs, memory, params, model, row)
        values = np.empty(2 * _widest(params, head))
        clock = int(params[grid + _position(params, head, values, row)])
    return int(raised_decode(obs, params, model, clock))
