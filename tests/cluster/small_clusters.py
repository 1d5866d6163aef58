"""Clusters that a test can follow by hand: a few instances of Llama 3.1 8B in bf16 on H100."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import BatchingSettings, ClusterSettings, RoutingSettings, SloSettings
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.profiles import Profile, load_profile
from biscale_gym.traces import Trace

CLOCKS_MHZ = (705, 1005, 1410, 1980)
CLOCK_MHZ = 1410
SLO = SloSettings(ttft_s=0.6, tpot_s=0.1)


@cache
def profile() -> Profile:
    return load_profile("h100-sxm5", "llama-3.1-8b", "bf16")


def prefill(tp: int = 2, clock_mhz: int = CLOCK_MHZ, weight: float = 1.0, pp: int = 1) -> InstanceSpec:
    return InstanceSpec("prefill", tp, clock_mhz, weight, pp)


def decode(tp: int = 2, clock_mhz: int = CLOCK_MHZ, weight: float = 1.0, pp: int = 1) -> InstanceSpec:
    return InstanceSpec("decode", tp, clock_mhz, weight, pp)


def requests(arrival_s: Iterable[float], prompt: int | Sequence[int] = 100, output: int | Sequence[int] = 5) -> Trace:
    times_s = np.array(list(arrival_s), dtype=float)
    return Trace(times_s, np.broadcast_to(prompt, times_s.shape), np.broadcast_to(output, times_s.shape))


def cluster(**settings: Any) -> ClusterSettings:
    """Settings where switching and transfer are instant; batching and routing may be given as dictionaries."""
    values: dict[str, Any] = {"switching": "instant", "transfer": "free", **settings}
    values["batching"] = BatchingSettings(**values.get("batching", {}))
    values["routing"] = RoutingSettings(**values.get("routing", {}))
    return ClusterSettings(**values)


def simulator(specs: Sequence[InstanceSpec], trace: Trace, settings: ClusterSettings, **options: Any) -> Simulator:
    return Simulator(settings, profile(), Placement(tuple(specs)), trace, CLOCKS_MHZ, SLO, **options)
