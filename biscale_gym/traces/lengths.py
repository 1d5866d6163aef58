"""Prompt and output lengths: two marginal distributions, joined by a Gaussian copula."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri

from biscale_gym.traces.settings import Lengths, LognormalLengths, QuantileLengths
from biscale_gym.traces.trace import Floats, Ints


def draw_lengths(settings: Lengths, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Prompt and output tokens of ``count`` requests, each int64[count].

    The draws of request i do not depend on ``count``: at another rate the same lengths come in the same order.
    """
    # Spearman's rho_s of a bivariate normal with correlation rho is 6/pi asin(rho/2) (Kruskal 1958).
    rho = 2.0 * np.sin(np.pi / 6.0 * settings.rank_correlation)
    normal = rng.standard_normal((count, 2))
    dependent = rho * normal[:, 0] + np.sqrt(1.0 - rho**2) * normal[:, 1]
    return (
        _tokens(settings.prompt_tokens, ndtr(normal[:, 0])),
        _tokens(settings.output_tokens, ndtr(dependent)),
    )


def _tokens(marginal: QuantileLengths | LognormalLengths, probability: Floats) -> Ints:
    if isinstance(marginal, LognormalLengths):
        drawn = np.exp(marginal.mu + marginal.sigma * ndtri(probability))
        tokens = np.clip(drawn, marginal.min_tokens, marginal.max_tokens)
    else:
        knots = marginal.probabilities or np.linspace(0.0, 1.0, len(marginal.tokens))
        tokens = np.interp(probability, knots, marginal.tokens)
    whole: Ints = np.rint(tokens).astype(np.int64)
    return whole
