"""The reference simulator against cases small enough for pencil and paper, closed forms, and published figures."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from reference_simulator import (
    Batching,
    Border,
    CostFunction,
    Decision,
    InstanceSpec,
    NewInstance,
    Policy,
    RequestSpec,
    Result,
    Routing,
    Scenario,
    Switching,
    Transfer,
    simulate,
)

# Everything is a dyadic fraction, so hand-computed times are met exactly. Clock 1 is twice as fast as clock 0.
SPEED = (0.5, 1.0)
BUSY_W = (100.0, 300.0)
IDLE_W = (20.0, 50.0)


def toy_cost(tp: int, clock: int, b: int, kv: int, m: int, s2: int) -> tuple[float, float]:
    """1/16 s per prefill token, 1 s per decode iteration, at clock 1."""
    work_s = m / 16 + (1.0 if b else 0.0)
    return work_s / SPEED[clock], BUSY_W[clock]


def toy_idle(tp: int, clock: int) -> float:
    return IDLE_W[clock]


def prefill(capacity: int = 1000, tp: int = 1, clock: int = 1, node: int = 0, weight: float = 1.0) -> InstanceSpec:
    return InstanceSpec("prefill", tp, clock, capacity, weight, node)


def decode(capacity: int = 1000, tp: int = 1, clock: int = 1, node: int = 0, weight: float = 1.0) -> InstanceSpec:
    return InstanceSpec("decode", tp, clock, capacity, weight, node)


def toy(*requests: tuple[float, int, int], instances: tuple[InstanceSpec, ...] = ()) -> Scenario:
    return Scenario(
        requests=tuple(RequestSpec(*request) for request in requests),
        instances=instances or (prefill(), decode()),
        cost=toy_cost,
        idle_power=toy_idle,
        clocks=2,
    )


def recorded(cost: CostFunction) -> tuple[CostFunction, list[tuple[int, ...]]]:
    """The cost, and a list that gets the (b, K, m, S2) of every call."""
    calls: list[tuple[int, ...]] = []

    def record(tp: int, clock: int, b: int, kv: int, m: int, s2: int) -> tuple[float, float]:
        calls.append((b, kv, m, s2))
        return cost(tp, clock, b, kv, m, s2)

    return record, calls


def times_of(result: Result, kind: str) -> list[float]:
    return [time_s for time_s, event, _, _ in result.events if event == kind]


def constant(clock: int) -> Callable[[Decision], int]:
    return lambda decision: clock


# Batches.


def test_two_requests_event_by_event() -> None:
    result = simulate(toy((0.0, 8, 3), (0.0, 4, 1)))
    assert result.events == [
        (0.0, "arrive", 0, 0),
        (0.0, "arrive", 0, 1),
        (0.0, "prefill-start", 0, 2),
        (0.75, "prefill-end", 0, 2),
        (0.75, "finish", 0, 1),
        (0.75, "claim", 1, 0),
        (0.75, "deliver", 1, 0),
        (0.75, "join", 1, 0),
        (0.75, "decode-start", 1, 1),
        (1.75, "decode-end", 1, 1),
        (1.75, "decode-start", 1, 1),
        (2.75, "decode-end", 1, 1),
        (2.75, "finish", 1, 0),
    ]
    first = result.requests[0]
    assert (first.prefill_start_s, first.first_token_s, first.delivered_s) == (0.0, 0.75, 0.75)
    assert (first.decode_start_s, first.finish_s, first.status) == (0.75, 2.75, "finished")
    assert result.end_s == 2.75
    assert result.instances[0].joules == {"busy": 225.0, "idle": 100.0, "switching": 0.0, "loading": 0.0}
    assert result.instances[1].joules == {"busy": 600.0, "idle": 37.5, "switching": 0.0, "loading": 0.0}
    assert result.unallocated_joules == 6 * IDLE_W[0] * 2.75
    assert (result.instances[0].prompt_tokens, result.instances[0].output_tokens) == (12, 2)
    assert (result.instances[1].iterations, result.instances[1].output_tokens) == (2, 2)


def test_the_budget_bounds_a_batch_and_a_longer_prompt_goes_alone() -> None:
    cost, calls = recorded(toy_cost)
    scenario = toy((0.0, 4, 1), (0.0, 12, 1), (0.0, 3, 1), (0.0, 5, 1), (0.0, 1, 1))
    simulate(replace(scenario, cost=cost, batching=Batching(prefill_token_budget=8)))
    assert calls == [(0, 0, 4, 16), (0, 0, 12, 144), (0, 0, 8, 34), (0, 0, 1, 1)]


def test_chunks_fill_the_budget_and_go_on_ahead_of_the_queue() -> None:
    cost, calls = recorded(toy_cost)
    scenario = toy((0.0, 6, 1), (0.0, 11, 1), (0.0, 2, 1))
    result = simulate(replace(scenario, cost=cost, batching=Batching(prefill_token_budget=8, chunked_prefill=True)))
    assert calls == [(0, 0, 8, 36 + 4), (0, 0, 8, 100 - 4), (0, 0, 3, 121 - 100 + 4)]
    assert [request.first_token_s for request in result.requests] == [0.5, 1.1875, 1.1875]
    assert [request.prefill_start_s for request in result.requests] == [0.0, 0.0, 1.0]


def test_prefill_holds_no_more_than_its_capacity() -> None:
    result = simulate(toy((0.0, 8, 1), (0.0, 8, 1), (0.0, 8, 1), instances=(prefill(capacity=20), decode())))
    assert [request.first_token_s for request in result.requests] == [1.0, 1.0, 1.5]


def test_full_decode_memory_holds_kv_on_the_prefill_side() -> None:
    scenario = toy((0.0, 8, 2), (0.0, 8, 3), (0.0, 8, 2), instances=(prefill(capacity=16), decode(capacity=12)))
    result = simulate(scenario)
    # Request 1 waits for the memory of 0, and request 2 for the prefill memory of 0, which its claim gave back at 1.0.
    assert [request.first_token_s for request in result.requests] == [1.0, 1.0, 1.5]
    assert [request.delivered_s for request in result.requests] == [1.0, 2.0, 4.0]
    assert [request.finish_s for request in result.requests] == [2.0, 4.0, 5.0]


def test_full_admission_claims_the_output_beforehand() -> None:
    scenario = toy((0.0, 4, 4), (0.0, 4, 4), instances=(prefill(), decode(capacity=12)))
    current = simulate(scenario)
    full = simulate(replace(scenario, batching=Batching(decode_admission="full")))
    assert current.requests[1].delivered_s == 0.5
    assert full.requests[1].delivered_s == full.requests[0].finish_s == 3.5


def test_sequences_are_limited() -> None:
    result = simulate(replace(toy((0.0, 8, 2), (0.0, 8, 2)), batching=Batching(max_decode_sequences=1)))
    assert [request.delivered_s for request in result.requests] == [1.0, 2.0]


def test_output_length_runs_one_iteration_more() -> None:
    batching = Batching(decode_iterations="output-length")
    assert simulate(replace(toy((0.0, 16, 3)), batching=batching)).requests[0].finish_s == 4.0


def test_preemption_and_recompute() -> None:
    cost, calls = recorded(toy_cost)
    scenario = toy((0.0, 4, 4), (0.0, 4, 4), instances=(prefill(), decode(capacity=10)))
    result = simulate(replace(scenario, cost=cost))
    assert calls[1:] == [
        (2, 8, 0, 0),  # both: 8 tokens, 10 after it
        (1, 5, 0, 0),  # no room for two more: request 1 leaves
        (1, 6, 0, 0),  # 6 + 5 do not fit
        (0, 0, 5, 25),  # request 0 is gone, request 1 recomputes prompt + 1 and gets a token
        (1, 6, 0, 0),
    ]
    assert [request.preemptions for request in result.requests] == [0, 1]
    assert [request.finish_s for request in result.requests] == [3.5, 3.5 + 5 / 16 + 1.0]
    assert times_of(result, "preempt") == [1.5]
    assert result.instances[1].kv_used == 0


def test_a_preempted_request_waits_ahead_of_the_others() -> None:
    scenario = toy((0.0, 4, 4), (0.0, 4, 4), (0.0, 4, 2), instances=(prefill(), decode(capacity=10)))
    result = simulate(scenario)
    # At 2.75, request 2 would fit and request 1 would not. At 3.75 both could join, but there is room for only one
    # to grow; request 2 rejoins when request 1 is finished.
    assert times_of(result, "preempt") == [1.75, 3.75]
    assert result.requests[2].delivered_s == 3.75
    assert [request.preemptions for request in result.requests] == [0, 1, 1]


def test_without_preemption_the_batch_outgrows_its_memory() -> None:
    scenario = toy((0.0, 4, 4), (0.0, 4, 4), instances=(prefill(), decode(capacity=10)))
    result = simulate(replace(scenario, batching=Batching(preemption="none")))
    assert [request.finish_s for request in result.requests] == [3.5, 3.5]


def test_requests_that_fit_nowhere_are_rejected() -> None:
    scenario = toy((0.0, 21, 1), (0.0, 20, 1), (0.0, 8, 5), instances=(prefill(capacity=20), decode(capacity=12)))
    result = simulate(scenario)
    assert [request.status for request in result.requests] == ["rejected", "finished", "rejected"]


def test_arrivals_at_decode() -> None:
    scenario = replace(toy((0.5, 8, 3), (0.5, 4, 1)), arrival_phase="decode", transfer=Transfer(latency_s=9.0))
    result = simulate(scenario)
    assert [request.first_token_s for request in result.requests] == [0.5, 0.5]
    assert [request.finish_s for request in result.requests] == [2.5, 0.5]
    assert result.instances[0].iterations == 0


# Transfer.


def test_transfers_share_links_and_pay_the_latency_each() -> None:
    transfer = Transfer(0.25, within_node_bytes_per_s=16.0, between_nodes_bytes_per_s=4.0, bytes_per_token=1.0)
    instances = (prefill(tp=2), decode(tp=2), decode(tp=1, node=1))
    scenario = toy(*[(0.0, 8, 2)] * 3, instances=instances)
    result = simulate(replace(scenario, transfer=transfer, nodes=2, gpus_per_node=4))
    # Egress: 8 B at 32 B/s to instance 1, 8 B at 4 B/s to instance 2, 8 B at 32 B/s to instance 1. But instance 1
    # is woken first and claims both of its own before instance 2 claims.
    assert [request.decode_instance for request in result.requests] == [1, 2, 1]
    assert [request.delivered_s for request in result.requests] == [2.0, 4.25, 2.25]
    assert [request.decode_start_s for request in result.requests] == [2.0, 4.25, 3.0]


def test_two_senders_share_the_link_of_their_receiver() -> None:
    transfer = Transfer(0.25, between_nodes_bytes_per_s=8.0, bytes_per_token=1.0)
    scenario = toy((0.0, 8, 2), (0.0, 8, 2), instances=(prefill(), prefill(), decode(node=1)))
    result = simulate(replace(scenario, transfer=transfer, nodes=2, gpus_per_node=4))
    assert [request.delivered_s for request in result.requests] == [1.75, 2.75]


# Routers.


def test_weighted_round_robin_is_stride_scheduling() -> None:
    scenario = toy(*[(0.0, 1, 1)] * 7, instances=(prefill(weight=2.0), prefill(weight=1.0), decode()))
    # Passes: 0 0 | .5 0 | .5 1 | 1 1 | 1.5 1 | 1.5 2 | 2 2 | 2.5 2
    assert [request.prefill_instance for request in simulate(scenario).requests] == [0, 1, 0, 0, 1, 0, 0]


def test_least_loaded_counts_running_requests_and_shortest_queue_does_not() -> None:
    scenario = toy((0.0, 16, 1), (0.5, 16, 1), (0.75, 16, 1), instances=(prefill(), prefill(), decode()))
    least = simulate(replace(scenario, routing=Routing(prefill="least-loaded")))
    shortest = simulate(replace(scenario, routing=Routing(prefill="shortest-queue")))
    assert [request.prefill_instance for request in least.requests] == [0, 1, 0]
    assert [request.prefill_instance for request in shortest.requests] == [0, 0, 1]


def test_the_decode_load_is_a_setting() -> None:
    scenario = toy((0.0, 16, 3), (0.5, 16, 3), instances=(prefill(), decode(), decode()))
    by_requests = simulate(replace(scenario, routing=Routing(decode="least-loaded", decode_load="requests")))
    by_waiting = simulate(replace(scenario, routing=Routing(decode="least-loaded", decode_load="waiting")))
    assert [request.decode_instance for request in by_requests.requests] == [1, 2]
    assert [request.decode_instance for request in by_waiting.requests] == [1, 1]


def test_power_of_two_takes_the_better_candidate() -> None:
    pairs = iter([(2, 1), (2, 1), (0, 2)])
    routing = Routing(prefill="power-of-two", two_candidates=lambda count: next(pairs))
    scenario = toy(*[(0.0, 16, 1)] * 3, instances=(prefill(), prefill(), prefill(), decode()))
    result = simulate(replace(scenario, routing=routing))
    assert [request.prefill_instance for request in result.requests] == [2, 1, 0]


# Clocks.


def switched(scenario: Scenario, policy: Policy, durations_s: list[float], settle_s: float = 0.0) -> Result:
    durations: Iterator[float] = iter(durations_s)
    return simulate(
        replace(scenario, prefill_policy=policy, switching=Switching(lambda: next(durations), settle_s), until_s=8.0)
    )


def test_a_lower_clock_lands_mid_iteration() -> None:
    result = switched(toy((0.0, 16, 1)), Policy(constant(0)), [0.25])
    assert times_of(result, "clock") == [0.25]
    assert result.requests[0].finish_s == 0.25 + 0.75 * 2
    ledger = result.instances[0]
    assert ledger.joules["switching"] == 0.25 * 300
    assert ledger.joules["busy"] == 1.5 * 100
    assert ledger.joules["idle"] == (8.0 - 1.75) * 20
    assert (ledger.seconds["switching"], ledger.seconds["busy"], ledger.clock_changes) == (0.25, 1.5, 1)


def test_calls_of_no_duration_land_before_the_batch() -> None:
    result = switched(toy((0.0, 16, 1)), Policy(constant(0)), [0.0])
    assert result.requests[0].finish_s == 2.0
    assert [kind for _, kind, _, _ in result.events[:4]] == ["arrive", "ask", "clock", "prefill-start"]


@pytest.mark.parametrize(("start", "lands_s"), [(0, 0.25 + 0.5 + 0.125), (1, 0.25 + 0.125)])
def test_a_group_runs_at_its_slowest_rank_and_settles(start: int, lands_s: float) -> None:
    scenario = toy((0.0, 64, 1), instances=(prefill(tp=2, clock=start), decode()))
    result = switched(scenario, Policy(constant(1 - start)), [0.25, 0.5], settle_s=0.125)
    assert times_of(result, "clock") == [lands_s]
    assert result.instances[0].seconds["switching"] == 0.875


def test_a_node_serves_one_instance_at_a_time() -> None:
    scenario = toy((0.0, 32, 1), (0.0, 32, 1), instances=(prefill(), prefill(), decode()))
    result = switched(scenario, Policy(constant(0)), [0.25, 0.5])
    assert [event[:3] for event in result.events if event[1] == "clock"] == [(0.25, "clock", 0), (0.75, "clock", 1)]
    apart = replace(scenario, instances=(prefill(), prefill(node=1), decode()), nodes=2, gpus_per_node=4)
    assert times_of(switched(apart, Policy(constant(0)), [0.25, 0.5]), "clock") == [0.25, 0.5]


def test_a_newer_answer_replaces_or_drops_one_that_has_not_begun() -> None:
    def answer(decision: Decision) -> int:
        if decision["instance"] == 0 or decision["reason"] == "boundary":
            return 0
        return 1

    scenario = toy((0.0, 64, 1), (0.0, 64, 1), (0.5, 1, 1), (0.5, 1, 1), instances=(prefill(), prefill(), decode()))
    result = switched(scenario, Policy(answer, on_arrival=True), [2.0] * 3)
    # Instance 1 asked for 0 behind instance 0's call, and took it back when a prompt arrived at 0.5; at its next batch,
    # at 4.0, it asks again.
    assert [event for event in result.events if event[1] == "clock"] == [(2.0, "clock", 0, 0), (6.0, "clock", 1, 0)]


def test_decision_points() -> None:
    asked: list[tuple[float, str, int, int]] = []

    def answer(decision: Decision) -> int:
        asked.append((decision["now"], decision["reason"], decision["m"], decision["queue"]))
        return 1

    policy = Policy(answer, True, True, overrun_margin=0.5, predict=lambda *load: (0.5, 0.0))
    simulate(replace(toy((0.0, 16, 1), (0.25, 4, 1), (0.25, 4, 1)), prefill_policy=policy))
    assert asked == [
        (0.0, "boundary", 16, 0),
        (0.25, "arrival", 16, 2),
        (0.75, "overrun", 16, 2),
        (1.0, "boundary", 8, 0),
        (1.5, "idle", 0, 0),
    ]


def test_a_policy_must_name_a_clock() -> None:
    with pytest.raises(ValueError, match="clock 2 of 2"):
        simulate(replace(toy((0.0, 16, 1)), prefill_policy=Policy(constant(2))))


# Re-placement.


def test_drained_decode_hands_over_its_gpus() -> None:
    instances = (prefill(), decode(capacity=20))
    border = Border(1.5, frozenset({1}), (NewInstance(decode(capacity=20), load_s=2.0, start_power_w=10.0),))
    scenario = toy((0.0, 16, 3), (0.25, 8, 2), instances=instances)
    scenario = replace(scenario, gpus_per_node=2, gpus=2, borders=(border,))
    drained = simulate(scenario)
    # Request 0 runs until 3.0 where it is; request 1 has its first token at 1.5 and nowhere to go before 5.0.
    assert [request.finish_s for request in drained.requests] == [3.0, 6.0]
    assert (drained.instances[1].gone_s, drained.instances[2].active_from_s) == (3.0, 5.0)
    assert drained.instances[2].joules["loading"] == 2.0 * (50 + 10)
    instant = simulate(replace(scenario, replacement="instant"))
    assert [request.finish_s for request in instant.requests] == [3.0, 2.5]


def test_drained_prefill_returns_what_it_has_not_begun() -> None:
    border = Border(0.25, frozenset({0}))
    instances = (prefill(), prefill(weight=0.5), decode(capacity=30))
    scenario = toy((0.0, 16, 3), (0.0, 16, 2), (0.125, 16, 2), instances=instances)
    result = simulate(replace(scenario, borders=(border,)))
    assert [request.prefill_instance for request in result.requests] == [0, 1, 1]
    assert result.requests[2].prefill_start_s == 1.0
    # Instance 0 is gone at 1.0, while decode has no room for all: KV that waits is fetched from host memory.
    assert result.instances[0].gone_s == 1.0
    assert result.count("finished") == 3


# Laws.


def random_scenario(seed: int) -> Scenario:
    """A small crowded cluster with tight memory and slow switching, whose power depends on the clock alone."""
    rng = random.Random(seed)
    at_s = 0.0
    requests = []
    for _ in range(60):
        at_s += rng.choice([0.0, rng.expovariate(2.0)])
        requests.append(RequestSpec(at_s, rng.choice([70, *range(1, 25)]), rng.randint(1, 9)))
    instances = tuple(
        rng.choice([prefill, decode])(rng.randint(30, 60), rng.choice([1, 2]), rng.randrange(2), node)
        for node in (0, 0, 1, 1)
    )
    instances += (prefill(40, node=0), decode(40, node=1))
    policy = Policy(lambda decision: rng.randrange(2), on_arrival=True, on_idle=True)
    border = Border(
        rng.uniform(1.0, 10.0),
        frozenset({rng.randrange(6)}),
        (NewInstance(prefill(50), 1.0), NewInstance(decode(50), 1.0)),
    )
    return Scenario(
        requests=tuple(requests),
        instances=instances,
        cost=toy_cost,
        idle_power=toy_idle,
        clocks=2,
        nodes=2,
        gpus_per_node=8,
        gpus=16,
        batching=Batching(
            prefill_token_budget=rng.choice([8, 20, 100]),
            chunked_prefill=rng.random() < 0.5,
            max_decode_sequences=rng.choice([2, 8]),
            decode_admission=rng.choice(["current", "current", "full"]),
            preemption=rng.choice(["recompute", "none"]),
        ),
        switching=Switching(lambda: rng.choice([0.0, rng.uniform(0.0, 0.3)]), rng.choice([0.0, 0.05])),
        transfer=rng.choice([Transfer(), Transfer(0.05, 400.0, 100.0, 1.0)]),
        prefill_policy=policy,
        decode_policy=policy,
        borders=(border,),
        replacement=rng.choice(["drain", "instant"]),
        until_s=rng.choice([None, 20.0, 400.0]),
    )


def joules_from_events(scenario: Scenario, result: Result, number: int) -> float:
    """The integral of an instance's power, rebuilt from the events alone."""
    instance = result.instances[number]
    specs = scenario.instances + tuple(new.spec for border in scenario.borders for new in border.new)
    active_from_s, until_s = instance.active_from_s, instance.gone_s
    if math.isnan(until_s):
        until_s = result.end_s
    if math.isnan(active_from_s):
        active_from_s = until_s
    changes = [event for event in result.events if event[2] == number and event[0] <= until_s]
    clock, busy, at_s, joules = specs[number].clock, False, active_from_s, 0.0
    for time_s, kind, _, detail in [*changes, (until_s, "stop", number, 0)]:
        joules += (time_s - at_s) * (BUSY_W if busy else IDLE_W)[clock] * specs[number].tp if time_s > at_s else 0.0
        at_s = max(at_s, time_s)
        busy = kind.endswith("-start") or (busy and not kind.endswith("-end"))
        clock = detail if kind == "clock" else clock
    return joules


