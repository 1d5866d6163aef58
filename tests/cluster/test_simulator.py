"""The simulator's Python face: snapshots, stepwise driving, bad answers, re-placement, routers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster.random_clusters import Case, new_engine, random_case, restless_decode, restless_prefill, run_engine
from cluster.small_clusters import CLOCKS_MHZ, SLO, cluster, decode, prefill, profile, requests, simulator
from numba import njit

from biscale_gym.cluster.placement import InstanceSpec, Placement, PlacementError
from biscale_gym.cluster.policy import MEMORY_SIZE, POLICY_SIGNATURE
from biscale_gym.cluster.simulator import ClusterError, Decision, PhasePolicy, PolicyError, Simulator
from biscale_gym.cluster.state import BUCKETS, EVENTS

TESTS = Path(__file__).resolve().parents[1]
BUSY = [0.01 * number for number in range(60)]


def bits(simulator: Simulator) -> list[bytes]:
    """Everything that a run changes; the scratch vector of the last observation apart."""
    return [array.tobytes() for name, array in simulator.state._asdict().items() if name != "obs"]


def busy_cluster() -> Simulator:
    """Two instances of each phase under load, with clock calls and transfers that take time."""
    trace = requests(BUSY, [50 + 37 * number % 400 for number in range(60)], [2 + number % 30 for number in range(60)])
    specs = [prefill(), prefill(4), decode(), decode(4)]
    return simulator(specs, trace, cluster(switching="nvml", transfer="rdma-20"), seed=3)


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_s", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("seed", [1, 4, 7])
def test_a_restored_run_is_the_same_to_the_last_bit(seed: int, at_s: float) -> None:
    run = new_engine(random_case(seed))
    run.run(at_s)
    start = run.snapshot()
    before = bits(run)
    run.run()
    after = bits(run)
    for _ in range(2):
        run.restore(start)
        assert bits(run) == before
        run.run()
        assert bits(run) == after


def test_a_snapshot_holds_a_pending_decision() -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(), PhasePolicy())
    decision = run.run(0.2)
    for _ in range(9):
        assert decision is not None
        decision = run.run(answer=(decision.instance + 1) % len(CLOCKS_MHZ))
    start = run.snapshot()

    def finish(clock: int) -> list[bytes]:
        waiting = run.run()
        assert waiting is not None
        assert decision is not None
        assert (waiting.instance, waiting.reason) == (decision.instance, decision.reason)
        while waiting is not None:
            waiting = run.run(answer=clock)
        return bits(run)

    low = finish(0)
    run.restore(start)
    high = finish(3)
    run.restore(start)
    assert finish(0) == low
    assert high != low


def test_a_snapshot_outlives_replacements_and_policies() -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(counting), PhasePolicy(restless_decode))
    run.run(0.2)
    start = run.snapshot()
    run.run()
    expected = bits(run)
    run.restore(start)
    run.reconfigure(Placement((prefill(8), *[decode(1)] * 8)))
    run.set_policies(PhasePolicy(restless_prefill), PhasePolicy(counting))
    run.run()
    again = run.requests().finish_s
    run.restore(start)
    run.run()
    assert bits(run) == expected
    run.restore(start)
    run.reconfigure(Placement((prefill(8), *[decode(1)] * 8)))
    run.set_policies(PhasePolicy(restless_prefill), PhasePolicy(counting))
    run.run()
    np.testing.assert_array_equal(run.requests().finish_s, again)


def test_a_snapshot_shares_nothing_with_the_run() -> None:
    run = busy_cluster()
    start = run.snapshot()
    kept = [array.tobytes() for array in start.state]
    run.run()
    assert [array.tobytes() for array in start.state] == kept


# -- determinism -------------------------------------------------------------------------------------------------------


DIGEST = """
import hashlib
from cluster.random_clusters import random_case, run_engine
digest = hashlib.sha256()
for seed in (3, 5, 1003):
    ledger = run_engine(random_case(seed, borders=seed > 1000)).requests()
    for name in ("prefill_start_s", "first_token_s", "delivered_s", "finish_s"):
        digest.update(getattr(ledger, name).tobytes())
