"""The process that holds a W&B run: reads calls as lines of JSON, makes them, and finishes when its input ends.

Started by ``wandb_run`` as a script, so that it imports nothing of the package. Standard output carries reports as
JSON: where the run is, and at the end the calls that W&B refused (a name, a file that is not there). Anything else that
goes wrong ends the process with status 1 and a line on standard error.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Mode = Literal["online", "offline", "disabled"]
STEP = "global_step"
_ORDERLY = 0.8
"""Share of the time at the end after which wandb gives up by itself; past all of it this process is killed."""
_UNSAVED_S = 1.0
"""What a service that is killed may take with it."""
_LONGEST_TAG, _LONGEST_NAME = 64, 100
"""Letters: W&B's limit of a tag, and of a table's or artifact's name less what it puts before."""
_REFUSED = (ValueError, TypeError, FileNotFoundError)
_ORPHANED = 255
"""Exit status of a run whose own process ended without a word."""


class Held:
    """The run and the calls that can be made to it."""

    def __init__(self) -> None:
        self.run: Any = None
        self.closed = False
        self._mode: Mode = "disabled"
        self._why = ""
        self._unreachable = False

    def start(
        self,
        kind: str,
        name: str,
        group: str | None,
        tags: Sequence[str],
        project: str,
        run_id: str,
        offline: bool,
        folder: str,
        revision: str | None,
        diff: str | None,
        watched_pid: int,
        start_s: float,
        finish_s: float,
    ) -> None:
        """Begins the run; offline if asked, or if there is no key or no server that takes it."""
        place = Path(folder) / "wandb"
        place.mkdir(exist_ok=True)
        # wandb would move on to a temporary folder that nobody finds again.
        tempfile.TemporaryFile(dir=place).close()
        # Artifacts wait here for an upload: with the run, not in the home directory.
        os.environ["WANDB_DATA_DIR"] = str(place)
        import wandb

        def begin(mode: Mode) -> Any:
            settings = wandb.Settings(
                root_dir=folder,
                console="off",
                silent=True,
                disable_git=True,
                git_commit=revision,
                save_code=False,
                symlink=False,
                init_timeout=start_s,
                finish_timeout=_ORDERLY * finish_s,
                finish_timeout_raises=True,
                x_stats_pid=watched_pid,
                x_transaction_log_flush_interval=_UNSAVED_S,
            )
            return wandb.init(
                project=project,
                id=run_id,
                name=name,
                group=group,
                tags=[tag[:_LONGEST_TAG] for tag in tags],
                job_type=kind,
                resume="allow",
                mode=mode,
                settings=settings,
            )

        self._mode, self._why, self._unreachable = ("offline", "as asked", False) if offline else _mode(start_s)
        try:
            self.run = begin(self._mode)
        except Exception as error:  # a server that refuses, is away or does not answer: what is logged is kept
            if self._mode != "online":
                raise
            self._mode, self._why, self._unreachable = "offline", _told(error), True
            self.run = begin("offline")
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        if diff is not None:
            Path(self.run.dir).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(diff, Path(self.run.dir) / "diff.patch")
            self.run.save(str(Path(self.run.dir) / "diff.patch"), base_path=self.run.dir, policy="now")

    def report(self) -> dict[str, Any]:
        """Where the run is: ``folder`` on disk, ``url`` if online, ``why`` if not, and if the server is to blame."""
        online, disabled = self._mode == "online", self._mode == "disabled"
        folder = None if disabled else self.run.settings.sync_dir
        return {
            "folder": folder,
            "url": self.run.url if online else None,
            "why": self._why,
            "unreachable": self._unreachable,
        }

    def config(self, values: Mapping[str, Any]) -> None:
        """Updates the config; a key may change."""
        self.run.config.update(values, allow_val_change=True)

    def log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Logs figures, or media, with the step that they are drawn over."""
        self.run.log({**metrics, **({} if step is None else {STEP: step})})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Logs a table."""
        import wandb

        self.log({name[:_LONGEST_NAME]: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def figure(self, name: str, path: str, step: int | None) -> None:
        """Logs a picture."""
        import wandb

        self.log({name: wandb.Image(path)}, step)

    def artifact(self, path: str, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """Logs a file or a folder as an artifact; letters that its name cannot hold become dashes."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:_LONGEST_NAME], type=kind, metadata=dict(metadata))
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


def _mode(start_s: float) -> tuple[Mode, str, bool]:
    """How to run, why offline, and whether that is for want of a server that takes the key.

    Nobody is asked for a key, and the server has ``start_s`` to answer.
    """
    import wandb

    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "disabled":
        return "disabled", "", False
    if wanted in {"offline", "dryrun"}:
        return "offline", f"WANDB_MODE={wanted}", False
    answers: queue.Queue[bool | Exception] = queue.Queue()

    def log_in() -> None:
        try:
            answers.put(wandb.login(prompt=False))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=log_in, daemon=True).start()
    try:
        answer = answers.get(timeout=start_s)
    except queue.Empty:
        return "offline", f"no answer from {wandb.setup().settings.base_url} within {start_s:g} s", True
    if isinstance(answer, Exception):
        return "offline", _told(answer), True
    return ("online", "", False) if answer else ("offline", "no key is configured", False)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    """Makes the calls on standard input, in order."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    held = Held()
    refused: list[str] = []
    for line in sys.stdin:
        arguments = json.loads(line)
        call = arguments.pop("call")
        try:
            getattr(held, call)(**arguments)
        except _REFUSED as error:
            if held.run is None:
                raise
            refused.append(_told(error))
        if call == "start":
            print(json.dumps(held.report()), file=reports)
    if not held.closed:
        held.close(_ORPHANED)
    print(json.dumps({"refused": len(refused), "first": refused[:1]}), file=reports)
    # Past wandb's own clean-up, which waits for as long as a server does not answer.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(_told(error), file=sys.stderr, flush=True)
        os._exit(1)
