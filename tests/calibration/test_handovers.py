"""Requests one at a time: overhead, launch latency, bandwidth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from biscale_gym.calibration.handovers import COLUMNS, read_handovers
from biscale_gym.profiles import ProfileError


def written(path: Path, rows: list[tuple[float, ...]]) -> Path:
    path.write_text("\n".join([",".join(COLUMNS), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_medians_and_slope_survive_disturbed_requests(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number, tokens in enumerate(range(50, 1050, 50)):
        disturbed = 40.0 if number % 7 == 0 else 0.0
        prefill_ms = 10 + 0.02 * tokens
        rows.append((tokens, prefill_ms + 3.0 + disturbed, prefill_ms, 5 + 0.004 * tokens + disturbed))
    found = read_handovers(written(tmp_path / "h.csv", [rows[i] for i in rng.permutation(len(rows))]))
    assert found.requests == 20
    assert found.overhead_ms == pytest.approx(3.0)
    assert found.ms_per_token == pytest.approx(0.004, rel=0.1)
    assert found.launch_ms == pytest.approx(5.0, abs=0.1)
    transfer = found.transfer(2048, 2, 0.5)
    assert transfer.launch_latency_s == pytest.approx(1e-3 * (found.launch_ms - 0.5))
    assert transfer.rdma_gb_per_s == transfer.nvlink_gb_per_s
    moved_s = transfer.transfer_s(2048 * 1000, 2, 2) - transfer.launch_latency_s
    assert moved_s == pytest.approx(1e-3 * found.ms_per_token * 1000)


def test_no_slope_is_no_limit(tmp_path: Path) -> None:
    found = read_handovers(written(tmp_path / "h.csv", [(tokens, 12.0, 10.0, 6.0) for tokens in (10, 20, 30, 40)]))
    assert found.ms_per_token == 0.0
    transfer = found.transfer(2048, 2, 7.0)
    assert transfer.rdma_gb_per_s is None
    assert transfer.launch_latency_s == 0.0, "never negative"


def test_faults_name_file_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    good = (10.0, 12.0, 10.0, 6.0)
    for rows, message in (
        ([good, (10.0, "x", 10.0, 6.0)], r"h.csv:3: ttft_ms: 'x' is not a number"),
        ([good, (10.0, 12.0, 10.0)], r"h.csv:3: handover_ms: '' is not a number"),
        ([(10.0, 12.0, "nan", 6.0)], r"h.csv:2: prefill_ms: 'nan' must be finite"),
        ([good], r"1 requests, at least 4"),
    ):
        with pytest.raises(ProfileError, match=message):
            read_handovers(written(path, rows))  # type: ignore[arg-type]
    path.write_text("ttft_ms\n")
    with pytest.raises(ProfileError, match=r"h.csv:1: expected the columns prompt_tokens, ttft_ms"):
        read_handovers(path)
