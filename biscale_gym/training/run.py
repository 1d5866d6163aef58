"""A training run: from settings to an evaluated model, through any number of interruptions.

SB3's own ``learn`` makes the iterations; at each border between two of them, where a checkpoint is exact, the run does
all the rest.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from rich.console import Console
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from biscale_gym.config import load_preset
from biscale_gym.envs.shield import NO_SHIELD
from biscale_gym.tracking import open_tracker
from biscale_gym.training import checkpoint as checkpoints
from biscale_gym.training.algorithms import find_algorithm, make_model
from biscale_gym.training.constraint import Multiplier
from biscale_gym.training.environments import LanesVecEnv, make_lanes
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.evaluation import Evaluator, Score
from biscale_gym.training.export import export_model
from biscale_gym.training.models import load_model, save_model
from biscale_gym.training.pictures import track_pictures
from biscale_gym.training.progress import RunProgress, described
from biscale_gym.training.settings import TrainingSettings
from biscale_gym.training.warm_start import clone

SETTINGS, RESULT = "settings.yaml", "result.json"
CHECKPOINTS, BEST, FINAL = "checkpoints", "best", "final"
RATES = ("steps_per_s", "steps_per_cpu_s")


@dataclass
class Progress:
    """What of a run goes into its checkpoints, beside model and lanes.

    Attributes:
        next_evaluation: the step from which on the next evaluation is due.
        evaluated_at: the step of the last one; -1: none.
        score: its score, as JSON.
        best_at, best: the best model's.
        not_better: evaluations in a row without a better model.
        multiplier, late_share: of the constraint.
        seconds, cpu_seconds: of wall and of processor time spent.
        run_id: of the W&B run.
        cloned: how the warm start went; None: it has not been.
    """

    next_evaluation: int
    evaluated_at: int = -1
    score: dict[str, Any] | None = None
    best_at: int = -1
    best: dict[str, Any] | None = None
    not_better: int = 0
    multiplier: float = 0.0
    late_share: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    run_id: str | None = None
    cloned: dict[str, float] | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        status: 0: done; 143 or 130: interrupted by SIGTERM or SIGINT, to be resumed.
        steps: environment steps made.
        steps_per_s, steps_per_cpu_s: of wall and of processor time over all sessions of the run, the lanes' first
            episodes, evaluations and checkpoints included, imports and references not.
        final, best: scores; None: the run was interrupted, or never evaluated.
        best_at: the best model's step.
        early: whether it stopped early.
    """

    status: int
    steps: int
    steps_per_s: float
    steps_per_cpu_s: float
    final: Score | None
    best: Score | None
    best_at: int
    early: bool = False


class _Stop(Exception):
    """Ends ``learn`` at a border."""


class _Borders(BaseCallback):
    """Calls ``border`` between an iteration's update and the next one's rollout."""

    def __init__(self, border: Callable[[], None]) -> None:
        super().__init__()
        self._border = border

    def _on_rollout_start(self) -> None:
        self._border()

    def _on_step(self) -> bool:
        return True


@contextlib.contextmanager
def _undisturbed(model: BaseAlgorithm) -> Iterator[None]:
    """Leaves every random generator as it was."""
    values, tensors = checkpoints.random_states(model)
    try:
        yield
    finally:
        checkpoints.set_random_states(model, values, tensors)


