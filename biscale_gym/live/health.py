"""How a client notices that a server dies, hangs and comes back; what the server says of itself goes on record.

A server is dead when it refuses connections, hung when for ``hung_s`` it answers no request and computes no prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from biscale_gym.live.http_client import ServerGone, ServerRefused, fetch
from biscale_gym.live.servers import Server
from biscale_gym.live.vllm_adapter import server as v
from biscale_gym.live.vllm_adapter.model import FIRST_TOKEN_ID
from biscale_gym.live.vllm_adapter.options import FETCHED

POLL_S = 0.5


async def read(server: Server) -> v.Metrics:
    """A server's metrics now, its tokens counted.

    Raises:
        ServerGone, ServerRefused, LiveError: it does not answer as it should.
    """
    metrics = v.read_metrics((await fetch(server.url, v.METRICS)).decode("utf-8", "replace"), server.url.text)
    before = dict(server.prompt_tokens)
    server.count(metrics.prompt_tokens)
    if server.prompt_tokens != before:
        server.heard_s = time.monotonic()
    return metrics


class _MetricsFile:
    """A server's metrics over time, CSV; a disk that fails ends the file, not the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="ascii")
        self._writer = csv.writer(self._file)
        self._broken = False
        self._put("time_s", "running", "waiting", "kv_usage", "prompt_tokens_computed", "prompt_tokens_fetched")

    def put(self, now_s: float, metrics: v.Metrics, prompt_tokens: Mapping[str, int]) -> None:
        """A line; the prompt tokens are those of this run."""
        fetched = prompt_tokens.get(FETCHED, 0)
        computed = sum(prompt_tokens.values()) - fetched
        self._put(
            f"{now_s:.3f}", metrics.running, metrics.waiting, f"{metrics.kv_usage:.6g}", str(computed), str(fetched)
        )

    def _put(self, *cells: object) -> None:
        if self._broken:
            return
        try:
            self._writer.writerow(cells)
            self._file.flush()
        except OSError as error:
            self._broken = True
            print(f"biscale-gym: {self._path}: {error.strerror}; the run goes on without it", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class Watch:
    """Over one server in one run.

    Args:
        server: ``up`` is cleared when it is down.
        folder: for its metrics.
        hung_s: silence after which it is taken for hung.
        now_s: time from the start of the run.
        lost: told of a server that is down, and why.
        back: told of one that serves again.
    """

    def __init__(
        self,
        server: Server,
        folder: Path,
        hung_s: float,
        now_s: Callable[[], float],
        lost: Callable[[Server, str], None],
        back: Callable[[Server], Awaitable[None]],
    ) -> None:
        self._server, self._hung_s, self._now_s, self._back = server, hung_s, now_s, back
        self._tell_lost = lost
        self._path = folder / f"{server.name}.metrics.csv"

    async def run(self) -> None:
        """Watch until it is cancelled."""
        server, hung_s = self._server, self._hung_s
        file = _MetricsFile(self._path)
        try:
            while True:
                try:
                    if server.up.is_set():
                        async with asyncio.timeout(hung_s):
                            metrics = await read(server)
                        if server.governor is not None:
                            server.governor.listen()
                        file.put(self._now_s(), metrics, server.prompt_tokens)
                        silent_s = time.monotonic() - server.heard_s
                        if server.asked and silent_s > hung_s:
                            self._lost(f"has answered no request for {silent_s:.1f} s")
                    else:
                        await self._try_again()
                except TimeoutError:
                    self._lost(f"has said nothing for {hung_s:g} s")
                except (ServerGone, ServerRefused) as error:
                    self._lost(f"is gone: {error}")
                await asyncio.sleep(POLL_S)
        finally:
            file.close()

    def _lost(self, why: str) -> None:
        self._server.up.clear()
        self._tell_lost(self._server, why)

    async def _try_again(self) -> None:
        """One prompt shows whether a server that was down serves again."""
        body = v.prefill_body(self._server.served.model, [FIRST_TOKEN_ID], False, {})
        with contextlib.suppress(OSError, EOFError, ServerRefused):
            async with asyncio.timeout(self._hung_s):
                await fetch(self._server.url, v.COMPLETIONS, body)
            await self._back(self._server)
