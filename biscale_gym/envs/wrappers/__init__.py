"""Wrappers: other actions, steps, observations and rewards, and episodes on record (docs/wrappers.md).

Those of native vector environments are in ``biscale_gym.envs.wrappers.vector``, under the same names.
"""

from biscale_gym.envs.wrappers.actions import ClockDeltas, ContinuousClocks
from biscale_gym.envs.wrappers.recording import RecordEpisode, Replay, ReplayError, replay
from biscale_gym.envs.wrappers.rewards import CostConstrained, EnergyPerRequest, SafetySteps, SlackShaping
from biscale_gym.envs.wrappers.steps import FrameSkip, History

__all__ = [
    "ClockDeltas",
    "ContinuousClocks",
    "CostConstrained",
    "EnergyPerRequest",
    "FrameSkip",
    "History",
    "RecordEpisode",
    "Replay",
    "ReplayError",
    "SafetySteps",
    "SlackShaping",
    "replay",
]
