"""What tests of the environments share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from biscale_gym.traces import generate, load_workload


@pytest.fixture(scope="session")
def recorded_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes at 20 requests/s as a CSV file."""
    trace = generate(load_workload("paper"), 20.0, 120.0, 7)
    path = tmp_path_factory.mktemp("traces") / "recorded.csv"
    rows = np.column_stack([trace.arrival_s, trace.prompt_tokens, trace.output_tokens])
    np.savetxt(
        path,
        rows,
        fmt=["%.9f", "%d", "%d"],
        delimiter=",",
        header="arrival_s,prompt_tokens,output_tokens",
        comments="",
    )
    return path
