"""Decision times: of what a run shows a policy, in its order, and of the calls alone."""

from __future__ import annotations

import time

import numpy as np
import pytest

from biscale_gym.cluster import features
from biscale_gym.control.rollout import RunJob, rollout_of
from biscale_gym.evaluation.latency import decision_times_s, shown_decisions

JOB = RunJob(
    scenario="smoke",
    controller="biscale",
    controller_settings={"tier1": {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}},
)


def test_decisions_are_those_of_a_run() -> None:
    rollout = rollout_of(JOB)
    policies = rollout.simulator.snapshot().policies
    shown = shown_decisions(rollout.simulator, policies, "prefill", 40, from_s=5.0)
    assert len(shown) == 40
    times_s = [one.obs[features.NOW_S] for one in shown]
    assert times_s == sorted(times_s)
    assert times_s[0] >= 5.0
    again = rollout_of(JOB).simulator
    at_the_start = int(again.state.glob[0]["digest"])
    again.run(rollout.simulator.now_s)
    # The clocks asked for so far are those of a run whose policies are not taken down.
    assert at_the_start != int(again.state.glob[0]["digest"]) == int(rollout.simulator.state.glob[0]["digest"])
    assert {int(one.obs[features.REASON]) for one in shown} <= {features.BOUNDARY, features.ARRIVAL}


def test_a_decision_takes_microseconds_and_no_more_than_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = rollout_of(JOB)
    policies = rollout.simulator.snapshot().policies
    shown = shown_decisions(rollout.simulator, policies, "decode", 20)
    start_s = time.perf_counter()
    times_s = decision_times_s(policies[1], shown)
    assert times_s.shape == (20,)
    assert 0.0 < np.median(times_s) < 1e-3
    assert times_s.sum() < time.perf_counter() - start_s


def test_a_held_clock_has_no_decisions() -> None:
    rollout = rollout_of(JOB)
    with pytest.raises(ValueError, match="prefill has no compiled policy"):
        shown_decisions(rollout.simulator, (None, None), "prefill", 5)
