"""One instance alone under one load: what planners measure classes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

FloatArray = npt.NDArray[np.float64]
_UNUSED_SLO = SloSettings(ttft_s=1.0, tpot_s=1.0)


@dataclass(frozen=True)
class ProbeResult:
    """One instance's figures over a whole trace.

    Attributes:
        ttft_s: float64[finished] (prefill probes; arrival to end of prefill).
        tpot_s: float64[finished with more than one output token] (decode probes).
        energy_j: joules from time 0 to the last arrival, idle included.
        duration_s: time of the last arrival.
        end_s: last finish.
        requests: requests of the trace.
        rejected: of them, those the instance could never hold.
        busy_share: share of the duration in which an iteration ran.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    energy_j: float
    duration_s: float
    end_s: float
    requests: int
    rejected: int
    busy_share: float


def probe_instance(
    spec: InstanceSpec,
    trace: Trace,
    profile: Profile,
    settings: ClusterSettings,
    clocks_mhz: Sequence[int] | None = None,
    policy: PhasePolicy | None = None,
    slo: SloSettings = _UNUSED_SLO,
    seed: int = 0,
    give_up_after_s: float = np.inf,
) -> ProbeResult:
    """Serve ``trace`` with one instance and nothing else.

    A prefill probe ends requests at their first token; in a decode probe they arrive with their first token out and no transfer to wait for.
    ``give_up_after_s``: stop so long after the last arrival; what is unfinished then counts as infinitely late.
    """
    clocks = sorted({spec.clock_mhz, *(clocks_mhz or ())})
    alone = settings.model_copy(update={"nodes": spec.pp, "gpus_per_node": max(spec.tp, 1)})
    simulator = Simulator(alone, profile, Placement((spec,)), trace, clocks, slo, seed, only=spec.phase)
    if policy is not None:
        simulator.set_policies(policy, policy)
    duration_s = trace.duration_s
    simulator.run(duration_s)
    ledger = simulator.instances()
    simulator.run(duration_s + give_up_after_s)
    requests = simulator.requests()
    unfinished = ~requests.finished & ~requests.rejected
    ttft = requests.first_token_s - requests.arrival_s
    decoded = (requests.output_tokens > 1) & ~requests.rejected
    tpot = (requests.finish_s - requests.first_token_s)[decoded] / (requests.output_tokens[decoded] - 1)
    return ProbeResult(
        ttft_s=np.where(unfinished & np.isnan(ttft), np.inf, ttft)[~requests.rejected],
        tpot_s=np.where(np.isnan(tpot), np.inf, tpot),
        energy_j=float(ledger.energy_j.sum()),
        duration_s=duration_s,
        end_s=float(np.nanmax(requests.finish_s)) if requests.finished.any() else duration_s,
        requests=len(trace),
        rejected=int(requests.rejected.sum()),
        busy_share=float(ledger.time_s[:, 0].sum() / max(duration_s * spec.pp, 1e-300)),
    )