@pytest.mark.parametrize("seed", range(40))
def test_requests_and_joules_are_conserved(seed: int) -> None:
    scenario = random_scenario(seed)
    result = simulate(scenario)
    arrived = len(times_of(result, "arrive"))
    assert arrived == result.count("finished") + result.count("in-flight") + result.count("rejected")
    assert arrived + result.count("not-arrived") == len(scenario.requests)
    if scenario.until_s != 20.0:
        assert result.count("in-flight") == 0
        assert all(instance.kv_used == 0 for instance in result.instances)
    for number, instance in enumerate(result.instances):
        worked_j = sum(instance.joules.values()) - instance.joules["loading"]
        assert worked_j == pytest.approx(joules_from_events(scenario, result, number), rel=1e-9, abs=1e-9)
    tokens = sum(request.generated for request in result.requests)
    assert tokens == sum(instance.output_tokens for instance in result.instances)
    gpu_seconds = sum(instance.tp * seconds for instance in result.instances for seconds in instance.seconds.values())
    if scenario.replacement == "drain":
        assert gpu_seconds + result.unallocated_gpu_seconds == pytest.approx(16 * result.end_s)


def test_mean_waiting_time_of_an_m_d_1_queue() -> None:
    load, service_s, count = 0.7, 1.0, 20_000
    means = []
    for seed in range(5):
        rng = random.Random(seed)
        at_s = 0.0
        requests = []
        for _ in range(count):
            at_s += rng.expovariate(load / service_s)
            requests.append(RequestSpec(at_s, 16, 1))
        scenario = replace(toy(), requests=tuple(requests), batching=Batching(prefill_token_budget=1))
        records = simulate(scenario).requests
        means.append(sum(record.prefill_start_s - record.arrival_s for record in records) / count)
    expected_s = load * service_s / (2 * (1 - load))
    assert sum(means) / len(means) == pytest.approx(expected_s, rel=0.04)


