"""Fill the feature vector of a decision (layout: biscale_gym.cluster.features)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from biscale_gym._jit import compiled, inlined
from biscale_gym.cluster import features as f
from biscale_gym.cluster.state import PREFILL, State

Vector = npt.NDArray[np.float64]


@compiled
def _put_batch(obs: Vector, j: int, tokens: float, sum_sq: float, oldest_arrival_s: float) -> None:
    at = f.BATCH_FIRST + f.BATCH_STRIDE * j
    obs[at + f.BATCH_TOKENS] = tokens
    obs[at + f.BATCH_SUM_SQ] = sum_sq
    obs[at + f.BATCH_OLDEST_ARRIVAL_S] = oldest_arrival_s


@compiled
def _project_batches(st: State, i: int, obs: Vector) -> None:
    """The running (or next) batch and the queue, cut into future batches by the scheduler's own rule."""
    g = st.glob[0]
    inst = st.inst[i]
    oldest_s = np.inf
    r = inst.batch_head
    while r >= 0:
        oldest_s = min(oldest_s, st.req[r].arrival_s)
        r = st.req[r].next
    _put_batch(obs, 0, inst.iter_tokens, inst.iter_sum_sq, oldest_s)
    batches = 1
    budget = g.prefill_token_budget
    tokens, sum_sq, oldest_s = np.int64(0), 0.0, np.inf
    r = inst.chunk_request
    start = np.int64(st.req[r].done) if r >= 0 else np.int64(0)
    if r < 0:
        r = inst.queue_head
    from_chunk = inst.chunk_request >= 0
    while r >= 0 and batches < f.HORIZON:
        left = np.int64(st.req[r].prompt) - start
        room = budget - tokens
        take = left
        if g.chunked_prefill:
            take = min(left, room)
        fits = take > 0 and (take <= room or tokens == 0)
        if fits:
            tokens += take
            sum_sq += np.float64(start + take) ** 2 - np.float64(start) ** 2
            oldest_s = min(oldest_s, st.req[r].arrival_s)
            start += take
        if not fits or take < left:
            _put_batch(obs, batches, tokens, sum_sq, oldest_s)
            batches += 1
            tokens, sum_sq, oldest_s = np.int64(0), 0.0, np.inf
            continue
        start = np.int64(0)
        r = inst.queue_head if from_chunk else np.int64(st.req[r].next)
        from_chunk = False
    if tokens > 0 and batches < f.HORIZON:
        _put_batch(obs, batches, tokens, sum_sq, oldest_s)
        batches += 1
    obs[f.BATCHES] = batches


@inlined
def _observe_slack(st: State, i: int, obs: Vector) -> None:
    """Least and quantiles of the running requests' slack: the values of rank floor(share * (n - 1))."""
    g = st.glob[0]
    inst = st.inst[i]
    last = inst.run_n - 1
    if last < 0:
        obs[f.SLACK_LEAST_S : f.SLACK_P50_S + 1] = 0.0
        return
    saved_s = st.slack_s[i]
    offset_s = g.tpot_slo_s * inst.iterations - g.now_s
    obs[f.SLACK_LEAST_S] = saved_s[last] + offset_s
    obs[f.SLACK_P1_S] = saved_s[last - last // 100] + offset_s
    obs[f.SLACK_P5_S] = saved_s[last - 5 * last // 100] + offset_s
    obs[f.SLACK_P25_S] = saved_s[last - 25 * last // 100] + offset_s
    obs[f.SLACK_P50_S] = saved_s[last - 50 * last // 100] + offset_s


@inlined
def observe(st: State, i: int, reason: int) -> None:
    """Write instance i's features into its phase's row of ``st.obs``."""
    g = st.glob[0]
    inst = st.inst[i]
    obs = st.obs[inst.phase]
    obs[f.NOW_S] = g.now_s
    obs[f.REASON] = reason
    obs[f.CLOCK] = inst.clock
    obs[f.TARGET] = inst.target
    obs[f.SWITCH_PENDING] = 1.0 if inst.in_service >= 0 or inst.queued else 0.0
    obs[f.CLOCK_COUNT] = g.clocks
    obs[f.LAST_OBSERVED_S] = inst.last_observed_s
    obs[f.LAST_PREDICTED_S] = inst.last_predicted_s
    obs[f.KV_TOKENS] = inst.kv_used
    obs[f.KV_CAPACITY_TOKENS] = inst.kv_capacity
    obs[f.TP] = inst.tp
    obs[f.ROUTED] = inst.routed
    obs[f.COMPLETED] = inst.completed
    obs[f.LATE] = inst.late
    if reason == f.OVERRUN:
        obs[f.LAST_OBSERVED_S] = g.now_s - inst.iter_start_s
        obs[f.LAST_PREDICTED_S] = inst.predicted_done_s + inst.work_left * inst.predicted_full_s
    if inst.phase == PREFILL:
        obs[f.SLO_S] = g.ttft_slo_s
        obs[f.QUEUE_REQUESTS] = inst.queue_n
        obs[f.QUEUE_TOKENS] = inst.queue_tokens
        obs[f.WORK_LEFT] = 1.0
        filled = int(obs[f.BATCHES])  # by the last observation; beyond them are zeros
        obs[f.BATCHES] = 0.0
        if inst.running:
            obs[f.WORK_LEFT] = max(0.0, inst.work_left - (g.now_s - inst.segment_start_s) / inst.full_duration_s)
        if reason != f.IDLE:
            _project_batches(st, i, obs)
        for j in range(int(obs[f.BATCHES]), filled):
            _put_batch(obs, j, 0.0, 0.0, 0.0)
    else:
        obs[f.SLO_S] = g.tpot_slo_s
        obs[f.QUEUE_REQUESTS] = inst.queue_n + inst.transit_n
        obs[f.QUEUE_TOKENS] = inst.queue_tokens + inst.transit_tokens
        obs[f.BATCH] = inst.run_n - inst.recompute_n
        obs[f.BATCH_KV_TOKENS] = inst.run_kv - inst.recompute_tokens
        obs[f.RECOMPUTE_TOKENS] = inst.recompute_tokens
        obs[f.RECOMPUTE_SUM_SQ] = inst.recompute_sum_sq
        obs[f.ITERATION] = inst.iterations
        if g.observe_slack:
            _observe_slack(st, i, obs)
