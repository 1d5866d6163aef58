"""Pipelines in closed form: stages that are shared, hand-overs, bubbles, joules, re-placement of whole instances."""

from __future__ import annotations

import numpy as np
import pytest
from cluster.small_clusters import CLOCK_MHZ, CLOCKS_MHZ, cluster, decode, prefill, profile, requests, simulator

from biscale_gym.cluster.placement import Lane, Placement, transition
from biscale_gym.cluster.simulator import Simulator
from biscale_gym.config import load_preset
from biscale_gym.profiles.settings import TransferSettings
from biscale_gym.traces import Trace

PP = 4


def prefill_s(prompt: int) -> float:
    """One pass of one prompt."""
    return 1e-3 * float(profile().latency_ms(2, CLOCK_MHZ, prefill_tokens=prompt, sum_len_sq=float(prompt) ** 2))


def decode_s(batch: int, kv_tokens: int) -> float:
    """One decode pass."""
    return 1e-3 * float(profile().latency_ms(2, CLOCK_MHZ, batch=batch, kv_tokens=kv_tokens))


def run_prefill(trace: Trace, pp: int = PP, **settings: object) -> Simulator:
    run = simulator([prefill(2, pp=pp)], trace, cluster(**settings), only="prefill")
    run.run()
    return run


def test_a_prompt_alone_takes_a_whole_pass() -> None:
    run = run_prefill(requests([0.0], 900))
    assert run.requests().first_token_s[0] == pytest.approx(prefill_s(900), rel=1e-12)


def test_equal_prompts_leave_a_stage_time_apart() -> None:
    """Lanes alone would finish all four at the same time."""
    run = run_prefill(requests([0.0] * PP, 900))
    expected = prefill_s(900) * (1.0 + np.arange(PP) / PP)
    np.testing.assert_allclose(run.requests().first_token_s, expected, rtol=1e-12)


@pytest.mark.parametrize("prompts", [(2000, 100, 1500, 300), (100, 300, 1500, 2000), (700, 100, 900, 2000)])
def test_a_short_prompt_waits_behind_a_long_one_at_every_stage(prompts: tuple[int, ...]) -> None:
    """Stage by stage: out(n, j) = max(out(n, j − 1), out(n − 1, j)) + stage time of n."""
    run = run_prefill(requests([0.0] * PP, prompts))
    free_s = np.zeros(PP)
    expected = []
    for prompt in prompts:
        at_s = 0.0
        for stage in range(PP):
            at_s = free_s[stage] = max(at_s, free_s[stage]) + prefill_s(prompt) / PP
        expected.append(at_s)
    np.testing.assert_allclose(run.requests().first_token_s, expected, rtol=1e-12)


@pytest.mark.parametrize(("gpus_per_node", "link"), [(8, "nvlink_gb_per_s"), (2, "rdma_gb_per_s")])
def test_every_boundary_between_stages_costs_a_hand_over(gpus_per_node: int, link: str) -> None:
    run = run_prefill(requests([0.0], 900), nodes=PP, gpus_per_node=gpus_per_node, transfer="rdma-20")
    preset = load_preset(TransferSettings, "transfer", "rdma-20")
    activations_bytes = 900 * profile().model.hidden_size * 2
    handover_s = preset.stage_latency_s + activations_bytes / (2 * getattr(preset, link) * 1e9)
    expected = prefill_s(900) + (PP - 1) * handover_s
    assert run.requests().first_token_s[0] == pytest.approx(expected, rel=1e-12)


