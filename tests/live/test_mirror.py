"""What workers show, and that the observation made of it is Cluster-v0's."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest

from biscale_gym.cluster.simulator import Simulator
from biscale_gym.cluster.state import PREFILL
from biscale_gym.envs import cluster_lanes as lanes
from biscale_gym.envs.cluster import ClusterEnv
from biscale_gym.live.devices import Reading, Spent, Work
from biscale_gym.live.governor import Load, WaitingPrompt
from biscale_gym.live.mirror import Seen, mirror, mirror_requests
from biscale_gym.live.status import (
    BLOCK_BYTES,
    SLACK_PERCENTS,
    Status,
    StatusWriter,
    clear_status,
    read_status,
    write_status,
)

ORIGIN_S = 1000.0
"""Start of the run on the workers' scale of time."""


@pytest.fixture
def block() -> Any:
    return multiprocessing.get_context("forkserver").RawArray("B", BLOCK_BYTES)


# -- the block ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(block: Any) -> None:
    assert read_status(block) == Status()
    shown = Status(*(float(number) for number in range(len(Status._fields))))
    write_status(block, shown)
    assert read_status(block) == shown
    clear_status(block)
    assert read_status(block) == Status()


def test_a_status_is_never_half_read(block: Any) -> None:
    ending = threading.Event()

    def write() -> None:
        number = 0.0
        while not ending.is_set():
            number += 1.0
            write_status(block, Status(*[number] * len(Status._fields)))

    writer = threading.Thread(target=write)
    writer.start()
    seen = {frozenset(status) for status in (read_status(block) for _ in range(20_000)) if status is not None}
    ending.set()
    writer.join()
    assert len(seen) > 2
    assert sum(len(numbers) != 1 for numbers in seen - {frozenset(Status())}) == 0


def test_a_writer_that_died_while_it_wrote_is_noticed(block: Any) -> None:
    write_status(block, Status(energy_j=1.0))
    block[0] += 1  # it had begun another
    assert read_status(block) is None


def test_a_worker_counts_what_it_shows(block: Any) -> None:
    writer = StatusWriter(block)
    writer.go(100.0)
    batch = Work(batch=3.0, kv_tokens=900.0)
    waiting = [WaitingPrompt(500, 200, 0.5), WaitingPrompt(300, 0, 0.75), WaitingPrompt(10, 0, 0.8)]
    load = Load(batch, 0.25, 1024, 2, 310, waiting, [0.3, 0.1, 0.2], routed=7, requests=3)
    writer.boundary(load, 2.0, Reading(5.0, 1410, 300.0, 150.0), 1410)
    writer.ended(batch, Spent(0.02, 1410, 6.0), Reading(5.02, 1410, 100.0, 156.0))
    assert read_status(block).energy_at_j(6.02) == pytest.approx(56.0 + 100.0)  # type: ignore[union-attr]
    writer.ended(Work(prefill_tokens=50.0, sum_len_sq=2500.0), Spent(0.03, 1410, 9.0), Reading(5.1, 1410, 100.0, 168.0))
    writer.boundary(load, 2.5, Reading(6.0, 1410, 300.0, 170.0), 930)
    status = read_status(block)
    assert status is not None
    assert (status.energy_j, status.busy_j, status.busy_s) == (70.0, 15.0, pytest.approx(0.05))
    assert (status.iterations, status.prompt_tokens, status.output_tokens, status.clock_changes) == (2, 50, 3, 1)
    assert (status.running, status.requests, status.routed, status.first_waiting_s) == (1, 3, 7, 0.75)
    assert status.deadlines_s == pytest.approx((2.6, 2.6, 2.7))
    assert status.energy_at_j(6.5) == pytest.approx(70.0 + 0.5 * 300.0)


# -- the mirror --------------------------------------------------------------------------------------------------------


