"""The client's side of a governor inside a server: connect, begin and end runs, hear of joules."""

from __future__ import annotations

import contextlib
import sys
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path

from biscale_gym.cluster.placement import Phase
from biscale_gym.control.controllers import PlanContext
from biscale_gym.live import messages as m
from biscale_gym.live.errors import LiveError
from biscale_gym.live.governed import Ask, Begin, Hello, socket_path

ANSWER_LIMIT_S = 300.0
"""For an answer: compiling a clock policy takes its time."""


class GovernorLink:
    """A connection to one server's governor.

    Args:
        folder: where its socket is.
        name: of the server.
        phase: of the server.

    Attributes:
        source, mode: of its device.
        energy_j: of the present run, as it said last.
        lost_j: of the present run, spent by governors that are gone.

    Raises:
        OSError: nobody listens there.
        LiveError: it is another phase's.
    """

    def __init__(self, folder: Path, name: str, phase: Phase) -> None:
        self._folder, self._name, self._phase = folder, name, phase
        self.energy_j = self.lost_j = 0.0
        self._connection = self._connect()

    def _connect(self) -> Connection:
        connection: Connection = Client(str(socket_path(self._folder, self._name)), "AF_UNIX")
        try:
            hello = connection.recv()
        except EOFError as error:
            raise ConnectionResetError(f"the governor of {self._name} hung up") from error
        if not isinstance(hello, Hello) or hello.phase != self._phase:
            raise LiveError(f"the governor {self._name} in {self._folder} is not a {self._phase} server's: {hello}")
        self.source, self.mode = hello.source, hello.mode
        if hello.mode == "observe-only":
            print(f"biscale-gym: {self._name} observes only: its clocks are not set", file=sys.stderr)
        return connection

    def reconnect(self) -> None:
        """To the governor of a server that is back.

        Raises:
            OSError: nobody listens there yet.
        """
        self.lost_j, self.energy_j = self.lost_j + self.energy_j, 0.0
        self._connection.close()
        self._connection = self._connect()

    def begin(self, controller: str, context: PlanContext, records: Path) -> None:
        """Let it get ready for a run; may take a minute.

        Raises:
            LiveError: it cannot apply this controller.
            OSError, EOFError: it is gone.
        """
        self.energy_j = 0.0
        self._connection.send(Begin(controller, context, records))
        answer = self._answer(m.Begun)
        if isinstance(answer, m.Broken):
            raise LiveError(f"{self._name} cannot be governed by {controller}:\n{answer.traceback}")

    def go(self, origin_s: float) -> None:
        """The run counts from ``origin_s`` on, on ``time.monotonic``'s scale."""
        self._connection.send(m.Go(origin_s))

    def listen(self) -> None:
        """Take in what it has said, and ask again; never waits."""
        with contextlib.suppress(OSError, EOFError):
            while self._connection.poll():
                message = self._connection.recv()
                if isinstance(message, m.Alive):
                    self.energy_j = message.energy_j
            self._connection.send(Ask())

    def end(self) -> m.Report | None:
        """End the run; None: it is gone, and its joules are among ``lost_j``."""
        try:
            self._connection.send(m.EndRun())
            report = self._answer(m.Report)
        except (OSError, EOFError):
            self.lost_j += self.energy_j
            return None
        assert isinstance(report, m.Report)
        return report

    def _answer(self, kind: type) -> object:
        """An answer of a kind, or that it is ``Broken``; those to earlier questions are passed over."""
        end_s = time.monotonic() + ANSWER_LIMIT_S
        while self._connection.poll(max(0.0, end_s - time.monotonic())):
            message = self._connection.recv()
            if isinstance(message, (kind, m.Broken)):
                return message
        raise TimeoutError(f"the governor of {self._name} has said nothing for {ANSWER_LIMIT_S:g} s")

    def close(self) -> None:
        """Hang up; its own controller is in charge again."""
        self._connection.close()
