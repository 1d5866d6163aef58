"""The profile that class tables are measured with."""

from __future__ import annotations

import pytest

from biscale_gym.profiles import Profile, load_profile


@pytest.fixture(scope="session")
def profile() -> Profile:
    """Llama 3.3 70B in fp8 on H100."""
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")
