"""Lock files: one controller per GPU, one clock call at a time per node.

``flock`` locks belong to the open file, so they end with the last process that holds it, however that ends. The
watchdog inherits a controller's GPU locks: no other controller gets the GPU before its clocks are given back.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biscale_gym.live.errors import DeviceBusyError, DeviceError


def lock_folder() -> Path:
    """``$BISCALE_GYM_LOCKS``, else the system's folder of temporary files; all controllers of a node must agree."""
    return Path(os.environ.get("BISCALE_GYM_LOCKS") or tempfile.gettempdir())


def _open(name: str) -> tuple[int, Path]:
    path = lock_folder() / f"biscale-gym-{name}.lock"
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), path
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask: the next controller may be another user's
            return descriptor, path
    except OSError as error:
        raise DeviceError(f"lock file {path}: {error.strerror}; name a folder in $BISCALE_GYM_LOCKS") from error


def _lives(pid: str) -> bool:
    """Whether a process runs; one that has ended and is not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2][1] != "Z"
    except OSError:
        return False


class GpuLock:
    """This process is the controller of one GPU, until ``close`` or its end.

    Raises:
        DeviceBusyError: another process is; its pid is named.
        DeviceError: the lock file cannot be opened.
    """

    def __init__(self, index: int, uuid: str) -> None:
        self.descriptor, path = _open(uuid)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self.descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self.descriptor)
            raise DeviceBusyError(
                f"GPU {index} is controlled by process {holder} ({path}); end it, or open the GPU in mode observe-only",
                _lives(holder),
            ) from None
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go; the file stays, so that no two controllers lock different files of one name."""
        os.close(self.descriptor)


@contextmanager
def clock_calls() -> Iterator[None]:
    """The node's clock calls are this thread's until the end of the block (the driver serialises them anyway)."""
    descriptor, _ = _open("clock-calls")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
