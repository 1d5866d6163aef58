from __future__ import annotations

import pytest

from biscale_gym.profiles import Profile, load_profile


@pytest.fixture(scope="session")
def bf16() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "bf16")


@pytest.fixture(scope="session")
def fp8() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
