"""An instance's running iteration: start, and a clock change in its midst."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym._jit import compiled, inlined
from biscale_gym.cluster.primitives import iteration_entity, set_event, set_power
from biscale_gym.cluster.state import HOLD, LOADING, PREFILL, State
from biscale_gym.profiles.kernels import decode_cost, idle_power_w, iteration_cost, iteration_latency

Vector = npt.NDArray[np.float64]


@inlined
def _cost(model: Vector, clock: int, inst: Any) -> tuple[float, float]:
    if inst.iter_tokens == 0.0:
        return decode_cost(model, clock, inst.iter_batch, inst.iter_kv)
    return iteration_cost(model, clock, inst.iter_batch, inst.iter_kv, inst.iter_tokens, inst.iter_sum_sq)


@compiled
def _predicted_full_s(st: State, inst: Any) -> float:
    model = st.predicted[inst.predicted_start : inst.predicted_stop]
    latency_s = iteration_latency(model, inst.clock, inst.iter_batch, inst.iter_kv, inst.iter_tokens, inst.iter_sum_sq)
    return float(latency_s + inst.waiting_s)


@compiled
def _waiting_s(st: State, i: int, latency_s: float) -> float:
    """What a pass through a pipeline that starts now lasts beyond its computing, ``latency_s``.

    It enters when the first stage is free, is handed over from stage to stage, and leaves the last one behind the pass
    before it. With equal stages this is exactly what following every pass from stage to stage gives (docs/cluster.md).
    """
    inst = st.inst[i]
    pipeline = st.inst[inst.first_lane]
    now_s = st.glob[0].now_s
    stage_s = latency_s / inst.pp
    enter_s = max(now_s, pipeline.stage_free_s)
    handover_s = inst.handover_s + inst.handover_s_per_token * (inst.iter_batch + inst.iter_tokens)
    out_s = max(enter_s + latency_s + handover_s, pipeline.pass_out_s + stage_s)
    pipeline.stage_free_s = enter_s + stage_s
    pipeline.pass_out_s = out_s
    return float(out_s - now_s - latency_s)


@compiled
def _with_waiting(model: Vector, inst: Any, latency_s: float, power_w: float) -> tuple[float, float]:
    """Latency and mean power of a pass through a pipeline: while it waits, a stage's worth of GPUs is idle."""
    whole_s = latency_s + inst.waiting_s
    return whole_s, (power_w * latency_s + idle_power_w(model, inst.clock) * inst.waiting_s) / whole_s


@inlined
def _schedule(st: State, i: int, inst: Any) -> None:
    """Set the timer to the iteration's end, or to its overrun where that comes first."""
    g = st.glob[0]
    entity = iteration_entity(st, i)
    mode = g.mode_prefill if inst.phase == PREFILL else g.mode_decode
    subscribed = g.ask_on_overrun_prefill if inst.phase == PREFILL else g.ask_on_overrun_decode
    if mode != HOLD and subscribed and not g.prediction_is_exact and inst.overrun_s >= 0.0:
        predicted_s = inst.predicted_done_s + inst.work_left * inst.predicted_full_s
        inst.overrun_s = inst.iter_start_s + (1.0 + g.overrun_margin) * predicted_s
        set_event(st, entity, min(inst.end_s, max(g.now_s, inst.overrun_s)))
    else:
        set_event(st, entity, inst.end_s)


@inlined
def begin_iteration(st: State, i: int) -> None:
    """Start the iteration described by the instance's ``iter_*`` fields at the clock in force."""
    g = st.glob[0]
    inst = st.inst[i]
    model = st.models[inst.model_start : inst.model_stop]
    latency_s, power_w = _cost(model, inst.clock, inst)
    if inst.pp > 1:
        inst.waiting_s = _waiting_s(st, i, latency_s)
        latency_s, power_w = _with_waiting(model, inst, latency_s, power_w)
    inst.running = 1
    set_power(st, i, power_w * inst.tp, False)
    inst.iter_start_s = g.now_s
    inst.segment_start_s = g.now_s
    inst.work_left = 1.0
    inst.full_duration_s = latency_s
    inst.end_s = g.now_s + latency_s
    inst.predicted_done_s = 0.0
    inst.overrun_s = np.inf
    inst.predicted_full_s = latency_s if g.prediction_is_exact else _predicted_full_s(st, inst)
    _schedule(st, i, inst)


@inlined
def clock_in_force(st: State, i: int, clock: int) -> None:
    """The new clock holds from now on; a running iteration's remaining work is rescaled."""
    g = st.glob[0]
    inst = st.inst[i]
    inst.clock = clock
    model = st.models[inst.model_start : inst.model_stop]
    if not inst.running:
        extra_w = inst.load_extra_w if inst.status == LOADING else 0.0
        set_power(st, i, inst.tp * (idle_power_w(model, clock) + extra_w), inst.status == LOADING)
        return
    done = min(inst.work_left, (g.now_s - inst.segment_start_s) / inst.full_duration_s)
    inst.predicted_done_s += done * inst.predicted_full_s
    inst.work_left -= done
    latency_s, power_w = _cost(model, clock, inst)
    if inst.pp > 1:
        latency_s, power_w = _with_waiting(model, inst, latency_s, power_w)
    set_power(st, i, power_w * inst.tp, False)
    inst.segment_start_s = g.now_s
    inst.full_duration_s = latency_s
    inst.end_s = g.now_s + inst.work_left * latency_s
    inst.predicted_full_s = latency_s if g.prediction_is_exact else _predicted_full_s(st, inst)
    _schedule(st, i, inst)


@inlined
def end_iteration(st: State, i: int) -> None:
    """Close the running iteration: what it took and what was predicted become the last observation.

    Its timer is left to the caller.
    """
    g = st.glob[0]
    inst = st.inst[i]
    inst.running = 0
    inst.last_observed_s = g.now_s - inst.iter_start_s
    inst.last_predicted_s = inst.predicted_done_s + inst.work_left * inst.predicted_full_s
    inst.iterations += 1


@compiled
def go_idle(st: State, i: int) -> None:
    """The instance computes nothing from now on."""
    inst = st.inst[i]
    set_power(st, i, inst.tp * idle_power_w(st.models[inst.model_start : inst.model_stop], inst.clock), False)