print(digest.hexdigest())
"""


def test_another_process_gives_the_same_times() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "PYTHONHASHSEED": hash_seed}
        digests.add(subprocess.check_output([sys.executable, "-c", DIGEST], env=environment, text=True).strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_the_seed_decides_switching_times_and_nothing_is_left_to_chance() -> None:
    def finish_s(seed: int) -> list[float]:
        case = random_case(3)
        run = Simulator(cluster(switching="nvml"), case.profile, case.placement, case.trace, CLOCKS_MHZ, SLO, seed)
        run.set_policies(PhasePolicy(restless_prefill), PhasePolicy(restless_decode))
        run.run()
        return run.requests().finish_s.tolist()

    assert finish_s(1) == finish_s(1)
    assert finish_s(1) != finish_s(2)


def test_a_policy_that_remembers_more_has_room_for_it() -> None:
    narrow, wide = busy_cluster(), busy_cluster()
    for run, memory in ((narrow, MEMORY_SIZE), (wide, 100)):
        run.set_policies(PhasePolicy(restless_prefill, memory=memory), PhasePolicy(restless_decode))
        run.run(0.5)
        run.state.memory[:, :MEMORY_SIZE] = np.arange(MEMORY_SIZE)
        kept = run.state.memory.copy()
        run.set_policies(PhasePolicy(restless_prefill), PhasePolicy(restless_decode, memory=200))
        run.run()
        assert run.state.memory.shape == (len(kept), 200)
        assert not run.state.memory[:, MEMORY_SIZE:].any()
    np.testing.assert_array_equal(narrow.requests().finish_s, wide.requests().finish_s)
    np.testing.assert_array_equal(narrow.state.memory, wide.state.memory)
    before = wide.state.memory.copy()
    for number in range(20):  # until the lanes outgrow their arrays
        tp = 2 + 2 * (number % 2)
        wide.reconfigure(
            Placement((InstanceSpec("prefill", tp, CLOCKS_MHZ[0]), InstanceSpec("decode", tp, CLOCKS_MHZ[0])))
        )
    assert len(wide.state.memory) > len(before)
    np.testing.assert_array_equal(wide.state.memory[: len(before)], before)
    assert wide.state.memory.shape[1] == 200


# -- stepwise driving --------------------------------------------------------------------------------------------------


def drive(run: Simulator, policies: dict[str, Callable[..., int]], until_s: float) -> int:
    """Answer every decision with a Python function of the compiled signature; returns their number."""
    memory = {number: np.zeros(MEMORY_SIZE) for number in range(64)}
    decision: Decision | None = run.run(until_s)
    asked = 0
    while decision is not None:
        asked += 1
        answer = policies[decision.phase](decision.obs, memory[decision.instance], np.zeros(1), np.zeros(1))
        decision = run.run(until_s, answer=answer)
    return asked


def stepwise(case: Case) -> Simulator:
    """The case with the same policies, every one of their answers given from outside."""
    run = new_engine(case)
    run.set_policies(
        PhasePolicy(on_arrival=True, on_overrun=case.mispredict, on_idle=True),
        PhasePolicy(on_overrun=case.mispredict, on_idle=True),
    )
    policies = {"prefill": restless_prefill.py_func, "decode": restless_decode.py_func}
    asked = 0
    for at_s, placement in case.borders:
        asked += drive(run, policies, at_s)
        run.reconfigure(placement)
    asked += drive(run, policies, case.until_s)
    assert asked > 0
    return run


@pytest.mark.parametrize("borders", [False, True])
def test_stepwise_driving_equals_the_compiled_policy(borders: bool) -> None:
    cases = [case for case in (random_case(seed, borders) for seed in range(400, 440)) if case.policies]
    assert len(cases) > 15
    for case in cases:
        compiled, stepped = run_engine(case), stepwise(case)
        np.testing.assert_array_equal(stepped.events, compiled.events)
        np.testing.assert_array_equal(stepped.requests().finish_s, compiled.requests().finish_s)
        np.testing.assert_array_equal(stepped.instances().energy_j, compiled.instances().energy_j)
        for counted in ("digest", "decisions"):
            assert stepped.state.glob[0][counted] == compiled.state.glob[0][counted]


def test_one_phase_may_be_compiled_and_the_other_stepwise() -> None:
    both, half = busy_cluster(), busy_cluster()
    both.set_policies(PhasePolicy(restless_prefill), PhasePolicy(restless_decode))
    both.run()
    half.set_policies(PhasePolicy(restless_prefill), PhasePolicy())
    drive(half, {"decode": restless_decode.py_func}, np.inf)
    np.testing.assert_array_equal(half.requests().finish_s, both.requests().finish_s)


# -- bad answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "nearest"),
    [(-1, 0), (4, 3), (10**30, 3), (1.7, 2), (2.0, 2), (-0.1, 0), (np.inf, 3), (np.float32(0.4), 0)],
)
def test_an_answer_that_is_no_clock_is_refused_with_the_nearest(answer: object, nearest: int) -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(), None)
    decision = run.run()
    assert decision is not None
    place = rf"the prefill policy, for instance {decision.instance} at {run.now_s:.6f} s, answered"
    with pytest.raises(PolicyError, match=rf"{place} .*the nearest is {nearest}; valid: 0 to 3 \(\[705, 1005, "):
        run.run(answer=answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [np.nan, "2", [2], np.array([2]), np.array(1.5)])
def test_an_answer_near_to_no_clock_is_refused(answer: object) -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(), None)
    run.run()
    with pytest.raises(PolicyError, match=r"which is no clock index; valid: 0 to 3 \("):
        run.run(answer=answer)  # type: ignore[arg-type]


def test_a_refused_answer_can_be_given_again() -> None:
    spoiled, clean = busy_cluster(), busy_cluster()
    for run in (spoiled, clean):
        run.set_policies(PhasePolicy(), None)
        run.run()
    with pytest.raises(PolicyError):
        spoiled.run(answer=9)
    for run in (spoiled, clean):
        while run.run(answer=2) is not None:
            pass
    np.testing.assert_array_equal(spoiled.requests().finish_s, clean.requests().finish_s)


@pytest.mark.parametrize("answer", [np.int32(2), np.array(2), np.uint8(2)])
def test_any_whole_number_is_an_answer(answer: int) -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(), None)
    decision = run.run()
    assert decision is not None
    run.run(answer=answer)
    assert run.state.inst[decision.instance]["target"] == 2


@njit(POLICY_SIGNATURE)
def constant(obs, memory, params, model):  # type: ignore[no-untyped-def]
    return int(params[0])


@njit(POLICY_SIGNATURE)
def raising(obs, memory, params, model):  # type: ignore[no-untyped-def]
    if obs[0] > 0.1:
        raise ValueError("no plan")
    return 0


@pytest.mark.parametrize("answer", [-1.0, 4.0, 1e15, np.nan])
def test_a_compiled_policy_that_answers_no_clock_is_named(answer: float) -> None:
    run = busy_cluster()
    run.set_policies(None, PhasePolicy(constant, np.array([answer])))
    with pytest.raises(PolicyError, match=r"the decode policy, for instance \d at 0\.\d+ s, answered .*valid: 0 to 3"):
        run.run()


def test_a_compiled_policy_that_raises_is_named() -> None:
    run = busy_cluster()
    run.set_policies(PhasePolicy(raising), None)
    with pytest.raises(PolicyError, match=r"a clock policy failed at 0\.\d+ s: ValueError\('no plan'\)"):
        run.run()


def test_an_answer_to_no_decision_is_refused() -> None:
    run = busy_cluster()
    with pytest.raises(ClusterError, match="no decision waits for one at 0"):
        run.run(answer=1)


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ClusterError, match="until_s is nan"):
        busy_cluster().run(np.nan)


def test_a_clock_is_set_only_where_there_is_one_and_an_instance() -> None:
    run = busy_cluster()
    run.set_clock(1, 3)
    run.run(0.5)
    assert run.state.inst["clock"][:4].tolist() == [2, 3, 2, 2]
    with pytest.raises(PolicyError, match="set_clock for instance 1 answered 4, which is no clock index; the nearest"):
        run.set_clock(1, 4)
    with pytest.raises(ClusterError, match=r"no instance 4 is running; valid: \[0, 1, 2, 3\]"):
        run.set_clock(4, 1)
    run.reconfigure(Placement((prefill(), decode())))
    run.run()
    with pytest.raises(ClusterError, match=r"no instance 1 is running; valid: \[0, 2\]"):
        run.set_clock(1, 1)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ClusterError, match="seed is -1, expected a whole number of at least 0"):
        simulator([prefill(), decode()], requests([0.0]), cluster(), seed=-1)


# -- re-placement ------------------------------------------------------------------------------------------------------


@njit(POLICY_SIGNATURE)
def counting(obs, memory, params, model):  # type: ignore[no-untyped-def]
    memory[0] += 1.0
    return int(memory[0]) % 4


def replaced(capacity: int, mode: str) -> Simulator:
    """From two lanes to eighteen and back, under load, three batches of prompts on the way."""
    trace = requests([0.004 * number for number in range(600)], 300, 20)
    settings = cluster(
        nodes=2,
        switching="nvml",
        transfer="rdma-20",
        replacement={"mode": mode, "start_s": 0.1, "load_gb_per_s": 500.0},
    )
    run = simulator([prefill(4), decode(4)], trace, settings, capacity=capacity, log_events=100_000)
    run.set_policies(PhasePolicy(restless_prefill, on_arrival=True), PhasePolicy(counting, on_idle=True))
    for at_s, placement in (
        (0.31, Placement((*[prefill(1)] * 6, *[decode(1)] * 8))),
        (0.92, Placement((prefill(8), *[decode(2)] * 4))),
        (1.57, Placement((prefill(4), decode(4)))),
    ):
        run.run(at_s)
        run.reconfigure(placement)
    run.run()
    return run


@pytest.mark.parametrize("mode", ["drain", "instant"])
def test_room_for_lanes_grows_without_a_trace(mode: str) -> None:
    grown, roomy = replaced(0, mode), replaced(64, mode)
    assert len(grown.lanes) == len(roomy.lanes) > 16
    assert len(grown.state.inst) > len(grown.lanes)
    np.testing.assert_array_equal(grown.events, roomy.events)
    np.testing.assert_array_equal(grown.instances().energy_j, roomy.instances().energy_j)
    counts = grown.counts()
    assert counts["finished"] == counts["arrived"] == 600


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([prefill(), decode(), decode(clock_mhz=1400)], "no clock 1400 MHz; the nearest is 1410"),
        ([prefill(4)], "no decode instance"),
        ([prefill(), *[decode(8)] * 2], "takes 18 GPUs"),
        ([prefill(2), decode(3)], "TP 3 is not supported"),
    ],
)
def test_a_refused_placement_leaves_the_run_as_it_was(specs: list[InstanceSpec], message: str) -> None:
    disturbed, calm = busy_cluster(), busy_cluster()
    for run in (disturbed, calm):
        run.run(0.2)
    with pytest.raises((ClusterError, PlacementError), match=message):
        disturbed.reconfigure(Placement(tuple(specs)))
    for run in (disturbed, calm):
        run.run()
    assert len(disturbed.lanes) == 4
    assert bits(disturbed) == bits(calm)


def test_a_kept_instance_has_its_new_share_of_requests() -> None:
    run = simulator([prefill(2), prefill(4)], requests(np.arange(12.0)), cluster(), only="prefill")
    run.run(3.5)
    run.reconfigure(Placement((prefill(2), prefill(4, weight=3.0))))
    run.run()
    taken = run.requests().prefill_instance
    assert taken[:4].tolist() == [0, 1, 0, 1]
    assert (taken[4:] == 1).sum() == 6


def test_a_clock_rises_after_the_last_call_and_falls_after_the_first(tmp_path: Path) -> None:
    calls = tmp_path / "calls.yaml"
    calls.write_text("median_ms: 5.0\nsigma: 0.0\nsettle_ms: 1.0\n")
    run = simulator([prefill(4), decode(2)], requests([9.0]), cluster(switching=str(calls)), log_events=100)
    run.run(1.0)
    run.set_clock(0, 3)
    run.set_clock(1, 3)
    run.run(2.0)
    run.set_clock(0, 0)
    run.run(3.0)
    changes = run.events[run.events["kind"] == EVENTS.index("clock")]
    # One node's calls come one after another, each instance's followed by the time to settle.
    np.testing.assert_allclose(changes["time_s"], [1.021, 1.032, 2.006])
    assert changes["instance"].tolist() == [0, 1, 0]
    np.testing.assert_allclose(run.instances().time_s[:, BUCKETS.index("switching")], [0.042, 0.011])


def test_an_instance_is_booked_from_the_moment_it_has_gpus() -> None:
    trace = requests([0.0], 2000, 1000)
    settings = cluster(nodes=1, replacement={"start_s": 1.0, "load_gb_per_s": 100.0})
    run = simulator([prefill(4), decode(4)], trace, settings)
    run.run(0.5)
    run.reconfigure(Placement((prefill(4), decode(2, 1410), decode(2, 1410))))
    run.run(0.6)
    run.reconfigure(Placement((prefill(4), decode(2, 1980), decode(2, 705))))
    run.run()
    drained_s = run.requests().finish_s[0]
    load_s = run.profile.weight_bytes / (2 * 100e9) + 1.0
    run.run(drained_s + load_s)
    ledger = run.instances()
    assert drained_s > 1.0
    np.testing.assert_allclose(ledger.time_s[2:], [[0.0, 0.0, 0.0, load_s]] * 2, rtol=1e-9)
    assert run.state.inst["clock"][2:].tolist() == [3, 0]
    assert run.state.node["free_gpus"].tolist() == [0]


# -- what cannot be held -----------------------------------------------------------------------------------------------


def test_what_no_instance_can_hold_is_rejected_and_counted() -> None:
    prefill_room, decode_room = (profile().kv_capacity_for(phase, 2) for phase in ("prefill", "decode"))
    long = max(prefill_room, decode_room)
    trace = requests(
        [0.0, 0.1, 0.2, 0.3, 0.4], [100, long + 1, decode_room - 9, 100, prefill_room], [5, 1, 10, decode_room, 1]
    )
    run = simulator([prefill(), decode()], trace, cluster())
    run.run()
    assert run.requests().rejected.tolist() == [False, True, True, True, False]
    assert run.counts() == {"arrived": 5, "finished": 2, "rejected": 3, "in_flight": 0}


def test_what_fills_an_instance_to_the_last_token_is_served() -> None:
    trace = requests([0.0, 0.0], 90, 30)
    run = simulator([prefill(), decode()], trace, cluster(batching={"decode_kv_tokens": 120}))
    run.run()
    assert run.counts()["finished"] == 2


def test_requests_that_a_new_placement_cannot_hold_are_rejected() -> None:
    room = profile().kv_capacity_for("decode", 2)
    trace = requests([0.0, 5.0, 5.1], [100, room, 100], [5, 100, 5])
    run = simulator([prefill(4), decode(4)], trace, cluster(replacement={"mode": "instant"}))
    run.run(4.0)
    run.reconfigure(Placement((prefill(4), decode(2))))
    run.run()
    assert run.requests().rejected.tolist() == [False, True, False]
    assert run.counts()["in_flight"] == 0


# -- routers -----------------------------------------------------------------------------------------------------------


def chosen(run: Simulator) -> list[int]:
    run.run()
    return run.requests().prefill_instance.tolist()


def test_weighted_round_robin_takes_the_least_pass_and_the_lower_number_among_equals() -> None:
    specs = [prefill(1, weight=2.0), prefill(1, weight=1.0), prefill(1, weight=4.0)]
    run = simulator(specs, requests(np.arange(14.0)), cluster(), only="prefill")
    assert chosen(run) == [0, 1, 2, 2, 0, 2, 2, 0, 1, 2, 2, 0, 2, 2]


def test_weighted_round_robin_keeps_the_shares_of_any_weights() -> None:
    weights = np.array([0.7, 2.3, 1.0])
    specs = [prefill(1, weight=float(weight)) for weight in weights]
    count = 4000
    taken = np.array(chosen(simulator(specs, requests(0.01 * np.arange(count)), cluster(), only="prefill")))
    for number, weight in enumerate(weights):
        so_far = np.cumsum(taken == number)
        assert (np.abs(so_far - np.arange(1, count + 1) * weight / weights.sum()) < 2.0).all()


def test_least_loaded_counts_the_running_batch_and_shortest_queue_does_not() -> None:
    trace = requests([0.0, 0.001, 0.002, 0.003], 4000)
    specs = [prefill(1), prefill(1)]

    def with_router(name: str) -> list[int]:
        return chosen(simulator(specs, trace, cluster(routing={"prefill": name}), only="prefill"))

    assert with_router("least-loaded") == [0, 1, 0, 1]
    assert with_router("shortest-queue") == [0, 0, 1, 1]


@pytest.mark.parametrize(("load", "expected"), [("requests", [0, 1, 0, 1]), ("waiting", [0, 0, 0, 0])])
def test_least_loaded_at_decode_counts_all_requests_or_those_that_wait(load: str, expected: list[int]) -> None:
    routing = {"decode": "least-loaded", "decode_load": load}
    trace = requests([0.0, 0.1, 0.2, 0.3], 100, 500)
    run = simulator([decode(), decode()], trace, cluster(routing=routing), only="decode")
    run.run()
    assert run.requests().decode_instance.tolist() == expected


def test_power_of_two_takes_the_less_loaded_of_a_pair() -> None:
    trace = requests([0.0, 0.001, 0.002, 0.003], 4000)
    routing = {"prefill": "power-of-two"}
    run = simulator([prefill(1), prefill(1)], trace, cluster(routing=routing), only="prefill")
    assert chosen(run) == [0, 1, 0, 1]


def test_power_of_two_draws_every_pair_as_often() -> None:
    count = 6000
    routing = {"prefill": "power-of-two"}
    run = simulator([prefill(1)] * 3, requests(np.arange(float(count))), cluster(routing=routing), only="prefill")
    shares = np.bincount(chosen(run), minlength=3) / count
    # Nobody is loaded, so the lower number of a pair is taken: of (0, 1) and (0, 2) the first, of (1, 2) the second.
    assert shares[2] == 0.0
    assert abs(shares[0] - 2 / 3) < 4.0 * np.sqrt(2 / 9 / count)


@pytest.mark.parametrize("router", ["weighted-round-robin", "least-loaded", "shortest-queue", "power-of-two"])
def test_no_router_gives_an_instance_what_it_cannot_hold(router: str) -> None:
    rooms = [profile().kv_capacity_for("prefill", tp) for tp in (1, 2, 4)]
    assert rooms[0] < rooms[1] < rooms[2]
    prompts = [rooms[1], rooms[2], 10] * 4
    trace = requests(50.0 * np.arange(12), prompts, 1)
    run = simulator([prefill(1), prefill(2), prefill(4)], trace, cluster(routing={"prefill": router}), only="prefill")
    taken = np.array(chosen(run))
    assert (taken[0::3] >= 1).all()
    assert (taken[1::3] == 2).all()
    assert run.counts()["finished"] == 12


# -- two precisions ----------------------------------------------------------------------------------------------------


def test_a_mixed_cluster_is_one_precision_in_prefill_and_the_other_in_decode() -> None:
    trace = requests([0.0, 0.3, 0.31, 0.9], [100, 1000, 400, 50], [20, 5, 30, 1])
    runs = {}
    for name, own in {"bf16": ("bf16", None), "fp8": ("fp8", None), "mixed": ("bf16", "fp8")}.items():
        settings = cluster(transfer="rdma-20", model="llama-3.1-8b", precision=own[0], decode_precision=own[1])
        run = Simulator(settings, settings.profile(), Placement((prefill(), decode())), trace, CLOCKS_MHZ, SLO)
        run.run()
        runs[name] = run
    mixed, bf16, fp8 = (runs[name] for name in ("mixed", "bf16", "fp8"))
    first, own_first = bf16.requests().first_token_s, mixed.requests().first_token_s
    np.testing.assert_array_equal(own_first, first)
    # The KV that travels is the same; the third request also waits for an iteration to end.
    transfers_s = [(run.requests().delivered_s - run.requests().first_token_s)[:2] for run in (mixed, fp8)]
    np.testing.assert_allclose(transfers_s[0], transfers_s[1], rtol=1e-9)
    # Alone on the decode instance, the first request decodes as on a cluster in fp8.
    decoding_s = [run.requests().finish_s[0] - run.requests().delivered_s[0] for run in (mixed, fp8, bf16)]
    assert decoding_s[0] == pytest.approx(decoding_s[1], rel=1e-12)
    assert decoding_s[0] < 0.9 * decoding_s[2]
    busy = BUCKETS.index("busy")
    joules = {name: run.instances().energy_j[:, busy] for name, run in runs.items()}
    assert joules["mixed"][0] == pytest.approx(joules["bf16"][0], rel=1e-12)
    assert joules["mixed"][1] < joules["bf16"][1]
    assert mixed.state.inst["kv_capacity"].tolist() == [
        bf16.state.inst["kv_capacity"][0],
        fp8.state.inst["kv_capacity"][1],
    ]
    assert mixed.state.inst["load_s"][0] == bf16.state.inst["load_s"][0] > mixed.state.inst["load_s"][1]


def test_switching_may_be_given_in_numbers() -> None:
    trace = requests([0.0], 100, 5)
    given = {"median_ms": 4.5, "sigma": 0.45609284638231407, "settle_ms": 1.0}
    states = [
        simulator([prefill(), decode()], trace, cluster(switching=switching)).state.glob[0]
        for switching in (given, "nvml")
    ]
    for name in ("switch_median_s", "switch_sigma", "settle_s"):
        assert states[0][name] == states[1][name] > 0


# -- what has not arrived ----------------------------------------------------------------------------------------------


def test_requests_yet_to_arrive_are_known_and_untouched() -> None:
    trace = requests(BUSY, [50] * 60, [2] * 60)
    built = simulator([prefill(), decode()], trace, cluster(), seed=3)
    for run in (built.anew(trace, 3), built):
        run.run(0.2)
        ledger = run.requests()
        coming = trace.arrival_s >= 0.2
        assert 0 < coming.sum() < 60
        np.testing.assert_array_equal(ledger.arrival_s, trace.arrival_s)
        np.testing.assert_array_equal(ledger.prompt_tokens, trace.prompt_tokens)
        np.testing.assert_array_equal(ledger.output_tokens, trace.output_tokens)
        for times_s in (ledger.prefill_start_s, ledger.first_token_s, ledger.delivered_s, ledger.finish_s):
            assert np.isnan(times_s[coming]).all()
        assert (ledger.prefill_instance[coming] == -1).all()
        assert (ledger.decode_instance[coming] == -1).all()
        assert not (ledger.finished | ledger.rejected)[coming].any()
        assert np.isfinite(ledger.prefill_start_s[0])
