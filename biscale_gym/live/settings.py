"""Settings of live workers (presets in ``configs/live``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from biscale_gym.cluster.placement import PHASES, InstanceGroup, Phase
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.config import ConfigError, Settings, load_preset
from biscale_gym.envs.settings import ClusterEnvSettings
from biscale_gym.live.devices import Mode
from biscale_gym.profiles.settings import ModelSettings

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class TinyModelSettings(Settings):
    """Shape of the random Llama that CPU workers run; the same weights in every worker, nothing is downloaded."""

    hidden_size: Annotated[int, Field(ge=128, multiple_of=128)]
    layers: Count
    vocabulary: Annotated[int, Field(ge=64)]

    def dimensions(self, max_model_len: int) -> ModelSettings:
        """As a model preset has them."""
        heads = self.hidden_size // 64
        return ModelSettings(
            layers=self.layers,
            hidden_size=self.hidden_size,
            attention_heads=heads,
            kv_heads=max(1, heads // 2),
            head_dim=64,
            mlp_size=3 * self.hidden_size,
            mlp_matrices=3,
            vocabulary=self.vocabulary,
            context_tokens=max_model_len,
            precisions=("bf16",),
        )


class EmulatedDeviceSettings(Settings):
    """Cards that the scenario's profile describes, for engines on CPUs; their numbers are ``modelled``."""

    kind: Literal["emulated"]

    @property
    def gpus(self) -> tuple[int, ...]:
        """None."""
        return ()


class NvmlDeviceSettings(Settings):
    """NVIDIA cards of this machine; their numbers are ``measured``.

    Attributes:
        gpus: NVML's indices, which ``CUDA_VISIBLE_DEVICES`` does not change: of a server its tensor-parallel group, of
            workers all that they may take, dealt in the order of the placement's instances.
        mode: ``observe-only`` sets no clocks.
        watchdog_s: silence of a worker after which the watchdog gives its clocks back.
    """

    kind: Literal["nvml"]
    gpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    mode: Mode = "control"
    watchdog_s: Positive = 10.0

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError(f"gpus names a card twice: {list(self.gpus)}")
        return self


DeviceSettings = Annotated[EmulatedDeviceSettings | NvmlDeviceSettings, Field(discriminator="kind")]


class LiveSettings(Settings):
    """Workers and how they are watched over.

    Attributes:
        engine: vLLM's build for CPUs, or the official one for NVIDIA GPUs.
        device: whose clocks and joules.
        model: what they run, with made-up weights; None: the scenario's model.
        weights: folder with the configuration and weights of the scenario's model, in place of made-up ones.
        max_model_len: longest prompt plus output.
        kv_blocks: KV blocks per worker; None: as many as the GPUs' memory holds.
        gpu_memory: share of the GPUs' memory for weights, activations and KV.
        kv_lease_s: how long a prefill worker keeps KV that no decode worker fetches.
        start_limit_s: until a worker must be up.
        hung_s: silence after which a worker is killed.
        restarts: of one worker within a run, before the run is given up.
        retries: of one request whose worker died, before it counts as failed.
        stale_s: age of telemetry that puts the top clock in the policy's place.
    """

    engine: Literal["cpu", "cuda"]
    device: DeviceSettings
    model: TinyModelSettings | None = None
    weights: Path | None = None
    max_model_len: Count
    kv_blocks: Count | None = None
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9
    kv_lease_s: Annotated[int, Field(ge=6)]
    start_limit_s: Positive
    hung_s: Positive
    restarts: Annotated[int, Field(ge=0)]
    retries: Annotated[int, Field(ge=0)]
    stale_s: Positive

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.engine == "cpu" and (self.model is None or self.kv_blocks is None):
            raise ValueError("an engine on CPUs needs model and kv_blocks")
        if self.engine == "cuda" and self.device.kind == "emulated":
            raise ValueError("engines on GPUs have clocks of their own: device.kind must be nvml")
        if self.model is not None and self.weights is not None:
            raise ValueError("model has made-up weights: give either model or weights")
        return self

    def dimensions(self, cluster: ClusterSettings) -> ModelSettings:
        """Of the model that workers of a cluster run.

        Raises:
            ConfigError: no such model preset.
        """
        if self.model is not None:
            return self.model.dimensions(self.max_model_len)
        return load_preset(ModelSettings, "models", cluster.model)

    def deal(self, placement: Sequence[InstanceGroup]) -> list[EmulatedDeviceSettings | NvmlDeviceSettings]:
        """The device of each instance of a placement, in order: the next ``tp`` cards.

        Raises:
            ConfigError: there are not as many cards, or an instance is pipelined.
        """
        degrees = [group.tp for group in placement for _ in range(group.count)]
        if any(group.pp > 1 for group in placement):
            raise ConfigError("the placement has pipelined instances; live workers have one stage")
        if isinstance(self.device, EmulatedDeviceSettings):
            return [self.device for _ in degrees]
        gpus = self.device.gpus
        if sum(degrees) > len(gpus):
            raise ConfigError(f"the placement takes {sum(degrees)} GPUs, but device.gpus names {len(gpus)}")
        starts = [sum(degrees[:number]) for number in range(len(degrees))]
        return [
            self.device.model_copy(update={"gpus": gpus[start : start + tp]})
            for start, tp in zip(starts, degrees, strict=True)
        ]


class LiveEnvSettings(ClusterEnvSettings):
    """Settings of ``BiScale/Live-v0``: those of ``BiScale/Cluster-v0``, and how it is served live.

    Attributes:
        workers: preset of configs/live, or a path.
        governor: controller (``NAME`` or ``NAME[KEY=VALUE,...]``) whose clock policies run within the workers, before
            every batch; None: all clocks are the agent's.
        governed: the phases whose clocks are the governor's; the agent's choices for them are ignored.
        out: folder of the records.
        planner, randomisation: must stay None: workers stay where they are, and the hardware is what it is.
    """

    workers: str = "cpu"
    governor: str | None = None
    governed: tuple[Phase, ...] = PHASES
    out: str = "results/live"

    @model_validator(mode="after")
    def _can_be_live(self) -> LiveEnvSettings:
        if self.planner is not None:
            raise ValueError(f"planner {self.planner!r}: live workers stay where the scenario's placement puts them")
        if self.randomisation is not None:
            raise ValueError(f"randomisation {self.randomisation!r}: the hardware is what it is")
        return self
