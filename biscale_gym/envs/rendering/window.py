"""A window on the screen."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray

from biscale_gym.envs.errors import EnvironmentUsageError


class Window:
    """Shows frames at a steady rate.

    Args:
        fps: frames per second, at most.

    Raises:
        DependencyNotInstalled: pygame is missing.
    """

    def __init__(self, fps: int) -> None:
        try:
            import pygame
        except ImportError as error:
            raise DependencyNotInstalled(
                "render_mode 'human' needs pygame, which is not installed: pip install 'biscale-gym[render]'"
            ) from error
        self._pygame: Any = pygame
        self._fps = fps
        self._surface: Any = None
        self._clock: Any = None

    def show(self, frame: NDArray[np.uint8]) -> None:
        """Show uint8[height, width, 3].

        Raises:
            EnvironmentUsageError: there is no screen.
        """
        pygame = self._pygame
        if self._surface is None:
            try:
                pygame.display.init()
                self._surface = pygame.display.set_mode((frame.shape[1], frame.shape[0]))
            except pygame.error as error:
                raise EnvironmentUsageError(
                    f"render_mode 'human' found no screen ({error}); use 'rgb_array', or set SDL_VIDEODRIVER=dummy"
                ) from error
            pygame.display.set_caption("BiScale Gym")
            self._clock = pygame.time.Clock()
        pygame.surfarray.blit_array(self._surface, frame.swapaxes(0, 1))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(self._fps)

    def close(self) -> None:
        """Close the window, if it is open."""
        if self._surface is not None:
            self._pygame.display.quit()
            self._surface = None
