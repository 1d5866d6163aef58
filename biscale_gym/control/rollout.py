"""One run: a controller serves a trace on the modelled cluster, window by window, and its figures come back."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger
from biscale_gym.cluster.placement import PHASES, Lane, Phase, Placement
from biscale_gym.cluster.simulator import PhasePolicy, Simulator
from biscale_gym.cluster.state import PREFILL
from biscale_gym.config import Settings, config_hash, load_preset
from biscale_gym.control.controllers import (
    ClusterPolicy,
    Controller,
    ControllerError,
    PlanContext,
    cluster_policy,
    make_controller,
)
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import Requests, requests_for
from biscale_gym.metrics import Counted, measure
from biscale_gym.profiles import Profile
from biscale_gym.profiles.prediction import predicted_profile
from biscale_gym.profiles.randomisation import randomised_switching
from biscale_gym.profiles.settings import RandomisationSettings, SwitchingSettings
from biscale_gym.traces import TraceError

FloatArray = npt.NDArray[np.float64]
TIMELINE_SAMPLES = 900


class RunJob(Settings):
    """Everything that names a run.

    Attributes:
        scenario: preset or path.
        controller: installed name or ``module:Class``.
        seed: of the generated trace and of the cluster's random numbers.
        trace: a recorded trace instead of the scenario's workload.
        rate_rps: another mean rate.
        split: which part of the workload is played; None: test for a generated workload, all of a recorded one.
        overrides: scenario settings replaced, dotted.
        controller_settings: the controller's keyword settings.
        randomisation: preset of a family of hardware, of which the seed draws one, as the environments do from a
            ``hardware_seed``; controllers go on believing in the scenario's own. None: the scenario's own.
    """

    scenario: str
    controller: str
    seed: int = 0
    trace: str | None = None
    rate_rps: float | None = None
    split: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    controller_settings: dict[str, Any] = Field(default_factory=dict)
    randomisation: str | None = None

    @field_validator("overrides", "controller_settings")
    @classmethod
    def _in_order(cls, values: dict[str, Any]) -> dict[str, Any]:
        # A record keeps its keys sorted: a job that is read back must have the same names as the one that was run.
        return _sorted(values)

    @property
    def scenario_name(self) -> str:
        """The scenario as rows name it: with what is replaced in it, and the family that its hardware is drawn from."""
        drawn = [] if self.randomisation is None else [f"randomisation={self.randomisation}"]
        return " ".join([self.scenario, *(f"{setting}={value}" for setting, value in self.overrides.items()), *drawn])

    @property
    def controller_name(self) -> str:
        """The controller as rows name it: with its settings, dotted."""
        return " ".join([self.controller, *(f"{name}={value}" for name, value in dotted(self.controller_settings))])

    @property
    def played_split(self) -> str:
        """The split that is played."""
        return self.split or ("test" if self.trace is None else "all")


def _sorted(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _sorted(value) if isinstance(value, dict) else value for name, value in sorted(settings.items())}


def dotted(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested settings, flat: ``{"a": {"b": 1}}`` as ``[("a.b", 1)]``."""
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        inner = dotted(value) if isinstance(value, dict) else [("", value)]
        flat += [(f"{name}.{key}" if key else name, one) for key, one in inner]
    return flat


@dataclass(frozen=True)
class RunOutcome:
    """What a run gave.

    Attributes:
        row: figures by name, with scenario, controller, seed and split.
        action_digest: of every placement and clock that was asked for.
        provenance: resolved configuration and its hash, trace name and hash, placements by window.
        timeline: arrays over time and instance: time_s[T], clock_mhz[T, I], queue[T, I], batch[T, I], power_w[T, I]
            (NaN while an instance is not there), label[I].
        windows: per window, every figure of ``metrics.measure``, [W], with ``start_s``, ``end_s`` of its counted part.
        ttft_s, tpot_s: of the judged requests.
    """

    row: dict[str, float | int | str]
    action_digest: str
    provenance: dict[str, Any]
    timeline: dict[str, npt.NDArray[Any]]
    windows: dict[str, npt.NDArray[Any]]
    ttft_s: FloatArray
    tpot_s: FloatArray


