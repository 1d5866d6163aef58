"""Settings of live workers (presets in ``configs/live``)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.config import Settings
from biscale_gym.envs.settings import ClusterEnvSettings

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class TinyModelSettings(Settings):
    """Shape of the random Llama that CPU workers run; the same weights in every worker, nothing is downloaded."""

    hidden_size: Annotated[int, Field(ge=128, multiple_of=128)]
    layers: Count
    vocabulary: Annotated[int, Field(ge=64)]


class LiveSettings(Settings):
    """Workers and how they are watched over.

    Attributes:
        model: what they run.
        max_model_len: longest prompt plus output.
        kv_blocks: KV blocks per worker.
        kv_lease_s: how long a prefill worker keeps KV that no decode worker fetches.
        start_limit_s: until a worker must be up.
        hung_s: silence after which a worker is killed.
        restarts: of one worker within a run, before the run is given up.
        retries: of one request whose worker died, before it counts as failed.
        stale_s: age of telemetry that puts the top clock in the policy's place.
    """

    model: TinyModelSettings
    max_model_len: Count
    kv_blocks: Count
    kv_lease_s: Annotated[int, Field(ge=6)]
    start_limit_s: Positive
    hung_s: Positive
    restarts: Annotated[int, Field(ge=0)]
    retries: Annotated[int, Field(ge=0)]
    stale_s: Positive


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
