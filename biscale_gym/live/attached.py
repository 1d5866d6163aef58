"""One run on vLLM servers that are already running, reached by URL.

The client is a proxy and a replay in one: requests are sent at the trace's arrival times, each takes the two hops of
``vllm_adapter.server``, and latencies are what this side of the connections sees. What the servers know of themselves
is read from their metrics. Clocks are theirs: a server started with the plugin classes has a governor that this client
tells whose policies to apply; without one nothing is set, and no joule is known (*observe-only*).

Requests of a server that dies or hangs (``health``) are served from the start again, on other servers or when it is
back, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np

from biscale_gym.cluster.placement import Phase
from biscale_gym.control.controllers import PlanContext
from biscale_gym.live import messages as m
from biscale_gym.live.errors import LiveError
from biscale_gym.live.governed import ARRIVAL, FIRST_TOKEN
from biscale_gym.live.governor_link import GovernorLink
from biscale_gym.live.health import Watch, read
from biscale_gym.live.http_client import ServerGone, ServerRefused, events, fetch
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Outcome
from biscale_gym.live.served import Served, ledger_of
from biscale_gym.live.servers import Server, pick, welcome
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.vllm_adapter import server as v
from biscale_gym.traces import Trace

OBSERVE_ONLY = "observe-only"
"""In a controller's place where no server has a governor, and of a run in which a clock is not set."""
LEAD_S = 0.2


class _Failed(Exception):
    """An attempt at a request came to nothing."""


