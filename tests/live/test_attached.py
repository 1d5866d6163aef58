"""Real vLLM servers, reached by URL: two hops over HTTP, governors inside them, deaths."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from live.helpers import (
    LOOPBACK,
    REAL_WORKERS,
    children,
    ended,
    everything_finished,
    listening_addresses,
    steady,
    wait_until,
)

from biscale_gym.cluster.placement import PHASES
from biscale_gym.config import load_preset
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live.attached import OBSERVE_ONLY, AttachedReplay
from biscale_gym.live.demand import prepared
from biscale_gym.live.errors import LiveError
from biscale_gym.live.records import read_records
from biscale_gym.live.replay import Outcome
from biscale_gym.live.servers import Started, await_up, connect, hang_up, start, stop
from biscale_gym.live.settings import LiveSettings
from biscale_gym.metrics import tpot_s
from biscale_gym.traces import Trace

pytestmark = REAL_WORKERS

Play = Callable[..., Outcome]


@pytest.fixture(scope="module")
def settings() -> LiveSettings:
    return load_preset(LiveSettings, "live", "cpu").model_copy(update={"hung_s": 60.0, "kv_lease_s": 6})


@pytest.fixture(scope="module")
def servers(scenario: ScenarioSettings, settings: LiveSettings, folder: Path) -> Iterator[list[Started]]:
    started: list[Started] = []
    try:
        for server in start("live-smoke", scenario, settings, folder):
            started.append(server)
        await_up(started, 600.0)
        yield started
    finally:
        stop(started)


@pytest.fixture
def play(
    servers: list[Started], scenario: ScenarioSettings, settings: LiveSettings, folder: Path, tmp_path: Path
) -> Play:
    def run(
        trace: Trace,
        controller: str = "max-clock",
        governed: bool = True,
        hung_s: float = 60.0,
        drain_limit_s: float = 300.0,
    ) -> Outcome:
        urls = {phase: [server.url for server in servers if server.phase == phase] for phase in PHASES}
        attached = connect(urls, scenario, folder if governed else None)
        context = prepared(scenario.model_copy(update={"drain_limit_s": drain_limit_s}), None, 0)[1]
        patient = settings.model_copy(update={"hung_s": hung_s})
        try:
            return AttachedReplay(attached, trace, controller, context, patient, tmp_path / controller).run()
        finally:
            hang_up(attached)

    return run


def test_governed_servers_serve_a_trace(play: Play, tmp_path: Path) -> None:
    trace = steady(20, 0.2)
    top, low = play(trace), play(trace, "biscale")
    for outcome in (top, low):
        everything_finished(outcome)
        assert outcome.retried == 0
        assert outcome.prompt_tokens == int(trace.prompt_tokens.sum())
        assert outcome.prompt_tokens_by_source["external_kv_transfer"] == outcome.prompt_tokens
        assert outcome.prompt_tokens_by_source["local_compute"] == 0
        assert len(outcome.itl_s) == int((trace.output_tokens - 1).sum())
        assert (tpot_s(outcome.requests) * (trace.output_tokens - 1)).sum() == pytest.approx(outcome.itl_s.sum())
        assert outcome.source == "modelled"
        records = {name: read_records(tmp_path / outcome.controller / f"{name}.csv") for name in servers_of(outcome)}
        assert records["prefill-0"]["prefill_tokens"].sum() == outcome.prompt_tokens
        assert records["decode-0"]["batch"].sum() == int(trace.output_tokens.sum())
        assert 0.0 < sum(rows["energy_j"].sum() for rows in records.values()) < outcome.energy_j
        for rows in records.values():
            # Between two iterations nothing else may have been booked as one of them.
            assert (rows["duration_s"] >= 0.99 * rows["computed_s"]).all()
    assert set(read_records(tmp_path / "max-clock" / "decode-0.csv")["clock_mhz"]) == {1980}
    lowered = read_records(tmp_path / "biscale" / "decode-0.csv")
    lowered = lowered[lowered["clock_mhz"] < 1980]
    assert len(lowered) > 20
    assert np.median(lowered["duration_s"] / lowered["computed_s"]) > 1.05
    lines = (tmp_path / "biscale" / "decode-0.metrics.csv").read_text().splitlines()
    assert len(lines) > 5
    assert all(0.0 <= float(line.split(",")[3]) <= 1.0 for line in lines[1:])


def servers_of(outcome: Outcome) -> tuple[str, ...]:
    assert set(outcome.requests.prefill_instance) == {0}
    assert set(outcome.requests.decode_instance) == {1}
    return "prefill-0", "decode-0"


def test_without_governors_they_are_observed(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = play(steady(4, 0.2), OBSERVE_ONLY, governed=False)
    everything_finished(outcome)
    assert outcome.prompt_tokens_by_source["external_kv_transfer"] == outcome.prompt_tokens
    assert outcome.source == ""
    assert np.isnan(outcome.energy_j)
    assert "observe-only: these servers have no governor" in capsys.readouterr().err


def test_a_controller_that_cannot_govern_is_told(play: Play) -> None:
    with pytest.raises(LiveError, match="cannot be governed by nobody:Nothing"):
        play(steady(1, 0.2), "nobody:Nothing")
    everything_finished(play(steady(2, 0.2)))


def test_nothing_listens_beyond_loopback(play: Play, servers: list[Started]) -> None:
    play(steady(2, 0.2))
    pids = {server.process.pid for server in servers}
    found = listening_addresses(pids | {child for pid in pids for child in children(pid)})
    assert found
    assert found <= LOOPBACK


def test_a_hung_engine_is_noticed_and_heard_again(play: Play, servers: list[Started]) -> None:
    """Its API server goes on answering; what it was asked is served again when it is back."""
    decode = next(server for server in servers if server.phase == "decode")
    (engine,) = [pid for pid in children(decode.process.pid) if "EngineCor" in name_of(pid)]  # cut off at 15 letters
    threading.Timer(1.0, lambda: os.kill(engine, signal.SIGSTOP)).start()
    threading.Timer(20.0, lambda: os.kill(engine, signal.SIGCONT)).start()
    outcome = play(steady(12, 0.2), hung_s=8.0)
    everything_finished(outcome)
    assert outcome.retried >= 1
    assert any(why.startswith("decode-0 has answered no request for") for why in outcome.replaced)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


# The last: afterwards there is no decode server.
def test_requests_of_a_dead_server_fail_and_are_counted(play: Play, servers: list[Started]) -> None:
    decode = next(server for server in servers if server.phase == "decode")
    engines = children(decode.process.pid)
    threading.Timer(1.5, decode.process.kill).start()
    outcome = play(steady(12, 0.2), drain_limit_s=60.0)
    assert outcome.states["finished"] + outcome.states["failed"] == 12
    assert outcome.states["failed"] > 0
    assert any(why.startswith("decode-0 is gone") for why in outcome.replaced)
    wait_until(lambda: all(ended(pid) for pid in engines))  # vLLM leaves them, the governor does not
