"""Load curves: what an instance draws in a window, and how many requests it fails, at every load under a clock policy.

A class table (:mod:`biscale_gym.planning.classes`) knows one rate and one clock per row. Where clocks follow the load,
one instance serves any rate, at the power that its policy needs for it; a curve measures that, with the policy that
will run, on the demand that planners may learn from. Curves are kept on disk as class tables are.

What loads an instance are tokens, and requests that are longer today than in the training demand load it more. So a
load is counted in *mean requests*: tokens over the mean number that a request of the training demand has, prompt tokens
for prefill and output tokens for decode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from biscale_gym.cluster.placement import InstanceSpec, Phase, Placement
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.metrics import tpot_s, ttft_s
from biscale_gym.planning import table_cache
from biscale_gym.planning.classes import (
    Measurement,
    measurement_key,
    nominal_prefill_s,
    source_digest,
)
from biscale_gym.planning.probe_trace import delayed, probe_trace
from biscale_gym.planning.probing import WARMUP_SHARE
from biscale_gym.traces.trace import Trace

Vector = NDArray[np.float64]

CACHE_KIND = "load-curves"
STEP = 1.4
"""Factor between the mean rates of the runs that make a curve."""
FINE_STEP = 1.07
"""The same, from the last run before the limit on."""
FINE_REQUESTS = 3
"""How many times a probe's requests a run in fine steps has: near its limit, one window's burst is not the rule."""
FEW_MISSED = 0.001
"""Share of late requests, beyond those that are late at the lowest rate, too, that marks the limit."""
MOST_MISSED = 0.3
"""Share of late requests at which the runs end."""
CARRIED_OVER = 0.02
"""Share of late requests in a window from which the next one's backlog is not its own."""
CLASS_WIDTH = 1.06
"""Ratio of the loads of windows that make one point."""
FIRST_RATE_RPS = 0.25
"""Per GPU; where curves begin."""
STEP_BACK = 2.0
"""Factor between the rates tried below, where that is too much already: requests are long."""
LEAST_PER_WINDOW = 4.0
"""Requests per window of the lowest rate that is tried: an instance may miss some at any."""


@dataclass(frozen=True)
class LoadPoint:
    """An instance in windows of one load.

    Attributes:
        load_rps: mean requests/s.
        power_w: of all its GPUs, idle time included.
        missed: share of requests outside the phase's SLO.
    """

    load_rps: float
    power_w: float
    missed: float


@dataclass(frozen=True)
class LoadCurve:
    """An instance of one kind at rising loads.

    Attributes:
        phase, tp: what the instance is.
        points: by load; neither power nor ``missed`` falls along them.
    """

    phase: Phase
    tp: int
    points: tuple[LoadPoint, ...]

    def at(self, load_rps: Vector) -> tuple[Vector, Vector]:
        """(power [W], share missed) at some loads: two float64[n], linear between the points, inf beyond the last."""
        loads = np.array([point.load_rps for point in self.points])
        power_w = np.interp(load_rps, loads, [point.power_w for point in self.points])
        missed = np.interp(load_rps, loads, [point.missed for point in self.points])
        beyond = load_rps > loads[-1] * (1.0 + 1e-9)
        return np.where(beyond, np.inf, power_w), np.where(beyond, np.inf, missed)


@dataclass(frozen=True)
class CurvePolicy:
    """The clock policy of a phase, and what tells it from others on disk.

    Attributes:
        policy: compiled.
        clocks_mhz: the run's list, which its answers index.
        start_mhz: clock of a new instance.
        code: of the policy, its sources' digest.
    """

    policy: PhasePolicy
    clocks_mhz: tuple[int, ...]
    start_mhz: int
    code: str

    def key(self) -> list[Any]:
        """What a curve depends on of it."""
        params = np.ascontiguousarray(self.policy.params, np.float64)
        asked = [self.policy.on_arrival, self.policy.on_overrun, self.policy.on_idle, self.policy.slack]
        function = getattr(self.policy.function, "__qualname__", repr(self.policy.function))
        digest = hashlib.sha256(params.tobytes()).hexdigest()
        return [function, digest, *asked, *self.clocks_mhz, self.start_mhz, self.code]


