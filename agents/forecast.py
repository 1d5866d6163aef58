"""The mean rate, or the mean load, that tier 1 plans the next window for.

============= ==========================================================================================
last-window   mean rate of the last window: the paper's rule
peak          greatest mean rate over equal parts of the last window
ewma          exponentially weighted mean of all windows so far, the operator's estimate coming first
oracle        true mean rate of the window to come: a bound for studies, which nobody can know in service
============= ==========================================================================================

Before the first window all of them answer the operator's estimate. The oracle cannot be had by mistake: a run fills
``PlanContext.coming_rate_rps`` in only for a controller that says ``foresees``, and without it the rule is an error.

A load is a rate of *mean requests* (:mod:`biscale_gym.planning.curves`): of tokens, over the mean number that a request
of the training demand brings the phase. The rules are the same; ``ewma`` weighs the loads of past windows, the others
take requests to be as long as in the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agents.errors import AgentError
from agents.settings import Tier1Settings
from biscale_gym.cluster.placement import Phase
from biscale_gym.control.controllers import PlanContext
from biscale_gym.planning.curves import mean_tokens


def peak_rps(arrivals_s: NDArray[np.float64], window_s: float, part_s: float) -> float:
    """Greatest mean rate [requests/s] over the parts of a window.

    Args:
        arrivals_s: float64[requests], s from the window's start.
        window_s: its length.
        part_s: wanted length of a part; the window is cut into the equal parts that come nearest, one at least.
    """
    parts = max(1, round(window_s / part_s))
    part = np.minimum((arrivals_s * (parts / window_s)).astype(np.int64), parts - 1)
    return float(np.bincount(part, minlength=parts).max()) * parts / window_s


def ewma_rps(history_rps: Sequence[float], estimate_rps: float, weight: float) -> float:
    """Exponentially weighted mean rate [requests/s].

    Args:
        history_rps: mean rate of each window so far.
        estimate_rps: what it starts from.
        weight: of each newer window, in (0, 1]; 1 is the last window alone.
    """
    rate_rps = estimate_rps
    for window_rps in history_rps:
        rate_rps = weight * window_rps + (1.0 - weight) * rate_rps
    return rate_rps


def oracle_rps(coming_rate_rps: float | None) -> float:
    """The true rate of the window to come [requests/s].

    Raises:
        AgentError: it was not shown.
    """
    if coming_rate_rps is None:
        raise AgentError(
            "forecast 'oracle' needs the rate of the window to come, which a run shows only to a controller whose "
            "attribute `foresees` is true"
        )
    return coming_rate_rps


def forecast_rps(settings: Tier1Settings, context: PlanContext) -> float:
    """The rate to plan for by the chosen rule [requests/s], without tier 1's margin.

    Raises:
        AgentError: the oracle is asked for in a run that does not show what comes.
    """
    if not context.history_rps or settings.forecast == "last-window":
        return context.last_rate_rps
    if settings.forecast == "peak":
        return peak_rps(context.last_arrivals_s, context.scenario.window_s, settings.peak_s)
    if settings.forecast == "ewma":
        return ewma_rps(context.history_rps, context.mean_rate_rps, settings.ewma_weight)
    return oracle_rps(context.coming_rate_rps)


def forecast_load_rps(settings: Tier1Settings, context: PlanContext, phase: Phase) -> float:
    """The load of a phase to plan for by the chosen rule [mean requests/s], without tier 1's margin.

    Windows of which it is not known how long their requests were count as the training demand does.

    Raises:
        AgentError: the oracle is asked for in a run that does not show what comes.
    """
    mean = mean_tokens(context.training, phase)
    lengths = [tokens / mean if tokens > 0.0 else 1.0 for tokens in context.history_tokens.get(phase, ())]
    lengths = lengths or [1.0] * len(context.history_rps)
    if settings.forecast == "ewma":
        loads_rps = [rate_rps * length for rate_rps, length in zip(context.history_rps, lengths, strict=True)]
        return ewma_rps(loads_rps, context.mean_rate_rps, settings.ewma_weight)
    return forecast_rps(settings, context) * (lengths[-1] if lengths else 1.0)
