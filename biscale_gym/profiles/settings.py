"""Settings of hardware, models, clock switching and KV transfer: the shape of the presets in ``configs/``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_gym.config import Settings

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["bf16", "fp8"]


class ModelSettings(Settings):
    """Dimensions of a dense decoder-only transformer; everything that depends on the model is derived from them."""

    layers: Count
    hidden_size: Count
    attention_heads: Count
    kv_heads: Count
    head_dim: Count
    mlp_size: Count
    mlp_matrices: Literal[2, 3]
    vocabulary: Count
    context_tokens: Count
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]

    @property
    def linear_parameters(self) -> float:
        """Parameters of the layers' dense products (without embedding and output head)."""
        attention = 2 * self.attention_heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return float(self.layers * self.hidden_size * (attention + self.mlp_matrices * self.mlp_size))

    @property
    def head_parameters(self) -> float:
        """Parameters of the output head."""
        return float(self.hidden_size * self.vocabulary)

    @property
    def attention_flop_per_square(self) -> float:
        """FLOP of causal attention per squared prompt token: half of 4 x layers x width."""
        return 2.0 * self.layers * self.attention_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token, 16-bit cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes streamed by every iteration: linear layers in ``precision``, output head in 16 bits."""
        return self.linear_parameters * (1 if precision == "fp8" else 2) + 2.0 * self.head_parameters


class ClockRange(Settings):
    """Lockable SM clocks: a regular list."""

    lowest_mhz: Count
    highest_mhz: Count
    step_mhz: Count

    @model_validator(mode="after")
    def _regular(self) -> ClockRange:
        if self.highest_mhz < self.lowest_mhz or (self.highest_mhz - self.lowest_mhz) % self.step_mhz:
            raise ValueError("highest_mhz must be lowest_mhz plus a whole number of step_mhz")
        return self

    @property
    def mhz(self) -> tuple[int, ...]:
        """Every clock, ascending."""
        return tuple(range(self.lowest_mhz, self.highest_mhz + 1, self.step_mhz))


class MemoryShare(Settings):
    """What of a GPU's memory weights and KV may use."""

    utilisation: Share
    reserve_gb: NonNegative


class TightPrefill(MemoryShare):
    """Shares of a prefill instance that would not fit otherwise; used where at least so many KV tokens come out."""

    least_kv_tokens: Count


class MemorySettings(MemoryShare):
    """GPU memory; ``tight_prefill`` replaces the shares on prefill instances that would not fit otherwise."""

    gpu_gb: Positive
    tight_prefill: TightPrefill | None = None


class AllReduceSettings(Settings):
    """One all-reduce over a TP group."""

    latency_us: NonNegative
    gb_per_s: Positive


class PrecisionSettings(Settings):
    """Latency terms that depend on the weights' precision."""

    peak_multiple: Positive
    bandwidth_tb_per_s: Positive
    efficiency: Positive
    launch_ms: NonNegative
    token_us: NonNegative
    sharded_token_us: NonNegative


class ParametricLatency(Settings):
    """Constants of the closed form's latency."""

    host_ms: NonNegative
    host_ms_per_sequence: NonNegative
    roofline_norm: Annotated[float, Field(ge=1)]
    tensor_tflops_per_ghz: Positive
    attention_efficiency: Positive
    kv_tb_per_s: Positive
    bandwidth_knee_ghz: Positive
    bandwidth_knee_power: Positive
    tensor_limit_ghz: Positive
    launch_flat: NonNegative
    launch_ghz: NonNegative
    allreduce_flat: NonNegative
    allreduce_ghz: NonNegative
    allreduce: dict[int, AllReduceSettings]
    precisions: dict[Precision, PrecisionSettings]


class ParametricPower(Settings):
    """Constants of the closed form's power."""

    limit_w: Positive
    idle_lowest_w: NonNegative
    idle_highest_w: NonNegative
    voltage_slope_per_ghz: NonNegative
    voltage_floor: Share
    w_per_tb_per_s: NonNegative
    w_per_tflops: NonNegative
    w_per_ghz: NonNegative
    elementwise_tb_per_s: Positive
    flop_energy: dict[Precision, Positive]
    prefill_factor: Annotated[float, Field(ge=1)]
    prefill_half_tokens: Positive


