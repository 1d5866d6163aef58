"""What an iteration costs: latency, power, clock switching, KV memory and transfer."""

from biscale_gym.profiles.loading import load_profile
from biscale_gym.profiles.profile import Profile, ProfileError
from biscale_gym.profiles.settings import HardwareSettings, ModelSettings, SwitchingSettings, TransferSettings

__all__ = [
    "HardwareSettings",
    "ModelSettings",
    "Profile",
    "ProfileError",
    "SwitchingSettings",
    "TransferSettings",
    "load_profile",
]