@dataclass(frozen=True)
class Windows:
    """What an instance did in each window of a run: float64[windows] each.

    Attributes:
        load_rps: mean requests that arrived, over the window's length.
        power_w: mean.
        missed: share of the requests that arrived outside the SLO; NaN where none was judged.
    """

    load_rps: Vector
    power_w: Vector
    missed: Vector


def mean_tokens(trace: Trace, phase: Phase) -> float:
    """Mean tokens that a request of this trace brings a phase."""
    return float((trace.prompt_tokens if phase == "prefill" else trace.output_tokens).mean())


def serve_windows(
    measurement: Measurement, phase: Phase, tp: int, served: CurvePolicy, trace: Trace, window_s: float
) -> Windows:
    """Simulate one instance alone on a trace, and read it window by window; the warm-up is not counted.

    Windows end at multiples of their length; the first and the last are between half a length and one and a half.
    """
    simulator = Simulator(
        measurement.cluster,
        measurement.profile,
        Placement((InstanceSpec(phase, tp, served.start_mhz),)),
        trace,
        served.clocks_mhz,
        measurement.slo,
        measurement.seed,
        only=phase,
    )
    simulator.set_policies(*((served.policy, None) if phase == "prefill" else (None, served.policy)))
    start_s = min(measurement.warmup_s, WARMUP_SHARE * trace.duration_s)
    multiples_s = np.arange(window_s, trace.duration_s - 0.5 * window_s, window_s)
    borders_s = [start_s, *multiples_s[multiples_s > start_s + 0.5 * window_s], trace.duration_s]
    simulator.run(start_s)
    ledgers = [simulator.instances()]
    for border_s in borders_s[1:]:
        simulator.run(border_s)
        ledgers.append(simulator.instances())
    simulator.run()
    ledger = simulator.requests()
    if phase == "prefill":
        latency_s, limit_s = ttft_s(ledger, 1e-3 * measurement.cluster.serving_overhead_ms), measurement.slo.ttft_s
        judged = np.ones(len(latency_s), np.bool_)
        tokens = ledger.prompt_tokens
    else:
        latency_s, limit_s = tpot_s(ledger, measurement.tpot_definition), measurement.slo.tpot_s
        judged = ledger.output_tokens > 1
        tokens = ledger.output_tokens
    late = ~(ledger.finished & (latency_s <= limit_s))
    lengths_s = np.diff(borders_s)
    arrived, _ = np.histogram(ledger.arrival_s, borders_s, weights=tokens / mean_tokens(measurement.training, phase))
    counted, _ = np.histogram(ledger.arrival_s[judged], borders_s)
    missed, _ = np.histogram(ledger.arrival_s[judged & late], borders_s)
    spent_j = np.array([float(after.since(before).energy_j.sum()) for before, after in pairwise(ledgers)])
    return Windows(arrived / lengths_s, spent_j / lengths_s, missed / np.where(counted > 0, counted, np.nan))


def measure_curve(measurement: Measurement, phase: Phase, tp: int, served: CurvePolicy, window_s: float) -> LoadCurve:
    """Measure an instance on the training demand, thinned or superposed to rising rates, until it fails many requests.

    What is read off are windows: a window's own load, power and share missed, so that a curve says what comes of a
    window of that load, bursts within it included; slower swings are the forecast's. Windows are brought together in
    classes of similar loads; power and shares are made non-decreasing by isotonic regression.

    Rates rise in coarse steps, and in fine ones from the last before the instance's limit: planners load instances up
    to there, so the way to it counts.
    """
    delay_s = nominal_prefill_s(measurement) if phase == "decode" else None
    training = measurement.training if delay_s is None else delayed(measurement.training, delay_s)
    seen: list[Windows] = []

    def missed_at(rate_rps: float, requests: int) -> float:
        trace = probe_trace(training, rate_rps, requests, measurement.seed)
        seen.append(serve_windows(measurement, phase, tp, served, trace, window_s))
        return float(np.nanmean(seen[-1].missed))

    rate_rps, requests = FIRST_RATE_RPS * tp, measurement.requests_per_probe
    while (always := missed_at(rate_rps, requests)) > FEW_MISSED and rate_rps * window_s > LEAST_PER_WINDOW * STEP_BACK:
        rate_rps /= STEP_BACK
        seen.clear()
    while missed_at(rate_rps * STEP, requests) <= min(always + FEW_MISSED, MOST_MISSED):
        rate_rps *= STEP
    while missed_at(rate_rps * FINE_STEP, FINE_REQUESTS * requests) <= MOST_MISSED:
        rate_rps *= FINE_STEP
    return LoadCurve(phase, tp, points_of(seen))


