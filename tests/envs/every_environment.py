"""The registered environments, and short episodes of them for tests."""

from __future__ import annotations

from typing import Any

import gymnasium

import biscale_gym  # noqa: F401 - registers them

# Live-v0 runs on real time.
IDS = sorted(name for name in gymnasium.registry if name.startswith("BiScale/") and "/Live-" not in name)


def short(**settings: Any) -> dict[str, Any]:
    """Settings of an episode of seconds; ``settings`` are added."""
    return {"scenario": "smoke", "episode_s": 3.0, "warmup_s": 1.0, **settings}
