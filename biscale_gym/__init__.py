"""BiScale Gym: reinforcement learning for energy-efficient LLM serving. Importing it registers the environments."""

from biscale_gym._version import __version__
from biscale_gym.envs import register as _register

__all__ = ["__version__"]

_register()
