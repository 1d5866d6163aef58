"""Episodes of sparse traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest

import biscale_gym  # noqa: F401 - registers the environments


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A request every two minutes, for four hours."""
    rows = [f"{120.0 * n},{200 + n},{5 + n}" for n in range(121)]
    path = tmp_path / "sparse.csv"
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


@pytest.mark.parametrize("load", [1.0, 0.05])
def test_every_drawn_episode_counts_a_request(sparse: Path, load: float) -> None:
    env: Any = gymnasium.make(
        "BiScale/Prefill-v0", scenario="smoke", trace=str(sparse), episode_s=20.0, warmup_s=5.0, load=(load, load)
    )
    moved = 0
    for seed in range(30):
        _, info = env.reset(seed=seed)
        requests = env.unwrapped.episode.requests
        assert len(requests) >= 1
        assert requests.arrival_s[-1] >= 5.0 - 1e-9 or info["start_s"] == 0.0
        moved += abs(float(requests.arrival_s[0]) - 5.0) < 1e-6
    assert 15 < moved < 30


def test_a_stated_start_without_requests_is_refused(sparse: Path) -> None:
    env: Any = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", trace=str(sparse), episode_s=20.0, warmup_s=5.0)
    with pytest.raises(ValueError, match="no request"):
        env.reset(options={"start_s": 30.0})
