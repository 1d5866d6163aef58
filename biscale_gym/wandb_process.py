"""The process that holds a W&B run: reads calls as lines of JSON, makes them, and finishes when its input ends.

Started by ``wandb_run`` as a script, so that it imports nothing of the package. Standard output carries one report as
JSON; what goes wrong goes to standard error and ends the process with status 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

STEP = "global_step"
_ORPHANED = 255
"""Exit status of a run whose own process ended without a word."""


class Held:
    """The run and the calls that can be made to it."""

    def __init__(self) -> None:
        self.run: Any = None
        self.closed = False
        self._finish_s = 0.0

    def start(
        self,
        kind: str,
        name: str,
        group: str | None,
        tags: Sequence[str],
        project: str,
        run_id: str,
        folder: str,
        diff: str | None,
        watched_pid: int,
        start_s: float,
        finish_s: float,
    ) -> None:
        """Begins the run; offline if there is no key, if ``WANDB_MODE`` says so, or if the server does not answer."""
        place = Path(folder) / "wandb"
        place.mkdir(exist_ok=True)
        # wandb would move on to a temporary folder that nobody finds again.
        tempfile.TemporaryFile(dir=place).close()
        # Artifacts wait here for an upload: with the run, not in the home directory.
        os.environ["WANDB_DATA_DIR"] = str(place)
        import wandb

        def begin(mode: Literal["online", "offline", "disabled"]) -> Any:
            settings = wandb.Settings(
                root_dir=folder,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                symlink=False,
                init_timeout=start_s,
                finish_timeout=finish_s,
                x_stats_pid=watched_pid,
            )
            return wandb.init(
                project=project,
                id=run_id,
                name=name,
                group=group,
                tags=list(tags),
                job_type=kind,
                resume="allow",
                mode=mode,
                settings=settings,
            )

        mode = _mode()
        try:
            self.run = begin(mode)
        except Exception as error:  # a server that refuses, is away or does not answer: what is logged is kept
            if mode != "online":
                raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            wandb.teardown()
            self.run = begin("offline")
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        if diff is not None:
            shutil.copyfile(diff, Path(self.run.dir) / "diff.patch")
            self.run.save(str(Path(self.run.dir) / "diff.patch"), base_path=self.run.dir, policy="now")

    def config(self, values: Mapping[str, Any]) -> None:
        """Updates the config; a key may change."""
        self.run.config.update(values, allow_val_change=True)

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Logs figures, or media, with the step that they are drawn over."""
        self.run.log({**metrics, **({} if step is None else {STEP: step})})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Logs a table."""
        import wandb

        self.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def figure(self, name: str, path: str, step: int | None) -> None:
        """Logs a picture."""
        import wandb

        self.log({name: wandb.Image(path)}, step)

    def artifact(self, path: str, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """Logs a file or a folder as an artifact; letters that its name cannot hold become dashes."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], type=kind, metadata=dict(metadata))
        if Path(path).is_dir():
            artifact.add_dir(path, skip_cache=True)
        else:
            artifact.add_file(path, skip_cache=True)
        self.run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Updates the summary."""
        self.run.summary.update(values)

    def close(self, exit_status: int) -> None:
        """Finishes the run."""
        self.closed = True
        self.run.finish(exit_code=exit_status)


def _mode() -> Literal["online", "offline", "disabled"]:
    """``WANDB_MODE`` where it forbids the network; else online if a key is configured, which nobody is asked for."""
    import wandb

    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "disabled":
        return "disabled"
    if wanted in {"offline", "dryrun"}:
        return "offline"
    return "online" if wandb.login(prompt=False) else "offline"


def main() -> None:
    """Makes the calls on standard input, in order."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    held = Held()
    for line in sys.stdin:
        arguments = json.loads(line)
        call = arguments.pop("call")
        getattr(held, call)(**arguments)
        if call == "start" and held.run is not None:
            settings = held.run.settings
            upload = settings.sync_dir if settings.mode == "offline" else None
            print(json.dumps({"upload": upload, "url": held.run.url}), file=reports)
    if held.run is not None and not held.closed:
        held.close(_ORPHANED)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