def points_of(seen: list[Windows]) -> tuple[LoadPoint, ...]:
    """Windows of similar loads together, one point each; those that follow an overloaded one bear its backlog."""
    load, power, missed = (
        np.concatenate([getattr(one, name) for one in seen]) for name in ("load_rps", "power_w", "missed")
    )
    burdened = np.concatenate([np.append(False, np.nan_to_num(one.missed[:-1]) > CARRIED_OVER) for one in seen])
    usable = (load > 0.0) & np.isfinite(missed) & ~burdened
    load, power, missed = load[usable], power[usable], missed[usable]
    number = np.round(np.log(load) / np.log(CLASS_WIDTH)).astype(np.int64)
    classes = np.unique(number)
    means = np.array([[values[number == one].mean() for values in (load, power, missed)] for one in classes])
    weights = np.array([np.count_nonzero(number == one) for one in classes], np.float64)
    power_w = isotonic_regression(means[:, 1], weights=weights).x
    shares = isotonic_regression(means[:, 2], weights=weights).x
    return tuple(LoadPoint(float(r), float(w), float(m)) for r, w, m in zip(means[:, 0], power_w, shares, strict=True))


def curve_key(
    measurement: Measurement, phase: Phase, tp: int, served: CurvePolicy, window_s: float, sources: str
) -> str:
    """Content hash of everything that a curve depends on."""
    limits = [measurement.slo.ttft_s, measurement.slo.tpot_s, window_s]
    return measurement_key(measurement, sources, {"curve": [phase, tp, *limits], "policy": served.key()})


def _measure_and_store(
    measurement: Measurement, phase: Phase, tp: int, served: CurvePolicy, window_s: float, key: str
) -> LoadCurve:
    curve = measure_curve(measurement, phase, tp, served, window_s)
    about = {
        "profile": f"{measurement.profile.model_name} {measurement.profile.for_phase(phase).precision}",
        "training": measurement.training.name,
        "curve": f"{phase} TP{tp}",
    }
    table_cache.store(CACHE_KIND, key, [asdict(point) for point in curve.points], about)
    return curve


def _stored(phase: Phase, tp: int, key: str) -> LoadCurve | None:
    rows = table_cache.load(CACHE_KIND, key)
    try:
        return None if rows is None else LoadCurve(phase, tp, tuple(LoadPoint(**row) for row in rows))
    except TypeError:
        return None


def load_curves(
    measurement: Measurement,
    kinds: Sequence[tuple[Phase, int]],
    served: dict[Phase, CurvePolicy],
    window_s: float,
) -> tuple[LoadCurve, ...]:
    """The curves of some kinds of instances, from disk where they have been measured before.

    Args:
        measurement: profile, SLO, training demand and probe lengths; ``headroom``, ``quantile`` and ``rate_tolerance``
            do not matter.
        kinds: (phase, TP degree).
        served: the clock policy of each phase.
        window_s: length of the windows that are planned.
    """
    sources = source_digest() + table_cache.source_digest(Path(__file__))
    keys = [curve_key(measurement, phase, tp, served[phase], window_s, sources) for phase, tp in kinds]
    found = [_stored(phase, tp, key) for (phase, tp), key in zip(kinds, keys, strict=True)]
    if all(curve is not None for curve in found):
        return tuple(curve for curve in found if curve is not None)
    with table_cache.exclusively(CACHE_KIND, table_cache.content_key({"curves": keys})):
        return tuple(
            _stored(phase, tp, key) or _measure_and_store(measurement, phase, tp, served[phase], window_s, key)
            for (phase, tp), key in zip(kinds, keys, strict=True)
        )