# Published figures.

DECODE_MS = {  # below batch 95, from 95 on
    "13B TP1": ((19.93, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831)),
    "66B TP4": ((30.76, 4.519e-4, 0.06328), (27.47, 4.047e-4, 0.12481)),
}
PREFILL_MS = {"13B TP1": (18.10, 0.10191, 7.122e-6), "66B TP4": (29.44, 0.15135, 8.317e-6)}
BUDGET = {"13B TP1": 66_144, "66B TP4": 78_496}


def linear_cost(model: str) -> CostFunction:
    """The published linear latency model; power is of no interest here."""

    def cost(tp: int, clock: int, b: int, kv: int, m: int, s2: int) -> tuple[float, float]:
        if m:
            base, per_token, per_square = PREFILL_MS[model]
            milliseconds = base + per_token * m + per_square * s2 + 1 + (2 + 1e-4 * m)
        else:
            base, per_token, per_request = DECODE_MS[model][b >= 95]
            milliseconds = base + per_token * (kv + b) + per_request * b + (2 + 1e-4 * kv)
        return milliseconds / 1000, 0.0

    return cost


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@pytest.mark.parametrize(
    ("trace", "model", "ttft_ms", "tpot_ms", "iterations", "end_s"),
    [
        ("r2", "13B TP1", (45.10, 118.24, 253.62), (26.990, 29.529, 32.179), (988, 18693), 497.38),
        ("r4", "13B TP1", (48.65, 136.77, 315.10), (34.666, 39.194, 42.259), (961, 7785), 258.12),
        ("r2", "66B TP4", (69.97, 186.64, 386.67), (38.804, 41.251, 44.197), (975, 13052), 501.24),
    ],
)
def test_published_figures(
    shared_data: Path,
    trace: str,
    model: str,
    ttft_ms: tuple[float, ...],
    tpot_ms: tuple[float, ...],
    iterations: tuple[int, int],
    end_s: float,
) -> None:
    with (shared_data / "reference" / f"trace_n1000_{trace}_s0.csv").open() as lines:
        rows = [
            RequestSpec(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(lines)
        ]
    tp = int(model[-1])
    result = simulate(
        Scenario(
            requests=tuple(rows),
            instances=(prefill(10**9, tp, clock=0), decode(50_000, tp, clock=0)),
            cost=linear_cost(model),
            idle_power=lambda tp, clock: 0.0,
            batching=Batching(
                prefill_token_budget=BUDGET[model],
                max_decode_sequences=10**6,
                preemption="none",
                decode_iterations="output-length",
            ),
            routing=Routing("least-loaded", "least-loaded", "waiting"),
        )
    )
    ttft_s = [request.first_token_s - request.arrival_s for request in result.requests]
    tpot_s = [(request.finish_s - request.first_token_s) / request.output_tokens for request in result.requests]
    for share, expected_ms in zip((0.5, 0.9, 0.99), ttft_ms, strict=True):
        assert 1000 * percentile(ttft_s, share) == pytest.approx(expected_ms, rel=0.001)
    for share, expected_ms, tolerance in zip((0.5, 0.9, 0.99), tpot_ms, (0.003, 0.004, 0.01), strict=True):
        assert 1000 * percentile(tpot_s, share) == pytest.approx(expected_ms, rel=tolerance)
    assert result.instances[0].iterations == iterations[0]
    assert result.instances[1].iterations == pytest.approx(iterations[1], rel=0.0006)
    assert result.end_s == pytest.approx(end_s, abs=0.05)
