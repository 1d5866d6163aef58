"""What a controller is, and how one is found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.placement import Phase, Placement
from biscale_gym.cluster.simulator import ClusterError, PhasePolicy, Simulator
from biscale_gym.config import nearest, parsed_overrides
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

FloatArray = NDArray[np.float64]
ENTRY_POINTS = "biscale_gym.controllers"


class ControllerError(ValueError):
    """A controller that cannot be found or used; the message names the nearest valid one."""


def no_arrivals() -> FloatArray:
    """Of a window that there has not been."""
    return np.zeros(0)


@dataclass(frozen=True)
class PlanContext:
    """What a controller knows when it plans a window: the past, never the trace that is evaluated.

    The one exception is ``coming_rate_rps``. It is filled in only for a controller whose attribute ``foresees`` is
    true, which bounds in studies have and nothing else should: every other controller finds None there, in every
    window, and fails at once if it calculates with it. ``last_arrivals_s`` is a copy, not a view into the trace.

    Attributes:
        scenario: cluster, SLO, clocks, window length.
        profile: what the controller believes iterations cost.
        training: the training split of the workload, never the evaluated part.
        mean_rate_rps: the operator's estimate of the run's mean rate, known before it.
        history_rps: mean arrival rate of each window so far; empty before the first.
        previous: the placement that serves now, None before the first.
        clocks_mhz: the run's ascending clock list; policies answer with indices into it.
        last_arrivals_s: float64[requests of the last window], ascending, s from that window's start; read-only, empty
            before the first border.
        coming_rate_rps: true mean rate until the next border or the end of the counted part; None before the first
            border, and for every controller that does not foresee.
        history_tokens: by phase, for each window so far: mean prompt tokens of the requests that arrived in it
            (prefill), mean output tokens of those that finished in it (decode); NaN where there were none. Empty where
            nobody keeps count.
    """

    scenario: ScenarioSettings
    profile: Profile
    training: Trace
    mean_rate_rps: float
    history_rps: tuple[float, ...] = ()
    previous: Placement | None = None
    clocks_mhz: tuple[int, ...] = ()
    last_arrivals_s: FloatArray = field(default_factory=no_arrivals, compare=False)
    coming_rate_rps: float | None = None
    history_tokens: Mapping[Phase, tuple[float, ...]] = field(default_factory=dict, hash=False)

    @property
    def last_rate_rps(self) -> float:
        """Mean rate of the last window; the operator's estimate before there is one."""
        return self.history_rps[-1] if self.history_rps else self.mean_rate_rps

    def clock_index(self, clock_mhz: int) -> int:
        """Position of a clock in the run's list.

        Raises:
            ClusterError: the run has no such clock; the nearest is named.
        """
        if clock_mhz not in self.clocks_mhz:
            closest = min(self.clocks_mhz, key=lambda clock: abs(clock - clock_mhz))
            raise ClusterError(f"the run has no clock {clock_mhz} MHz; the nearest is {closest}")
        return self.clocks_mhz.index(clock_mhz)


@runtime_checkable
class Controller(Protocol):
    """Decides placements (tier 1) and clocks (tier 2).

    Attributes:
        name: as in tables.
        replans: whether the placement is planned anew at every window of the scenario, or once, before the run.
    """

    name: str
    replans: bool

    def plan(self, context: PlanContext) -> Placement:
        """The placement from now on."""
        ...

    def policies(self, context: PlanContext) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        """Clock policies of prefill and decode; None holds each instance's planned clock."""
        ...


class ClusterPolicy(Protocol):
    """Decides the clocks of all instances together, at fixed times, in place of clock policies of single instances.

    A controller that has one returns it from ``cluster_policy(context)``, called once, after the first ``plan``.

    Attributes:
        interval_s: from one decision to the next; the first is at the start of the run.
    """

    interval_s: float

    def begin(self, simulator: Simulator) -> None:
        """Take over a cluster that has not run yet."""
        ...

    def decide(self, simulator: Simulator) -> None:
        """Ask for clocks, now; after a change of placement for those of the new one."""
        ...


def cluster_policy(controller: Controller, context: PlanContext) -> ClusterPolicy | None:
    """What decides all clocks together, where the controller has such a policy."""
    has: Callable[[PlanContext], ClusterPolicy | None] | None = getattr(controller, "cluster_policy", None)
    return None if has is None else has(context)


def instance_policies(
    controller: Controller, context: PlanContext, where: str
) -> tuple[PhasePolicy | None, PhasePolicy | None]:
    """Clock policies of prefill and decode, for a place that knows no others.

    Raises:
        ControllerError: the controller decides all clocks together.
    """
    if cluster_policy(controller, context) is not None:
        raise ControllerError(
            f"controller {controller.name!r} decides the clocks of all instances together, which {where} cannot ask "
            "for; `biscale-gym compare` can"
        )
    return controller.policies(context)


def parsed_variant(text: str) -> tuple[str, dict[str, Any]]:
    """A controller as command lines name it: ``NAME`` or ``NAME[KEY=VALUE,...]``, keys dotted, values read as YAML.

    Returns:
        The name, and the controller's keyword settings.

    Raises:
        ControllerError: the text is not of this form.
    """
    name, bracket, inside = text.partition("[")
    if bracket and not inside.endswith("]"):
        raise ControllerError(f"controller {text!r}: expected NAME[KEY=VALUE,...], the closing bracket last")
    settings: dict[str, Any] = {}
    for key, value in parsed_overrides([part for part in split_names(inside.removesuffix("]")) if part]).items():
        *groups, last = key.split(".")
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return name.strip(), settings


def split_names(text: str) -> list[str]:
    """The parts of a comma-separated list; commas within brackets part nothing."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "[") - (sign == "]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def controller_names() -> list[str]:
    """Names of the installed controllers, sorted."""
    return sorted(point.name for point in entry_points(group=ENTRY_POINTS))


def find_controller(name: str) -> Callable[..., Any]:
    """The class of a controller: an installed name, or ``module:Class``.

    Raises:
        ControllerError: no such controller; the nearest is named.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            loaded: Callable[..., Any] = point.load()
            return loaded
    if ":" not in name:
        raise ControllerError(f"no controller {name!r}; {nearest(name, controller_names())}, or module:Class")
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ControllerError(f"controller {name!r} cannot be loaded: {error}") from error
    return found


def make_controller(name: str, settings: dict[str, Any] | None = None) -> Controller:
    """An instance of a controller, with keyword settings.

    Raises:
        ControllerError: no such controller, or it does not take these settings.
    """
    try:
        controller = find_controller(name)(**(settings or {}))
    except TypeError as error:
        raise ControllerError(f"controller {name!r}: {error}") from error
    if not isinstance(controller, Controller):
        raise ControllerError(f"{name!r} is no controller: it needs name, replans, plan() and policies()")
    return controller
