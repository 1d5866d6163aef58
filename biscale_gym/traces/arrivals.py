"""Arrival processes of a stated mean rate.

All but Gamma are Cox processes: Poisson, given a rate that varies in time as rate_rps x m(t). The relative
modulation m does not depend on the rate, so thinning the arrivals generated at a rate gives, in law, those generated at
the thinned rate, and more requests per second mean more users of the same habits. The index of dispersion over a window
is 1 + rate x window x (relative variance of m over the window): it grows with the rate. Gamma arrivals keep their CV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biscale_gym.traces.settings import (
    Arrivals,
    Band,
    DiurnalArrivals,
    GammaArrivals,
    MarkovArrivals,
    ModulatedArrivals,
    PoissonArrivals,
)
from biscale_gym.traces.trace import Floats, TraceError

DAY_S = 86_400.0

_STEPS_PER_PERIOD = 8
_JITTER_OCTAVES = 0.1


def draw_arrivals(
    settings: Arrivals, rate_rps: float, duration_s: float, path_rng: np.random.Generator, rng: np.random.Generator
) -> Floats:
    """Arrival times in [0, duration_s), ascending.

    Args:
        settings: the process.
        rate_rps: mean rate. For modulated and Markov arrivals m(t) is scaled to a mean of 1 over the duration, so that
            every seed carries the same load; for diurnal ones the mean of 1 is over a day.
        duration_s: length of the trace.
        path_rng: draws the course of the rate.
        rng: draws the arrivals given that course.

    Raises:
        TraceError: the Markov source stays silent for the whole duration.
    """
    if isinstance(settings, GammaArrivals):
        return _gamma(settings.cv, rate_rps, duration_s, rng)
    times_s, cumulative = _cumulative_modulation(settings, duration_s, path_rng)
    count = rng.poisson(rate_rps * cumulative[-1])
    marks = np.sort(rng.random(count)) * cumulative[-1]
    arrival_s: Floats = np.interp(marks, cumulative, times_s)
    return np.minimum(arrival_s, np.nextafter(duration_s, 0.0))


def _gamma(cv: float, rate_rps: float, duration_s: float, rng: np.random.Generator) -> Floats:
    """Renewal process with Gamma gaps: shape 1 / cv^2, mean 1 / rate."""
    shape = cv**-2
    blocks: list[Floats] = []
    reached_s = 0.0
    while reached_s < duration_s:
        expected = (duration_s - reached_s) * rate_rps
        gaps_s = rng.gamma(shape, 1.0 / (shape * rate_rps), size=int(expected + 4.0 * cv * expected**0.5) + 16)
        blocks.append(reached_s + np.cumsum(gaps_s))
        reached_s = float(blocks[-1][-1])
    arrival_s = np.concatenate(blocks)
    return arrival_s[arrival_s < duration_s]


def _cumulative_modulation(
    settings: PoissonArrivals | ModulatedArrivals | MarkovArrivals | DiurnalArrivals,
    duration_s: float,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Breakpoints in time and the integral of m up to each (both float64[points]); linear in between."""
    if isinstance(settings, PoissonArrivals):
        times_s = np.array([0.0, duration_s])
        return times_s, times_s
    if isinstance(settings, MarkovArrivals):
        return _markov(settings, duration_s, rng)
    bands = settings.bands
    fastest_s = min((band.period_s for band in bands), default=DAY_S / 24.0)
    # A daily curve is smooth at 1/24 day / 8 steps; a band needs its own period resolved.
    points = max(2, int(np.ceil(duration_s / fastest_s * _STEPS_PER_PERIOD)) + 1)
    times_s = np.linspace(0.0, duration_s, points)
    modulation = _swings(bands, times_s, rng)
    modulation *= duration_s / _integral(times_s, modulation)[-1]
    if isinstance(settings, DiurnalArrivals):
        modulation *= day_curve(settings, times_s)
    return times_s, _integral(times_s, modulation)


def day_curve(settings: DiurnalArrivals, times_s: Floats) -> Floats:
    """float64[n]: the rate at each time after midnight, relative to the day's mean: a raised cosine."""
    swing = (settings.peak_to_trough - 1.0) / (settings.peak_to_trough + 1.0)
    curve: Floats = 1.0 + swing * np.cos(2.0 * np.pi * (times_s / DAY_S - settings.peak_hour / 24.0))
    return curve


def _swings(bands: Sequence[Band], times_s: Floats, rng: np.random.Generator) -> Floats:
    """exp(sum of sinusoids): positive, its relative variance the sum of the bands' (up to a common factor).

    Each band carries a fixed power and only its phase and exact period are drawn, so that the burstiness of short
    traces differs little from seed to seed. As E exp(a cos phase) = I0(a), the relative variance of the product is
    close to exp(sum a^2 / 2) - 1, which is solved for the amplitudes a.
    """
    total = sum(band.relative_variance for band in bands)
    log_share = np.log1p(total) / total if total > 0.0 else 0.0
    logarithm = np.zeros_like(times_s)
    for band in bands:
        amplitude = np.sqrt(2.0 * band.relative_variance * log_share)
        period_s = band.period_s * 2.0 ** rng.uniform(-_JITTER_OCTAVES, _JITTER_OCTAVES)
        phase = rng.uniform(0.0, 2.0 * np.pi)
        logarithm += amplitude * np.cos(2.0 * np.pi / period_s * times_s + phase)
    return np.exp(logarithm)


def _markov(settings: MarkovArrivals, duration_s: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    chain = np.array(settings.next_state)
    mean_s = np.array([state.mean_s for state in settings.states])
    relative_rate = np.array([state.relative_rate for state in settings.states])
    state = int(rng.choice(mean_s.size, p=_share_of_time(chain, mean_s)))
    ends_s, rates = [0.0], []
    while ends_s[-1] < duration_s:
        ends_s.append(ends_s[-1] + rng.exponential(mean_s[state]))
        rates.append(relative_rate[state])
        state = int(rng.choice(mean_s.size, p=chain[state]))
    times_s = np.minimum(np.array(ends_s), duration_s)
    cumulative = np.concatenate(([0.0], np.cumsum(np.diff(times_s) * np.array(rates))))
    if cumulative[-1] == 0.0:
        raise TraceError(f"the Markov source is silent for all of {duration_s:g} s: ask for a longer trace")
    return times_s, cumulative * (duration_s / cumulative[-1])


def _share_of_time(chain: Floats, mean_s: Floats) -> Floats:
    """Stationary share of time in each state of the semi-Markov chain: visits weighted by how long they last."""
    system = np.vstack([chain.T - np.eye(mean_s.size), np.ones(mean_s.size)])
    visits = np.linalg.lstsq(system, np.append(np.zeros(mean_s.size), 1.0), rcond=None)[0]
    shares = np.maximum(visits, 0.0) * mean_s
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def _integral(times_s: Floats, values: Floats) -> Floats:
    """Cumulative trapezoid, from 0."""
    return np.concatenate(([0.0], np.cumsum(np.diff(times_s) * 0.5 * (values[1:] + values[:-1]))))
