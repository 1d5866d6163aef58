"""What a worker and its parent tell each other over their pipe; every message is one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.control.controllers import Controller, PlanContext, make_controller, parsed_variant
from biscale_gym.live.devices import Meter, Mode
from biscale_gym.live.vllm_adapter.engine import Output


@dataclass(frozen=True, slots=True)
class Variant:
    """A controller: installed name or ``module:Class``, and its keyword settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parsed(cls, text: str) -> Variant:
        """Of a command line: ``NAME`` or ``NAME[KEY=VALUE,...]``.

        Raises:
            ControllerError: it is of another form.
        """
        return cls(*parsed_variant(text))

    def make(self) -> Controller:
        """The controller.

        Raises:
            ControllerError: no such controller, or it does not take these settings.
        """
        return make_controller(self.name, self.settings)


@dataclass(frozen=True, slots=True)
class Run:
    """To a worker: get ready for a run.

    Attributes:
        controller: whose clock policy to apply; None: the clock is held, until ``Clock`` names another.
        context: what the controller knows.
        records: file for the iterations.
        clock_mhz: held where the controller has no policy.
        watched: whether the worker shows its status (``live.status``).
        token_budget: of a batch in this run; None: the worker's own, which it may not exceed.
    """

    controller: Variant | None
    context: PlanContext
    records: Path
    clock_mhz: int
    watched: bool = False
    token_budget: int | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """To a worker: hold this clock from now on."""

    clock_mhz: int


@dataclass(frozen=True, slots=True)
class Go:
    """To a worker: the run counts from ``origin_s`` on, on ``time.monotonic``'s scale."""

    origin_s: float


@dataclass(frozen=True, slots=True)
class Add:
    """To a worker: a request.

    Attributes:
        request: id, unique over attempts.
        prompt: int32[prompt tokens], token ids.
        output_tokens: how many to make.
        kv_params: for vLLM's connector.
        arrival_s, first_token_s: of the request, from the start of the run; the latter for decode.
    """

    request: str
    prompt: npt.NDArray[np.int32]
    output_tokens: int
    kv_params: dict[str, Any] | None
    arrival_s: float
    first_token_s: float


@dataclass(frozen=True, slots=True)
class Abort:
    """To a worker: forget a request."""

    request: str


@dataclass(frozen=True, slots=True)
class ReadMeters:
    """To a worker: say what its energy counters show."""


@dataclass(frozen=True, slots=True)
class Stop:
    """To a worker: end."""


@dataclass(frozen=True, slots=True)
class EndRun:
    """To a worker: close the run's records and report."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a worker: it is up, with so much KV, in blocks of so many tokens."""

    kv_capacity_tokens: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Begun:
    """From a worker: its clock policy is compiled, its device open.

    Attributes:
        source: whether the device's numbers are measured or modelled.
        mode: whether it sets clocks, or observes only.
        notice: what there is to tell of it.
    """

    source: str
    mode: Mode = "control"
    notice: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """From a worker: it cannot run what it was asked to, and another process in its place could not either.

    Attributes:
        why: for people.
    """

    why: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """From a worker: what an iteration brought, and when, from the start of the run."""

    time_s: float
    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class Alive:
    """From a worker, several times a second: its loop turns.

    Attributes:
        energy_j: of its device in this run.
        kv_used_tokens: now.
    """

    energy_j: float
    kv_used_tokens: int


@dataclass(frozen=True, slots=True)
class Meters:
    """From a worker between two batches: its device's energy counters."""

    meters: tuple[Meter, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """From a worker at the end of a run.

    Attributes:
        energy_j: of its device in this run.
        source: measured or modelled.
        flags: of its device's telemetry.
        prompt_tokens: in this run, by source.
        records_written, records_dropped: iterations on record.
        stale_decisions: clocks that telemetry was too old for.
    """

    energy_j: float
    source: str
    flags: frozenset[str]
    prompt_tokens: dict[str, int]
    records_written: int
    records_dropped: int
    stale_decisions: int


@dataclass(frozen=True, slots=True)
class Broken:
    """From a worker: the last words."""

    traceback: str
