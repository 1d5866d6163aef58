"""What policies see: entries that a phase does not have are 0, queues count the same requests in both their entries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from random_clusters import decode_decisions, new_engine, random_case, run_engine, run_reference
from small_clusters import SLO, cluster, decode, prefill, requests, simulator

from biscale_gym.cluster import features as f
from biscale_gym.cluster.simulator import Decision, PhasePolicy, Simulator

SLACKS = slice(f.SLACK_LEAST_S, f.SLACK_P50_S + 1)
BATCHES_END = f.BATCH_FIRST + f.BATCH_STRIDE * f.HORIZON


def decisions(engine: Simulator) -> list[Decision]:
    """Every decision of a run, each answered with the clock last asked for."""
    asked = PhasePolicy(on_arrival=True, on_overrun=True, on_idle=True)
    engine.set_policies(asked, asked)
    seen = []
    decision = engine.run()
    while decision is not None:
        seen.append(decision)
        decision = engine.run(answer=int(decision.obs[f.TARGET]))
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_nothing_of_other_decisions_is_left(seed: int) -> None:
    seen = decisions(new_engine(random_case(seed)))
    assert {decision.phase for decision in seen} == {"prefill", "decode"}
    for decision in seen:
        obs = decision.obs
        if decision.phase == "decode":
            assert not obs[f.ITERATION + 1 : f.ROUTED].any()
        else:
            there = int(obs[f.BATCHES])
            assert (there == 0) == (decision.reason == f.IDLE)
            tokens = obs[f.BATCH_FIRST + f.BATCH_TOKENS : BATCHES_END : f.BATCH_STRIDE]
            assert (tokens[:there] > 0).all()
            assert not obs[f.BATCH_FIRST + f.BATCH_STRIDE * there : f.ROUTED].any()
        assert obs[f.ROUTED] >= obs[f.COMPLETED] >= obs[f.LATE] >= 0


@pytest.mark.parametrize("seed", range(12))
def test_a_queue_without_requests_has_no_tokens(seed: int) -> None:
    for decision in decisions(new_engine(random_case(seed))):
        assert (decision.obs[f.QUEUE_REQUESTS] == 0) == (decision.obs[f.QUEUE_TOKENS] == 0)


def test_prefill_is_told_what_serving_overhead_leaves_of_the_slo() -> None:
    settings = cluster(serving_overhead_ms=40.0)
    seen = decisions(simulator([prefill(), decode()], requests(np.arange(3.0)), settings))
    told = {decision.phase: decision.obs[f.SLO_S] for decision in seen}
    assert told == pytest.approx({"prefill": SLO.ttft_s - 0.04, "decode": SLO.tpot_s})


def ranked(slacks_s: list[float]) -> list[float]:
    """The five entries of a batch, from its requests' slacks."""
    ordered = sorted(slacks_s)
    return [ordered[percent * (len(ordered) - 1) // 100] if ordered else 0.0 for percent in (0, 1, 5, 25, 50)]


@pytest.mark.parametrize("only", [None, "decode"])
def test_accumulated_slack_is_the_plain_simulators(only) -> None:
    largest, preempted, negative, positive = 0, 0, 0, 0
    for seed in range(40):
        case = dataclasses.replace(random_case(seed, only=only), policies=True)
        told: list[dict] = []
        engine, seen = decode_decisions(case)
        reference = run_reference(case, engine, told)
        preempted += sum(request.preemptions for request in reference.requests)
        for number in {decision.instance for decision in seen}:
            ours = [decision.obs for decision in seen if decision.instance == number]
            theirs = [decision["slacks_s"] for decision in told if decision["instance"] == number]
            assert len(ours) == len(theirs)
            np.testing.assert_allclose(
                [obs[SLACKS] for obs in ours], [ranked(slacks_s) for slacks_s in theirs], rtol=1e-9, atol=1e-9
            )
            largest = max(largest, *map(len, theirs))
            negative += sum(obs[f.SLACK_LEAST_S] < 0 for obs in ours)
            positive += sum(obs[f.SLACK_LEAST_S] > 0 for obs in ours)
    assert largest > 10
    assert preempted > 10
    assert negative > 100
    assert positive > 100


def test_looking_at_slack_changes_nothing() -> None:
    for seed in range(5):
        case = dataclasses.replace(random_case(seed), policies=True)
        plain, (stepwise, _) = run_engine(case), decode_decisions(case)
        assert plain.state.glob[0]["digest"] == stepwise.state.glob[0]["digest"]
        assert plain.requests().finish_s.tobytes() == stepwise.requests().finish_s.tobytes()


@pytest.mark.parametrize("iterations", ["output-minus-one", "output-length"])
def test_slack_of_one_request_is_what_its_tpot_leaves(iterations: str) -> None:
    output = 6
    run = simulator(
        [prefill(), decode()], requests([0.0], 100, output), cluster(batching={"decode_iterations": iterations})
    )
    run.set_policies(None, PhasePolicy(slack=True))
    seen = []
    decision = run.run()
    while decision is not None:
        seen.append(decision.obs)
        decision = run.run(answer=int(decision.obs[f.TARGET]))
    assert len(seen) == output - (iterations == "output-minus-one")
    assert all(len(set(obs[SLACKS])) == 1 for obs in seen)
    ledger = run.requests()
    last_s = float(ledger.finish_s[0] - seen[-1][f.NOW_S])
    tpot_s = float(ledger.finish_s[0] - ledger.first_token_s[0]) / (output - 1)
    at_end_s = seen[-1][f.SLACK_LEAST_S] + SLO.tpot_s - last_s
    assert at_end_s == pytest.approx((SLO.tpot_s - tpot_s) * (output - 1), rel=1e-9)
    # Transfer and clocks are instant here: the request decodes from its first token on.
    lost_s = SLO.tpot_s if iterations == "output-length" else 0.0
    assert seen[0][f.SLACK_LEAST_S] == pytest.approx(-lost_s, abs=1e-12)


def test_slack_is_zero_where_it_is_not_asked_for() -> None:
    run = simulator([prefill(), decode()], requests(np.arange(9.0) / 9, 100, 40), cluster())
    for slack in (True, False):
        run.set_policies(None, PhasePolicy(slack=slack))
        seen = []
        decision = run.run()
        for _ in range(10):
            assert decision is not None
            seen.append(decision.obs[SLACKS].any())
            decision = run.run(answer=int(decision.obs[f.TARGET]))
        assert any(seen) == slack
