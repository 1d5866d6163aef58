"""Every figure of docs/evaluation.md on ledgers small enough to work out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from biscale_gym.cluster.ledger import InstanceLedger, RequestLedger
from biscale_gym.cluster.settings import SloSettings
from biscale_gym.metrics import Counted, Measurement, TpotDefinition, attained, measure, tpot_s, ttft_s

NAN = math.nan
SLO = SloSettings(ttft_s=0.5, tpot_s=0.1)


def requests(*rows: tuple[float, float, float, int], rejected: tuple[int, ...] = ()) -> RequestLedger:
    """One row per request: arrival, first token, finish, output tokens; NaN where a time has not come."""
    arrival_s, first_token_s, finish_s, output_tokens = (np.array(column) for column in zip(*rows, strict=True))
    count = len(rows)
    return RequestLedger(
        arrival_s=arrival_s,
        prefill_start_s=arrival_s,
        first_token_s=first_token_s,
        delivered_s=first_token_s,
        finish_s=finish_s,
        prompt_tokens=np.full(count, 100),
        output_tokens=output_tokens,
        prefill_instance=np.zeros(count, int),
        decode_instance=np.ones(count, int),
        preemptions=np.zeros(count, int),
        finished=~np.isnan(finish_s),
        rejected=np.isin(np.arange(count), rejected),
    )


def instances(**changes: Any) -> InstanceLedger:
    """A prefill instance of two GPUs and a decode instance of four, ten seconds each."""
    values: dict[str, Any] = {
        "now_s": 10.0,
        "is_prefill": np.array([True, False]),
        "tp": np.array([2, 4]),
        "energy_j": np.array([[100.0, 20.0, 3.0, 4.0], [1000.0, 200.0, 30.0, 40.0]]),
        "time_s": np.array([[6.0, 2.0, 1.0, 1.0], [7.0, 1.0, 1.0, 1.0]]),
        "iterations": np.array([5, 70]),
        "prompt_tokens": np.array([254, 0]),
        "output_tokens": np.array([0, 635]),
        "clock_changes": np.array([2, 9]),
        "unallocated_j": 500.0,
    }
    return InstanceLedger(**{**values, **changes})


def figures(
    ledger: RequestLedger,
    start_s: float = 0.0,
    end_s: float = 10.0,
    energy: InstanceLedger | None = None,
    definition: TpotDefinition = "per-decode-token",
    overhead_s: float = 0.0,
) -> Measurement:
    return measure(ledger, Counted(start_s, end_s, energy or instances()), SLO, definition, overhead_s)


def test_ttft_is_from_arrival_to_first_token_with_the_overhead_of_serving() -> None:
    ledger = requests((1.0, 1.25, 2.0, 5), (2.0, NAN, NAN, 5))
    np.testing.assert_allclose(ttft_s(ledger), [0.25, NAN])
    np.testing.assert_allclose(ttft_s(ledger, 0.125), [0.375, NAN])
    assert figures(ledger, overhead_s=0.125).row["ttft_p50_s"] == 0.375
    assert figures(ledger, overhead_s=0.3).row["ttft_attainment"] == 0.0


def test_tpot_divides_by_the_decode_tokens_or_by_all() -> None:
    ledger = requests((0.0, 1.0, 2.0, 5), (0.0, 1.0, 1.0, 1), (0.0, 1.0, NAN, 5))
    np.testing.assert_allclose(tpot_s(ledger), [0.25, NAN, NAN])
    np.testing.assert_allclose(tpot_s(ledger, "per-output-token"), [0.2, 0.0, NAN])
    assert figures(ledger).row["tpot_p99_s"] == 0.25
    assert figures(requests((0.0, 1.0, 2.0, 5)), definition="per-output-token").row["tpot_p99_s"] == 0.2


def test_quantiles_interpolate_linearly() -> None:
    row = figures(requests(*[(0.0, float(k), float(k) + 2.0 * k, 3) for k in (5, 1, 4, 2, 3)])).row
    assert [row[f"ttft_{q}_s"] for q in ("p50", "p90", "p99")] == pytest.approx([3.0, 4.6, 4.96])
    assert [row[f"tpot_{q}_s"] for q in ("p50", "p90", "p99")] == pytest.approx([3.0, 4.6, 4.96])


def test_attainment_is_of_either_slo_and_of_both() -> None:
    quick, slow = (0.5, 0.5 + 4 * 0.1), (0.6, 0.6 + 4 * 0.2)
    ledger = requests(
        (0.0, *quick, 5),
        (0.0, slow[0], slow[0] + 0.4, 5),
        (0.0, quick[0], quick[0] + 0.8, 5),
        (0.0, *slow, 5),
    )
    row = figures(ledger).row
    assert (row["ttft_attainment"], row["tpot_attainment"], row["joint_attainment"]) == (0.5, 0.5, 0.25)
    assert row["goodput_rps"] == pytest.approx(1 / 10.0)


def test_rejected_and_unfinished_requests_miss_and_one_token_passes_tpot() -> None:
    ledger = requests(
        (0.0, 0.1, 0.3, 5),
        (0.0, NAN, NAN, 5),
        (0.0, NAN, NAN, 1),
        (0.0, 0.1, NAN, 5),
        (0.0, 0.1, 0.1, 1),
        rejected=(1, 2),
    )
    ttft_kept, tpot_kept = attained(ttft_s(ledger), tpot_s(ledger), ledger, SLO)
    assert ttft_kept[[0, 1, 2, 4]].tolist() == [True, False, False, True]
    assert tpot_kept.tolist() == [True, False, False, False, True]
    measured = figures(ledger)
    assert measured.row["joint_attainment"] == pytest.approx(2 / 5)
    assert measured.row["requests_judged"] == 5
    assert len(measured.ttft_s) == 3
    assert measured.tpot_s.tolist() == pytest.approx([0.05])


def test_only_arrivals_between_warm_up_and_end_are_judged() -> None:
    waits = {1.9: 9.0, 2.0: 0.1, 5.0: 0.2, 10.0: 0.3, 10.1: 9.0}
    measured = figures(requests(*[(at, at + wait, at + wait, 1) for at, wait in waits.items()]), start_s=2.0)
    assert measured.row["requests_judged"] == 3
    assert measured.ttft_s.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert measured.row["ttft_attainment"] == 1.0
    assert measured.row["goodput_rps"] == pytest.approx(3 / 8.0)


def test_joules_are_split_by_phase_and_by_bucket() -> None:
    row = figures(requests((0.0, 0.1, 0.1, 1))).row
    assert row["prefill_energy_j"] == 127.0
    assert row["decode_energy_j"] == 1270.0
    assert row["idle_energy_j"] == 220.0
    assert row["switching_energy_j"] == 33.0
    assert row["loading_energy_j"] == 44.0
    assert row["unallocated_energy_j"] == 500.0
    assert row["total_energy_j"] == 127.0 + 1270.0 + 500.0
    assert row["mean_power_w"] == pytest.approx(189.7)
    assert row["prefill_j_per_token"] == 0.5
    assert row["decode_j_per_token"] == 2.0
    assert row["gpus_used"] == pytest.approx(6.0)
    assert (row["prefill_iterations"], row["decode_iterations"], row["clock_changes"]) == (5, 70, 11)


def test_gaps_are_neither_judged_nor_part_of_the_time() -> None:
    ledger = requests(*((at_s, at_s + 0.25, at_s + 1.0, 5) for at_s in (1.0, 4.0, 5.5, 6.0, 10.0)))
    counted = Counted(1.0, 10.0, instances(), gaps=((2.0, 4.0), (5.0, 6.0)))
    assert counted.seconds == 6.0
    assert counted.judges(ledger.arrival_s).tolist() == [True, True, False, True, True]
    row = measure(ledger, counted, SLO).row
    assert row["requests_judged"] == 4
    assert row["mean_power_w"] == pytest.approx(float(row["total_energy_j"]) / 6.0)


def test_what_was_booked_before_the_warm_ups_end_is_not_counted() -> None:
    early = instances(
        now_s=2.0,
        is_prefill=np.array([True]),
        tp=np.array([2]),
        energy_j=np.array([[27.0, 0.0, 0.0, 0.0]]),
        time_s=np.array([[2.0, 0.0, 0.0, 0.0]]),
        iterations=np.array([1]),
        prompt_tokens=np.array([54]),
        output_tokens=np.array([0]),
        clock_changes=np.array([1]),
        unallocated_j=100.0,
    )
    row = figures(requests((5.0, 5.1, 5.1, 1)), start_s=2.0, energy=instances().since(early)).row
    assert row["prefill_energy_j"] == 100.0
    assert row["decode_energy_j"] == 1270.0
    assert row["unallocated_energy_j"] == 400.0
    assert row["prefill_j_per_token"] == 0.5
    assert (row["prefill_iterations"], row["clock_changes"]) == (4, 10)
    assert row["gpus_used"] == pytest.approx((2 * 8.0 + 4 * 10.0) / 8.0)


def test_a_figure_without_anything_to_measure_is_nan() -> None:
    silent = instances(prompt_tokens=np.zeros(2, int), output_tokens=np.zeros(2, int))
    row = figures(requests((0.0, 0.1, 0.1, 1)), start_s=5.0, energy=silent).row
    names = ("ttft_p99_s", "tpot_p50_s", "joint_attainment", "prefill_j_per_token", "decode_j_per_token")
    assert all(math.isnan(row[name]) for name in names)
    assert row["requests_judged"] == 0
    instant = figures(requests((5.0, 5.1, 5.1, 1)), start_s=5.0, end_s=5.0).row
    assert math.isnan(instant["mean_power_w"])
    assert math.isnan(instant["goodput_rps"])
    assert instant["ttft_p50_s"] == pytest.approx(0.1)
