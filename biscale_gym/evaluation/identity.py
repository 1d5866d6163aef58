"""The content address of a run: what it would compute, not where or when.

Two runs share an address when their job, every preset, the trace's bytes, the package version and the code that decides
the result (the model, the control layer and the controllers; not tables and plots) are the same. An edited controller
is therefore run again, and a moved trace is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from biscale_gym._version import __version__
from biscale_gym.config import nearest, preset_names, presets_dir
from biscale_gym.control.controllers import ENTRY_POINTS
from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.faults import EvaluationError

_DECIDING = (
    "_jit.py",
    "config.py",
    "metrics.py",
    "traces",
    "profiles",
    "cluster",
    "planning",
    "control",
    "envs/cluster_lanes.py",
    "envs/cluster_layout.py",
    "envs/cluster_mlp.py",
    "envs/encoding.py",
    "envs/lanes.py",
    "envs/layout.py",
    "envs/mlp.py",
    "envs/network.py",
    "envs/placement_choice.py",
    "envs/placement_layout.py",
    "envs/placement_mlp.py",
)
_UNDECIDING_PRESETS = ("sweeps", "traces", "training")
"""Kinds that no run reads: how agents are trained, where published traces are."""
_CODE = ("*.py", "*.safetensors", "models/*.json")
"""Of controllers: their sources, and the models that come with them."""


def run_id(job: RunJob) -> str:
    """First 16 hex digits of the SHA-256 of everything the run's result depends on.

    Raises:
        EvaluationError: the scenario or the trace does not exist.
    """
    content = {
        "job": {
            **job.model_dump(mode="json"),
            "scenario": _scenario_address(job.scenario),
            "trace": None if job.trace is None else file_digest(Path(job.trace)),
        },
        "presets": _tree_digest(_deciding_presets(), ("*.yaml",)),
        "code": _code_digest(job.controller),
        "files": _files_named_in(job.controller_settings),
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _deciding_presets() -> tuple[Path, ...]:
    folders = sorted(path for path in presets_dir().iterdir() if path.is_dir())
    return tuple(path for path in folders if path.name not in _UNDECIDING_PRESETS)


def _files_named_in(settings: Any) -> dict[str, str]:
    """Digests of the files and folders of files, such as models, that a controller's settings name by path."""
    if isinstance(settings, dict):
        return {key: value for one in settings.values() for key, value in _files_named_in(one).items()}
    if not isinstance(settings, str) or "/" not in settings:
        return {}
    path = Path(settings)
    near = (
        path.parent.glob(f"{path.name}.*") if not path.exists() else path.rglob("policy.*") if path.is_dir() else [path]
    )
    return {str(found): file_digest(found) for found in sorted(near) if found.is_file()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered for as long as the file's size and time stay.

    Raises:
        EvaluationError: there is no such file.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    return _digest_of_state(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _digest_of_state(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scenario_address(name_or_path: str) -> str:
    """A preset stands for itself (the presets are hashed as a whole); a file of one's own for its bytes."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return file_digest(path)
    known = preset_names("scenarios")
    if name_or_path not in known:
        raise EvaluationError(f"no scenario {name_or_path!r}; {nearest(name_or_path, known)}")
    return name_or_path


@cache
def _code_digest(controller: str) -> str:
    package = Path(__file__).parents[1]
    roots = [package / part for part in _DECIDING]
    installed = [point.module for point in entry_points(group=ENTRY_POINTS) if point.name == controller]
    foreign = installed or [controller.partition(":")[0]]
    for module in {"agents": None, "baselines": None, **{name.partition(".")[0]: None for name in foreign}}:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            roots.append(origin.parent if origin.name == "__init__.py" else origin)
    return _tree_digest(tuple(roots), _CODE)


@cache
def _tree_digest(roots: tuple[Path, ...], patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name, content in _files(roots, patterns):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(roots: Iterable[Path], patterns: tuple[str, ...]) -> Iterable[tuple[str, bytes]]:
    for root in roots:
        paths = sorted(path for pattern in patterns for path in root.rglob(pattern)) if root.is_dir() else [root]
        for path in paths:
            if path.is_file():
                yield path.relative_to(root.parent).as_posix(), path.read_bytes()
