"""Tier 1's forecast: each rule against histories made by hand, and what a run shows of its future."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from agents.biscale import BiScale
from agents.errors import AgentError
from agents.forecast import ewma_rps, forecast_load_rps, forecast_rps, peak_rps
from agents.settings import Tier1Settings
from baselines.place_only import PlaceOnly
from biscale_gym.cluster.placement import PHASES, InstanceSpec, Placement
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.rollout import Rollout, RunJob, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.workload import Requests, requests_for
from biscale_gym.traces import Trace

RULES = ("last-window", "peak", "ewma", "oracle")
# Of 20 s, the smoke scenario's window: 4 requests in the first half, 10 in the second, 8 of these in its first 5 s.
ARRIVALS_S = np.array([0.0, 1.0, 4.0, 9.9, 10.0, 10.5, 11.0, 11.5, 12.0, 12.5, 13.0, 14.9, 15.0, 19.9])


@pytest.fixture(scope="module")
def scenario():
    return load_scenario("smoke")


@pytest.fixture(scope="module")
def requests(scenario, profile):
    return requests_for(scenario, profile, "test", 0, None, None)


@pytest.fixture
def context(scenario, profile):
    return PlanContext(
        scenario,
        profile,
        Trace([0.0], [1], [1]),
        mean_rate_rps=2.0,
        history_rps=(1.0, 4.0, 0.7),
        last_arrivals_s=ARRIVALS_S,
        coming_rate_rps=9.0,
    )


@pytest.mark.parametrize(
    ("settings", "expected_rps"),
    [
        ({}, 0.7),
        ({"forecast": "peak", "peak_s": 5.0}, 8 / 5),
        ({"forecast": "peak", "peak_s": 10.0}, 10 / 10),
        ({"forecast": "peak", "peak_s": 60.0}, 14 / 20),
        ({"forecast": "ewma", "ewma_weight": 0.5}, ((2.0 + 1.0) / 2 + 4.0) / 4 + 0.7 / 2),
        ({"forecast": "ewma", "ewma_weight": 1.0}, 0.7),
        ({"forecast": "oracle"}, 9.0),
    ],
)
def test_rules_on_a_history(context, settings, expected_rps):
    assert forecast_rps(Tier1Settings(**settings), context) == pytest.approx(expected_rps, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "tokens", "expected_rps"),
    [
        # Prompts of 1,000 tokens in the training demand.
        ({"forecast": "ewma", "ewma_weight": 0.5}, (500.0, 2000.0, 1000.0), ((2.0 + 0.5) / 2 + 8.0) / 4 + 0.7 / 2),
        ({"forecast": "ewma", "ewma_weight": 0.5}, (math.nan, 2000.0, 1000.0), ((2.0 + 1.0) / 2 + 8.0) / 4 + 0.7 / 2),
        ({"forecast": "ewma", "ewma_weight": 0.5}, (), ((2.0 + 1.0) / 2 + 4.0) / 4 + 0.7 / 2),
        ({"forecast": "last-window"}, (500.0, 2000.0, 1500.0), 0.7 * 1.5),
        ({"forecast": "peak", "peak_s": 60.0}, (500.0, 2000.0, 1500.0), 14 / 20 * 1.5),
        ({"forecast": "oracle"}, (500.0, 2000.0, 1500.0), 9.0 * 1.5),
    ],
)
@pytest.mark.parametrize("phase", PHASES)
def test_longer_requests_are_more_load(context, settings, tokens, expected_rps, phase):
    lengths = {"prefill": (1_000, 10), "decode": (7, 1_000)}[phase]
    training = Trace([0.0, 1.0], [lengths[0]] * 2, [lengths[1]] * 2)
    longer = replace(context, training=training, history_tokens={phase: tokens})
    load_rps = forecast_load_rps(Tier1Settings(**settings), longer, phase)
    assert load_rps == pytest.approx(expected_rps, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_first_window_is_the_operators_estimate(scenario, profile, rule):
    first = PlanContext(scenario, profile, Trace([0.0], [1], [1]), mean_rate_rps=2.0)
    assert forecast_rps(Tier1Settings(forecast=rule), first) == 2.0
    for phase in PHASES:
        assert forecast_load_rps(Tier1Settings(forecast=rule), first, phase) == 2.0


def test_a_window_is_cut_into_equal_parts():
    # 20 s in parts of about 6 s are three of 6.67 s, with 3, 8 and 3 requests.
    assert peak_rps(ARRIVALS_S, 20.0, 6.0) == pytest.approx(8 / (20 / 3))
    assert peak_rps(np.array([19.999999, 20.0]), 20.0, 10.0) == pytest.approx(0.2)
    assert peak_rps(np.zeros(0), 20.0, 5.0) == 0.0


def test_a_smoothed_rate_starts_from_the_estimate():
    assert ewma_rps((), 6.0, 0.3) == 6.0
    assert ewma_rps((10.0,), 6.0, 0.25) == 7.0
    assert ewma_rps((5.0,) * 200, 6.0, 0.25) == pytest.approx(5.0)


def test_the_oracle_is_an_error_where_nothing_is_shown(scenario, profile):
    blind = PlanContext(scenario, profile, Trace([0.0], [1], [1]), 2.0, history_rps=(1.0,))
    with pytest.raises(AgentError, match="foresees"):
        forecast_rps(Tier1Settings(forecast="oracle"), blind)


class Watching:
    """A fixed placement; what it is told is kept."""

    name = "watching"
    replans = True

    def __init__(self) -> None:
        self.contexts: list[PlanContext] = []

    def plan(self, context: PlanContext) -> Placement:
        self.contexts.append(context)
        return Placement((InstanceSpec("prefill", 2, 1410), InstanceSpec("decode", 4, 1410)))

    def policies(self, context: PlanContext) -> tuple[None, None]:
        return None, None


@pytest.mark.parametrize("window_start", ["carried", "steady-state"])
def test_a_run_tells_how_long_requests_were(scenario, requests, window_start):
    controller = Watching()
    changed = scenario.model_copy(update={"window_start": window_start, "warmup_s": 1.0})
    rollout = Rollout(controller, changed, requests)
    rollout.run()
    trace, ledger = requests.evaluated, rollout.ledger()
    for number, context in enumerate(controller.contexts):
        assert {len(tokens) for tokens in context.history_tokens.values()} == {number}
        for past in range(number):
            arrived = (trace.arrival_s >= 20.0 * past) & (trace.arrival_s < 20.0 * (past + 1))
            finished = (ledger.finish_s >= 20.0 * past) & (ledger.finish_s < 20.0 * (past + 1))
            if window_start == "steady-state":
                finished &= ledger.arrival_s >= 20.0 * past
            assert context.history_tokens["prefill"][past] == pytest.approx(trace.prompt_tokens[arrived].mean())
            assert context.history_tokens["decode"][past] == pytest.approx(ledger.output_tokens[finished].mean())


class Foreseeing(Watching):
    """It asks for the rate to come."""

    foresees = True


def test_only_who_foresees_is_shown_what_comes(scenario, requests):
    arrival_s = requests.evaluated.arrival_s
    shown = {}
    for kind in (Watching, Foreseeing):
        controller = kind()
        # The last window is shorter than the others.
        cut = Requests(requests.evaluated, requests.training, requests.mean_rate_rps, end_s=52.0)
        Rollout(controller, scenario, cut).run()
        shown[kind] = [context.coming_rate_rps for context in controller.contexts]
        for number, context in enumerate(controller.contexts[1:]):
            inside = (arrival_s >= 20.0 * number) & (arrival_s < 20.0 * (number + 1))
            np.testing.assert_array_equal(context.last_arrivals_s, arrival_s[inside] - 20.0 * number)
            assert context.last_arrivals_s.base is None
            assert not context.last_arrivals_s.flags.writeable
            assert len(context.last_arrivals_s) / 20.0 == context.history_rps[-1]
        assert not len(controller.contexts[0].last_arrivals_s)
    assert shown[Watching] == [None, None, None]
    counts = np.histogram(arrival_s[arrival_s < 52.0], [0.0, 20.0, 40.0, 52.0])[0]
    assert shown[Foreseeing] == [None, counts[1] / 20.0, counts[2] / 12.0]


@pytest.mark.parametrize("rule", RULES)
def test_only_the_oracle_foresees_and_it_is_said(rule):
    for controller in (BiScale(tier1={"forecast": rule}), PlaceOnly(forecast=rule)):
        assert controller.foresees == (rule == "oracle")
        assert [note for note in controller.notes if "not realisable" in note] == controller.notes
        assert len(controller.notes) == (rule == "oracle")


def test_the_default_is_the_last_window():
    explicit = {"forecast": "last-window", "keep_within": 0.0}
    quick = {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}
    digests = [
        run(RunJob(scenario="smoke", controller="biscale", controller_settings={"tier1": quick | more})).action_digest
        for more in ({}, explicit)
    ]
    assert digests[0] == digests[1]
