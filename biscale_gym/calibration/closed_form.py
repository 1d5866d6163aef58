"""The parametric form fitted to profiled iterations: constants of docs/model-card.md, each times a factor.

Factors are found by robust least squares of relative errors. What one clock cannot tell apart (the bandwidth's knee,
the split of launch overheads) is not varied; of factors that a profile leaves undetermined, a weak pull keeps the
common scale of all times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from biscale_gym.profiles.iterations import Iterations
from biscale_gym.profiles.parametric import ParametricProfile
from biscale_gym.profiles.profile import ProfileError
from biscale_gym.profiles.settings import ParametricSettings, PrecisionSettings

Floats = NDArray[np.float64]

LATENCY_TERMS = ("host", "host per sequence", "weights", "products", "launch", "per token", "attention", "KV")
"""Terms of an iteration's time that are scaled, in this order."""
POWER_TERMS = ("w_per_tb_per_s", "w_per_tflops", "w_per_ghz")
PULL = 0.01
"""Residual per unit of a factor's logarithm."""
ROBUST = 0.1
"""Relative error beyond which a point counts less than its square."""


def form_of(profile: ParametricProfile) -> ParametricSettings:
    """The constants of a profile's closed form."""
    form = profile.hardware.parametric
    assert form is not None
    return form


def with_form(profile: ParametricProfile, form: ParametricSettings) -> ParametricProfile:
    """The profile with other constants."""
    return replace(profile, hardware=profile.hardware.model_copy(update={"parametric": form}))


def without_allreduce(profile: ParametricProfile) -> ParametricProfile:
    """The profile of instances whose GPUs exchange nothing: what one of them computes alone."""
    form = form_of(profile)
    free = {
        tp: reduce.model_copy(update={"latency_us": 0.0, "gb_per_s": 1e12})
        for tp, reduce in form.latency.allreduce.items()
    }
    latency = form.latency.model_copy(update={"allreduce": free})
    return with_form(profile, form.model_copy(update={"latency": latency}))


def with_times_scaled(profile: ParametricProfile, factors: Floats) -> ParametricProfile:
    """Every time of ``LATENCY_TERMS`` times its factor, float64[8]."""
    form = form_of(profile)
    host, per_sequence, weights, products, launch, per_token, attention, kv = (float(factor) for factor in factors)
    own: PrecisionSettings = form.latency.precisions[profile.precision]
    own = own.model_copy(
        update={
            "bandwidth_tb_per_s": own.bandwidth_tb_per_s / weights,
            "efficiency": own.efficiency / products,
            "launch_ms": own.launch_ms * launch,
            "token_us": own.token_us * per_token,
            "sharded_token_us": own.sharded_token_us * per_token,
        }
    )
    latency = form.latency.model_copy(
        update={
            "host_ms": form.latency.host_ms * host,
            "host_ms_per_sequence": form.latency.host_ms_per_sequence * per_sequence,
            "attention_efficiency": form.latency.attention_efficiency / attention,
            "kv_tb_per_s": form.latency.kv_tb_per_s / kv,
            "precisions": {**form.latency.precisions, profile.precision: own},
        }
    )
    return with_form(profile, form.model_copy(update={"latency": latency}))


def predicted(profile: ParametricProfile, iterations: Iterations) -> Floats:
    """Latency [ms] and power [W] of iterations, shape (n, 2)."""
    answers = np.empty((len(iterations), 2))
    for tp, clock in sorted(set(zip(iterations.tp.tolist(), iterations.clock_mhz.tolist(), strict=True))):
        here = (iterations.tp == tp) & (iterations.clock_mhz == clock)
        own = iterations.rows(here)
        work = (own.batch, own.kv_tokens, own.prefill_tokens, own.sum_len_sq)
        answers[here, 0] = profile.latency_ms(int(tp), int(clock), *work)
        answers[here, 1] = profile.power_w(int(tp), int(clock), *work)
    return answers


def _least_squares(relative: Callable[[Floats], Floats], size: int) -> Floats:
    solution = least_squares(relative, np.zeros(size), loss="soft_l1", f_scale=ROBUST, method="trf")
    return np.asarray(solution.x, dtype=np.float64)


def fit(iterations: Iterations, base: ParametricProfile, with_power: bool) -> ParametricProfile:
    """The base's form with constants that meet the iterations.

    Args:
        iterations: busy rows of both phases, idle ones for the idle power.
        base: where the search starts, of the profiled model and precision; what is not fitted stays.
        with_power: fit power's constants as well.

    Raises:
        ProfileError: fewer rows than terms.
    """
    busy = iterations.rows((iterations.batch > 0) | (iterations.prefill_tokens > 0))
    if len(busy) < len(LATENCY_TERMS):
        raise ProfileError(
            f"profiled iterations: {len(busy)} rows for the {len(LATENCY_TERMS)} terms of the closed form"
        )
    scale = float(np.median(busy.latency_ms / predicted(base, busy)[:, 0]))
    start = with_times_scaled(base, np.full(len(LATENCY_TERMS), scale))

    def late(logs: Floats) -> Floats:
        found = predicted(with_times_scaled(start, np.exp(logs)), busy)[:, 0]
        return np.concatenate([np.log(found / busy.latency_ms), PULL * logs])

    timed = with_times_scaled(start, np.exp(_least_squares(late, len(LATENCY_TERMS))))
    return _with_power(timed, busy, iterations) if with_power else timed


def _with_power(profile: ParametricProfile, busy: Iterations, iterations: Iterations) -> ParametricProfile:
    """The profile with the idle and busy power of the iterations."""
    form = form_of(profile)
    idle = iterations.rows((iterations.batch == 0) & (iterations.prefill_tokens == 0))
    ends = {"idle_lowest_w": profile.clocks_mhz[0], "idle_highest_w": profile.top_clock_mhz}
    measured = {
        name: float(np.median(idle.power_w_per_gpu[idle.clock_mhz == clock]))
        for name, clock in ends.items()
        if (idle.clock_mhz == clock).any()
    }
    form = form.model_copy(update={"power": form.power.model_copy(update=measured)})

    def scaled(logs: Floats) -> ParametricProfile:
        factors = dict(zip(POWER_TERMS, np.exp(logs).tolist(), strict=True))
        changed = {name: getattr(form.power, name) * factor for name, factor in factors.items()}
        return with_form(profile, form.model_copy(update={"power": form.power.model_copy(update=changed)}))

    def off(logs: Floats) -> Floats:
        found = predicted(scaled(logs), busy)[:, 1]
        return np.concatenate([np.log(found / busy.power_w_per_gpu), PULL * logs])

    return scaled(_least_squares(off, len(POWER_TERMS)))
