"""What ``biscale-gym train`` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from biscale_gym.config import replaced, validate
from biscale_gym.training.errors import TrainingError
from biscale_gym.training.run import SETTINGS, begin, load_settings, summary, train
from biscale_gym.training.settings import TrainingSettings
from biscale_gym.training.zoo import with_conf_file

RESULTS = Path("results/train")


def train_from(
    config: str,
    overrides: dict[str, Any],
    out: Path | None = None,
    conf_file: Path | None = None,
    wandb: str | None = None,
    tensorboard: bool = False,
) -> int:
    """Train, or go on with the run of a folder; returns the exit status: 0, or 128 + the signal that interrupted.

    Args:
        config: preset, YAML file, or a run's folder.
        overrides: dotted setting to value.
        out: the new run's folder; None: named by preset and seed, or by the run's id under a W&B agent.
        conf_file: hyper-parameters in RL Baselines3 Zoo's form.
        wandb: project at Weights & Biases.
        tensorboard: also write event files.

    Raises:
        ConfigError, TrainingError, TrackingError: something is not as it must be.
    """
    settings, folder = load_settings(config)
    if folder is not None:
        if overrides or out is not None or conf_file is not None:
            raise TrainingError(f"{folder} goes on as it began: --set, --out and --conf-file are for new runs")
    else:
        if conf_file is not None:
            settings = with_conf_file(settings, conf_file)
        if overrides:
            values = replaced(settings.model_dump(mode="json"), overrides, f"training preset {config!r}")
            settings = validate(TrainingSettings, values, f"training preset {config!r} with --set")
        folder = out if out is not None else RESULTS / f"{Path(config).stem}-{_agents_run() or settings.seed}"
        begin(settings, folder)
    return train(settings, folder, Console(stderr=True), wandb, tensorboard).status


def trial(config: str, overrides: dict[str, Any], folder: Path, wandb: str | None = None) -> dict[str, float]:
    """One trial of a search: a run in ``folder``, or what is left of it there, to its end; returns its summary.

    Raises:
        KeyboardInterrupt: a signal interrupted it.
        ConfigError, TrainingError: as ``train_from``.
    """
    if (folder / SETTINGS).exists():
        settings, _ = load_settings(str(folder))
    else:
        chosen, _ = load_settings(config)
        values = replaced(chosen.model_dump(mode="json"), overrides, f"training preset {config!r}")
        settings = validate(TrainingSettings, values, f"training preset {config!r} with a trial's settings")
        begin(settings, folder)
    result = train(settings, folder, Console(stderr=True), wandb)
    if result.status != 0:
        raise KeyboardInterrupt
    return summary(result)


def _agents_run() -> str | None:
    """The run's id under a W&B agent: its trials differ by more than their seed."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
