"""BiScale Gym: reinforcement learning for energy-efficient LLM serving."""

__version__ = "0.1.0"