@dataclass
class Timeline:
    """Samples of every instance's state at fixed times."""

    time_s: list[float] = field(default_factory=list)
    samples: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, simulator: Simulator, lanes_before: int = 0) -> None:
        """Sample now: columns clock MHz, queue, batch, power W; one row per lane, after those of earlier clusters."""
        inst = simulator.state.inst[: len(simulator.lanes)]
        present = np.isfinite(inst["gone_s"])
        sample = np.empty((len(inst), 4))
        sample[:, 0] = np.asarray(simulator.clocks_mhz)[inst["clock"]]
        sample[:, 1] = inst["queue_n"]
        sample[:, 2] = np.where(inst["phase"] == PREFILL, inst["batch_n"], inst["run_n"])
        sample[:, 3] = inst["power_w"]
        sample[present] = np.nan
        self.time_s.append(simulator.now_s)
        self.samples.append(np.vstack([np.full((lanes_before, 4), np.nan), sample]))

    def arrays(self, lanes: tuple[Lane, ...]) -> dict[str, npt.NDArray[Any]]:
        """All samples as arrays over (time, lane)."""
        stacked = np.full((len(self.samples), len(lanes), 4), np.nan)
        for number, sample in enumerate(self.samples):
            stacked[number, : len(sample)] = sample
        labels = [f"{lane.spec.phase} {number} TP{lane.spec.tp}" for number, lane in enumerate(lanes)]
        return {
            "time_s": np.asarray(self.time_s),
            "clock_mhz": stacked[..., 0],
            "queue": stacked[..., 1],
            "batch": stacked[..., 2],
            "power_w": stacked[..., 3],
            "label": np.asarray(labels),
        }


