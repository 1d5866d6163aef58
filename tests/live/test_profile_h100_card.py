"""What scripts/profile_h100.py reads of a card, through the real pynvml and a stand-in for the driver's library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import ModuleType

import pytest
from live.fake_nvml import DRIVER_NOT_LOADED, Cards


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("profile_h100")


def test_reads_and_sets_nothing(script: ModuleType, cards: Cards) -> None:
    card = script.Card("1")
    cards[1].power_mw, cards[1].clock_mhz = 345_000, 1410
    assert card.instant_w() == 345.0
    assert card.clock_mhz() == 1410
    assert card.clocks_mhz()[-1] == 1980
    assert card.driver() == "fake"
    assert card.average_w() is None, "the stand-in does not offer it"
    before_j = card.energy_j()
    cards[1].energy_mj += 2_500
    assert card.energy_j() - before_j == 2.5
    assert cards.state.calls == 0, "no clock call"


def test_the_counters_period_and_idle_power(script: ModuleType, cards: Cards) -> None:
    card = script.Card("0")
    ending = threading.Event()

    def counting() -> None:
        while not ending.wait(0.02):
            cards[0].energy_mj += 2_000

    thread = threading.Thread(target=counting)
    thread.start()
    try:
        period_s = card.counter_period_s(0.5)
        began_s, before_j = time.monotonic(), card.energy_j()
        watts = script.idle_w(card, 0.2)
        rate_w = (card.energy_j() - before_j) / (time.monotonic() - began_s)
    finally:
        ending.set()
        thread.join()
    assert period_s is not None
    assert period_s >= 0.015
    assert watts == pytest.approx(rate_w, rel=0.3)


def test_no_driver_is_one_message(script: ModuleType, cards: Cards) -> None:
    cards.state.init_error = DRIVER_NOT_LOADED
    with pytest.raises(script.ProfileFault, match="is the NVIDIA driver there"):
        script.Card("0")
