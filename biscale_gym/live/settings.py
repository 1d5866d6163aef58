"""Settings of live workers (presets in ``configs/live``)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from biscale_gym.config import Settings

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
