"""The watchdog: a process of its own that gives clocks back when their controller dies or hangs.

The controller writes a byte to its standard input at every beat. When the pipe closes (the controller is gone, however
it ended) or stays silent for too long (it hangs), the watchdog gives the clocks of its GPUs back and ends.

It is nobody's child: who kills a controller with all its descendants (a vLLM server does so with an engine that takes
long to end) must not reach it. Its standard output, open until it ends, tells that it lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from biscale_gym.live import nvml
from biscale_gym.live.errors import DeviceError
from biscale_gym.live.locks import clock_calls

READY = b"ready "
"""And its pid."""
BEAT = b"b"
FINISHED = b"q"
"""The controller has given the clocks back itself."""
START_LIMIT_S = 60.0
END_LIMIT_S = 10.0
RESET_ATTEMPTS = 10


class Watchdog:
    """The controller's side: start the process, beat, end it.

    Args:
        gpus: NVML indices.
        timeout_s: silence after which it acts.
        keep_open: descriptors that it inherits (the GPU locks).

    Attributes:
        pid: of its process.

    Raises:
        DeviceError: it does not come up; what it said is in the message.
    """

    def __init__(self, gpus: Sequence[int], timeout_s: float, keep_open: Sequence[int] = ()) -> None:
        command = [sys.executable, "-m", __name__, str(timeout_s), *map(str, gpus)]
        # A session of its own: Ctrl-C at a terminal reaches the controller, and the watchdog must outlive that.
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            bufsize=0,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        self._pipe, self._said = launcher.stdin, launcher.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self.pid = 0
        ready = select.select([self._said], [], [], START_LIMIT_S)[0]
        said = self._said.read(32) if ready else b""
        launcher.kill()  # it has left the watchdog behind long ago, or hangs
        launcher.wait()
        if not said.startswith(READY):
            self.end()
            raise DeviceError(f"the watchdog of GPUs {list(gpus)} did not come up; see what it said on standard error")
        self.pid = int(said[len(READY) :])

    def _ended(self, timeout_s: float = 0.0) -> bool:
        """Whether it has ended, or does so in time: it says nothing more, until its output is closed."""
        return bool(select.select([self._said], [], [], timeout_s)[0])

    @property
    def alive(self) -> bool:
        """Whether it still watches."""
        return not self._ended()

    def beat(self) -> bool:
        """Tell it that the controller lives; False: it has ended."""
        try:
            self._pipe.write(BEAT)
        except OSError:
            return False
        return self.alive

    def end(self, given_back: bool = True) -> None:
        """Wait until it has gone: at once if the clocks are given back, else after it has given them back."""
        if given_back:
            with contextlib.suppress(OSError):
                self._pipe.write(FINISHED)
        self._pipe.close()
        if not self._ended(END_LIMIT_S) and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._said.close()


def give_back(gpus: Sequence[nvml.Gpu]) -> None:
    """Give all clocks back, however often it takes; a card that cannot is told of on standard error."""
    left = list(gpus)
    for attempt in range(RESET_ATTEMPTS):
        if attempt:
            time.sleep(0.5)
        for gpu in tuple(left):
            try:
                with clock_calls():
                    gpu.reset_clock()
                left.remove(gpu)
            except DeviceError as error:
                print(f"biscale-gym watchdog: {error}", file=sys.stderr, flush=True)
        if not left:
            return


def main(arguments: Sequence[str]) -> int:
    """``TIMEOUT_S GPU…``: watch standard input; the exit status is 0, or 1 after clocks had to be given back."""
    timeout_s, indices = float(arguments[0]), [int(index) for index in arguments[1:]]
    if os.fork():
        os._exit(0)  # the watchdog goes on as the child of init
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # At shutdown everyone gets SIGTERM, the controller too: the clocks are given back by whoever comes first.
    terminated, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with nvml.session():
        gpus = nvml.open_gpus(indices)
        os.write(1, READY + b"%d" % os.getpid())
        why = ""
        while not why:
            ready, _, _ = select.select([0, terminated], [], [], timeout_s)
            if not ready:
                why = f"its controller has been silent for {timeout_s:g} s"
            elif terminated in ready:
                why = "SIGTERM"
            else:
                heard = os.read(0, 65536)
                if FINISHED in heard:
                    return 0
                why = "" if heard else "its controller is gone"
        print(f"biscale-gym watchdog: {why}; the clocks of GPUs {indices} are given back", file=sys.stderr, flush=True)
        give_back(gpus)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DeviceError as error:
        sys.exit(f"biscale-gym watchdog: {error}")
