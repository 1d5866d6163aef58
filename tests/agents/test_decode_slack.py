"""Decisions of the compiled decode policies."""

from __future__ import annotations

import numpy as np
import pytest

from agents import decode_slack
from agents.decode_slack import slack_params
from agents.settings import DecodeSlackSettings
from biscale_gym.cluster import features
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.profiles.kernels import decode_cost, decode_latency, iteration_latency
from tests.agents.conftest import CLOCKS_MHZ

TOP = len(CLOCKS_MHZ) - 1
ALL = range(len(CLOCKS_MHZ))
SLO_S = 0.04


def params(**settings):
    return slack_params(DecodeSlackSettings(**settings), ALL, CLOCKS_MHZ)


def upward_scan(model, batch, kv_tokens, slo_s, headroom=0.95):
    for clock in ALL:
        if decode_latency(model, clock, batch, kv_tokens) <= headroom * slo_s:
            return clock
    return TOP


@pytest.mark.parametrize("monotone", [True, False])
def test_paper_is_the_upward_scan(observe, model, memory, monotone):
    """Over a wandering batch, with the memory of earlier answers in use."""
    rng = np.random.default_rng(4)
    settings = params(latency_falls_with_clock=monotone)
    answers = set()
    batch = 60.0
    for step in range(3000):
        batch = float(np.clip(batch + rng.integers(-40, 41), 1, 900))
        kv_tokens = batch * 400
        obs = observe(SLO_S=SLO_S, BATCH=batch, BATCH_KV_TOKENS=kv_tokens, KV_TOKENS=kv_tokens, ITERATION=step)
        answer = decode_slack.paper(obs, memory, settings, model)
        assert answer == upward_scan(model, batch, kv_tokens, SLO_S)
        answers.add(answer)
    assert len(answers) >= 4


def test_recomputed_tokens_are_in_the_prediction(observe, model, memory):
    obs = observe(SLO_S=0.2, BATCH=100, BATCH_KV_TOKENS=4e4, RECOMPUTE_TOKENS=3000, RECOMPUTE_SUM_SQ=9e6)
    expected = [iteration_latency(model, c, 100.0, 4e4, 3000.0, 9e6) <= 0.95 * 0.2 for c in ALL].index(True)
    answer = decode_slack.paper(obs, memory, params(), model)
    assert answer == expected > upward_scan(model, 100.0, 4e4, 0.2)


@pytest.mark.parametrize("variant", list(decode_slack.VARIANTS))
def test_kv_guard_has_hysteresis(observe, model, memory, variant):
    def ask(utilisation, iteration):
        obs = observe(
            SLO_S=1.0,
            BATCH=8,
            BATCH_KV_TOKENS=4000,
            KV_TOKENS=utilisation * 600_000,
            ITERATION=iteration,
            NOW_S=iteration,
        )
        return decode_slack.VARIANTS[variant](obs, memory, params(variant=variant), model)

    calm = ask(0.84, 100)
    assert calm < TOP
    assert ask(0.86, 200) == TOP
    assert ask(0.75, 300) == TOP
    assert ask(0.69, 400) == calm
    assert ask(0.80, 500) == calm


@pytest.mark.parametrize("variant", list(decode_slack.VARIANTS))
def test_misprediction_goes_to_the_top(observe, model, variant):
    def ask(**values):
        obs = observe(SLO_S=1.0, BATCH=8, BATCH_KV_TOKENS=4000, **values)
        return decode_slack.VARIANTS[variant](obs, np.zeros(MEMORY_SIZE), params(variant=variant), model)

    assert ask(LAST_OBSERVED_S=0.0104, LAST_PREDICTED_S=0.01) < TOP
    assert ask(LAST_OBSERVED_S=0.0106, LAST_PREDICTED_S=0.01) == TOP
    assert ask(REASON=features.OVERRUN) == TOP
    assert ask(REASON=features.IDLE) == CLOCKS_MHZ.index(885)


def test_nothing_feasible_is_the_top(observe, model, memory):
    obs = observe(SLO_S=0.001, BATCH=64, BATCH_KV_TOKENS=3e4)
    assert decode_slack.paper(obs, memory, params(), model) == TOP
    assert decode_slack.floored(obs, memory, params(variant="floored"), model) == TOP


def test_floored_stops_at_the_energy_optimum(observe, model):
    """With slack to spare it does not sink below the clock of least J/token; with little it is the plain rule."""
    settings = params(variant="floored")
    for batch in (1.0, 16.0, 128.0, 700.0):
        kv_tokens = 400 * batch
        costs = [decode_cost(model, c, batch, kv_tokens) for c in ALL]
        economical = int(np.argmin([t * p for t, p in costs]))
        for slo_s in (0.02, 0.05, 1.0):
            obs = observe(SLO_S=slo_s, BATCH=batch, BATCH_KV_TOKENS=kv_tokens)
            answer = decode_slack.floored(obs, np.zeros(MEMORY_SIZE), settings, model)
            assert answer == max(economical, upward_scan(model, batch, kv_tokens, slo_s))