def shown_by(simulator: Simulator, number: int) -> Seen:
    """What a worker in an instance's place would show at this moment, and what the client would know."""
    state, clocks = simulator.state, simulator.clocks_mhz
    inst, glob = state.inst[number], state.glob[0]
    now_s = simulator.now_s
    energy = simulator.instances()
    arrivals = [float(r["arrival_s"]) for r in listed(state, int(inst["batch_head"]))]
    queued = list(listed(state, int(inst["queue_head"])))
    decode = inst["phase"] != PREFILL
    last = int(inst["run_n"]) - 1
    deadlines_s = [
        float(state.slack_s[number, last - percent * last // 100] + glob["tpot_slo_s"] * inst["iterations"])
        for percent in SLACK_PERCENTS
        if decode and last >= 0
    ] or [0.0, 0.0, 0.0]
    ago_s = 0.0  # the batch began so long ago, had it run at this clock all the time
    if inst["running"]:
        left = inst["work_left"] - (now_s - inst["segment_start_s"]) / inst["full_duration_s"]
        ago_s = float((1.0 - left) * inst["full_duration_s"])
    status = Status(
        time_s=ORIGIN_S + now_s - ago_s,
        running=float(inst["running"]),
        clock_mhz=clocks[inst["clock"]],
        target_mhz=clocks[inst["target"]],
        power_w=float(inst["power_w"]),
        energy_j=float(energy.energy_j[number].sum() - inst["power_w"] * ago_s),
        energy_s=ORIGIN_S + now_s - ago_s,
        drawn_w=float(inst["power_w"]),
        busy_j=float(energy.energy_j[number, 0]),
        busy_s=float(energy.time_s[number, 0]),
        iterations=float(inst["iterations"]),
        prompt_tokens=float(inst["prompt_tokens"]),
        output_tokens=float(inst["output_tokens"]),
        clock_changes=float(inst["clock_changes"]),
        kv_used_tokens=float(inst["kv_used"]),
        requests=float(inst["run_n"] if decode else inst["batch_n"]),
        batch=float(inst["run_n"] if decode else inst["iter_batch"]),
        kv_tokens=float(inst["run_kv"] if decode else inst["iter_kv"]),
        prefill_tokens=float(inst["iter_tokens"]),
        sum_len_sq=float(inst["iter_sum_sq"]),
        oldest_arrival_s=min(arrivals, default=np.inf),
        routed=float(inst["routed"]),
        queue_requests=float(inst["queue_n"] + inst["transit_n"]),
        queue_tokens=float(inst["queue_tokens"] + inst["transit_tokens"]),
        first_waiting_s=float(queued[0]["arrival_s"]) if queued else np.inf,
        least_deadline_s=deadlines_s[0],
        p5_deadline_s=deadlines_s[1],
        p50_deadline_s=deadlines_s[2],
    )
    counts = {name: int(inst[name]) for name in ("routed", "completed", "late")}
    return Seen(status, **counts, kv_capacity_tokens=int(inst["kv_capacity"]))


def listed(state: Any, first: int) -> Any:
    while first >= 0:
        yield state.req[first]
        first = int(state.req[first]["next"])


def without_the_last(seen: Seen, simulator: Simulator) -> Seen:
    """The same worker, before it has read its pipe: the prompts that wait on it are known to the client alone."""
    inst = simulator.state.inst[0]
    queued = [(int(r["prompt"]), float(r["arrival_s"])) for r in listed(simulator.state, int(inst["queue_head"]))]
    status = seen.status._replace(
        routed=seen.status.routed - len(queued), queue_requests=0.0, queue_tokens=0.0, first_waiting_s=np.inf
    )
    return replace(seen, status=status, unseen=queued)


LIVE = {"scenario": "live-smoke", "overrides": {"rate_rps": 25.0}}
SEVERAL = {"scenario": "paper-67"}
COMPARED = ("in_flight", "waiting_requests", "slack_running", "slack_waiting", "work_left", "slack[0]", "late_60s")


@pytest.mark.parametrize("settings", [LIVE, SEVERAL], ids=["live-smoke", "paper-67"])
def test_the_observation_of_the_same_state_is_cluster_v0s(settings: dict[str, Any]) -> None:
    """Entry by entry, over an episode under random clocks; terms too."""
    env: ClusterEnv = gymnasium.make("BiScale/Cluster-v0", episode_s=15.0, warmup_s=5.0, **settings).unwrapped  # type: ignore[assignment]
    setting = env.setting
    expected, _ = env.reset(seed=3)
    env.action_space.seed(3)
    assert env.episode is not None
    other = setting._new_simulator(env.episode, setting.placement, None)
    count = len(setting.placement.instances)
    lane, obs, terms = np.zeros(1, setting.lane_dtype), np.zeros_like(expected), np.zeros(setting.terms)
    spread: dict[str, set[float]] = {name: set() for name in COMPARED}

    def show() -> dict[str, int]:
        seen = [shown_by(env.simulator, number) for number in range(count)]
        if count == 2:
            seen[0] = without_the_last(seen[0], env.simulator)
        counts = env.simulator.counts()
        mirror(other, seen, counts, env.simulator.now_s, ORIGIN_S)
        return counts

    show()
    setting.begin(lane, other, env.episode)
    setting.first(other.handle(), lane, obs, terms)
    np.testing.assert_allclose(obs, expected, atol=2e-6, err_msg="at the start")
    over = False
    while not over:
        expected, reward, _, over, info = env.step(env.action_space.sample())
        counts = show()
        if over:
            mirror_requests(other, env.simulator.requests(), counts["arrived"])
        lanes.tell_cluster(other.handle(), lane, setting.params, over, obs, terms)
        for name, found, wanted in zip(env.observation_names, obs.tolist(), expected.tolist(), strict=True):
            assert found == pytest.approx(wanted, abs=2e-6), f"{name} at {env.simulator.now_s:.1f} s"
            for part in COMPARED:
                if name.endswith(part):
                    spread[part].add(wanted)
        assert terms[setting.reward_column] == pytest.approx(reward)
        assert setting.info(terms) == pytest.approx({name: info[name] for name in setting.term_columns})
    assert min(len(values) for name, values in spread.items() if name != "late_60s") > 5  # none was trivially equal
    metrics = setting.figures(env.simulator.requests(), other.instances().since(env._start), env.episode)  # type: ignore[arg-type]
    left_out = {"switching_energy_j", "idle_energy_j"}  # live joules are of batches, or idle
    assert {name: value for name, value in metrics.items() if name not in left_out} == pytest.approx(
        {name: value for name, value in info["episode_metrics"].items() if name not in left_out}
    )


def test_energy_of_former_processes_counts() -> None:
    env: ClusterEnv = gymnasium.make("BiScale/Cluster-v0", scenario="live-smoke", episode_s=5.0).unwrapped  # type: ignore[assignment]
    env.reset(seed=0)
    simulator = env.setting._new_simulator(env.episode, env.setting.placement, None)  # type: ignore[arg-type]
    first = Status(energy_s=ORIGIN_S, drawn_w=100.0, energy_j=10.0, busy_j=4.0, busy_s=0.5, iterations=7.0)
    idle = Seen(Status(energy_s=ORIGIN_S + 2.0, drawn_w=100.0, clock_mhz=750.0, target_mhz=1980.0), 0, 0, 0, 1000)
    counts = {"arrived": 0, "finished": 0, "rejected": 0}
    mirror(simulator, [replace(idle, lost=(first,)), idle], counts, 3.0, ORIGIN_S)
    ledger = simulator.instances()
    assert ledger.energy_j.sum(axis=1).tolist() == [10.0 + 100.0, 100.0]
    assert (ledger.energy_j[0, 0], ledger.iterations.tolist()) == (4.0, [7, 0])
    assert simulator.state.inst["in_service"].tolist() == [0, 0]  # the clock asked for is not in force yet
    mirror(simulator, [replace(idle, lost=(first,)), idle], counts, 2.5, ORIGIN_S)
    assert simulator.instances().energy_j.sum(axis=1).tolist() == [110.0, 100.0]  # joules do not fall
