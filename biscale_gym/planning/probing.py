"""What one instance, or a few together, do under a given load: simulated by the engine that later runs the cluster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.metrics import TpotDefinition, attained, tpot_s, ttft_s
from biscale_gym.profiles import Profile
from biscale_gym.traces.trace import Trace

WARMUP_SHARE = 0.1
"""The uncounted start never takes more than this share of a probe."""

BRACKET_STEP = 1.2
"""First factor by which the search for a rate widens; it is squared at every further step."""

GREATEST_STEP = 4.0
"""Greatest factor: an overloaded instance takes long to simulate."""

SMALLEST_RATE_RPS = 1e-3
"""A class that breaks the SLO even at this rate carries nothing."""


@dataclass(frozen=True)
class ProbeOutcome:
    """One instance under one load.

    Attributes:
        latency_s: the quantile asked for, of TTFT or TPOT; inf where too many requests were rejected or never finished.
        joules: of all the instance's GPUs, idle time included, over the counted span.
        requests: arrived in the counted span.
    """

    latency_s: float
    joules: float
    requests: int

    @property
    def joules_per_request(self) -> float:
        """Joules per request that arrived."""
        return self.joules / self.requests


@dataclass(frozen=True)
class UnitOutcome:
    """Prefill and decode instances together under one load.

    Attributes:
        ttft_s, tpot_s: the quantile asked for of each; inf where too many requests were rejected or never finished.
        within_both: share of the requests that keep both SLOs.
    """

    ttft_s: float
    tpot_s: float
    within_both: float


OutcomeT = TypeVar("OutcomeT", ProbeOutcome, UnitOutcome)


def _quantile(latency_s: npt.NDArray[np.float64], quantile: float) -> float:
    """One of the measured values: no interpolation towards an infinite one."""
    return float(np.quantile(latency_s, quantile, method="higher")) if latency_s.size else 0.0


def serve_alone(
    profile: Profile,
    settings: ClusterSettings,
    spec: InstanceSpec,
    trace: Trace,
    *,
    quantile: float,
    warmup_s: float,
    tpot_definition: TpotDefinition = "per-decode-token",
) -> ProbeOutcome:
    """Run one instance alone on a trace, at its clock.

    A prefill instance ends requests at their first token; a decode instance takes them as they arrive, first token out
    and KV at hand.

    Args:
        profile: what iterations cost.
        settings: rules of the cluster; its size does not matter.
        spec: the instance.
        trace: the load.
        quantile: of latency.
        warmup_s: simulated but not counted.
        tpot_definition: see ``metrics.tpot_s``.
    """
    alone = settings.model_copy(update={"nodes": spec.pp})
    # A single instance at a fixed clock never looks at the SLO.
    simulator = Simulator(
        alone,
        profile,
        Placement((spec,)),
        trace,
        [spec.clock_mhz],
        SloSettings(ttft_s=1.0, tpot_s=1.0),
        only=spec.phase,
    )
    start_s = min(warmup_s, WARMUP_SHARE * trace.duration_s)
    simulator.run(start_s)
    before = simulator.instances()
    simulator.run(trace.duration_s)
    counted = simulator.instances().since(before)
    simulator.run()
    ledger = simulator.requests()
    arrived = ledger.arrival_s >= start_s
    if spec.phase == "prefill":
        latency_s, judged = ttft_s(ledger, 1e-3 * settings.serving_overhead_ms), arrived
    else:
        latency_s, judged = tpot_s(ledger, tpot_definition), arrived & (ledger.output_tokens > 1)
    latency_s = np.where(ledger.finished, latency_s, np.inf)[judged]
    return ProbeOutcome(
        latency_s=_quantile(latency_s, quantile),
        joules=float(counted.energy_j.sum()),
        requests=int(arrived.sum()),
    )


def serve_together(
    profile: Profile,
    settings: ClusterSettings,
    placement: Placement,
    trace: Trace,
    *,
    slo: SloSettings,
    quantile: float,
    warmup_s: float,
    tpot_definition: TpotDefinition = "per-decode-token",
) -> UnitOutcome:
    """Run a placement of both phases on a trace, at its clocks.

    Args:
        profile: what iterations cost.
        settings: the cluster that it is on.
        placement: the instances.
        trace: the load.
        slo: what a request must keep.
        quantile: of latency.
        warmup_s: simulated but not counted.
        tpot_definition: see ``metrics.tpot_s``.
    """
    clocks = sorted({spec.clock_mhz for spec in placement.instances})
    simulator = Simulator(settings, profile, placement, trace, clocks, slo)
    simulator.run()
    ledger = simulator.requests()
    judged = ledger.arrival_s >= min(warmup_s, WARMUP_SHARE * trace.duration_s)
    ttft, tpot = ttft_s(ledger, 1e-3 * settings.serving_overhead_ms), tpot_s(ledger, tpot_definition)
    ttft_kept, tpot_kept = attained(ttft, tpot, ledger, slo)
    within_both = (ttft_kept & tpot_kept & ledger.finished)[judged]
    return UnitOutcome(
        ttft_s=_quantile(np.where(ledger.finished, ttft, np.inf)[judged], quantile),
        tpot_s=_quantile(np.where(ledger.finished, tpot, np.inf)[judged & (ledger.output_tokens > 1)], quantile),
        within_both=float(within_both.mean()) if within_both.size else 1.0,
    )


def greatest_rate(
    probe: Callable[[float], OutcomeT], passes: Callable[[OutcomeT], bool], guess_rps: float, tolerance: float
) -> tuple[float, OutcomeT | None]:
    """The greatest rate whose outcome passes, by widening a bracket and halving it in the logarithm.

    Args:
        probe: outcome at a mean rate.
        passes: whether an outcome is good enough.
        guess_rps: where to begin.
        tolerance: relative width of the final bracket; its lower end, which was seen to pass, is the answer.

    Returns:
        The rate and its outcome; (0, None) if nothing passes.
    """
    passed_rps, failed_rps = 0.0, math.inf
    passed: OutcomeT | None = None
    rate_rps, factor = guess_rps, BRACKET_STEP
    while passed is None or math.isinf(failed_rps):
        outcome = probe(rate_rps)
        if passes(outcome):
            passed_rps, passed = rate_rps, outcome
            rate_rps *= factor
        else:
            failed_rps = rate_rps
            if rate_rps <= SMALLEST_RATE_RPS:
                return 0.0, None
            rate_rps = max(rate_rps / factor, SMALLEST_RATE_RPS)
        factor = min(factor * factor, GREATEST_STEP)
    while failed_rps > passed_rps * (1.0 + tolerance):
        middle = math.sqrt(passed_rps * failed_rps)
        outcome = probe(middle)
        if passes(outcome):
            passed_rps, passed = middle, outcome
        else:
            failed_rps = middle
    return passed_rps, passed
