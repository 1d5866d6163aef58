"""What a run leaves behind as it goes: lines of JSON always, Weights & Biases and TensorBoard when asked.

A ``Tracker`` hands every call to each of its records. ``run.jsonl`` is written at once; W&B lives in a process of its
own behind a bounded queue (``wandb_run``), so that nothing there can stop or slow the caller. wandb, torch and
tensorboard are imported only when they are used.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

from biscale_gym.config import config_hash, nearest
from biscale_gym.fingerprint import dirty_diff, fingerprint
from biscale_gym.wandb_run import Limits, WandbRun, new_run

Kind = Literal["train", "evaluate", "compare", "sweep"]
STEP = "global_step"
"""Name of the step that every metric is drawn over."""
LINES = "run.jsonl"
DIFF = "diff.patch"
_NAMED_VERSIONS = ("gymnasium", "torch", "stable_baselines3", "sb3_contrib", "wandb", "tensorboard", "optuna")


class TrackingError(ValueError):
    """Run records that cannot be opened: an extra is missing, or the run's folder cannot be written."""


class Sink(Protocol):
    """One kind of run record. A call that raises ends this record, with a warning, and no other."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Settings and provenance, by dotted or nested key."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures at a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """A table of JSON values."""

    def figure(self, name: str, path: Path, step: int | None) -> None:
        """A picture that lies in the run's folder."""

    def artifact(self, path: Path, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """A file or folder to be kept under a name, as one of its versions."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the run amounts to."""

    def close(self, exit_status: int) -> None:
        """Ends the record."""


class Tracker:
    """The records of one run, as a context manager; an exception that leaves it ends them with status 1.

    Every call may be made at any time and returns at once; none raises for a record that fails.
    """

    def __init__(self, folder: Path, sinks: Mapping[str, Sink], run_id: str | None) -> None:
        self.folder = folder
        self.run_id = run_id
        """Id of the W&B run, to resume it with; None without W&B."""
        self.unreachable = False
        """Whether W&B had a key but, at the end, no server that took the run; further runs had better be offline."""
        self._sinks = dict(sinks)

    def config(self, values: Mapping[str, Any]) -> None:
        """Records the resolved settings, and their ``config_hash`` beside them."""
        plain = _plain(values)
        self._each("config", {**plain, "config_hash": config_hash(plain)})

    def log(self, metrics: Mapping[str, float], step: int, group: str | None = None) -> None:
        """Records figures at ``step`` (environment steps), under ``group/name``."""
        prefix = "" if group is None else f"{group}/"
        self._each("log", {f"{prefix}{name}": float(value) for name, value in metrics.items()}, int(step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None) -> None:
        """Records a table; cells are numbers, text or None."""
        self._each("table", name, list(columns), [[_plain(cell) for cell in row] for row in rows], step)

    def figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Records a picture: the path of a PNG file, or a matplotlib figure, which is saved under ``figures/``."""
        if isinstance(figure, str | Path):
            path = Path(figure)
        else:
            path = self.folder / "figures" / f"{_file_stem(name)}{'' if step is None else f'-{step}'}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
            except OSError as error:
                warnings.warn(f"{path}: cannot be written ({error.strerror or error})", stacklevel=2)
                return
        self._each("figure", name, path, step)

    def artifact(self, path: Path, kind: str, name: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Records a file or a folder (a model, records, an export) that stays as it is until the run ends."""
        self._each("artifact", Path(path), kind, name, _plain(metadata or {}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Records what the run amounts to: final figures, text."""
        self._each("summary", _plain(values))

    def close(self, exit_status: int = 0) -> None:
        """Ends every record; W&B has a limited time for what it has not sent. A second call does nothing."""
        self._each("close", exit_status)
        self.unreachable |= any(sink.unreachable for sink in self._sinks.values() if isinstance(sink, WandbRun))
        self._sinks.clear()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0 if error is None else 1)

    def _each(self, call: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, call)(*arguments)
            except Exception as error:  # whatever a record stumbles over, the run goes on
                del self._sinks[name]
                warnings.warn(f"{name}: {type(error).__name__}: {error}; the run goes on without it", stacklevel=3)


def open_tracker(
    folder: Path,
    *,
    kind: Kind,
    name: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    wandb: str | None = None,
    tensorboard: bool = False,
    resume: str | None = None,
    limits: Limits | None = None,
    offline: bool = False,
) -> Tracker:
    """Opens the records of a run in ``folder``: ``run.jsonl``, appended to, and what else is asked for.

    The first line holds the fingerprint: versions, git revision; changes that are not committed go to ``diff.patch``.

    Args:
        folder: The run's own folder; made if need be.
        kind: What the run does; W&B calls it the job type.
        name: The run's name in lists.
        group: What it belongs to (a comparison, a sweep).
        tags: For filters.
        wandb: Project at Weights & Biases; None for none.
        tensorboard: Also write event files to ``tensorboard/``.
        resume: ``run_id`` of the W&B run to go on with.
        limits: How long W&B may take, in place of the usual.
        offline: Keep W&B off the network even if a key is configured.

    Raises:
        TrackingError: the folder cannot be written, wandb or tensorboard is not installed, or ``kind`` is none.
    """
    if kind not in get_args(Kind):
        raise TrackingError(f"no kind of run {kind!r}; {nearest(kind, list(get_args(Kind)))}")
    check_installed(wandb, tensorboard)
    about = {"kind": kind, "name": name, "group": group, "tags": list(tags)}
    provenance = {"command": sys.argv, **fingerprint(), **_versions()}
    diff = dirty_diff()
    run_id = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if diff:
            (folder / DIFF).write_text(diff, encoding="utf-8")
        lines = JsonLines(folder)
        sinks: dict[str, Sink] = {LINES: lines}
        if tensorboard:
            sinks["TensorBoard"] = TensorBoard(folder / "tensorboard")
    except OSError as error:
        raise TrackingError(f"{folder}: cannot be written ({error.strerror or error})") from error
    if wandb is not None:
        project, run_id = new_run(wandb)
        run_id = resume or run_id
        start = {
            **about,
            "project": project,
            "run_id": run_id,
            "offline": offline,
            "revision": provenance["git_revision"],
            "diff": str((folder / DIFF).resolve()) if diff else None,
        }
        sinks["W&B"] = WandbRun(folder, start, limits or Limits())
    lines.write("start", {**about, "wandb_project": wandb, "run_id": run_id})
    tracker = Tracker(folder, sinks, run_id)
    tracker._each("config", {"provenance": provenance})
    return tracker


class JsonLines:
    """``run.jsonl``: one object per call, in order, with ``event`` and ``time_s`` (Unix time); NaN is null."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stream = (folder / LINES).open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        line = {"event": event, "time_s": round(time.time(), 3), **_finite(dict(values))}
        self._stream.write(json.dumps(line, allow_nan=False, default=str) + "\n")

    def config(self, values: Mapping[str, Any]) -> None:
        """Line ``config`` with ``values``."""
        self.write("config", {"values": values})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Line ``log`` with ``global_step`` and ``metrics``."""
        self.write("log", {STEP: step, "metrics": metrics})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Line ``table`` with ``columns`` and ``rows``."""
        self.write("table", {"name": name, STEP: step, "columns": columns, "rows": rows})

    def figure(self, name: str, path: Path, step: int | None) -> None:
        """Line ``figure`` with the picture's ``path``."""
        self.write("figure", {"name": name, STEP: step, "path": self._place(path)})

    def artifact(self, path: Path, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """Line ``artifact`` with its ``path``, ``kind`` and ``metadata``."""
        self.write("artifact", {"name": name, "kind": kind, "path": self._place(path), "metadata": metadata})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Line ``summary`` with ``values``."""
        self.write("summary", {"values": values})

    def close(self, exit_status: int) -> None:
        """Line ``end`` with ``exit_status``."""
        self.write("end", {"exit_status": exit_status})
        self._stream.close()

    def _place(self, path: Path) -> str:
        """Relative to the run's folder where it lies inside."""
        resolved, folder = path.resolve(), self._folder.resolve()
        return str(resolved.relative_to(folder) if resolved.is_relative_to(folder) else resolved)


class TensorBoard:
    """Event files for ``tensorboard --logdir``: scalars, pictures, and tables and settings as Markdown."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = SummaryWriter(str(folder))

    def config(self, values: Mapping[str, Any]) -> None:
        """Text ``config``."""
        self._writer.add_text("config", f"```json\n{json.dumps(values, indent=2, default=str)}\n```")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None) -> None:
        """Text under the table's name."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step or 0)

    def figure(self, name: str, path: Path, step: int | None) -> None:
        """An image; formats that matplotlib cannot read are left out."""
        if path.suffix == ".png":
            from matplotlib.image import imread

            self._writer.add_image(name, imread(path), step or 0, dataformats="HWC")

    def artifact(self, path: Path, kind: str, name: str, metadata: Mapping[str, Any]) -> None:
        """Where the file lies, as text."""
        self._writer.add_text(f"artifacts/{kind}/{name}", f"`{path}`")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Text ``summary``."""
        self._writer.add_text("summary", f"```json\n{json.dumps(values, indent=2, default=str)}\n```")

    def close(self, exit_status: int) -> None:
        """Writes what is left."""
        self._writer.close()


def check_installed(wandb: str | None, tensorboard: bool) -> None:
    """Whether what is asked for is there, without importing it.

    Raises:
        TrackingError: it is not; the message says how it gets there.
    """
    for package, asked in (("wandb", wandb is not None), ("tensorboard", tensorboard)):
        if asked and importlib.util.find_spec(package) is None:
            raise TrackingError(f"--{package} needs {package}: pip install 'biscale-gym[train]'")


def _versions() -> dict[str, str]:
    found = {}
    for name in _NAMED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """JSON's own types: numpy's scalars and paths have their nearest, mappings and sequences are gone through."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _finite(value: Any) -> Any:
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file_stem(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
