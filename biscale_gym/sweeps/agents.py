"""A sweep at Weights & Biases: ``wandb sweep`` and ``wandb agent``, which start the file's own command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from biscale_gym.sweeps.settings import SweepError, SweepSettings


def logged_in() -> bool:
    """Whether W&B is installed, ``WANDB_MODE`` allows the network, and a key is configured that the server takes."""
    if os.environ.get("WANDB_MODE", "online").lower() in {"offline", "dryrun", "disabled"}:
        return False
    try:
        import wandb

        return wandb.login(prompt=False)
    except ImportError:
        return False
    except Exception as error:  # no server, a wrong key: the sweep can still be run here
        print(f"W&B: {' '.join(str(error).split())}", file=sys.stderr)
        return False


def run_at_wandb(sweep: SweepSettings, project: str, count: int | None, say: Callable[[str], None] = print) -> int:
    """Makes the sweep, and runs ``count`` of its trials here; without ``count`` other agents can.

    Returns:
        The agent's exit status.

    Raises:
        SweepError: W&B does not take the sweep.
    """
    import wandb

    values = sweep.model_dump(mode="json", exclude_unset=True)
    project = sweep.project or project
    try:
        made = wandb.sweep(values, entity=sweep.entity, project=project)
    except Exception as error:  # wandb has no common class of what a server answers
        raise SweepError(f"W&B does not take the sweep: {' '.join(str(error).split())}") from error
    place = "/".join([*([sweep.entity] if sweep.entity else []), project, made])
    say(f"agents, here and elsewhere: wandb agent {place}")
    if count is None:
        return 0
    # The agent looks for the command where this interpreter's commands are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "wandb", "agent", "--count", str(count), place]
    return subprocess.run(command, env={**os.environ, "PATH": path}, check=False).returncode
