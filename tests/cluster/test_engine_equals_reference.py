"""The compiled engine against the plain simulator: events in order, times and joules to 1e-9, on random clusters."""

from __future__ import annotations

import numpy as np
import pytest
from cluster.random_clusters import Case, events_of, random_case, reference_events, run_engine, run_reference

RELATIVE = 1e-9


def _by_instant(events: list[tuple[float, str, int, int]]) -> list[tuple[str, int, int]]:
    """Events in order; what happens at one instant is sorted, since the page leaves the order of logging there open."""
    times = np.array([event[0] for event in events])
    groups = np.concatenate([[0], np.cumsum(np.diff(times) > 1e-9 * np.maximum(1.0, times[1:]))])
    keyed = sorted(zip(groups.tolist(), [event[1:] for event in events], strict=True))
    return [event for _, event in keyed]


def assert_same(case: Case) -> None:
    engine = run_engine(case)
    reference = run_reference(case, engine)
    ours, theirs = events_of(engine), reference_events(reference)
    for number, (a, b) in enumerate(zip(_by_instant(ours), _by_instant(theirs), strict=False)):
        assert a == b, f"event {number} of case {case.seed}: engine {a}, reference {b}"
    assert len(ours) == len(theirs)
    np.testing.assert_allclose([e[0] for e in ours], [e[0] for e in theirs], rtol=RELATIVE)

    requests = engine.requests()
    for name in ("prefill_start_s", "first_token_s", "delivered_s", "finish_s"):
        expected = np.array([getattr(request, name) for request in reference.requests])
        mine = getattr(requests, name)
        if name == "delivered_s":
            mine = np.where(mine <= case.until_s, mine, np.nan)
        np.testing.assert_allclose(mine, expected, rtol=RELATIVE, err_msg=name)
    assert requests.preemptions.tolist() == [request.preemptions for request in reference.requests]
    assert requests.finished.sum() == reference.count("finished")
    assert requests.rejected.sum() == reference.count("rejected")

    ledger = engine.instances()
    buckets = ("busy", "idle", "switching", "loading")
    joules = np.array([[instance.joules[bucket] for bucket in buckets] for instance in reference.instances])
    seconds = np.array([[instance.seconds[bucket] for bucket in buckets] for instance in reference.instances])
    np.testing.assert_allclose(ledger.energy_j, joules, rtol=RELATIVE, atol=1e-6)
    np.testing.assert_allclose(ledger.time_s, seconds, rtol=RELATIVE, atol=1e-9)
    np.testing.assert_allclose(ledger.unallocated_j, reference.unallocated_joules, rtol=RELATIVE, atol=1e-6)
    assert ledger.iterations.tolist() == [instance.iterations for instance in reference.instances]
    assert ledger.clock_changes.tolist() == [instance.clock_changes for instance in reference.instances]
    assert ledger.prompt_tokens[ledger.is_prefill].tolist() == [
        instance.prompt_tokens for instance in reference.instances if instance.phase == "prefill"
    ]


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_clusters(first: int) -> None:
    for seed in range(first, first + 20):
        assert_same(random_case(seed))


@pytest.mark.parametrize("first", range(1000, 1120, 20))
def test_random_replacements(first: int) -> None:
    for seed in range(first, first + 20):
        assert_same(random_case(seed, borders=True))


@pytest.mark.parametrize("first", range(3000, 3120, 20))
def test_random_pipelines(first: int) -> None:
    for seed in range(first, first + 20):
        assert_same(random_case(seed, borders=seed % 3 == 0, pipelines=True))


@pytest.mark.parametrize("seed", [7321, 7830, 8669])
def test_an_instance_that_waits_for_gpus_starts_at_its_new_clock(seed: int) -> None:
    assert_same(random_case(seed, borders=True))


@pytest.mark.parametrize("seed", [5678, 7750, 8495, 9390, 9667])
def test_decisions_of_one_instant_are_taken_in_the_order_of_waking(seed: int) -> None:
    assert_same(random_case(seed, borders=True))


@pytest.mark.parametrize("seed", range(2000, 2030))
def test_decode_alone(seed: int) -> None:
    assert_same(random_case(seed, only="decode"))
