"""What holds in every run, whatever the cluster, the load, the policies and the re-placements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cluster.random_clusters import Case, new_engine, random_case, run_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_gym.cluster.simulator import Simulator, lowest_idle_power_w
from biscale_gym.cluster.state import ACTIVE, DRAINING, LOADING

RELATIVE = 1e-9
TIMES = ("arrival_s", "prefill_start_s", "first_token_s", "delivered_s", "finish_s")
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=40, deadline=None)


@st.composite
def cases(draw: st.DrawFn, borders: bool | None = None) -> Case:
    only = draw(st.sampled_from((None, "prefill", "decode")))
    return random_case(draw(seeds), draw(st.booleans()) if borders is None else borders, only)


def served(case: Case) -> Simulator:
    simulator = run_engine(case)
    simulator.run()
    return simulator


def halted(case: Case, share: float) -> Case:
    """The case until a share of its trace has arrived, its re-placements included."""
    last_border_s = max((at_s for at_s, _ in case.borders), default=0.0)
    return replace(case, until_s=max(share * case.trace.duration_s, last_border_s))


class Meter:
    """Joules and seconds read off the power of every instance between any two events."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.joules = np.zeros(64)
        self.seconds = np.zeros(64)
        self.unallocated_j = 0.0
        self.idle_w = lowest_idle_power_w(simulator.profile)

    def _read(self, seconds: float) -> None:
        inst = self.simulator.state.inst
        there = np.isin(inst["status"], (LOADING, ACTIVE, DRAINING))
        self.joules[: len(inst)] += np.where(there, inst["power_w"], 0.0) * seconds
        self.seconds[: len(inst)] += there * seconds
        free = self.simulator.settings.gpus - inst["tp"][there].sum()
        self.unallocated_j += max(0, free) * self.idle_w * seconds

    def _next_event_s(self) -> float:
        state = self.simulator.state
        number = state.glob[0]["next_arrival"]
        arrival_s = state.arrivals["arrival_s"][number] if number < len(state.req) else np.inf
        return min(float(state.tree_s[1]), float(arrival_s))

    def run(self, until_s: float) -> None:
        """Stop before and after every event on the way."""
        self.simulator.run(self.simulator.now_s)
        while self._next_event_s() < until_s:
            event_s = self._next_event_s()
            self._read(event_s - self.simulator.now_s)
            self.simulator.run(np.nextafter(event_s, np.inf))
        self._read(until_s - self.simulator.now_s)
        self.simulator.run(until_s)


@many
@given(cases(), st.floats(0.0, 1.2))
def test_every_request_is_finished_in_flight_or_rejected(case: Case, share: float) -> None:
    simulator = run_engine(halted(case, share))
    ledger, counts = simulator.requests(), simulator.counts()
    assert counts["finished"] == ledger.finished.sum()
    assert counts["rejected"] == ledger.rejected.sum()
    assert counts["arrived"] == (ledger.arrival_s < simulator.now_s).sum()
    simulator.run()
    counts = simulator.counts()
    assert counts["arrived"] == counts["finished"] + counts["rejected"] == len(case.trace)
    assert counts["in_flight"] == 0


@many
@given(cases(), st.floats(0.0, 1.2))
def test_joules_are_the_integral_of_power_and_seconds_the_time_in_service(case: Case, share: float) -> None:
    case = halted(case, share)
    meter = Meter(new_engine(case))
    for at_s, placement in case.borders:
        meter.run(at_s)
        meter.simulator.reconfigure(placement)
    meter.run(case.until_s)
    ledger = meter.simulator.instances()
    count = len(ledger.tp)
    np.testing.assert_allclose(ledger.energy_j.sum(axis=1), meter.joules[:count], rtol=RELATIVE, atol=1e-9)
    np.testing.assert_allclose(ledger.time_s.sum(axis=1), meter.seconds[:count], rtol=RELATIVE, atol=1e-9)
    assert ledger.unallocated_j == pytest.approx(meter.unallocated_j, rel=RELATIVE)


@many
@given(cases())
def test_where_a_run_is_halted_changes_nothing(case: Case) -> None:
    whole, parts = run_engine(case), new_engine(case)
    stops_s = [(at_s, None) for at_s in np.linspace(0.0, case.until_s, 97)]
    for at_s, placement in sorted([*stops_s, *case.borders], key=lambda stop: stop[0]):
        parts.run(at_s)
        parts.instances()
        if placement is not None:
            parts.reconfigure(placement)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(parts.requests(), name), getattr(whole.requests(), name))
    np.testing.assert_array_equal(parts.events, whole.events)
    one, other = parts.instances(), whole.instances()
    np.testing.assert_allclose(one.energy_j, other.energy_j, rtol=RELATIVE, atol=1e-9)
    assert one.unallocated_j == pytest.approx(other.unallocated_j, rel=RELATIVE)


@many
@given(cases())
def test_gpu_seconds_are_conserved_where_instances_wait_for_gpus(case: Case) -> None:
    waits = case.settings.replacement.model_copy(update={"mode": "drain"})
    case = replace(case, settings=case.settings.model_copy(update={"replacement": waits}))
    simulator = run_engine(case)
    ledger = simulator.instances()
    allocated = (ledger.time_s.sum(axis=1) * ledger.tp).sum()
    unallocated = ledger.unallocated_j / lowest_idle_power_w(case.profile)
    assert allocated + unallocated == pytest.approx(case.settings.gpus * simulator.now_s, rel=RELATIVE)


@many
@given(cases())
def test_memory_is_free_once_everything_is_finished(case: Case) -> None:
    inst = served(case).state.inst
    for name in ("kv_used", "run_n", "run_kv", "queue_n", "queue_tokens", "transit_n", "transit_tokens", "batch_n"):
        assert not inst[name].any(), name


@many
@given(cases())
def test_times_are_in_order(case: Case) -> None:
    ledger = served(case).requests()
    times_s = np.array([getattr(ledger, name) for name in TIMES])
    for request in times_s.T:
        known = request[~np.isnan(request)]
        assert (np.diff(known) >= 0.0).all()
    assert not np.isnan(ledger.finish_s[ledger.finished]).any()
    assert np.isnan(ledger.finish_s[~ledger.finished]).all()


@many
@given(cases(borders=False))
def test_tokens_are_conserved(case: Case) -> None:
    simulator = served(case)
    ledger, instances = simulator.requests(), simulator.instances()
    prompts = ledger.prompt_tokens[ledger.finished].sum()
    assert instances.prompt_tokens.sum() == (0 if case.only == "decode" else prompts)
    extra = case.settings.batching.decode_iterations == "output-length"
    decoded = ledger.output_tokens[ledger.finished] - 1 + extra
    assert instances.output_tokens.sum() == (0 if case.only == "prefill" else decoded.sum())
