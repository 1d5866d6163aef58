"""Settings of the modelled cluster: size, batching, routing, re-placement."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biscale_gym.config import Settings, load_preset
from biscale_gym.profiles import Profile, SwitchingSettings, load_profile
from biscale_gym.profiles.settings import Precision

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Router = Literal["weighted-round-robin", "least-loaded", "shortest-queue", "power-of-two"]


class BatchingSettings(Settings):
    """How instances form batches (docs/cluster.md)."""

    prefill_token_budget: Count = 8192
    chunked_prefill: bool = False
    max_decode_sequences: Count = 1024
    decode_admission: Literal["current", "full"] = "current"
    preemption: Literal["recompute", "none"] = "recompute"
    decode_iterations: Literal["output-minus-one", "output-length"] = "output-minus-one"
    decode_kv_tokens: Count | None = None
    """Replaces the KV capacity of every decode instance (some simulators cap it at a number of their own)."""
    prefill_kv_tokens: Count | None = None


class RoutingSettings(Settings):
    """Which instance takes a request, by phase."""

    prefill: Router = "weighted-round-robin"
    decode: Router = "weighted-round-robin"
    decode_load: Literal["requests", "waiting"] = "requests"
    """What ``least-loaded`` counts on a decode instance: all its requests, or those without a claim on its memory."""


class ReplacementSettings(Settings):
    """What changing a placement costs (docs/cluster.md, Windows and re-placement)."""

    mode: Literal["drain", "instant"] = "drain"
    load_gb_per_s: Positive = 4.0
    start_s: NonNegative = 10.0
    start_power_w: NonNegative = 0.0


class SloSettings(Settings):
    """Service level objectives on P99 TTFT and P99 TPOT."""

    ttft_s: Positive
    tpot_s: Positive


class ClusterSettings(Settings):
    """The modelled cluster: GPUs, model, and every rule of the engine."""

    hardware: str = "h100-sxm5"
    model: str = "llama-3.3-70b"
    precision: Precision = "fp8"
    decode_precision: Precision | None = None
    """Of the weights of decode instances; None: ``precision``, as prefill."""
    nodes: Count = 2
    gpus_per_node: Count = 8
    batching: BatchingSettings = BatchingSettings()
    routing: RoutingSettings = RoutingSettings()
    switching: str | SwitchingSettings = "nvml"
    """A preset in configs/switching, a path, or the numbers themselves."""
    transfer: str = "rdma-20"
    replacement: ReplacementSettings = ReplacementSettings()
    overrun_margin: NonNegative = 0.05
    truncate_to_context: bool = True
    """Shorten requests that exceed the model's context; some simulators serve them as they are."""
    serving_overhead_ms: NonNegative = 0.0
    """Client-side overhead added to every TTFT."""

    @property
    def gpus(self) -> int:
        """GPUs of the cluster."""
        return self.nodes * self.gpus_per_node

    def switching_settings(self) -> SwitchingSettings:
        """How clocks switch.

        Raises:
            ConfigError: no such preset.
        """
        given = self.switching
        return load_preset(SwitchingSettings, "switching", given) if isinstance(given, str) else given

    def profile(self) -> Profile:
        """What iterations of this model cost on this hardware, by phase where precisions differ.

        Raises:
            ConfigError, ProfileError: no such hardware, model or precision.
        """
        return load_profile(self.hardware, self.model, self.precision, self.decode_precision)
