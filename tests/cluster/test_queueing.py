"""Where queueing theory has a closed form, the engine meets it."""

from __future__ import annotations

import numpy as np
import pytest
from cluster.small_clusters import CLOCK_MHZ, cluster, decode, prefill, profile, requests, simulator

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.cluster.state import EVENTS
from biscale_gym.config import load_preset
from biscale_gym.profiles.settings import TransferSettings

PROMPT = 512
SERVICE_S = float(profile().latency_ms(2, CLOCK_MHZ, prefill_tokens=PROMPT, sum_len_sq=PROMPT**2)) / 1e3


def mean_number(simulator: Simulator, enters: str, leaves: str) -> float:
    """Time average, until now, of how many are between two kinds of logged events."""
    events = simulator.events
    kinds = np.array(EVENTS)[events["kind"]]
    chosen = np.isin(kinds, (enters, leaves))
    number = np.cumsum(np.where(kinds[chosen] == enters, 1, -1))
    assert number[-1] == 0
    return float((number[:-1] * np.diff(events["time_s"][chosen])).sum() / simulator.now_s)


@pytest.mark.parametrize("rate_rps", [1.0, 30.0, 90.0])
def test_littles_law(rate_rps: float) -> None:
    rng = np.random.default_rng(5)
    count = 1500
    trace = requests(
        np.cumsum(rng.exponential(1.0 / rate_rps, count)), rng.integers(1, 2000, count), rng.integers(1, 200, count)
    )
    settings = cluster(transfer="rdma-20", switching="nvml", batching={"decode_kv_tokens": 60_000})
    run = simulator([prefill(), prefill(4), decode(4)], trace, settings, log_events=800_000)
    run.run()
    ledger = run.requests()
    assert ledger.finished.all()
    end_s = run.now_s
    assert mean_number(run, "arrive", "finish") == pytest.approx(
        count / end_s * (ledger.finish_s - ledger.arrival_s).mean(), rel=1e-9
    )
    decoding = ledger.output_tokens > 1
    claims = run.events[run.events["kind"] == EVENTS.index("claim")]
    claimed_s = claims["time_s"][np.argsort(claims["subject"])]
    transfer_s = (ledger.delivered_s[decoding] - claimed_s).mean()
    assert mean_number(run, "claim", "deliver") == pytest.approx(decoding.sum() / end_s * transfer_s, rel=1e-9)


def alone_at_prefill(load: float, count: int) -> Simulator:
    """Poisson arrivals of equal prompts at one prefill instance that takes one prompt at a time."""
    rng = np.random.default_rng(11)
    trace = requests(np.cumsum(rng.exponential(SERVICE_S / load, count)), PROMPT)
    settings = cluster(batching={"prefill_token_budget": PROMPT})
    run = simulator([prefill()], trace, settings, only="prefill")
    run.run()
    return run


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_wait_is_that_of_an_m_d_1_queue(load: float) -> None:
    ledger = alone_at_prefill(load, 400_000).requests()
    wait_s = ledger.prefill_start_s - ledger.arrival_s
    # Busy periods are independent, so the ratio of sums over them has this standard error (regenerative method).
    period = np.cumsum(wait_s == 0.0) - 1
    waited_s, served = np.bincount(period, wait_s), np.bincount(period)
    error_s = np.sqrt(((waited_s - wait_s.mean() * served) ** 2).sum()) / len(wait_s)
    expected_s = load * SERVICE_S / (2.0 * (1.0 - load))
    assert 4.0 * error_s < 0.1 * expected_s
    assert abs(wait_s.mean() - expected_s) < 4.0 * error_s
    share_error = np.sqrt(((1.0 - (1.0 - load) * served) ** 2).sum()) / len(wait_s)
    assert abs((wait_s == 0.0).mean() - (1.0 - load)) < 4.0 * share_error


def test_waits_follow_lindleys_recursion() -> None:
    run = alone_at_prefill(0.8, 5_000)
    ledger = run.requests()
    wait_s = ledger.prefill_start_s - ledger.arrival_s
    following_s = np.maximum(0.0, wait_s[:-1] + SERVICE_S - np.diff(ledger.arrival_s))
    np.testing.assert_allclose(wait_s[1:], following_s, atol=1e-9)
    busy_s = run.instances().time_s[0, 0]
    assert busy_s == pytest.approx(5_000 * SERVICE_S, rel=1e-12)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_lone_request_takes_its_prefill_transfer_and_iterations(nodes: int) -> None:
    prompt, output = 1500, 40
    settings = cluster(nodes=nodes, gpus_per_node=8 // nodes, transfer="rdma-20")
    run = simulator([prefill(2), decode(4)], requests([1.0], prompt, output), settings)
    run.run()
    ledger, instances = run.requests(), run.instances()
    prefill_s = float(profile().latency_ms(2, CLOCK_MHZ, prefill_tokens=prompt, sum_len_sq=prompt**2)) / 1e3
    assert ledger.first_token_s[0] - 1.0 == pytest.approx(prefill_s, rel=1e-12)

    link = load_preset(TransferSettings, "transfer", "rdma-20")
    pair_gb_per_s = {1: link.nvlink_gb_per_s, 2: link.rdma_gb_per_s}[nodes]
    assert pair_gb_per_s is not None
    transfer_s = prompt * profile().kv_bytes_per_token / (2 * pair_gb_per_s * 1e9) + link.launch_latency_s
    assert ledger.delivered_s[0] - ledger.first_token_s[0] == pytest.approx(transfer_s, rel=1e-9)

    held = prompt + np.arange(output - 1)
    iterations_s = profile().latency_ms(4, CLOCK_MHZ, 1, held) / 1e3
    tpot_s = (ledger.finish_s[0] - ledger.first_token_s[0]) / (output - 1)
    assert tpot_s == pytest.approx((transfer_s + iterations_s.sum()) / (output - 1), rel=1e-12)

    power_w = profile().power_w(2, CLOCK_MHZ, prefill_tokens=prompt, sum_len_sq=prompt**2)
    assert instances.energy_j[0, 0] == pytest.approx(2 * float(power_w) * prefill_s, rel=1e-12)
    decode_j = 4 * (profile().power_w(4, CLOCK_MHZ, 1, held) * iterations_s).sum()
    assert instances.energy_j[1, 0] == pytest.approx(decode_j, rel=1e-12)