class AttachedReplay:
    """One run.

    Args:
        servers: from ``connect``.
        trace: arrival times are kept, whatever the servers do.
        controller: name or ``module:Class``, for servers with governors; else ``OBSERVE_ONLY``.
        context: what it knows; its scenario says how long the run may drain.
        settings: retries, how long silence may last, and the vocabulary of prompts.
        folder: for records.
        seed: of the prompts' token ids.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        trace: Trace,
        controller: str,
        context: PlanContext,
        settings: LiveSettings,
        folder: Path,
        seed: int = 0,
    ) -> None:
        self._servers, self._controller, self._context = servers, controller, context
        self._settings, self._folder, self._seed = settings, folder, seed
        columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
        self._served = [Served(number, *row) for number, row in enumerate(zip(*columns, strict=True))]
        self._vocabulary = settings.dimensions(context.scenario.cluster).vocabulary
        self._longest = min(server.served.max_model_len for server in servers)
        self._run_id = uuid.uuid4().hex[:8]
        self._records: list[Path] = []
        self._attempts: dict[int, asyncio.Task[None]] = {}
        self._lost: set[int] = set()  # requests whose server has died, until their attempt has ended
        self._retried = 0
        self._deaths: list[str] = []
        self._reports: list[m.Report] = []
        self._origin_s = 0.0

    def run(self) -> Outcome:
        """Serve the trace.

        Raises:
            LiveError: a governor refuses the controller, or a server answers what no vLLM server does.
        """
        return asyncio.run(self._run())

    def _now_s(self) -> float:
        return time.monotonic() - self._origin_s

    async def _run(self) -> Outcome:
        self._folder.mkdir(parents=True, exist_ok=True)
        for server in self._servers:
            server.fresh()
            try:
                await read(server)
            except (ServerGone, ServerRefused) as error:
                raise LiveError(f"{server.name} does not answer: {error}") from error
            if server.governor is not None:
                await asyncio.to_thread(self._begin, server, server.governor)
        self._origin_s = time.monotonic() + LEAD_S
        for server in self._servers:
            if server.governor is not None:
                server.governor.go(self._origin_s)
            welcome(server, self._servers)
        scenario = self._context.scenario
        watches = [
            Watch(server, self._folder, self._settings.hung_s, self._now_s, self._mourn, self._welcome)
            for server in self._servers
        ]
        watchers = [asyncio.create_task(watch.run()) for watch in watches]
        requests = [asyncio.create_task(self._serve(served)) for served in self._served]
        try:
            await self._finish(requests, watchers, scenario.duration_s + scenario.drain_limit_s)
            end_s = max(scenario.duration_s, self._now_s())
            await self._finish([asyncio.create_task(asyncio.sleep(end_s - self._now_s()))], watchers, end_s)
        finally:
            for task in (*requests, *watchers):
                task.cancel()
            await asyncio.gather(*requests, *watchers, return_exceptions=True)
        for server in self._servers:
            with contextlib.suppress(ServerGone, ServerRefused):
                await read(server)
            if server.governor is not None:
                report = await asyncio.to_thread(server.governor.end)
                self._reports += [] if report is None else [report]
        return self._outcome(end_s)

    async def _finish(
        self, tasks: Sequence[asyncio.Task[None]], watchers: Sequence[asyncio.Task[None]], limit_s: float
    ) -> None:
        """Wait for tasks until ``limit_s`` of the run; whatever goes wrong in them or in the watchers is raised."""
        left = set(tasks)
        while left and self._now_s() < limit_s:
            done, _ = await asyncio.wait(
                {*left, *watchers}, timeout=limit_s - self._now_s(), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            left -= done

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _serve(self, served: Served) -> None:
        await asyncio.sleep(max(0.0, served.arrival_s - self._now_s()))
        served.sent_s = self._now_s()
        if served.prompt_tokens + served.output_tokens > self._longest:
            served.state = "rejected"
            return
        served.state = "unfinished"
        while True:
            attempt = asyncio.create_task(self._attempt(served))
            self._attempts[served.number] = attempt
            try:
                await attempt
            except (ServerGone, ServerRefused, _Failed):
                pass
            except asyncio.CancelledError:
                if served.number not in self._lost:
                    raise  # the end of the run
            else:
                served.state = "finished"
                return
            finally:
                self._lost.discard(served.number)
                del self._attempts[served.number]
            if served.attempt == self._settings.retries:
                served.state = "failed"
                return
            self._retried += 1
            served.attempt += 1
            served.token_s, served.made, served.kv_params, served.stage = [], 0, None, None

    async def _attempt(self, served: Served) -> None:
        prompt = served.prompt(self._seed, self._vocabulary).tolist()
        headers = {v.REQUEST_ID: f"{self._run_id}-{served.id}"}
        told = {ARRIVAL: served.arrival_s}
        async with self._on("prefill", served) as prefill:
            served.prefill_sent_s, served.prefilled_by = self._now_s(), prefill.name
            body = v.prefill_body(prefill.served.model, prompt, served.output_tokens > 1, told)
            piece = v.read_piece(json.loads(await fetch(prefill.url, v.COMPLETIONS, body, headers)))
        if piece.finish != "length" or len(piece.tokens) != 1:
            raise _Failed(f"{prefill.name} ended a prompt with {piece.finish!r}")
        served.token_s, served.first_token, served.kv_params = [self._now_s()], piece.tokens[0], piece.kv_params
        if served.output_tokens == 1:
            return
        if not served.kv_params:
            raise LiveError(f"{prefill.url.text} does not say where KV lies: was it started with KV transfer?")
        told = told | {FIRST_TOKEN: served.token_s[0]}
        prefill.holds.add(served.number)
        try:
            async with self._on("decode", served) as decode:
                if self._now_s() - served.token_s[0] > self._settings.kv_lease_s:
                    raise _Failed("while no decode server was up, its KV has been freed")
                body = v.decode_body(decode.served.model, prompt, served.output_tokens, served.kv_params, told)
                async with contextlib.aclosing(events(decode.url, v.COMPLETIONS, body, headers)) as answers:
                    async for event in answers:
                        decode.heard_s = time.monotonic()
                        piece = v.read_piece(event)
                        if piece.tokens:
                            prefill.holds.discard(served.number)
                        self._take(served, piece.tokens)
                        if piece.finish not in (None, "length"):
                            raise _Failed(f"{decode.name} ended a request with {piece.finish!r}")
        finally:
            prefill.holds.discard(served.number)
        if served.made != served.output_tokens:
            raise LiveError(f"request {served.number} has {served.made} tokens in place of {served.output_tokens}")

    def _take(self, served: Served, tokens: Sequence[int]) -> None:
        now_s = self._now_s()
        for token in tokens:
            served.made += 1
            if served.made == 1:
                served.agrees = token == served.first_token
            else:
                served.token_s.append(now_s)

    @contextlib.asynccontextmanager
    async def _on(self, phase: Phase, served: Served) -> AsyncIterator[Server]:
        """A server for one hop; waits while none is up."""
        servers = [server for server in self._servers if server.phase == phase]
        while (server := pick(servers)) is None:
            waits = [asyncio.create_task(each.up.wait()) for each in servers]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        served.stage, served.worker = phase, server.name
        if not server.asked:
            server.heard_s = time.monotonic()
        server.asked.add(served.number)
        try:
            yield server
            server.heard_s = time.monotonic()
        finally:
            server.asked.discard(served.number)

    # -- servers -------------------------------------------------------------------------------------------------------

    def _mourn(self, server: Server, why: str) -> None:
        """A server is down: what depends on it is given up."""
        self._deaths.append(f"{server.name} {why}")
        print(f"biscale-gym: {server.name} {why}", file=sys.stderr)
        for number in server.asked | server.holds:
            attempt = self._attempts.get(number)
            if attempt is not None and not attempt.done():
                self._lost.add(number)
                attempt.cancel()

    async def _welcome(self, server: Server) -> None:
        """A server is back: its governor is told what to do, and it takes requests again."""
        if server.governor is not None:
            await asyncio.to_thread(self._begin_again, server, server.governor)
        welcome(server, self._servers)

    # -- governors -----------------------------------------------------------------------------------------------------

    def _begin(self, server: Server, governor: GovernorLink) -> None:
        """Let a server's governor get ready; takes its time, so in a thread."""
        number = sum(path.name.partition(".")[0] == server.name for path in self._records)
        path = (self._folder / f"{server.name}{f'.{number}' if number else ''}.csv").resolve()
        self._records.append(path)
        governor.begin(self._controller, self._context, path)

    def _begin_again(self, server: Server, governor: GovernorLink) -> None:
        """The same with one that was down; the former governor is gone, or was hanging."""
        governor.reconnect()
        self._begin(server, governor)
        governor.go(self._origin_s)

    @property
    def _mode(self) -> str:
        governors = [server.governor for server in self._servers]
        observing = any(governor is None or governor.mode == OBSERVE_ONLY for governor in governors)
        return OBSERVE_ONLY if observing else "control"

    # -- what came of it -----------------------------------------------------------------------------------------------

    def _outcome(self, end_s: float) -> Outcome:
        up = {server.phase for server in self._servers if server.up.is_set()}
        for served in self._served:
            waits_for: Phase = "decode" if served.token_s else "prefill"
            if served.state == "unfinished" and waits_for not in up:
                served.state = "failed"  # nobody was left to serve it
        states = dict.fromkeys(("finished", "failed", "rejected", "unfinished"), 0)
        for served in self._served:
            states["unfinished" if served.state == "expected" else served.state] += 1
        finished = [served for served in self._served if served.state == "finished"]
        decoded = [served for served in finished if served.output_tokens > 1]
        gaps = [np.diff(served.token_s) for served in finished]
        tokens: dict[str, int] = {}
        for server in self._servers:
            if server.phase == "decode":
                for source, count in server.prompt_tokens.items():
                    tokens[source] = tokens.get(source, 0) + count
        lost_j = sum(server.governor.lost_j for server in self._servers if server.governor is not None)
        control = [read_records(path)["control_s"] for path in self._records if path.is_file()]
        return Outcome(
            controller=self._controller,
            requests=ledger_of(self._served, [server.name for server in self._servers]),
            itl_s=np.concatenate(gaps) if gaps else np.zeros(0),
            lag_s=np.array([served.sent_s - served.arrival_s for served in self._served]),
            states=states,
            retried=self._retried,
            replaced=tuple(self._deaths),
            energy_j=lost_j + sum(report.energy_j for report in self._reports) if self._reports else float("nan"),
            source=self._servers[0].governor.source if self._servers[0].governor is not None else "",
            mode=self._mode,
            end_s=end_s,
            prompt_tokens=sum(served.prompt_tokens for served in decoded),
            prompt_tokens_by_source=tokens,
            first_tokens_agree=all(served.agrees for served in decoded),
            control_s=np.concatenate(control) if control else np.zeros(0),
            records_dropped=sum(report.records_dropped for report in self._reports),
        )
