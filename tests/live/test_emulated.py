"""EmulatedDevice on a clock of the test's own: stretching, energy, and a switch in the midst of an iteration."""

from __future__ import annotations

import time

import pytest

from biscale_gym.live.devices import Work
from biscale_gym.live.emulated import EmulatedDevice
from biscale_gym.live.errors import DeviceError
from biscale_gym.profiles import Profile, SwitchingSettings, load_profile

CLOCKS_MHZ = (930, 1410, 1980)
DECODE = Work(batch=32.0, kv_tokens=32_000.0)
PREFILL = Work(prefill_tokens=4096.0, sum_len_sq=2.0 * 2048**2)
INSTANT = SwitchingSettings(median_ms=0.0, sigma=0.0, settle_ms=0.0)


class Time:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.now_s += seconds


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("h100-sxm5", "llama-3.3-70b", "fp8")


@pytest.fixture
def clock() -> Time:
    return Time()


def device(profile: Profile, clock: Time, switching: SwitchingSettings = INSTANT) -> EmulatedDevice:
    return EmulatedDevice(profile, 2, CLOCKS_MHZ, switching, clock.now, clock.sleep)


def run(gpus: EmulatedDevice, clock: Time, work: Work, computed_s: float) -> tuple[float, float]:
    clock.now_s += computed_s
    spent = gpus.iteration(work, computed_s)
    return spent.duration_s, spent.energy_j


@pytest.mark.parametrize("work", [DECODE, PREFILL])
@pytest.mark.parametrize("clock_mhz", CLOCKS_MHZ)
def test_an_iteration_lasts_and_draws_what_the_profile_says(
    profile: Profile, clock: Time, work: Work, clock_mhz: int
) -> None:
    gpus = device(profile, clock)
    gpus.ask_clock(clock_mhz)
    clock.now_s += 1e-9
    at = (work.batch, work.kv_tokens, work.prefill_tokens, work.sum_len_sq)
    slower = float(profile.latency_ms(2, clock_mhz, *at) / profile.latency_ms(2, 1980, *at))
    assert slower > 1.05 or clock_mhz > 930  # prefill is as fast at 1410 MHz: the card's power limit binds
    duration_s, energy_j = run(gpus, clock, work, 0.02)
    assert duration_s == pytest.approx(0.02 * slower, rel=1e-9)
    assert energy_j == pytest.approx(2 * float(profile.power_w(2, clock_mhz, *at)) * duration_s, rel=1e-9)


def test_idle_time_draws_idle_power(profile: Profile, clock: Time) -> None:
    gpus = device(profile, clock)
    gpus.ask_clock(930)
    clock.now_s += 10.0
    assert gpus.reading().energy_j == pytest.approx(20.0 * profile.idle_power_w(2, 930), rel=1e-9)
    duration_s, energy_j = run(gpus, clock, Work(), 0.5)  # an engine that waits for KV computes nothing
    assert (duration_s, energy_j) == (pytest.approx(0.5), pytest.approx(profile.idle_power_w(2, 930), rel=1e-9))
    assert gpus.source == "modelled"


def test_a_clock_comes_into_force_after_the_switching_time(profile: Profile, clock: Time) -> None:
    gpus = device(profile, clock, SwitchingSettings(median_ms=4.0, sigma=0.0, settle_ms=2.0))
    gpus.ask_clock(930)
    assert (gpus.target_mhz, gpus.clock_mhz) == (930, 1980)
    clock.now_s += 0.009
    assert gpus.clock_mhz == 1980
    clock.now_s += 0.002  # 2 cards x 4 ms + 2 ms have passed
    assert gpus.clock_mhz == 930


def test_a_switch_inside_an_iteration_stretches_what_is_left_of_it(profile: Profile, clock: Time) -> None:
    gpus = device(profile, clock, SwitchingSettings(median_ms=5.0, sigma=0.0, settle_ms=0.0))
    at = (DECODE.batch, DECODE.kv_tokens)
    slower = float(profile.latency_ms(2, 930, *at) / profile.latency_ms(2, 1980, *at))
    gpus.ask_clock(930)  # in force 10 ms from now, in the middle of a batch of 20 ms
    duration_s, energy_j = run(gpus, clock, DECODE, 0.02)
    assert duration_s == pytest.approx(0.01 + 0.01 * slower, rel=1e-9)
    top_w, low_w = (2 * float(profile.power_w(2, mhz, *at)) for mhz in (1980, 930))
    assert energy_j == pytest.approx(0.01 * top_w + 0.01 * slower * low_w, rel=1e-9)


def test_energy_adds_up_over_any_mix(profile: Profile, clock: Time) -> None:
    gpus = device(profile, clock, SwitchingSettings(median_ms=5.0, sigma=0.0, settle_ms=1.0))
    total_j = 0.0
    for number in range(50):
        gpus.ask_clock(CLOCKS_MHZ[number % 3])
        total_j += run(gpus, clock, (DECODE, PREFILL, Work())[number % 3], 0.004 * (1 + number % 5))[1]
        before_j = gpus.reading().energy_j
        clock.now_s += 0.003
        total_j += gpus.reading().energy_j - before_j
    assert gpus.reading().energy_j == pytest.approx(total_j, rel=1e-9)


def test_on_the_real_clock(profile: Profile) -> None:
    gpus = EmulatedDevice(profile, 2, CLOCKS_MHZ, INSTANT)
    gpus.ask_clock(930)
    began_s = time.monotonic()
    time.sleep(0.02)
    spent = gpus.iteration(PREFILL, time.monotonic() - began_s)
    assert time.monotonic() - began_s == pytest.approx(spent.duration_s, abs=0.01)
    assert spent.duration_s > 1.3 * 0.02


def test_a_clock_that_does_not_exist_names_the_nearest(profile: Profile, clock: Time) -> None:
    with pytest.raises(DeviceError, match="no clock 1400 MHz; the nearest is 1410 MHz"):
        device(profile, clock).ask_clock(1400)
