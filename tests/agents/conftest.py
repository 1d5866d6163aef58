"""A small compiled profile and observation builders for policy tests."""

from __future__ import annotations

import numpy as np
import pytest

from biscale_gym.cluster import features
from biscale_gym.cluster.policy import MEMORY_SIZE

CLOCKS_MHZ = (705, 885, 1005, 1200, 1410, 1620, 1980)


@pytest.fixture(scope="session")
def profile():
    profiles = pytest.importorskip("biscale_gym.profiles")
    return profiles.load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


@pytest.fixture(scope="session")
def model(profile):
    """Compiled profile of a TP4 group over the default grid."""
    return profile.compile(4, CLOCKS_MHZ, 1024)


@pytest.fixture
def memory():
    return np.zeros(MEMORY_SIZE)


@pytest.fixture
def observe():
    """Build an observation from feature names; ``batches`` are (tokens, sum_sq, oldest_arrival_s) triples."""

    def build(batches=(), **values):
        obs = np.zeros(features.SIZE)
        obs[features.CLOCK_COUNT] = len(CLOCKS_MHZ)
        obs[features.KV_CAPACITY_TOKENS] = 600_000
        obs[features.TP] = 4
        for name, value in values.items():
            obs[getattr(features, name)] = value
        if batches:
            obs[features.BATCHES] = len(batches)
            obs[features.WORK_LEFT] = values.get("WORK_LEFT", 1.0)
            for j, batch in enumerate(batches):
                first = features.BATCH_FIRST + features.BATCH_STRIDE * j
                obs[first : first + 3] = batch
        return obs

    return build