class Rollout:
    """A controller, a scenario and a trace, ready to be run.

    Args:
        controller: decides placements and clocks.
        scenario: what is served, where, under which SLO.
        requests: the trace, and what planners learn from.
        seed: of the cluster's random numbers.
        profile: what iterations truly cost; the scenario's if None.
        believed: what controllers plan and predict with, before the scenario's ``prediction``; the truth if None.
        switching: how clocks truly switch; the scenario's if None.
        only: serve this phase alone (see ``Simulator``).
        control_interval_s: ask the clock policies about every instance at multiples of this, at no other time; None: at
            the engine's decision points. A controller that decides all clocks together has an interval of its own.

    Attributes:
        simulator: the cluster that serves now; with steady-state windows every window has its own.
        placements: (from when, placement) as planned.
        windows: what counted of each window, once ``run`` has served it.
    """

    def __init__(
        self,
        controller: Controller,
        scenario: ScenarioSettings,
        requests: Requests,
        seed: int = 0,
        profile: Profile | None = None,
        only: Phase | None = None,
        control_interval_s: float | None = None,
        believed: Profile | None = None,
        switching: SwitchingSettings | None = None,
    ) -> None:
        cluster = scenario.cluster
        self._only: Phase | None = only
        self._interval_s = control_interval_s
        self.controller = controller
        self.scenario = scenario
        self.requests = requests
        self.seed = seed
        self.profile = profile or cluster.profile()
        self.placements: list[tuple[float, Placement]] = []
        self._history_rps: list[float] = []
        self._history_tokens: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
        self._clocks_mhz = tuple(sorted({*scenario.clocks_mhz, scenario.top_clock_mhz}))
        self.switching = switching
        self.predicted = believed
        if scenario.prediction is not None:
            self.predicted = predicted_profile(believed or self.profile, scenario.prediction, self._clocks_mhz)
        placement = controller.plan(self._context())
        self._clocks_mhz = tuple(sorted({*self._clocks_mhz, *(spec.clock_mhz for spec in placement.instances)}))
        self.placements.append((0.0, placement))
        self.timeline = Timeline()
        self.windows: list[Counted] = []
        self._served: list[Simulator] = []
        self._joint = cluster_policy(controller, self._context())
        if self._joint is not None:
            if control_interval_s is not None or only is not None:
                raise ControllerError(
                    f"controller {controller.name!r} decides the clocks of both phases together, every "
                    f"{self._joint.interval_s:g} s: expected neither a control interval nor a single phase"
                )
            self._interval_s = self._joint.interval_s
        self.simulator = self._cluster(0)

    @property
    def _borders_s(self) -> list[float]:
        """Where windows begin, and the end."""
        return [0.0, *np.arange(self.scenario.window_s, self.end_s, self.scenario.window_s).tolist(), self.end_s]

    def _cluster(self, window: int) -> Simulator:
        """A cluster with the present placement: for the whole trace, or for one window of it if they start fresh."""
        trace = self.requests.evaluated
        seed: int | np.random.SeedSequence = self.seed
        if self._fresh_windows:
            start_s, stop_s = self._borders_s[window : window + 2]
            first = np.searchsorted(trace.arrival_s, start_s)
            last = len(trace) if stop_s == self.end_s else np.searchsorted(trace.arrival_s, stop_s)
            if first == last:
                raise TraceError(
                    f"trace {trace.name!r} has no arrival from {start_s:g} to {stop_s:g} s; "
                    "window_start 'steady-state' needs one in every window, 'carried' does not"
                )
            trace = trace.take(np.arange(first, last), trace.name)
            seed = np.random.SeedSequence([self.seed, window])
        simulator = Simulator(
            self.scenario.cluster,
            self.profile,
            self.placements[-1][1],
            trace,
            self._clocks_mhz,
            self.scenario.slo,
            seed,
            predicted=self.predicted,
            only=self._only,
            switching=self.switching,
        )
        self._served.append(simulator)
        if self._joint is not None:
            self._joint.begin(simulator)
        else:
            simulator.set_policies(*self._policies(), only_when_told=self._interval_s is not None)
        return simulator

    @property
    def _fresh_windows(self) -> bool:
        return self.scenario.window_start == "steady-state"

    def _arrivals_s(self, start_s: float, stop_s: float) -> FloatArray:
        """Arrivals in [start_s, stop_s) of the evaluated trace."""
        arrival_s = self.requests.evaluated.arrival_s
        first, last = np.searchsorted(arrival_s, (start_s, stop_s))
        return arrival_s[first:last]

    def _coming_rate_rps(self, now_s: float) -> float | None:
        """True mean rate of the window that begins, for a controller that says that it foresees; else None."""
        if not getattr(self.controller, "foresees", False):
            return None
        stop_s = min(now_s + self.scenario.window_s, self.end_s)
        return len(self._arrivals_s(now_s, stop_s)) / (stop_s - now_s) if stop_s > now_s else 0.0

    def _context(self) -> PlanContext:
        return PlanContext(
            scenario=self.scenario,
            profile=self.predicted or self.profile,
            training=self.requests.training,
            mean_rate_rps=self.requests.mean_rate_rps,
            history_rps=tuple(self._history_rps),
            history_tokens={phase: tuple(tokens) for phase, tokens in self._history_tokens.items()},
            previous=self.placements[-1][1] if self.placements else None,
            clocks_mhz=self._clocks_mhz,
        )

    def _policies(self) -> tuple[PhasePolicy | None, PhasePolicy | None]:
        policies = self.controller.policies(self._context())
        for phase, policy in zip(PHASES, policies, strict=True):
            if policy is not None and policy.function is None:
                raise ControllerError(
                    f"controller {self.controller.name!r}: its {phase} policy has no function; "
                    "a rollout needs a compiled one, or None to hold the planned clock"
                )
        return policies

    @property
    def end_s(self) -> float:
        """Where the counted part ends: the generated duration, or a recorded trace's last arrival."""
        return self.requests.end_s

    def _count_tokens(self, start_s: float, stop_s: float) -> None:
        """Note how long the requests of a window were: prompts when they arrive, outputs when they are finished."""
        ledger = self.simulator.requests()
        tokens = {"prefill": ledger.prompt_tokens, "decode": ledger.output_tokens}
        times_s = {"prefill": ledger.arrival_s, "decode": ledger.finish_s}
        for phase in PHASES:
            own = tokens[phase][(times_s[phase] >= start_s) & (times_s[phase] < stop_s)]
            self._history_tokens[phase].append(float(own.mean()) if len(own) else float("nan"))

    def _replan(self, now_s: float) -> None:
        """The next window's placement; the running cluster changes to it unless the window gets one of its own."""
        window_s = self.scenario.window_s
        arrivals_s = self._arrivals_s(now_s - window_s, now_s) - (now_s - window_s)
        arrivals_s.setflags(write=False)
        self._history_rps.append(len(arrivals_s) / window_s)
        self._count_tokens(now_s - window_s, now_s)
        context = replace(self._context(), last_arrivals_s=arrivals_s, coming_rate_rps=self._coming_rate_rps(now_s))
        placement = self.controller.plan(context)
        if placement != self.placements[-1][1] and not self._fresh_windows:
            self.simulator.reconfigure(placement)
        self.placements.append((now_s, placement))

    def run(self, count_drain: bool = False) -> Counted:
        """Serve the whole trace, drain included; returns what counts.

        Args:
            count_drain: count until the last event instead of the last arrival, however long the drain takes.
        """
        borders_s = self._borders_s
        for window, (start_s, stop_s) in enumerate(pairwise(borders_s)):
            if window and self.controller.replans:
                self._replan(start_s)
            if window and self._fresh_windows:
                self._drain(start_s + self.scenario.drain_limit_s)
                self.simulator = self._cluster(window)
            drained = count_drain and stop_s == self.end_s
            self.windows.append(self._serve_window(start_s, stop_s, drained))
        self._drain(self.end_s + self.scenario.drain_limit_s)
        gaps = tuple((one.end_s, other.start_s) for one, other in pairwise(self.windows) if one.end_s < other.start_s)
        energy = InstanceLedger.joined([window.energy for window in self.windows])
        return Counted(self.windows[0].start_s, self.windows[-1].end_s, energy, gaps)

    def _serve_window(self, start_s: float, stop_s: float, drained: bool) -> Counted:
        """Run to the window's end, or to the last event; returns what counts of it, which may be nothing."""
        uncounted_s = self.scenario.warmup_s + (start_s if self._fresh_windows else 0.0)
        from_s = min(max(start_s, uncounted_s), stop_s)
        lanes_before = sum(len(simulator.lanes) for simulator in self._served[:-1])
        grid_s = np.linspace(0.0, self.end_s, TIMELINE_SAMPLES, endpoint=False)
        samples = set(grid_s[(grid_s >= start_s) & (grid_s < stop_s)].tolist())
        start: InstanceLedger | None = None
        asked = set(self._intervals_s(start_s, stop_s))
        for at_s in sorted(samples | asked | {start_s, from_s, stop_s}):
            self.simulator.run(at_s)
            if at_s in asked:
                self._ask(self._joint)
            if at_s == from_s:
                start = self.simulator.instances()
            if at_s in samples:
                self.timeline.add(self.simulator, lanes_before)
        assert start is not None
        if drained:
            self._drain()
        return Counted(from_s, self.simulator.now_s, self.simulator.instances().since(start))

    def _ask(self, joint: ClusterPolicy | None) -> None:
        """The decisions of a control interval."""
        if joint is None:
            self.simulator.ask_everyone()
        else:
            joint.decide(self.simulator)

    def _drain(self, limit_s: float = np.inf) -> None:
        """Serve what has arrived, until ``limit_s`` at most; who decides all clocks together goes on deciding."""
        if self._joint is not None:
            number = math.ceil(self.simulator.now_s / self._joint.interval_s)
            while self.simulator.counts()["in_flight"] > 0 and number * self._joint.interval_s < limit_s:
                self.simulator.run(number * self._joint.interval_s)
                self._joint.decide(self.simulator)
                number += 1
        self.simulator.run(limit_s)

    def _intervals_s(self, start_s: float, stop_s: float) -> list[float]:
        """Multiples of the control interval in [start_s, stop_s)."""
        if self._interval_s is None:
            return []
        numbers = range(math.ceil(start_s / self._interval_s) - 1, math.ceil(stop_s / self._interval_s) + 1)
        return [at_s for at_s in (number * self._interval_s for number in numbers) if start_s <= at_s < stop_s]

    def ledger(self) -> RequestLedger:
        """The requests' ledger over all windows."""
        return RequestLedger.joined(
            [simulator.requests() for simulator in self._served], [len(simulator.lanes) for simulator in self._served]
        )

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Every lane that ever was, in the order of the timeline's."""
        return tuple(lane for simulator in self._served for lane in simulator.lanes)

    def counts(self) -> dict[str, int]:
        """Requests that arrived, finished, were rejected, and are in flight."""
        each = [simulator.counts() for simulator in self._served]
        return {name: sum(counts[name] for counts in each) for name in each[0]}

    def action_digest(self) -> str:
        """Of every placement planned and every clock asked for, with their times."""
        parts = [f"{at_s!r} {placement!r}" for at_s, placement in self.placements]
        parts += [str(int(simulator.state.glob[0]["digest"])) for simulator in self._served]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def rollout_of(job: RunJob) -> Rollout:
    """A job ready to be run.

    Raises:
        ConfigError, TraceError, ControllerError, PlacementError, ClusterError, ProfileError: what is wrong with it.
    """
    scenario = load_scenario(job.scenario, job.overrides)
    nominal = scenario.cluster.profile()
    requests = requests_for(scenario, nominal, job.played_split, job.seed, job.trace, job.rate_rps)
    controller = make_controller(job.controller, job.controller_settings)
    if job.randomisation is None:
        return Rollout(controller, scenario, requests, job.seed, nominal)
    ranges = load_preset(RandomisationSettings, "randomisation", job.randomisation)
    hardware = np.random.default_rng(job.seed)
    profile = nominal.randomised(hardware, ranges)
    switching = randomised_switching(scenario.cluster.switching_settings(), hardware, ranges)
    return Rollout(controller, scenario, requests, job.seed, profile, believed=nominal, switching=switching)


