"""vLLM servers that are already running, as a client sees them; and how to start such servers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live.errors import LiveError
from biscale_gym.live.governed import VARIABLE, GovernorSettings, socket_path
from biscale_gym.live.governor_link import GovernorLink
from biscale_gym.live.http_client import ServerGone, ServerRefused, Url, fetch
from biscale_gym.live.pool import free_port
from biscale_gym.live.routing import next_of, start_level
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.setups import setups_of
from biscale_gym.live.vllm_adapter import server as v
from biscale_gym.live.vllm_adapter.install import TESTED
from biscale_gym.live.vllm_adapter.options import environment

STOP_LIMIT_S = 20.0
PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class Server:
    """One server in one run.

    Attributes:
        name: ``prefill-0``, ``decode-0``, in the order of the URLs.
        phase, url: of it.
        weight: share of requests relative to the phase's other servers.
        served: what it offers.
        governor: inside it, if there is one.
        up: set while it takes requests.
        turn: of the router.
        heard_s: when it last answered a request, or was first asked after a pause.
        asked: numbers of the requests that wait for its answers.
        holds: numbers of the prompts whose KV nobody has fetched from it yet.
        prompt_tokens: since the run began, by source.
        last_tokens: the server's own counts when they were read last.
    """

    name: str
    phase: Phase
    url: Url
    weight: float
    served: v.Served
    governor: GovernorLink | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)
    turn: float = 0.0
    heard_s: float = 0.0
    asked: set[int] = field(default_factory=set)
    holds: set[int] = field(default_factory=set)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    last_tokens: dict[str, int] | None = None

    def fresh(self) -> None:
        """Forget the former run."""
        self.up, self.turn, self.asked, self.holds = asyncio.Event(), 0.0, set(), set()
        self.prompt_tokens, self.last_tokens = {}, None
        if self.governor is not None:
            self.governor.energy_j = self.governor.lost_j = 0.0

    def count(self, prompt_tokens: Mapping[str, int]) -> None:
        """Take in the server's counts, which start again at zero when it is restarted."""
        if self.last_tokens is not None:
            for source, now in prompt_tokens.items():
                before = self.last_tokens.get(source, 0)
                self.prompt_tokens[source] = self.prompt_tokens.get(source, 0) + now - (before if now >= before else 0)
        self.last_tokens = dict(prompt_tokens)


def pick(servers: Sequence[Server]) -> Server | None:
    """Who is next among those that are up."""
    able = [server for server in servers if server.up.is_set()]
    return next_of(able) if able else None


def welcome(server: Server, servers: Sequence[Server]) -> None:
    """A server takes requests from now on; it starts level with the least served of its phase."""
    start_level(server, [each for each in servers if each.phase == server.phase and each.up.is_set()])
    server.heard_s = time.monotonic()
    server.up.set()


def _weights(scenario: ScenarioSettings, phase: Phase, count: int) -> list[float]:
    """Of the scenario's placement, where it has as many instances; else all alike."""
    planned = [group.weight for group in scenario.placement if group.phase == phase for _ in range(group.count)]
    return planned if len(planned) == count else [1.0] * count


async def _offer(url: Url) -> v.Served:
    try:
        return v.served_by(await fetch(url, v.MODELS), await fetch(url, v.VERSION), url.text)
    except (ServerGone, ServerRefused) as error:
        raise LiveError(f"no vLLM server to attach to: {error}") from error


