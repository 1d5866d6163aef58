"""Class tables on disk: one small JSON file per content hash, written whole or not at all.

The folder is the package's own, ``$BISCALE_GYM_CACHE`` or in the user's cache folder. A file is written beside its
final name and moved there, so that several writers of one entry leave one intact file; what cannot be read, or does not
carry its own digest, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biscale_gym.config import cache_root

try:
    import fcntl
except ImportError:  # Windows: two processes then measure the same table, harmlessly.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


def content_key(parts: dict[str, Any]) -> str:
    """First 32 hex digits of the SHA-256 of the canonical JSON of ``parts``."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()[:32]


def source_digest(*folders_or_files: Path) -> str:
    """Digest of the Python sources that a cached result depends on: other code, other entry."""
    digest = hashlib.sha256()
    for path in folders_or_files:
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(source.name.encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(rows: Any) -> str:
    return hashlib.sha256(_canonical(rows).encode()).hexdigest()


def _path(kind: str, key: str) -> Path:
    return cache_root() / kind / f"{key}.json"


def load(kind: str, key: str) -> Any | None:
    """The entry's rows; None if there is none, or if it is torn or altered."""
    path = _path(kind, key)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["digest"] == _digest(entry["rows"]):
            return entry["rows"]
        log.warning("%s does not match its digest: measured again", path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%s): measured again", path, error)
    return None


def store(kind: str, key: str, rows: Any, about: dict[str, Any]) -> None:
    """Write an entry; ``about`` says for people what it is.

    A folder that cannot be written costs a warning, not the result.
    """
    path = _path(kind, key)
    text = json.dumps({"about": about, "rows": rows, "digest": _digest(rows)}, indent=1, sort_keys=True)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{key}-", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): the table will be measured again next time", path, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusively(kind: str, key: str) -> Iterator[None]:
    """Hold the entry's lock, so that of several processes one measures and the others then read.

    The lock saves work, it guards nothing: where it cannot be had (a folder that cannot be written, a file system
    without locks) the block runs all the same. It ends with its process, however that ends.
    """
    path = _path(kind, key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                log.warning("%s cannot be locked (%s)", path, error)
        yield
