"""What a run shows of itself: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from biscale_gym.training.evaluation import Score

LINE_EVERY_S = 30.0


class RunProgress:
    """Steps done, steps per second, mean reward of the last rollout, and the last evaluation.

    Args:
        console: where to.
        total_steps: of the run.
        done_steps: with which it begins.
    """

    def __init__(self, console: Console, total_steps: int, done_steps: int = 0) -> None:
        self._console = console
        self._total = total_steps
        self._first, self._began_s = done_steps, time.monotonic()
        self._told_s = self._began_s
        self._score = "not evaluated yet"
        self._bar = Progress(
            TextColumn("{task.fields[rate]:>7,.0f} steps/s"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>11,.0f} of {task.total:,.0f}"),
            TimeRemainingColumn(),
            TextColumn("reward {task.fields[reward]:+.4f} late {task.fields[late]:.2%}"),
            TextColumn("[bold]{task.fields[score]}"),
            console=console,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=done_steps, rate=0.0, reward=0.0, late=0.0, score=self._score
        )
        if console.is_terminal:
            self._bar.start()

    def step(self, steps: int, reward: float, late: float) -> None:
        """After an iteration: steps so far, mean reward per step, share of requests that were late."""
        now_s = time.monotonic()
        rate = (steps - self._first) / max(now_s - self._began_s, 1e-9)
        self._bar.update(self._task, completed=steps, rate=rate, reward=reward, late=late, score=self._score)
        if not self._console.is_terminal and now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            self.say(
                f"{steps:,} of {self._total:,} steps, {rate:,.0f} per second; reward {reward:+.4f}, "
                f"late {late:.2%}; {self._score}"
            )

    def evaluated(self, score: Score) -> None:
        """After an evaluation."""
        self._score = described(score)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._console.is_terminal:
            self._bar.stop()


def described(score: Score) -> str:
    """A score in a few words."""
    ratios = ", ".join(f"{100.0 * ratio:.2f} % of {name}" for name, ratio in score.ratios.items())
    energy = ratios or f"{score.energy:.3f} MJ"
    kept = "keeps the SLO" if score.keeps_slo else "does not keep the SLO"
    return f"energy {energy}; within the SLO {100.0 * score.attainment:.2f} %, {kept}"