@contextlib.contextmanager
def _signals(noted: list[int]) -> Iterator[None]:
    """Notes SIGTERM and SIGINT instead of dying of them; the second one is not waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """One session of a training run in a folder.

    Args:
        settings: of the run.
        folder: of everything that it leaves.
        console: for messages and progress.
        wandb: project at Weights & Biases; None for none.
        tensorboard: also write event files.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        console: Console,
        wandb: str | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._console = console
        self._wandb, self._tensorboard = wandb, tensorboard
        self._noted: list[int] = []
        self._early = False
        self._written_s = time.monotonic()
        self._bordered_at = -1
        self._reported_at = 0
        torch.set_num_threads(settings.threads)
        _check(settings)
        self._lanes: LanesVecEnv = make_lanes(settings)
        self._model: BaseAlgorithm = make_model(settings, self._lanes)
        self._model.set_logger(Logger(None, []))
        self._evaluator = Evaluator(settings)
        self._multiplier: Multiplier | None = None
        if settings.constraint is not None and settings.constraint.kind == "lagrangian":
            self._multiplier = Multiplier(settings.constraint)
            self._lanes.multiplier = self._multiplier.value
        self._state = Progress(next_evaluation=settings.evaluation.every_steps)
        self._resumed: checkpoints.Checkpoint | None = None
        self._restore()

    @property
    def steps(self) -> int:
        """Environment steps made so far."""
        return int(self._model.num_timesteps)

    def _restore(self) -> None:
        newest = checkpoints.latest(self._folder / CHECKPOINTS)
        if newest is None:
            return
        self._resumed = checkpoints.read(newest)
        checkpoints.restore(self._resumed, self._model, self._lanes)
        self._state = Progress(**self._resumed.values["run"])
        if self._multiplier is not None:
            self._multiplier.value, self._multiplier.late_share = self._state.multiplier, self._state.late_share
            self._lanes.multiplier = self._multiplier.value
        self._bordered_at = self._reported_at = self.steps
        self._console.print(f"going on from step {self.steps:,} ({newest})", highlight=False, soft_wrap=True)

    def run(self) -> Result:
        """Train to the end, or to a signal."""
        settings = self._settings
        with (
            _signals(self._noted),
            open_tracker(
                self._folder,
                kind="train",
                name=self._folder.name,
                group=settings.env_id,
                wandb=self._wandb,
                tensorboard=self._tensorboard,
                resume=self._state.run_id,
            ) as self._tracker,
        ):
            self._state.run_id = self._tracker.run_id
            self._tracker.config(settings.model_dump(mode="json"))
            self._set_load()
            self._references()
            self._began_s = time.monotonic() - self._state.seconds
            self._began_cpu_s = time.process_time() - self._state.cpu_seconds
            self._progress = RunProgress(self._console, settings.total_steps, self.steps)
            try:
                return self._learn()
            finally:
                self._progress.close()

    def _references(self) -> None:
        """Play the references, or read what they did, before the clock of the first iteration runs."""
        for scenario, played in self._evaluator.references().items():
            for name, one in played.items():
                self._tracker.log(
                    {"energy_mj": sum(one.energy_j) / len(one.energy_j) / 1e6, "attainment": one.attainment},
                    0,
                    group=f"references/{scenario}/{name}",
                )

    def _learn(self) -> Result:
        settings, state = self._settings, self._state
        if settings.warm_start is not None and state.cloned is None:
            state.cloned = clone(settings, self._model, self._lanes)
            self._tracker.log(state.cloned, 0, group="warm_start")
            agreement = f"{state.cloned['agreement']:.1%}"
            self._progress.say(f"warm start: decides as {settings.warm_start.controller} in {agreement} of all cases")
        left = settings.total_steps - self.steps
        try:
            if left > 0:
                learn: Any = self._model.learn
                fresh = self._resumed is None
                learn(left, callback=_Borders(self._border), log_interval=None, reset_num_timesteps=fresh)
            self._border()
        except _Stop:
            pass
        if self._noted:
            return self._interrupted()
        return self._finished()

    # -- borders -------------------------------------------------------------------------------------------------------

    def _border(self) -> None:
        """Between two iterations: learn the multiplier, report, evaluate, write a checkpoint, stop."""
        if self._resumed is not None:
            # Now nothing draws from the generators but the iterations to come, as when the checkpoint was written.
            checkpoints.set_generators(self._resumed, self._model)
            self._resumed = None
        if self.steps != self._bordered_at:
            self._bordered_at = self.steps
            self._after_iteration()
        stops = bool(self._noted) or self._early
        due = time.monotonic() - self._written_s >= self._settings.checkpoint_every_s
        if self.steps > 0 and (due or stops):
            self._write()
        if stops:
            raise _Stop
        self._set_load()

    def _after_iteration(self) -> None:
        settings, state = self._settings, self._state
        if self.steps == 0:
            if settings.warm_start is not None:
                self._evaluate()
            return
        totals = self._lanes.totals
        if self._multiplier is not None:
            self._multiplier.update(totals["violations"], totals["completed"])
            self._lanes.multiplier = self._multiplier.value
            state.multiplier, state.late_share = self._multiplier.value, self._multiplier.late_share
        on_policy = find_algorithm(settings.algorithm).on_policy
        if on_policy or self.steps - self._reported_at >= max(settings.evaluation.every_steps // 50, settings.lanes):
            self._report()
        if self.steps >= state.next_evaluation:
            state.next_evaluation = self.steps + settings.evaluation.every_steps
            self._evaluate()
            patience = settings.early_stop
            if patience is not None and self.steps >= patience.min_steps:
                self._early = state.not_better >= patience.patience

    def _report(self) -> None:
        totals, steps = self._lanes.totals, self.steps
        made = max(totals["steps"], 1.0)
        late = totals["violations"] / max(totals["completed"], 1.0)
        figures = {
            "reward": totals["reward"] / made,
            "late": late,
            "j_per_request": totals["energy_j"] / max(totals["completed"], 1.0),
            "simulated_s": totals["dt_s"],
            **dict(zip(RATES, self._rates(), strict=True)),
        }
        if self._multiplier is not None:
            figures["multiplier"] = self._multiplier.value
        if self._settings.curriculum is not None:
            figures["load_low"], figures["load_high"] = self._load()
        learner = {
            name.removeprefix("train/"): float(value) for name, value in self._model.logger.name_to_value.items()
        }
        self._model.logger.dump(steps)
        self._tracker.log({**learner, **figures}, steps, group="train")
        self._progress.step(steps, figures["reward"], late)
        self._lanes.begin_tally()
        self._reported_at = steps

    def _evaluate(self) -> None:
        state, steps = self._state, self.steps
        with _undisturbed(self._model):
            score = self._evaluator.score(self._model)
        self._tracker.log(score.figures(), steps, group=self._settings.evaluation.split)
        self._progress.evaluated(score)
        better = state.best is None or score.rank > Score(**state.best).rank
        state.evaluated_at, state.score = steps, score.values()
        state.not_better = 0 if better else state.not_better + 1
        if better:
            state.best_at, state.best = steps, score.values()
            self._save(BEST, score)
        assert state.best is not None
        self._tracker.log(_amounts(Score(**state.best)), steps, group="best")
        self._progress.say(f"step {steps:,}: {described(score)}{'; the best so far' if better else ''}")

    def _save(self, name: str, score: Score) -> None:
        about = {"step": self.steps, "score": score.values(), "split": self._settings.evaluation.split}
        save_model(self._folder / name, self._model, self._settings, about)

    def _write(self) -> None:
        self._state.seconds = time.monotonic() - self._began_s
        self._state.cpu_seconds = time.process_time() - self._began_cpu_s
        taken = checkpoints.taken(self._model, self._lanes, asdict(self._state))
        checkpoints.write(self._folder / CHECKPOINTS, taken, self.steps)
        self._written_s = time.monotonic()

    def _load(self) -> tuple[float, float]:
        """The range of loads that the curriculum has come to."""
        curriculum = self._settings.curriculum
        assert curriculum is not None
        low, high = self._settings.env.get("load", (1.0, 1.0))
        way = min(1.0, self.steps / (curriculum.over * self._settings.total_steps))
        start_low, start_high = curriculum.load
        return start_low + way * (low - start_low), start_high + way * (high - start_high)

    def _set_load(self) -> None:
        if self._settings.curriculum is not None:
            self._lanes.set_load(*self._load())

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _rates(self) -> tuple[float, float]:
        """Steps per second of wall and of processor time, as ``RATES`` names them."""
        spent_s, spent_cpu_s = time.monotonic() - self._began_s, time.process_time() - self._began_cpu_s
        return self.steps / max(spent_s, 1e-9), self.steps / max(spent_cpu_s, 1e-9)

    def _interrupted(self) -> Result:
        self._progress.say(f"stopped at step {self.steps:,}; to go on: biscale-gym train {self._folder}")
        return Result(128 + self._noted[0], self.steps, *self._rates(), None, None, self._state.best_at)

    def _finished(self) -> Result:
        state = self._state
        if state.evaluated_at != self.steps:
            self._evaluate()
        assert state.score is not None
        assert state.best is not None
        final, best = Score(**state.score), Score(**state.best)
        self._save(FINAL, final)
        result = Result(0, self.steps, *self._rates(), final, best, state.best_at, self._early)
        models = {name: load_model(self._folder / name) for name in (BEST, FINAL)}
        for name, score in ((BEST, best), (FINAL, final)):
            made = {"step": self.steps if name == FINAL else state.best_at, "score": score.values()}
            export_model(models[name], self._settings, self._folder / name, made)
            self._tracker.artifact(self._folder / name, "model", name, {"step": self.steps, **score.figures()})
        columns = list(next(iter(best.scenarios.values())))
        rows = [
            [name, scenario, *(figures[column] for column in columns)]
            for name, score in ((BEST, best), (FINAL, final))
            for scenario, figures in score.scenarios.items()
        ]
        self._tracker.table("scenarios", ["model", "scenario", *columns], rows, self.steps)
        rates = {name: getattr(result, name) for name in RATES}
        self._tracker.summary({**summary(result), "best_at": state.best_at, **rates})
        checkpoints.replace_file(self._folder / RESULT, asdict(result))
        self._progress.say(f"best (step {state.best_at:,}): {described(best)}; models: {self._folder}")
        if self._wandb is not None or self._tensorboard:
            track_pictures(self._tracker, self._settings, models[BEST], state.best_at)
        return result


def _amounts(score: Score) -> dict[str, float]:
    """What a score comes to, flat."""
    return {
        "objective": score.objective,
        "energy": score.energy,
        "attainment": score.attainment,
        "keeps_slo": float(score.keeps_slo),
        "return": score.mean_return,
    }


def summary(result: Result) -> dict[str, float]:
    """Figures of a run that is done, ``best/objective`` and so on, as trackers and searches take them."""
    scores = {"best": result.best, "final": result.final}
    return {
        f"{name}/{figure}": value
        for name, score in scores.items()
        if score is not None
        for figure, value in _amounts(score).items()
    }


def _check(settings: TrainingSettings) -> None:
    """Refuse what does not go together before anything is made."""
    algorithm = find_algorithm(settings.algorithm)
    lagrangian = settings.constraint is not None and settings.constraint.kind == "lagrangian"
    if lagrangian and not algorithm.on_policy:
        raise TrainingError(
            f"constraint.kind lagrangian: {settings.algorithm} learns from rewards of older multipliers; "
            "use penalty, or an on-policy algorithm"
        )
    if algorithm.recurrent and settings.shield != NO_SHIELD:
        raise TrainingError(
            f"shield: a policy of {settings.algorithm} is evaluated by itself, its state is not a shield's; remove it"
        )
    if lagrangian and any(wrapper.name == "EnergyPerRequest" for wrapper in settings.wrappers):
        raise TrainingError("constraint and the wrapper EnergyPerRequest both price violations; keep one of them")


def load_settings(config: str) -> tuple[TrainingSettings, Path | None]:
    """(settings, the run's folder if ``config`` is one) of a preset, a YAML file, or the folder of a run.

    Raises:
        ConfigError: no such preset or file, or a fault in it.
        TrainingError: a folder that holds no run.
    """
    folder = Path(config)
    if not folder.is_dir():
        return load_preset(TrainingSettings, "training", config), None
    if not (folder / SETTINGS).is_file():
        raise TrainingError(f"{folder} holds no training run ({SETTINGS} is missing)")
    return load_preset(TrainingSettings, "training", str(folder / SETTINGS)), folder


def begin(settings: TrainingSettings, folder: Path) -> None:
    """Claim a folder for a new run.

    Raises:
        TrainingError: it holds a run already.
    """
    if (folder / SETTINGS).exists():
        raise TrainingError(
            f"{folder} holds a run already: biscale-gym train {folder} goes on with it, another --out begins a new one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def read_result(folder: Path) -> Result:
    """How the run of a folder ended.

    Raises:
        TrainingError: it has not ended.
    """
    try:
        told = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder}: no training run that is done ({error})") from error
    return Result(**{**told, "final": Score(**told["final"]), "best": Score(**told["best"])})


def train(
    settings: TrainingSettings,
    folder: Path,
    console: Console | None = None,
    wandb: str | None = None,
    tensorboard: bool = False,
) -> Result:
    """Train in a folder that ``begin`` has claimed, from its last checkpoint on if it has one.

    Raises:
        TrainingError: settings that do not go together, or a checkpoint that cannot be read.
        ConfigError, ControllerError, EnvironmentUsageError: as making the environments and references.
    """
    shown = console if console is not None else Console(stderr=True)
    if (folder / RESULT).exists():
        shown.print(f"{folder}: this run is done", markup=False, highlight=False, soft_wrap=True)
        return read_result(folder)
    return Run(settings, folder, shown, wandb, tensorboard).run()
