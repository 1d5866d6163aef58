"""The functions behind ``biscale-gym trace``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from biscale_gym.traces import Trace, TraceError, read_trace
from biscale_gym.traces.commands import describe, describe_file, generate_file, list_published


def test_generate_then_describe(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    trace = generate_file("azure-conv-like", None, 700.0, 3, path)
    assert trace.rate_rps == pytest.approx(5.53, rel=0.1)
    assert read_trace(path).hash == trace.hash
    text = describe_file(path)
    for piece in ("requests/s", "inter-arrival CV", "index of dispersion, 300 s", "prompt tokens", trace.hash):
        assert piece in text
    markdown = describe_file(path, style="markdown")
    assert markdown.startswith("| | |\n|---|---|\n| name | conv |")


def test_a_rate_must_come_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="'sharegpt-like' has no native rate"):
        generate_file("sharegpt-like", None, 10.0, 0, tmp_path / "x.csv")


def test_describing_one_request_leaves_out_what_it_has_not() -> None:
    text = describe(Trace(np.array([0.0]), np.array([5]), np.array([6]), "one"))
    assert "mean rate         -" in text
    assert "dispersion" not in text


def test_the_catalogue_is_listed() -> None:
    assert "burstgpt" in list_published()