def test_floored_limits_its_changes_but_not_its_jumps(observe, model, memory):
    settings = params(variant="floored", change_every_iterations=10, switch_time_s=0.01)
    target = TOP

    def ask(batch, iteration, now_s, **values):
        nonlocal target
        obs = observe(
            SLO_S=SLO_S,
            BATCH=batch,
            BATCH_KV_TOKENS=400 * batch,
            ITERATION=iteration,
            NOW_S=now_s,
            TARGET=target,
            **values,
        )
        target = decode_slack.floored(obs, memory, settings, model)
        return target

    quiet, busy = ask(8.0, 1, 1.0), max(b for b in range(1, 900) if upward_scan(model, b, 400.0 * b, SLO_S) < TOP)
    wanted = upward_scan(model, busy, 400.0 * busy, SLO_S)
    assert quiet < wanted < TOP
    assert ask(busy - 0.0, 2, 1.02) in (quiet, TOP)
    target = quiet
    memory[decode_slack.CHANGED_AT_S], memory[decode_slack.CHANGED_AT_ITERATION] = 1.0, 1
    assert ask(20.0, 10, 9.0) == quiet, "fewer than 10 iterations since the change"
    assert ask(20.0, 50, 1.09) == quiet, "less than 10 switching times since the change"
    assert ask(busy, 50, 9.0) == wanted, "both have passed"
    assert ask(busy, 51, 9.01, REASON=features.OVERRUN) == TOP, "a jump waits for nothing"
    assert ask(8.0, 52, 9.02) == TOP
    assert ask(8.0, 70, 9.2) == quiet


def test_credit_without_slack_is_the_upward_scan(observe, model):
    for batch in (10.0, 100.0, 300.0, 600.0, 900.0):
        obs = observe(SLO_S=SLO_S, BATCH=batch, BATCH_KV_TOKENS=400 * batch)
        answer = decode_slack.credit(obs, np.zeros(MEMORY_SIZE), params(variant="credit"), model)
        assert answer == upward_scan(model, batch, 400 * batch, SLO_S)


def test_credit_spreads_the_slack_over_forty_iterations(observe, model):
    """An iteration may last 0.95 SLO + slack / 40, at most 1.05 SLO; what a lagging batch lacks is taken off."""
    settings = params(variant="credit")
    answers = {}
    for slack_s in (-0.4, -0.2, 0.0, 0.08, 0.16, 5.0):
        for batch in range(20, 900, 20):
            obs = observe(SLO_S=SLO_S, BATCH=batch, BATCH_KV_TOKENS=400.0 * batch, SLACK_P25_S=slack_s)
            # Of the requests that joined last, and of the rest, nothing is asked.
            obs[features.SLACK_LEAST_S] = obs[features.SLACK_P1_S] = obs[features.SLACK_P5_S] = -9.0
            obs[features.SLACK_P50_S] = 9.0
            share = min(1.05, 0.95 + slack_s / 40 / SLO_S)
            expected = upward_scan(model, batch, 400.0 * batch, SLO_S, share)
            answers[slack_s, batch] = decode_slack.credit(obs, np.zeros(MEMORY_SIZE), settings, model)
            assert answers[slack_s, batch] == expected
    totals = [sum(clock for (at, _), clock in answers.items() if at == slack_s) for slack_s in (-0.4, 0.0, 5.0)]
    assert totals[0] > totals[1] > totals[2]


def test_slow_switching_spreads_the_slack_further(observe, model):
    """Ten switching times of 0.1 s are 25 iterations of 40 ms, so the slack has to last for a hundred."""
    settings = params(variant="credit", switch_time_s=0.1)
    for batch in range(20, 900, 20):
        obs = observe(SLO_S=SLO_S, BATCH=batch, BATCH_KV_TOKENS=400.0 * batch, SLACK_P25_S=0.2)
        expected = upward_scan(model, batch, 400.0 * batch, SLO_S, 0.95 + 0.2 / 100 / SLO_S)
        assert decode_slack.credit(obs, np.zeros(MEMORY_SIZE), settings, model) == expected


def needs(model, share):
    """A batch at which the clock above the lowest is just needed for that share of the SLO."""
    return min(b for b in range(1, 900) if decode_latency(model, 0, float(b), 400.0 * b) > share * SLO_S)


def test_credit_spends_nothing_where_memory_is_short(observe, model):
    batch = needs(model, 0.96)

    def ask(utilisation):
        obs = observe(SLO_S=SLO_S, BATCH=batch, BATCH_KV_TOKENS=400.0 * batch, SLACK_P25_S=5.0)
        obs[features.KV_TOKENS] = utilisation * obs[features.KV_CAPACITY_TOKENS]
        return decode_slack.credit(obs, np.zeros(MEMORY_SIZE), params(variant="credit"), model)

    assert ask(0.69) == 0
    assert ask(0.71) == upward_scan(model, batch, 400.0 * batch, SLO_S) > 0
    assert ask(0.86) == TOP


def test_credit_holds_its_clock_while_there_is_slack(observe, model, memory):
    settings = params(variant="credit")
    batch = needs(model, 1.2)

    def ask(iteration, slack_s, target, **values):
        obs = observe(
            SLO_S=SLO_S,
            BATCH=batch,
            BATCH_KV_TOKENS=400.0 * batch,
            ITERATION=iteration,
            NOW_S=iteration,
            TARGET=target,
            SLACK_P25_S=slack_s,
            **values,
        )
        return decode_slack.credit(obs, memory, settings, model)

    memory[decode_slack.CHANGED], memory[decode_slack.CHANGED_AT_S] = 1.0, 100.0
    memory[decode_slack.CHANGED_AT_ITERATION] = 100.0
    assert ask(105, 0.3 * SLO_S, 0) == 0, "1.2 SLO leaves a tenth of an SLO of slack"
    assert ask(105, 0.1 * SLO_S, 0) == TOP, "1.2 SLO would take more than there is"
    assert memory[decode_slack.CHANGED_AT_ITERATION] == 105
    assert ask(114, 0.3 * SLO_S, TOP) == TOP, "nine iterations since the jump"
    chosen = ask(115, 0.3 * SLO_S, TOP)
    assert 0 < chosen < TOP
    assert ask(116, 0.3 * SLO_S, chosen, REASON=features.OVERRUN) == TOP, "a jump waits for nothing"