def run(job: RunJob) -> RunOutcome:
    """Run a job from its names alone.

    Raises:
        ConfigError, TraceError, ControllerError, PlacementError, ClusterError, ProfileError, PolicyError: what is wrong
            with it.
    """
    rollout = rollout_of(job)
    counted = rollout.run()
    return outcome_of(rollout, counted, job, config_hash(rollout.scenario))


def outcome_of(rollout: Rollout, counted: Counted, job: RunJob, scenario_hash: str) -> RunOutcome:
    """A finished rollout as rows, arrays and provenance."""
    scenario = rollout.scenario
    requests = rollout.ledger()
    overhead_s = scenario.cluster.serving_overhead_ms * 1e-3
    measured = measure(requests, counted, scenario.slo, scenario.tpot_definition, overhead_s)
    row: dict[str, float | int | str] = {
        "scenario": job.scenario_name,
        "controller": job.controller_name,
        "seed": job.seed,
        "split": job.played_split,
        **measured.row,
        **{f"requests_{name}": count for name, count in rollout.counts().items()},
        "end_s": float(np.nanmax(requests.finish_s)) if requests.finished.any() else float("nan"),
        "slo_ttft_s": scenario.slo.ttft_s,
        "slo_tpot_s": scenario.slo.tpot_s,
    }
    evaluated = rollout.requests.evaluated
    provenance = {
        "scenario": scenario.model_dump(mode="json"),
        "config_hash": scenario_hash,
        "profile_hash": rollout.profile.hash,
        "believed_profile_hash": (rollout.predicted or rollout.profile).hash,
        "randomisation": job.randomisation,
        "switching": (rollout.switching or scenario.cluster.switching_settings()).model_dump(mode="json"),
        "trace_name": evaluated.name,
        "trace_hash": evaluated.hash,
        "training_hash": rollout.requests.training.hash,
        "placements": [[at_s, placement.describe()] for at_s, placement in rollout.placements],
        "notes": list(getattr(rollout.controller, "notes", ())),
    }
    return RunOutcome(
        row=row,
        action_digest=rollout.action_digest(),
        provenance=provenance,
        timeline=rollout.timeline.arrays(rollout.lanes),
        windows=_window_figures(rollout, requests, overhead_s),
        ttft_s=measured.ttft_s,
        tpot_s=measured.tpot_s,
    )


def _window_figures(rollout: Rollout, requests: RequestLedger, overhead_s: float) -> dict[str, npt.NDArray[Any]]:
    """Figures of each window by name, [W]; what arrives at a border belongs to the later window."""
    scenario, windows = rollout.scenario, rollout.windows
    rows: list[dict[str, float | int]] = []
    for number, counted in enumerate(windows):
        until_s = counted.end_s if number + 1 < len(windows) else np.inf
        own = requests.arrived(counted.start_s, until_s)
        measured = measure(own, counted, scenario.slo, scenario.tpot_definition, overhead_s)
        rows.append({"start_s": counted.start_s, "end_s": counted.end_s, **measured.row})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