def connect(urls: Mapping[Phase, Sequence[str]], scenario: ScenarioSettings, governors: Path | None) -> list[Server]:
    """Servers that answer, with their governors; what is missing is told on standard error.

    Args:
        urls: of the servers, by phase.
        scenario: its placement has their routing weights.
        governors: folder with the sockets of their governors; None: they have none.

    Raises:
        LiveError: a server does not answer, only some have governors, or only some of these have a meter.
    """
    servers = []
    for phase in PHASES:
        if not urls[phase]:
            raise LiveError(f"no URL of a {phase} server")
        weights = _weights(scenario, phase, len(urls[phase]))
        for number, (text, weight) in enumerate(zip(urls[phase], weights, strict=True)):
            url = Url.parsed(text)
            served = asyncio.run(_offer(url))
            if not served.tested:
                print(
                    f"biscale-gym: {text} runs vLLM {served.version}; tested with {', '.join(TESTED)}", file=sys.stderr
                )
            servers.append(Server(f"{phase}-{number}", phase, url, weight, served))
    if governors is not None:
        for server in servers:
            with contextlib.suppress(OSError):
                server.governor = GovernorLink(governors, server.name, server.phase)
    sources = {server.governor.source for server in servers if server.governor is not None}
    if len(sources) > 1:
        told = ", ".join(f"{server.name}'s are {server.governor.source}" for server in servers if server.governor)
        raise LiveError(f"joules of some servers are measured and of others modelled, which do not add up: {told}")
    without = [f"{server.name} ({server.url.text})" for server in servers if server.governor is None]
    if without and len(without) < len(servers):
        raise LiveError(f"these servers have no governor in {governors}, while others have: {', '.join(without)}")
    if without:
        print(
            "biscale-gym: observe-only: these servers have no governor, so no clock is set and no energy known; start "
            f"them with --scheduler-cls {v.SCHEDULER_CLASS} and ${VARIABLE}, and name the folder of their --governors",
            file=sys.stderr,
        )
    return servers


def hang_up(servers: Sequence[Server]) -> None:
    """Let their own controllers be in charge again."""
    for server in servers:
        if server.governor is not None:
            server.governor.close()


@dataclass(frozen=True)
class Started:
    """A server that was started here.

    Attributes:
        name: of its governor.
        phase: of it.
        url: where it listens.
        process: of its API server; the engine is a child of that.
        log: what it says.
    """

    name: str
    phase: Phase
    url: str
    process: subprocess.Popen[bytes]
    log: Path


def _end_with_parent() -> None:
    """In a new process: SIGTERM when its parent's main thread is gone, however that ended (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(
    scenario_name: str, scenario: ScenarioSettings, settings: LiveSettings, folder: Path, controller: str | None = None
) -> Iterator[Started]:
    """Start governed servers on this machine, one per instance of the scenario's placement, on 127.0.0.1.

    Args:
        scenario_name: preset or file, for the governors.
        scenario: the same; its placement and batching rules count.
        settings: of workers.
        folder: for model, logs, governors' settings and sockets.
        controller: in charge of the clocks while no client is.

    Yields:
        each as soon as its process runs; ``await_up`` waits until they serve.

    Raises:
        ConfigError: the placement takes more GPUs than there are.
        LiveError: vLLM is not installed here.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    for each in setups_of(scenario, settings, folder):
        setup, port = replace(each, port=free_port()), free_port()
        socket_path(folder, setup.name)
        path = folder / f"{setup.name}.json"
        governor = GovernorSettings(
            name=setup.name,
            phase=setup.phase,
            tp=setup.tp,
            scenario=scenario_name,
            device=setup.device,
            folder=folder,
            controller=controller,
            stale_s=settings.stale_s,
        )
        path.write_text(governor.model_dump_json(indent=1), encoding="utf-8")
        log = folder / f"{setup.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                v.server_command(setup, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment(setup, in_process=False) | {VARIABLE: str(path)},
                preexec_fn=_end_with_parent,
            )
        yield Started(setup.name, setup.phase, f"http://127.0.0.1:{port}", process, log)


def await_up(servers: Sequence[Started], limit_s: float) -> None:
    """Wait until all of them serve.

    Raises:
        LiveError: one has ended, or is not up in time; the end of what it said is in the message.
    """
    end_s = time.monotonic() + limit_s
    for server in servers:
        while True:
            try:
                asyncio.run(_offer(Url.parsed(server.url)))
                break
            except LiveError:
                status = server.process.poll()
                if status is not None or time.monotonic() > end_s:
                    said = server.log.read_text(encoding="utf-8", errors="replace")[-3000:]
                    why = f"is not up after {limit_s:g} s" if status is None else f"ended with status {status}"
                    raise LiveError(f"{server.name} {why}; {server.log}:\n{said}") from None
                time.sleep(0.5)


def stop(servers: Sequence[Started]) -> None:
    """End them."""
    for server in servers:
        if server.process.poll() is None:
            server.process.terminate()
    for server in servers:
        try:
            server.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
