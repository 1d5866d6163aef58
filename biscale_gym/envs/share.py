"""The share of a workload that one instance is routed: what an environment of a single instance is fed with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from biscale_gym._jit import compiled_as
from biscale_gym.cluster.placement import InstanceSpec, Phase, Placement
from biscale_gym.planning.probe_trace import delayed
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace


@compiled_as(types.void(types.float64[::1], types.float64[::1], types.int64[::1]))
def _stride(weights: Any, passes: Any, chosen: Any) -> None:
    for request in range(len(chosen)):
        best = 0
        for instance in range(1, len(weights)):
            if passes[instance] < passes[best]:
                best = instance
        chosen[request] = best
        passes[best] += 1.0 / weights[best]


def round_robin(weights: NDArray[np.float64], requests: int) -> NDArray[np.int64]:
    """The instance of each request under smooth weighted round robin, as the cluster's router has it: int64[requests].

    The least pass goes first (the lower number among equals) and is raised by 1 / weight.
    """
    chosen = np.zeros(requests, dtype=np.int64)
    _stride(np.ascontiguousarray(weights, dtype=np.float64), np.zeros(len(weights)), chosen)
    return chosen


def nominal_prefill_s(trace: Trace, profile: Profile, specs: tuple[InstanceSpec, ...]) -> NDArray[np.float64]:
    """How long each prompt alone takes on the first prefill instance at its clock: float64[requests], s."""
    prompts = trace.prompt_tokens.astype(np.float64)
    spec = specs[0]
    milliseconds = profile.latency_ms(spec.tp, spec.clock_mhz, prefill_tokens=prompts, sum_len_sq=prompts * prompts)
    return np.asarray(1e-3 * milliseconds, dtype=np.float64)


def routed_share(trace: Trace, placement: Placement, phase: Phase, instance: int, profile: Profile) -> Trace:
    """The requests that one instance of a phase gets, at the times at which they reach it.

    For decode every request is later by a nominal prefill: its prompt alone, on the placement's first prefill instance.

    Args:
        trace: the whole cluster's demand.
        placement: whose instances share it by their weights.
        phase: of the instance.
        instance: its number among those of the phase.
        profile: what a nominal prefill takes.

    Raises:
        TraceError: the instance gets no request.
    """
    specs = placement.of(phase)
    if phase == "decode":
        trace = delayed(trace, nominal_prefill_s(trace, profile, placement.of("prefill")))
    lanes = [number for number, spec in enumerate(specs) for _ in range(spec.pp)]
    weights = np.array([spec.weight / spec.pp for spec in specs for _ in range(spec.pp)])
    chosen = round_robin(weights, len(trace)) == lanes.index(instance)
    return trace.take(chosen, f"{trace.name}, share of {phase} {instance}")
