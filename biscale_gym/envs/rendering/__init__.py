"""Pictures of the last seconds: clock, queue, batch, power and slack of every instance.

Imported only where an environment is made with a render mode; matplotlib and pygame only where they draw.
"""

from biscale_gym.envs.rendering.renderer import Renderer

__all__ = ["Renderer"]
