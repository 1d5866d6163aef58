"""How long a compiled clock policy takes for a decision: no Python around it, on what a run really shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from biscale_gym.cluster import features
from biscale_gym.cluster.placement import Phase
from biscale_gym.cluster.policy import POLICY_TYPE
from biscale_gym.cluster.simulator import PhasePolicy, Simulator

Vector = NDArray[np.float64]
CALLS_PER_TIMING = 50
_REPEATS = 3
_VECTOR = types.float64[::1]


class ShownDecision(NamedTuple):
    """What a policy is called with at one decision, but for its params."""

    obs: Vector
    memory: Vector
    """As it was before the decision."""
    model: Vector


@cache
def _repeated() -> Any:
    """A compiled loop that calls a policy several times on one observation."""

    @njit(types.int64(POLICY_TYPE, _VECTOR, _VECTOR, _VECTOR, _VECTOR, types.int64))
    def repeated(policy: Any, obs: Vector, memory: Vector, params: Vector, model: Vector, times: int) -> int:
        clock = 0
        for _ in range(times):
            clock = policy(obs, memory, params, model)
        return clock

    return repeated


def shown_decisions(
    simulator: Simulator,
    policies: tuple[PhasePolicy | None, PhasePolicy | None],
    phase: Phase,
    count: int,
    from_s: float = 0.0,
) -> list[ShownDecision]:
    """What a phase's policy is shown at its first ``count`` boundaries and arrivals from ``from_s`` on, or at all.

    Args:
        simulator: at its start; it is run as far as needed.
        policies: of prefill and decode; that of ``phase`` must be a compiled one.
        phase: whose decisions.
        count: how many at most.
        from_s: simulated time of the first, s.

    Raises:
        ValueError: the phase has no policy.
    """
    prefill, decode = policies
    asked = prefill if phase == "prefill" else decode
    if asked is None or asked.function is None:
        raise ValueError(f"{phase} has no compiled policy whose decisions could be taken down")
    told = replace(asked, function=None)
    simulator.set_policies(*((told, decode) if phase == "prefill" else (prefill, told)))
    shown: list[ShownDecision] = []
    decision = simulator.run()
    while decision is not None and len(shown) < count:
        state = simulator.state
        inst = state.inst[decision.instance]
        memory = state.memory[decision.instance]
        model = state.predicted[inst["predicted_start"] : inst["predicted_stop"]]
        if decision.reason in (features.BOUNDARY, features.ARRIVAL) and simulator.now_s >= from_s:
            shown.append(ShownDecision(decision.obs, memory.copy(), model))
        decision = simulator.run(answer=int(asked.function(decision.obs, memory, asked.params, model)))
    return shown


def decision_times_s(policy: PhasePolicy, shown: Sequence[ShownDecision]) -> Vector:
    """Seconds of each decision, float64[decisions].

    ``CALLS_PER_TIMING`` calls in compiled code, less the same with none, best of three; they go on with the memory that
    the first of them leaves.
    """
    repeated = _repeated()

    def seconds(one: ShownDecision, times: int) -> float:
        least_s = np.inf
        for _ in range(_REPEATS):
            memory = one.memory.copy()
            start_s = time.perf_counter()
            repeated(policy.function, one.obs, memory, policy.params, one.model, times)
            least_s = min(least_s, time.perf_counter() - start_s)
        return float(least_s)

    return np.array([(seconds(one, CALLS_PER_TIMING) - seconds(one, 0)) / CALLS_PER_TIMING for one in shown])