class ParametricSettings(Settings):
    """Closed form: latency, power, and the model they were fitted on."""

    reference_layers: Count
    reference_hidden_size: Count
    latency: ParametricLatency
    power: ParametricPower


class LinearPrefill(Settings):
    """Prefill coefficients of the linear form."""

    a_ms: NonNegative
    ms_per_token: NonNegative
    ms_per_square: NonNegative


class LinearDecode(Settings):
    """Decode coefficients of the linear form."""

    a_ms: NonNegative
    ms_per_token: NonNegative
    ms_per_sequence: NonNegative


class LinearCoefficients(Settings):
    """One model at one TP degree."""

    prefill: LinearPrefill
    small: LinearDecode
    large: LinearDecode


class LinearSettings(Settings):
    """Linear latency model with constant power; coefficients by model preset name and TP degree."""

    busy_power_w: NonNegative
    idle_power_w: NonNegative
    large_batch: Count
    prefill_extra_ms: NonNegative
    engine_ms: NonNegative
    engine_ms_per_token: NonNegative
    coefficients: dict[str, dict[int, LinearCoefficients]]


class TableSettings(Settings):
    """Tables of profiled or fitted costs: one ``.npz`` file per model preset, precision and TP degree.

    Paths are relative to the folder of the YAML file.
    """

    files: dict[str, dict[Precision, dict[int, Path]]]


class HardwareSettings(Settings):
    """A GPU and one form of what iterations cost on it."""

    description: str
    memory: MemorySettings
    clocks: ClockRange
    tensor_parallel_degrees: Annotated[tuple[Count, ...], Field(min_length=1)]
    parametric: ParametricSettings | None = None
    linear: LinearSettings | None = None
    table: TableSettings | None = None

    @model_validator(mode="after")
    def _one_form(self) -> HardwareSettings:
        if sum(form is not None for form in (self.parametric, self.linear, self.table)) != 1:
            raise ValueError("exactly one of parametric, linear, table must be given")
        return self


Range = tuple[NonNegative, NonNegative]


class RandomisationSettings(Settings):
    """How far a randomised hardware may lie from the nominal one; every draw is uniform."""

    efficiency_share: Share
    bandwidth_knee_ghz: Range
    voltage_floor: Range
    bandwidth_share: Share
    launch_share: Share
    power_share: Share
    idle_lowest_w: Range
    switching_factor: Range


class SwitchingSettings(Settings):
    """Duration of one clock-setting call (lognormal), and the settling time after it."""

    median_ms: NonNegative
    sigma: NonNegative
    settle_ms: NonNegative

    def draw_s(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """Durations of ``size`` calls [s], shape (size,)."""
        return 1e-3 * self.median_ms * np.exp(self.sigma * rng.standard_normal(size))


class TransferSettings(Settings):
    """KV transfer: latency, and bandwidth per GPU pair between nodes (RDMA) or within one (NVLink); null: unlimited.

    ``stage_latency_s`` is the latency of handing activations from one pipeline stage to the next, over the same links.
    """

    launch_latency_s: NonNegative
    stage_latency_s: NonNegative
    rdma_gb_per_s: Positive | None
    nvlink_gb_per_s: Positive | None

    def bytes_per_s(self, prefill_tp: int, decode_tp: int, same_node: bool) -> float:
        """Bandwidth between two instances: the smaller TP degree times a GPU pair's."""
        pair = self.nvlink_gb_per_s if same_node else self.rdma_gb_per_s
        return math.inf if pair is None else 1e9 * pair * min(prefill_tp, decode_tp)

    def transfer_s(self, size_bytes: float, prefill_tp: int, decode_tp: int, same_node: bool = False) -> float:
        """Time from the start of an uncontended transfer to its delivery [s]."""
        return self.launch_latency_s + size_bytes / self.bytes_per_s(prefill_tp, decode_tp, same_node)
