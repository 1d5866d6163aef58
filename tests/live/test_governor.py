"""The governor shows a policy what the model's engine would, decides as it would, and is quick about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import fake_nvml
from live.fake_nvml import Cards
from live.helpers import wait_until

from agents.biscale import BiScale
from biscale_gym.cluster import features as f
from biscale_gym.cluster.placement import InstanceSpec, Phase, Placement
from biscale_gym.cluster.policy import policy
from biscale_gym.cluster.simulator import Decision, PhasePolicy, Simulator
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import ScenarioSettings, load_scenario
from biscale_gym.control.workload import Requests, requests_for
from biscale_gym.live.devices import Reading, Work
from biscale_gym.live.emulated import EmulatedDevice
from biscale_gym.live.errors import DeviceError, LiveError
from biscale_gym.live.governor import Governor, InstanceSetting, Load, WaitingPrompt
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.records import RecordStream, read_records
from biscale_gym.profiles import Profile, SwitchingSettings

INSTANT = SwitchingSettings(median_ms=0.0, sigma=0.0, settle_ms=0.0)
CLOCKS_MHZ = (930, 1410, 1830, 1980)
TP = 2


@pytest.fixture(scope="module")
def scenario() -> ScenarioSettings:
    return load_scenario("smoke")


@pytest.fixture(scope="module")
def profile(scenario: ScenarioSettings) -> Profile:
    return scenario.cluster.profile()


@pytest.fixture(scope="module")
def requests(scenario: ScenarioSettings, profile: Profile) -> Requests:
    return requests_for(scenario, profile, "test", 3, None, None)


@policy
def lowest(obs: Any, memory: Any, params: Any, model: Any) -> int:
    """The lowest clock, and a note of how often it was asked."""
    memory[0] += 1.0
    return int(params[0])


def setting(simulator: Simulator, phase: Phase, lane: int) -> InstanceSetting:
    batching, glob = simulator.settings.batching, simulator.state.glob[0]
    return InstanceSetting(
        phase,
        TP,
        CLOCKS_MHZ[-1],
        float(glob["ttft_slo_s" if phase == "prefill" else "tpot_slo_s"]),
        int(simulator.state.inst[lane]["kv_capacity"]),
        batching.prefill_token_budget,
        batching.chunked_prefill,
    )


def listed(state: Any, first: int) -> Iterator[Any]:
    while first >= 0:
        yield state.req[first]
        first = int(state.req[first]["next"])


def load_of(simulator: Simulator, decision: Decision) -> Load:
    """The state of the engine at a decision, as a worker would tell it."""
    state = simulator.state
    inst = state.inst[decision.instance]
    work = Work(*(float(inst[name]) for name in ("iter_batch", "iter_kv", "iter_tokens", "iter_sum_sq")))
    counts = {name: int(inst[name]) for name in ("routed", "completed", "late")}
    if decision.reason == f.IDLE:
        work = Work()
    if decision.phase == "decode":
        slack_s = []
        if decision.reason != f.IDLE:
            saved_s, tpot_s = state.slack_s[decision.instance, : int(inst["run_n"])], state.glob[0]["tpot_slo_s"]
            slack_s = (saved_s + tpot_s * inst["iterations"] - simulator.now_s).tolist()
        return Load(
            work,
            kv_used_tokens=int(inst["kv_used"]),
            queue_requests=int(inst["queue_n"] + inst["transit_n"]),
            queue_tokens=int(inst["queue_tokens"] + inst["transit_tokens"]),
            slack_s=slack_s,
            **counts,
        )
    waiting = [
        WaitingPrompt(int(r["prompt"]), 0, float(r["arrival_s"])) for r in listed(state, int(inst["queue_head"]))
    ]
    chunk = int(inst["chunk_request"])
    if chunk >= 0:
        r = state.req[chunk]
        waiting.insert(0, WaitingPrompt(int(r["prompt"]), int(r["done"]), float(r["arrival_s"])))
    in_batch = [float(r["arrival_s"]) for r in listed(state, int(inst["batch_head"]))]
    return Load(
        work,
        oldest_arrival_s=min(in_batch, default=np.inf),
        kv_used_tokens=int(inst["kv_used"]),
        queue_requests=int(inst["queue_n"]),
        queue_tokens=int(inst["queue_tokens"]),
        waiting=waiting,
        **counts,
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("chunked", [False, True])
def test_observations_are_those_of_the_engine(
    scenario: ScenarioSettings, profile: Profile, requests: Requests, phase: Phase, chunked: bool
) -> None:
    batching = scenario.cluster.batching.model_copy(update={"chunked_prefill": chunked, "prefill_token_budget": 100})
    cluster = scenario.cluster.model_copy(update={"batching": batching, "switching": "instant"})
    placement = Placement((InstanceSpec("prefill", TP, 1410), InstanceSpec("decode", TP, 1410)))
    simulator = Simulator(cluster, profile, placement, requests.evaluated, CLOCKS_MHZ, scenario.slo)
    asks = PhasePolicy(on_idle=True, slack=True)
    simulator.set_policies(asks if phase == "prefill" else None, asks if phase == "decode" else None)
    lane = 0 if phase == "prefill" else 1
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    asked_of = PhasePolicy(lowest, np.array([1.0]), on_idle=True, slack=True)
    governor = Governor(setting(simulator, phase, lane), asked_of, device, profile, CLOCKS_MHZ)
    device.ask_clock(1410)
    time.sleep(0.001)
    decision, compared, longest = simulator.run(), 0, 0
    while decision is not None and compared < 800:
        obs = governor._obs
        governor._observe(load_of(simulator, decision), decision.reason)
        # Of time and of the last iteration this governor knows nothing: it has computed none.
        for entry in (f.NOW_S, f.LAST_OBSERVED_S, f.LAST_PREDICTED_S, *((f.ITERATION,) if phase == "decode" else ())):
            obs[entry] = decision.obs[entry]
        if decision.reason == f.IDLE and phase == "decode":
            obs[f.SLACK_LEAST_S : f.SLACK_P50_S + 1] = decision.obs[f.SLACK_LEAST_S : f.SLACK_P50_S + 1]
        np.testing.assert_allclose(obs, decision.obs, rtol=1e-12, atol=1e-12)
        longest = max(longest, int(obs[f.BATCHES])) if phase == "prefill" else longest
        compared += 1
        decision = simulator.run(answer=1)
    assert compared > 300
    assert longest == (f.HORIZON if phase == "prefill" else 0)  # the queue was long enough to be cut off


def controller_policies(scenario: ScenarioSettings, profile: Profile, requests: Requests) -> dict[Phase, PhasePolicy]:
    context = PlanContext(scenario, profile, requests.training, 20.0, clocks_mhz=CLOCKS_MHZ)
    prefill, decode = BiScale().policies(context)
    assert prefill is not None
    assert decode is not None
    return {"prefill": prefill, "decode": decode}


LOADS = {
    "prefill": Load(
        Work(prefill_tokens=2000.0, sum_len_sq=2e6),
        oldest_arrival_s=0.0,
        queue_requests=40,
        waiting=[WaitingPrompt(500, 0, 0.0)] * 40,
    ),
    "decode": Load(Work(batch=64.0, kv_tokens=64_000.0), kv_used_tokens=64_000, slack_s=[0.1] * 64),
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_control_takes_a_fraction_of_a_millisecond(
    scenario: ScenarioSettings, profile: Profile, requests: Requests, tmp_path: Path, phase: Phase
) -> None:
    chosen = controller_policies(scenario, profile, requests)[phase]
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    records = RecordStream(tmp_path / "records.csv")
    own = InstanceSetting(phase, TP, 1980, 0.6 if phase == "prefill" else 0.1, 100_000, 2048)
    governor = Governor(own, chosen, device, profile, CLOCKS_MHZ, records)
    for _ in range(400):
        governor.before(LOADS[phase])
        governor.after(1e-5)
    records.close()
    assert np.median(read_records(records.path)["control_s"]) < 0.3e-3


def test_biscale_lowers_decode_clocks_and_records_say_so(
    scenario: ScenarioSettings, profile: Profile, requests: Requests, tmp_path: Path
) -> None:
    chosen = controller_policies(scenario, profile, requests)["decode"]
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    records = RecordStream(tmp_path / "records.csv")
    governor = Governor(
        InstanceSetting("decode", TP, 1980, 0.1, 100_000, 2048), chosen, device, profile, CLOCKS_MHZ, records
    )
    for _ in range(5):
        governor.before(LOADS["decode"])
        time.sleep(0.002)
        governor.after(0.002)
    records.close()
    rows = read_records(records.path)
    assert rows["target_mhz"].tolist() == [930] * 5
    assert set(rows["source"]) == {"modelled"}
    assert (rows["duration_s"][1:] > 1.05 * rows["computed_s"][1:]).all()
    expected_s = 1e-3 * profile.latency_ms(TP, 930, 64.0, 64_000.0)
    np.testing.assert_allclose(rows["predicted_s"][1:], expected_s)


def test_a_policy_is_asked_once_when_idle_and_keeps_its_memory(profile: Profile) -> None:
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    own = InstanceSetting("decode", TP, 1980, 0.1, 100_000, 2048)
    governor = Governor(own, PhasePolicy(lowest, np.array([0.0]), on_idle=True), device, profile, CLOCKS_MHZ)
    for _ in range(3):
        governor.idle(Load())
    governor.before(LOADS["decode"])
    governor.after(1e-4)
    governor.idle(Load())
    assert governor._memory[0] == 3.0
    assert device.target_mhz == 930


def test_without_a_policy_the_planned_clock_is_held(profile: Profile) -> None:
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    governor = Governor(InstanceSetting("decode", TP, 1410, 0.1, 100_000, 2048), None, device, profile, CLOCKS_MHZ)
    governor.before(LOADS["decode"])
    assert device.target_mhz == 1410


def test_without_a_policy_another_clock_can_be_held(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    own = InstanceSetting("decode", TP, 1410, 0.1, 100_000, 2048)
    governor = Governor(own, None, device, profile, CLOCKS_MHZ, stale_s=0.5)
    governor.hold(930)
    assert device.target_mhz == 930  # at once, and before every batch
    device.ask_clock(1830)
    governor.before(LOADS["decode"])
    assert device.target_mhz == 930
    with pytest.raises(DeviceError, match="no clock 900 MHz; the nearest is 930"):
        governor.hold(900)
    old = replace(device.reading(), time_s=time.monotonic() - 1.0)
    monkeypatch.setattr(device, "reading", lambda: old)
    governor.before(LOADS["decode"])
    assert device.target_mhz == 1980
    governor.hold(1410)  # telemetry is too old: the top clock stays
    assert device.target_mhz == 1980
    governed = Governor(own, PhasePolicy(lowest, np.array([0.0])), device, profile, CLOCKS_MHZ)
    with pytest.raises(LiveError, match="the decode policy decides this instance's clock"):
        governed.hold(930)


def test_old_telemetry_means_the_top_clock(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    own = InstanceSetting("decode", TP, 1410, 0.1, 100_000, 2048)
    governor = Governor(own, PhasePolicy(lowest, np.array([0.0])), device, profile, CLOCKS_MHZ, stale_s=0.5)
    governor.before(LOADS["decode"])
    assert device.target_mhz == 930
    old = replace(device.reading(), time_s=time.monotonic() - 1.0)
    assert isinstance(old, Reading)
    monkeypatch.setattr(device, "reading", lambda: old)
    governor.before(LOADS["decode"])
    assert (device.target_mhz, governor.stale_decisions) == (1980, 1)


def test_on_cards_that_cannot_be_read_the_top_clock_is_set(cards: Cards, profile: Profile) -> None:
    own = InstanceSetting("decode", 1, 1980, 0.1, 100_000, 2048)
    with NvmlDevice([0], sample_s=0.01) as device:
        chosen = PhasePolicy(lowest, np.array([0.0]))
        governor = Governor(own, chosen, device, profile, CLOCKS_MHZ, stale_s=0.3)

        def comes_to(clock_mhz: int) -> bool:
            governor.before(LOADS["decode"])
            return cards.locked_mhz[0] == clock_mhz

        wait_until(lambda: comes_to(930))  # a machine with much else to do is late with telemetry, too
        spent = governor.after(0.01)
        assert spent.energy_j == pytest.approx(0.01 * 100.0)  # of the card, not of the profile
        cards[0].read_error = fake_nvml.GPU_IS_LOST
        time.sleep(0.5)
        stale_before = governor.stale_decisions
        wait_until(lambda: comes_to(1980))
        assert governor.stale_decisions > stale_before


def test_observing_only_the_policy_runs_and_no_clock_is_set(cards: Cards, profile: Profile, tmp_path: Path) -> None:
    own = InstanceSetting("decode", 1, 1980, 0.1, 100_000, 2048)
    records = RecordStream(tmp_path / "records.csv")
    with NvmlDevice([0], mode="observe-only") as device:
        governor = Governor(own, PhasePolicy(lowest, np.array([0.0])), device, profile, CLOCKS_MHZ, records)
        governor.before(LOADS["decode"])
        governor.after(0.01)
    records.close()
    (row,) = read_records(records.path)
    assert (row["target_mhz"], row["clock_mhz"], row["source"]) == (930, 1980, "measured")
    assert cards.calls == []


def test_wrong_answers_and_settings_are_told(profile: Profile) -> None:
    device = EmulatedDevice(profile, TP, CLOCKS_MHZ, INSTANT)
    own = InstanceSetting("decode", TP, 1980, 0.1, 100_000, 2048)
    governor = Governor(own, PhasePolicy(lowest, np.array([4.0])), device, profile, CLOCKS_MHZ)
    with pytest.raises(LiveError, match=r"the decode policy answered with clock 4 at .* valid: 0 to 3"):
        governor.before(LOADS["decode"])
    with pytest.raises(LiveError, match="the decode policy has no function"):
        Governor(own, PhasePolicy(), device, profile, CLOCKS_MHZ)
    with pytest.raises(LiveError, match=r"decode instance has no clocks \[1395\]"):
        Governor(own, None, device, profile, (1395, 1980))
