"""The Lagrangian multiplier: what a late request costs, so that no more than a limit of them are late."""

from __future__ import annotations

from biscale_gym.training.settings import ConstraintSettings


class Multiplier:
    """Dual ascent on: least energy, such that the share of late requests is at most ``limit``.

    After each rollout, multiplier += learning_rate x min(late / limit - 1, most_excess), within 0 and ``highest``
    (Altman, "Constrained Markov decision processes", 1999; Ray, Achiam, Amodei, "Benchmarking safe exploration", 2019,
    without its softplus). The share is that of the rollout's requests, under the policy that made it.

    Args:
        settings: of the constraint.
    """

    def __init__(self, settings: ConstraintSettings) -> None:
        self._settings = settings
        self.value = settings.penalty
        self.late_share = 0.0

    def update(self, violations: float, completed: float) -> None:
        """Learn from a rollout: requests that broke their SLO, and requests that were completed."""
        if completed <= 0.0:
            return
        settings = self._settings
        self.late_share = violations / completed
        excess = min(self.late_share / settings.limit - 1.0, settings.most_excess)
        self.value = min(max(0.0, self.value + settings.learning_rate * excess), settings.highest)
