"""What a workload preset and a catalogue entry may say."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from biscale_gym.config import Settings

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class PoissonArrivals(Settings):
    """Independent exponential gaps."""

    kind: Literal["poisson"]


class GammaArrivals(Settings):
    """Independent Gamma gaps with coefficient of variation ``cv``; the CV stays when the rate changes."""

    kind: Literal["gamma"]
    cv: PositiveFloat


class Band(Settings):
    """One time scale of a swinging rate: a sinusoid of random phase, its period moved by up to a tenth of an octave.

    ``relative_variance`` is what it adds to the variance of rate / mean rate.
    """

    period_s: PositiveFloat
    relative_variance: float = Field(ge=0.0)


class ModulatedArrivals(Settings):
    """Poisson arrivals whose rate swings on many time scales at once (a Cox process)."""

    kind: Literal["modulated"]
    bands: tuple[Band, ...] = Field(min_length=1)


class MarkovState(Settings):
    """A state of the source: how long it lasts on average (exponential), and its rate relative to the other states."""

    mean_s: PositiveFloat
    relative_rate: float = Field(ge=0.0)


class MarkovArrivals(Settings):
    """Poisson arrivals whose rate follows a Markov chain: bursts and pauses.

    ``next_state[i][j]`` is the probability that state i is followed by state j.
    """

    kind: Literal["markov"]
    states: tuple[MarkovState, ...] = Field(min_length=2)
    next_state: tuple[tuple[Probability, ...], ...]

    @model_validator(mode="after")
    def _chain(self) -> MarkovArrivals:
        count = len(self.states)
        if [len(row) for row in self.next_state] != [count] * count:
            raise ValueError(f"next_state must be {count} rows of {count} probabilities")
        if any(not math.isclose(sum(row), 1.0, abs_tol=1e-9) for row in self.next_state):
            raise ValueError("each row of next_state must sum to 1")
        if all(state.relative_rate == 0.0 for state in self.states):
            raise ValueError("every state has relative_rate 0: nothing would ever arrive")
        return self


class DiurnalArrivals(Settings):
    """Poisson arrivals whose rate follows the hour of the day, with faster swings on top; the trace begins at midnight.

    The mean over a whole day is the rate asked for.
    """

    kind: Literal["diurnal"]
    peak_to_trough: float = Field(ge=1.0)
    peak_hour: float = Field(ge=0.0, lt=24.0)
    bands: tuple[Band, ...] = ()


Arrivals = Annotated[
    PoissonArrivals | GammaArrivals | ModulatedArrivals | MarkovArrivals | DiurnalArrivals, Field(discriminator="kind")
]


class QuantileLengths(Settings):
    """Lengths with the given quantiles, linear in between.

    ``probabilities`` default to equal steps from 0 to 1; the first must be 0 and the last 1.
    """

    kind: Literal["quantiles"]
    tokens: tuple[float, ...] = Field(min_length=2)
    probabilities: tuple[Probability, ...] | None = None

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[float, ...]) -> tuple[float, ...]:
        if tokens[0] < 1.0 or list(tokens) != sorted(tokens):
            raise ValueError("must ascend from at least 1")
        return tokens

    @model_validator(mode="after")
    def _matching(self) -> QuantileLengths:
        given = self.probabilities
        if given is None:
            return self
        if len(given) != len(self.tokens):
            raise ValueError(f"{len(given)} probabilities for {len(self.tokens)} tokens")
        if given[0] != 0.0 or given[-1] != 1.0 or any(b <= a for a, b in pairwise(given)):
            raise ValueError("probabilities must rise from 0 to 1")
        return self


class LognormalLengths(Settings):
    """Lognormal lengths (``mu``, ``sigma`` of the logarithm of tokens), clipped."""

    kind: Literal["lognormal"]
    mu: float
    sigma: PositiveFloat
    min_tokens: PositiveInt
    max_tokens: PositiveInt

    @model_validator(mode="after")
    def _bounds(self) -> LognormalLengths:
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        return self


Marginal = Annotated[QuantileLengths | LognormalLengths, Field(discriminator="kind")]


class Lengths(Settings):
    """Prompt and output lengths, dependent through a Gaussian copula with the given Spearman rank correlation."""

    prompt_tokens: Marginal
    output_tokens: Marginal
    rank_correlation: float = Field(default=0.0, gt=-1.0, lt=1.0)


class WorkloadSettings(Settings):
    """What requests come and when; ``native_rate_rps`` is the rate at which it was measured, if it was."""

    name: str
    description: str
    source: str
    arrivals: Arrivals
    lengths: Lengths
    native_rate_rps: PositiveFloat | None = None


class TraceSource(Settings):
    """Where a published trace is, what it must hash to, and under which terms it may be used."""

    description: str
    url: str = Field(pattern=r"^https://.+/[^/]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    format: Literal["azure", "burstgpt", "mooncake"]
    licence: str
    attribution: str

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[1]