def test_the_largest_microbatch_sets_the_pace_of_all() -> None:
    """Two lanes decode, one a long context and one a short: both take the long one's time, the short one idly."""
    prompts, tokens = (120_000, 100), 40
    trace = requests([0.0, 0.0], prompts, tokens + 1)
    run = simulator([decode(2, pp=2)], trace, cluster(), only="decode")
    run.run()
    long_s = sum(decode_s(1, prompts[0] + k) for k in range(tokens))
    finish_s = run.requests().finish_s
    assert finish_s[0] == pytest.approx(long_s, rel=1e-12)
    assert 0.97 * long_s < finish_s[1] < 1.03 * long_s
    assert sum(decode_s(1, prompts[1] + k) for k in range(tokens)) < 0.8 * long_s


def test_equal_microbatches_go_on_without_bubbles() -> None:
    trace = requests([0.0] * PP, 500, 41)
    run = simulator([decode(2, pp=PP)], trace, cluster(), only="decode")
    run.run()
    alone_s = sum(decode_s(1, 500 + k) for k in range(40))
    # The last lane enters three stage times after the first; contexts then grow alike.
    assert run.requests().finish_s.max() == pytest.approx(alone_s + 3 * decode_s(1, 500) / PP, rel=2e-3)


def test_waiting_draws_idle_power() -> None:
    run = run_prefill(requests([0.0, 0.0], (1800, 200)), pp=2)
    ledger = run.instances()
    watts = [
        float(profile().power_w(2, CLOCK_MHZ, prefill_tokens=prompt, sum_len_sq=prompt**2)) for prompt in (1800, 200)
    ]
    computing_s = np.array([prefill_s(1800), prefill_s(200)])
    waiting_s = run.requests().first_token_s - computing_s
    assert waiting_s[0] == pytest.approx(0.0, abs=1e-12)
    assert waiting_s[1] > 0.5 * computing_s[0]
    idle_w = profile().idle_power_w(2, CLOCK_MHZ)
    np.testing.assert_allclose(ledger.energy_j[:, 0], 2 * (computing_s * watts + waiting_s * idle_w), rtol=1e-12)


def test_a_clock_change_rescales_computing_and_keeps_the_wait() -> None:
    trace = requests([0.0, 0.0], (1800, 1800))
    run = simulator([prefill(2, pp=2)], trace, cluster(), only="prefill")
    at_s = 0.5 * prefill_s(1800)
    run.run(at_s)
    for lane in range(2):
        run.set_clock(lane, CLOCKS_MHZ.index(1980))
    run.run()
    fast_s = 1e-3 * float(profile().latency_ms(2, 1980, prefill_tokens=1800, sum_len_sq=1800.0**2))
    wait_s = np.array([0.0, 0.5 * prefill_s(1800)])
    left = 1.0 - at_s / (prefill_s(1800) + wait_s)
    np.testing.assert_allclose(run.requests().first_token_s, at_s + left * (fast_s + wait_s), rtol=1e-9)


def test_instances_stay_or_leave_with_all_their_lanes() -> None:
    """One lane alone would have to move to make room; its instance goes with it."""
    spec = prefill(2, pp=2)
    before = [(0, Lane(spec, 0, 0, False)), (1, Lane(spec, 1, 1, False)), (2, Lane(decode(4), 0))]
    change = transition(before, Placement((spec, decode(4), decode(8))), 2, 8)
    kept = {number for number, _ in change.keep}
    assert {0, 1} <= kept or not {0, 1} & kept
    assert sorted(change.leave) == sorted({0, 1, 2} - kept)
    assert sum(lane.spec.tp for lane in change.start) + sum(spec.tp for _, spec in change.keep) == 16


def test_a_kept_pipeline_goes_on_as_one() -> None:
    run = simulator([prefill(2, pp=2), decode(2)], requests([0.0, 1.0], 900, 2), cluster(nodes=2))
    run.run(0.5)
    run.reconfigure(Placement((decode(2), prefill(2, pp=2), prefill(2, pp=2))))
    inst = run.state.inst
    first = inst["first_lane"][: len(run.lanes)].tolist()
    assert first == [0, 0, 2, 3, 3]
    assert [lane.number for lane in run.lanes] == [0, 1, 0, 0, 1]
