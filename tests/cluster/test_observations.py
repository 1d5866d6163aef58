"""What policies see: entries that a phase does not have are 0, queues count the same requests in both their entries."""

from __future__ import annotations

import numpy as np
import pytest
from random_clusters import new_engine, random_case
from small_clusters import SLO, cluster, decode, prefill, requests, simulator

from biscale_gym.cluster import features as f
from biscale_gym.cluster.simulator import Decision, PhasePolicy, Simulator

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
