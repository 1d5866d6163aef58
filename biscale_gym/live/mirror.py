"""What live workers show, written into the modelled engine's state, so that what reads a model reads them too.

``BiScale/Cluster-v0`` encodes its observation and its reward's terms from the engine's arrays. Filled from the workers
in place of being advanced, the same arrays go through the same compiled code: the observation of a live cluster is
Cluster-v0's by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.cluster.state import BUSY, DECODING, FINISHED, IDLE, PREFILL, QUEUED, REJECTED
from biscale_gym.live.status import SLACK_PERCENTS, Status
from biscale_gym.profiles.kernels import iteration_latency


@dataclass(frozen=True)
class Seen:
    """One worker as its parent sees it.

    Attributes:
        status: what it shows.
        lost: what its former processes showed last.
        routed, completed, late: of the client's counts.
        unseen: (prompt tokens, arrival) of the requests that were sent after the status was made.
        kv_capacity_tokens: of the worker.
    """

    status: Status
    routed: int
    completed: int
    late: int
    kv_capacity_tokens: int
    lost: Sequence[Status] = ()
    unseen: Sequence[tuple[int, float]] = field(default_factory=list)


def mirror(
    simulator: Simulator, workers: Sequence[Seen], counts: Mapping[str, int], now_s: float, origin_s: float
) -> None:
    """Write a moment of a live cluster into a simulator of the same placement.

    Args:
        simulator: written; instance i is worker i.
        workers: in the order of the placement.
        counts: requests that have ``arrived``, ``finished``, and were ``rejected`` or have failed.
        now_s: from the start of the run.
        origin_s: start of the run, on the statuses' scale of time.
    """
    state = simulator.state
    glob = state.glob[0]
    glob["now_s"] = now_s
    for name in ("arrived", "finished", "rejected"):
        glob[name] = counts[name]
    arrival_s = state.arrivals["arrival_s"]
    for number, seen in enumerate(workers):
        _mirror_instance(simulator, number, seen, now_s, origin_s, arrival_s)


def _mirror_instance(
    simulator: Simulator, number: int, seen: Seen, now_s: float, origin_s: float, arrival_s: npt.NDArray[np.float64]
) -> None:
    state, status = simulator.state, seen.status
    inst = state.inst[number]
    clock, target = (_index(simulator.clocks_mhz, mhz) for mhz in (status.clock_mhz, status.target_mhz))
    inst["clock"], inst["target"] = clock, target
    inst["in_service"], inst["queued"] = (0 if clock != target else -1), 0
    inst["routed"], inst["completed"], inst["late"] = seen.routed, seen.completed, seen.late
    inst["kv_used"], inst["kv_capacity"] = status.kv_used_tokens, seen.kv_capacity_tokens
    inst["queue_n"] = status.queue_requests + len(seen.unseen)
    inst["queue_tokens"] = status.queue_tokens + sum(tokens for tokens, _ in seen.unseen)
    inst["transit_n"] = inst["transit_tokens"] = 0
    _mirror_energy(inst, seen, now_s, origin_s)
    running = bool(status.running)
    inst["running"], inst["batch_n"] = running, status.requests
    inst["iter_batch"], inst["iter_kv"] = status.batch, status.kv_tokens
    inst["iter_tokens"], inst["iter_sum_sq"] = status.prefill_tokens, status.sum_len_sq
    if running:
        model = state.predicted[inst["predicted_start"] : inst["predicted_stop"]]
        inst["full_duration_s"] = iteration_latency(model, clock, *status.work_terms)
        inst["segment_start_s"], inst["work_left"] = status.time_s - origin_s, 1.0
    if inst["phase"] == PREFILL:
        waiting_s = [status.first_waiting_s, *(at_s for _, at_s in seen.unseen)]
        inst["batch_head"] = _request(state.req, arrival_s, status.oldest_arrival_s) if running else -1
        inst["queue_head"] = _request(state.req, arrival_s, min(waiting_s))
        return
    inst["run_n"], inst["run_kv"] = status.batch, status.kv_tokens
    last = int(status.batch) - 1
    if last >= 0:
        granted_s = state.glob[0]["tpot_slo_s"] * inst["iterations"]  # the engine adds this to every entry
        for percent, deadline_s in zip(SLACK_PERCENTS, status.deadlines_s, strict=True):
            state.slack_s[number, last - percent * last // 100] = deadline_s - granted_s


def _mirror_energy(inst: np.void, seen: Seen, now_s: float, origin_s: float) -> None:
    status = seen.status
    every = (*seen.lost, status)
    busy_j, busy_s = sum(one.busy_j for one in every), sum(one.busy_s for one in every)
    energy_j = sum(one.energy_j for one in seen.lost) + status.energy_at_j(origin_s + now_s)
    # A clock that came into force within the batch may have made it cheaper than it looked before its end.
    energy_j = max(energy_j, float(inst["energy_j"].sum()))
    inst["energy_j"], inst["time_s"] = 0.0, 0.0
    inst["energy_j"][BUSY], inst["energy_j"][IDLE] = busy_j, energy_j - busy_j
    inst["time_s"][BUSY], inst["time_s"][IDLE] = busy_s, now_s - busy_s
    inst["power_w"], inst["last_s"] = status.power_w, now_s
    for name in ("iterations", "prompt_tokens", "output_tokens", "clock_changes"):
        inst[name] = sum(getattr(one, name) for one in every)


def mirror_requests(simulator: Simulator, requests: RequestLedger, arrived: int) -> None:
    """Write the fate of the requests so far, which the end of an episode asks for."""
    req = simulator.state.req
    simulator.state.glob[0]["next_arrival"] = arrived
    for name in ("arrival_s", "prompt", "output"):
        req[name] = simulator.state.arrivals[name]
    req["first_token_s"] = requests.first_token_s
    req["finish_s"] = requests.finish_s
    req["status"] = np.select(
        [requests.finished, requests.rejected, ~np.isnan(requests.first_token_s)],
        [FINISHED, REJECTED, DECODING],
        QUEUED,
    )


def _index(clocks_mhz: Sequence[int], clock_mhz: float) -> int:
    """Position of the clock that is nearest (a card need not run at exactly the clock that it was given)."""
    return int(np.argmin(np.abs(np.asarray(clocks_mhz) - clock_mhz)))


def _request(req: np.ndarray, arrival_s: npt.NDArray[np.float64], at_s: float) -> int:
    """A request that arrived then, as a list of its own; -1 where there is none."""
    if not np.isfinite(at_s):
        return -1
    number = min(int(np.searchsorted(arrival_s, at_s)), len(arrival_s) - 1)
    req[number]["arrival_s"], req[number]["next"] = arrival_s[number], -1
    return number
