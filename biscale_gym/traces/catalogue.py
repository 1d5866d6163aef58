"""Published traces by name, and their download: resumable, checked, complete or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from biscale_gym.config import load_preset, nearest, preset_names
from biscale_gym.traces.settings import TraceSource
from biscale_gym.traces.trace import TraceError

KIND = "traces"
TIMEOUT_S = 30.0

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes in all (None where the server does not say)."""

_CHUNK_BYTES = 1 << 18
_RANGE_NOT_SATISFIABLE = 416


def catalogue() -> dict[str, TraceSource]:
    """Every published trace that ``fetch`` knows, by name."""
    return {name: load_preset(TraceSource, KIND, name) for name in preset_names(KIND)}


def trace_source(name: str) -> TraceSource:
    """The catalogue's entry.

    Raises:
        TraceError: no such entry; the nearest is named.
    """
    names = preset_names(KIND)
    if name not in names:
        raise TraceError(f"no published trace {name!r}; {nearest(name, names)}")
    return load_preset(TraceSource, KIND, name)


def fetch(
    name: str,
    folder: str | Path,
    base_url: str | None = None,
    *,
    report: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Path:
    """Download a published trace into ``folder`` and return its path.

    What has arrived is kept in ``FILE.part`` when the connection breaks, and the next call goes on from there. The file
    gets its name when it is complete and its checksum is right. A file that is there already is only checked.

    Args:
        name: of the catalogue's entry.
        folder: made if it is not there.
        base_url: a mirror that holds the file under the same name, instead of the published address.
        report: takes lines for people: licence, attribution, result.
        progress: told of bytes as they arrive.

    Raises:
        TraceError: unknown name, no connection, a download cut off, a wrong checksum or an unwritable folder.
    """
    source = trace_source(name)
    url = source.url if base_url is None else f"{base_url.rstrip('/')}/{source.filename}"
    if not url.startswith(("http://", "https://")):
        raise TraceError(f"{url}: not an http or https address")
    target = Path(folder) / source.filename
    part = target.with_name(target.name + ".part")
    report(f"{name}: {source.description} Licence {source.licence}; {source.attribution}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            found = _checksum(target)
            if found != source.sha256:
                raise TraceError(
                    f"{target}: is there already with a wrong checksum (SHA-256 is {found}, expected {source.sha256}); "
                    "move it away to fetch it again"
                )
            report(f"{target} is there already, checksum right")
            return target
        _download(url, part, progress)
        found = _checksum(part)
        if found != source.sha256:
            # Its bytes are wrong somewhere: going on from there would never mend it.
            part.unlink()
            raise TraceError(
                f"{url}: wrong checksum, the download was deleted (SHA-256 is {found}, expected {source.sha256})"
            )
        os.replace(part, target)
    except OSError as error:
        raise TraceError(f"{target}: cannot be written ({error.strerror or error})") from error
    report(f"saved {target} ({target.stat().st_size:,} bytes, checksum right)")
    return target


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Bring ``part`` to the full length, going on from the bytes that it holds.

    Raises:
        TraceError: no connection, or it broke off.
        OSError: ``part`` cannot be written.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "biscale-gym"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if have and error.code == _RANGE_NOT_SATISFIABLE:
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            # It holds more than the file has, so it is not a part of it.
            part.unlink()
            _download(url, part, progress)
            return
        raise TraceError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TraceError(f"{url}: no connection ({getattr(error, 'reason', error)})") from error
    with response:
        resumed = have > 0 and (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with part.open("ab" if resumed else "wb") as file:
            broken = _copy(response, file, have, total, progress)
    arrived = part.stat().st_size
    if broken is not None or (total is not None and arrived < total):
        of_all = "" if total is None else f" of {total:,}"
        raise TraceError(
            f"{url}: cut off after {arrived:,}{of_all} bytes{f' ({broken})' if broken else ''}; "
            f"they are kept in {part}: run the same command again to go on from there"
        ) from broken


def _copy(
    response: IO[bytes], file: IO[bytes], have: int, total: int | None, progress: Progress | None
) -> Exception | None:
    """Append the response to the file; what broke the connection, if anything did."""
    while True:
        try:
            chunk = response.read(_CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            return error
        if not chunk:
            return None
        file.write(chunk)
        have += len(chunk)
        if progress is not None:
            progress(have, total)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
