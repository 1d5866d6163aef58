"""Decisions of the compiled prefill policies."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from numba import njit, types

from agents import prefill_mpc
from agents.prefill_mpc import mpc_params
from agents.settings import PrefillMPCSettings
from biscale_gym.cluster import features
from biscale_gym.cluster.policy import MEMORY_SIZE, POLICY_TYPE
from biscale_gym.profiles.kernels import idle_power_w, iteration_cost
from tests.agents.conftest import CLOCKS_MHZ

TOP = len(CLOCKS_MHZ) - 1
ALL = range(len(CLOCKS_MHZ))
SLO_S = 0.6


def params(**settings):
    return mpc_params(PrefillMPCSettings(**settings), ALL, CLOCKS_MHZ)


def batch(tokens, oldest_s, prompts=1):
    return (tokens, tokens**2 / prompts, oldest_s)


def naive_first_clock(obs, model, idle_w, headroom=0.95):
    """First clock of the best assignment, by enumeration straight from the definition; None if nothing fits."""
    h = int(obs[features.BATCHES])
    rows = obs[features.BATCH_FIRST : features.BATCH_FIRST + 3 * h].reshape(h, 3)
    best, best_value = None, np.inf
    for choice in itertools.product(ALL, repeat=h):
        end, value = obs[features.NOW_S], 0.0
        for j, clock in enumerate(choice):
            duration_s, power_w = iteration_cost(model, clock, 0.0, 0.0, rows[j, 0], rows[j, 1])
            duration_s *= obs[features.WORK_LEFT] if j == 0 else 1.0
            end += duration_s
            value += duration_s * (power_w - idle_w)
            if end - rows[j, 2] > headroom * SLO_S:
                break
        else:
            if value < best_value:
                best, best_value = choice, value
    return best


def queue(rng, observe, reason=features.BOUNDARY):
    now_s = 100.0
    arrivals = np.sort(rng.uniform(now_s - 0.5, now_s, int(rng.integers(1, 4))))
    batches = [batch(int(rng.integers(50, 6000)), a, int(rng.integers(1, 5))) for a in arrivals]
    left = 1.0 if reason == features.BOUNDARY else float(rng.uniform(0.05, 0.95))
    return observe(batches, NOW_S=now_s, SLO_S=SLO_S, REASON=reason, WORK_LEFT=left, CLOCK=1, TARGET=1)


@pytest.mark.parametrize("reason", [features.BOUNDARY, features.ARRIVAL])
def test_exact_policy_agrees_with_enumeration(observe, model, reason):
    rng = np.random.default_rng(reason)
    settings = params(search="exact")
    idle_w = idle_power_w(model, CLOCKS_MHZ.index(885))
    feasible = 0
    for _ in range(60):
        obs = queue(rng, observe, reason)
        answer = prefill_mpc.exact(obs, np.zeros(MEMORY_SIZE), settings, model)
        best = naive_first_clock(obs, model, idle_w)
        if best is None:
            assert answer == TOP
            continue
        feasible += 1
        assert answer == best[0]
    assert feasible > 20


@pytest.mark.parametrize("form", list(prefill_mpc.FORMS))
def test_first_clock_leaves_every_deadline_reachable(observe, model, form):
    rng = np.random.default_rng(8)
    for _ in range(100):
        obs = queue(rng, observe)
        if naive_first_clock(obs, model, 0.0) is None:
            continue
        first = prefill_mpc.FORMS[form](obs, np.zeros(MEMORY_SIZE), params(search=form), model)
        rows = obs[features.BATCH_FIRST :].reshape(-1)[: 3 * int(obs[features.BATCHES])].reshape(-1, 3)
        end = obs[features.NOW_S]
        for j, (tokens, sum_sq, oldest_s) in enumerate(rows):
            end += iteration_cost(model, first if j == 0 else TOP, 0.0, 0.0, tokens, sum_sq)[0]
            assert end - oldest_s <= 0.95 * SLO_S + 1e-9


def test_loose_deadlines_take_the_energy_optimum_and_tight_ones_the_top(observe, model, memory):
    loose = observe([batch(2000, 10.0)], NOW_S=10.0, SLO_S=60.0)
    idle_w = idle_power_w(model, CLOCKS_MHZ.index(885))
    costs = [iteration_cost(model, c, 0.0, 0.0, 2000.0, 4e6) for c in ALL]
    expected = int(np.argmin([t * (p - idle_w) for t, p in costs]))
    assert prefill_mpc.greedy(loose, memory, params(), model) == expected
    late = observe([batch(2000, 9.0)], NOW_S=10.0, SLO_S=SLO_S)
    assert prefill_mpc.greedy(late, memory, params(), model) == TOP


def test_guard_holds_the_top_clock_until_the_next_boundary(observe, model, memory):
    def ask(reason, observed_s=0.1, predicted_s=0.1):
        obs = observe(
            [batch(500, 10.0)],
            NOW_S=10.0,
            SLO_S=SLO_S,
            REASON=reason,
            LAST_OBSERVED_S=observed_s,
            LAST_PREDICTED_S=predicted_s,
        )
        return prefill_mpc.greedy(obs, memory, params(), model)

    calm = ask(features.BOUNDARY)
    assert calm < TOP
    assert ask(features.BOUNDARY, observed_s=0.1049) == calm
    assert ask(features.BOUNDARY, observed_s=0.1051) == TOP
    assert ask(features.ARRIVAL) == TOP
    assert ask(features.BOUNDARY) == calm
    assert ask(features.ARRIVAL) == calm
    assert ask(features.OVERRUN) == TOP
    assert ask(features.ARRIVAL) == TOP
    assert ask(features.BOUNDARY) == calm


def test_idle_clock_is_the_nearest_of_the_run(observe, model, memory):
    obs = observe(REASON=features.IDLE, TARGET=6)
    assert prefill_mpc.greedy(obs, memory, params(), model) == CLOCKS_MHZ.index(885)
    assert prefill_mpc.greedy(obs, memory, params(idle_clock_mhz=700), model) == 0


def test_switching_time_makes_a_late_switch_unattractive(observe, model, memory):
    """With the clock low and a deadline that only an immediate switch meets, planning for the delay goes higher."""
    tokens = 3000
    low_s = iteration_cost(model, 0, 0.0, 0.0, float(tokens), float(tokens) ** 2)[0]
    slo_s = 0.9 * low_s / 0.95
    obs = observe([batch(tokens, 10.0)], NOW_S=10.0, SLO_S=slo_s, CLOCK=0, TARGET=0)
    at_once = prefill_mpc.exact(obs, memory, params(search="exact"), model)
    delayed = prefill_mpc.exact(obs, memory, params(search="exact", switch_time_s=0.5 * low_s), model)
    assert 0 < at_once < delayed


def test_grid_restricts_the_answer(observe, model, memory):
    settings = mpc_params(PrefillMPCSettings(), [0, 5], CLOCKS_MHZ)
    loose = observe([batch(2000, 10.0)], NOW_S=10.0, SLO_S=60.0)
    assert prefill_mpc.greedy(loose, memory, settings, model) in (0, 5)
    late = observe([batch(2000, 9.0)], NOW_S=10.0, SLO_S=SLO_S)
    assert prefill_mpc.greedy(late, memory, settings, model) == 5


@njit(types.int64(POLICY_TYPE, *(types.float64[::1],) * 4, types.int64), cache=False)
def _repeat(policy, obs, memory, settings, model, times):
    total = 0
    for _ in range(times):
        total += policy(obs, memory, settings, model)
    return total


@pytest.mark.parametrize("form", list(prefill_mpc.FORMS))
def test_decision_time(observe, model, memory, form):
    """Median over random full-horizon queues, with room for a busy machine above the stated 0.2 ms."""
    rng = np.random.default_rng(2)
    took = []
    for _ in range(30):
        batches = [batch(int(rng.integers(200, 8192)), 100.0 - 0.02 * j, 8) for j in range(8)]
        obs = observe(batches, NOW_S=100.0, SLO_S=float(rng.uniform(0.5, 6.0)))
        start = time.perf_counter()
        _repeat(prefill_mpc.FORMS[form], obs, memory, params(search=form), model, 20)
        took.append((time.perf_counter() - start) / 20)
    print(form, np.median(took), np.max(took))
    assert np.median(took) < 1e-3
