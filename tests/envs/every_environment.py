"""The registered environments, and short episodes of them for tests."""

from __future__ import annotations

from typing import Any

import gymnasium

import biscale_gym  # noqa: F401 - registers them

# Live-v0 runs on real time.
IDS = sorted(name for name in gymnasium.registry if name.startswith("BiScale/") and "/Live-" not in name)


QUICK_TABLE = {"requests_per_probe": 200, "probe_warmup_s": 1.0, "rate_tolerance": 0.2}
"""Class tables that are measured in a moment."""


def short(env_id: str, **settings: Any) -> dict[str, Any]:
    """Settings of an environment for an episode of seconds on ``smoke``; ``settings`` are added."""
    few_seconds = {"scenario": "smoke", "episode_s": 3.0, "warmup_s": 1.0}
    if "Placement" in env_id:
        few_seconds |= {**QUICK_TABLE, "overrides": {"window_s": 1.5}}
    return {**few_seconds, **settings}
