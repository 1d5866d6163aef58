"""Properties of the compiled profile: tables equal the closed form, nothing jumps, everything is monotone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from biscale_gym.profiles import Profile, kernels, load_profile
from biscale_gym.profiles import layout as at
from biscale_gym.profiles.closed_form import closed_form

GRID_MHZ = (345, 705, 885, 1005, 1200, 1410, 1620, 1980)
VECTORS = {
    (precision, tp): load_profile("h100-sxm5", "llama-3.3-70b", precision).compile(tp, GRID_MHZ, 64)
    for precision in ("bf16", "fp8")
    for tp in (1, 2, 4, 8)
}
# Where the board limit binds, power is within 1e-4 W before the last step, whose slope may be off at a kink.
AT_LIMIT = 1e-3 / 698.0
FINE = {precision: load_profile("h100-sxm5", "llama-3.3-70b", precision) for precision in ("bf16", "fp8")}

classes = st.sampled_from(sorted(VECTORS))
clocks = st.integers(0, len(GRID_MHZ) - 1)
batches = st.integers(0, 256).map(float)
contexts = st.floats(1, 8192)
prompts = st.integers(1, 16384).map(float)
lengths = st.floats(1, 8192)


@given(classes, clocks, st.integers(1, 256).map(float), contexts)
@settings(max_examples=300, deadline=None)
def test_decode_look_up_equals_the_closed_form(
    which: tuple[str, int], clock: int, batch: float, context: float
) -> None:
    vector, kv = VECTORS[which], np.floor(batch * context)
    latency_s, power_w = kernels.decode_cost(vector, clock, batch, kv)
    expected_s, expected_w = closed_form(vector, GRID_MHZ[clock] / 1000, batch, kv, 0.0, 0.0)
    if expected_w > vector[at.LIMIT_W]:
        mhz = kernels.effective_clock_mhz(vector, clock, batch, kv, 0.0, 0.0)
        assert mhz < GRID_MHZ[clock]
        expected_s, expected_w = closed_form(vector, mhz / 1000, batch, kv, 0.0, 0.0)
    exact = AT_LIMIT if power_w == vector[at.LIMIT_W] else 1e-11
    assert latency_s == pytest.approx(expected_s, rel=exact)
    assert power_w == pytest.approx(expected_w, rel=exact)
    assert kernels.decode_latency(vector, clock, batch, kv) == latency_s
    assert kernels.iteration_cost(vector, clock, batch, kv, 0.0, 0.0) == (latency_s, power_w)
    assert kernels.iteration_latency(vector, clock, batch, kv, 0.0, 0.0) == latency_s


@given(classes, clocks, batches, contexts, prompts, lengths)
@example(("fp8", 1), 5, 5.0, 1.0, 468.0, 1.0)
# Power bends at the tensor cores' own clock just above the answer, and the search starts far above it.
@example(("bf16", 1), 7, 2.0, 3.5, 16251.0, 530.0)
@settings(max_examples=300, deadline=None)
def test_mixed_iterations_equal_the_closed_form(
    which: tuple[str, int], clock: int, batch: float, context: float, m: float, length: float
) -> None:
    vector, kv, s2 = VECTORS[which], np.floor(batch * context), np.floor(m * min(m, length))
    latency_s, power_w = kernels.iteration_cost(vector, clock, batch, kv, m, s2)
    mhz = kernels.effective_clock_mhz(vector, clock, batch, kv, m, s2)
    expected_s, expected_w = closed_form(vector, mhz / 1000, batch, kv, m, s2)
    exact = AT_LIMIT if power_w == vector[at.LIMIT_W] else 1e-11
    assert latency_s == pytest.approx(expected_s, rel=exact)
    assert power_w == pytest.approx(expected_w, rel=exact)
    assert power_w <= vector[at.LIMIT_W]
    assert mhz <= GRID_MHZ[clock] + 1e-9
    assert kernels.iteration_latency(vector, clock, batch, kv, m, s2) == latency_s


@given(classes, batches, contexts, st.one_of(st.just(0.0), prompts), lengths)
@settings(max_examples=300, deadline=None)
def test_clocks_are_monotone(which: tuple[str, int], batch: float, context: float, m: float, length: float) -> None:
    vector, kv, s2 = VECTORS[which], np.floor(batch * context), np.floor(m * min(m, length))
    if batch + m == 0:
        return
    costs = np.array([kernels.iteration_cost(vector, f, batch, kv, m, s2) for f in range(len(GRID_MHZ))])
    assert np.all(np.diff(costs[:, 0]) <= 1e-12 * costs[:-1, 0])
    assert np.all(np.diff(costs[:, 1]) >= -1e-9)
    idle = [kernels.idle_power_w(vector, f) for f in range(len(GRID_MHZ))]
    assert np.all(np.diff(idle) > 0)
    assert np.all(costs[:, 1] > idle)


@given(classes, st.floats(0.345, 1.98), batches, contexts, st.floats(0, 16384), lengths)
@settings(max_examples=300, deadline=None)
def test_nothing_jumps(
    which: tuple[str, int], ghz: float, batch: float, context: float, m: float, length: float
) -> None:
    vector = VECTORS[which]
    here = np.array(closed_form(vector, ghz, batch, batch * context, m, m * length))
    step = 1e-7
    for near in (
        closed_form(vector, min(1.98, ghz + step), batch, batch * context, m, m * length),
        closed_form(vector, ghz, batch + step, (batch + step) * context, m, m * length),
        closed_form(vector, ghz, batch, batch * context, m + step, (m + step) * length),
        closed_form(vector, ghz, batch, batch * context + 1, m, m * length),
        closed_form(vector, ghz, batch, batch * context, m, m * length + 1),
    ):
        np.testing.assert_allclose(near, here, rtol=1e-5)


@given(st.sampled_from(["bf16", "fp8"]), st.floats(100, 1000), st.integers(0, 64).map(float))
@settings(max_examples=50, deadline=None)
def test_nothing_jumps_where_the_limit_begins_to_bind(precision: str, m: float, batch: float) -> None:
    vector = VECTORS[precision, 2]
    top = len(GRID_MHZ) - 1
    tokens = m + np.arange(0, 40, 0.25)
    costs = np.array([kernels.iteration_cost(vector, top, batch, batch * 512, t, t * t) for t in tokens])
    assert np.max(np.abs(np.diff(costs[:, 0]) / costs[:-1, 0])) < 0.01
    assert np.max(np.abs(np.diff(costs[:, 1]) / costs[:-1, 1])) < 0.01


@given(classes, prompts, lengths)
@settings(max_examples=200, deadline=None)
def test_a_prefill_batch_costs_the_same_at_several_clocks_together(
    which: tuple[str, int], m: float, length: float
) -> None:
    vector, s2, limited_s = VECTORS[which], np.floor(m * min(m, length)), 0.0
    log_tokens, tokens_p = kernels.prefill_terms(vector, m)
    for clock in reversed(range(len(GRID_MHZ))):
        latency_s, power_w, limited_s = kernels.prefill_cost_with(vector, clock, m, s2, log_tokens, tokens_p, limited_s)
        assert (latency_s, power_w) == kernels.iteration_cost(vector, clock, 0.0, 0.0, m, s2)


def test_locks_above_the_effective_clock_cost_the_same(fp8: Profile) -> None:
    vector = fp8.compile(2, [1950, 1965, 1980], 256)
    costs = {kernels.decode_cost(vector, clock, 256.0, 128_000.0) for clock in range(3)}
    assert len(costs) == 1
    assert costs.pop()[1] == 698.0
    # The solution depends neither on the list nor on the table.
    alone = fp8.compile(2, [1980], 8)
    assert kernels.decode_cost(alone, 0, 256.0, 128_000.0) == kernels.decode_cost(vector, 2, 256.0, 128_000.0)


def test_beyond_the_table_the_closed_form_answers(bf16: Profile) -> None:
    small, large = bf16.compile(4, GRID_MHZ, 8), bf16.compile(4, GRID_MHZ, 300)
    for batch in (1.0, 8.0, 9.0, 300.0):
        for clock in range(len(GRID_MHZ)):
            np.testing.assert_allclose(
                kernels.decode_cost(small, clock, batch, 512 * batch),
                kernels.decode_cost(large, clock, batch, 512 * batch),
                rtol=1e-12,
            )


def test_every_class_of_the_clock_list_compiles(bf16: Profile) -> None:
    assert len(bf16.clocks_mhz) == 110
    assert bf16.top_clock_mhz == 1980
    vector = bf16.compile(4, bf16.clocks_mhz, 16)
    assert kernels.clock_count(vector) == 110
    assert np.all(np.isfinite(vector[at.HEADER :]))
