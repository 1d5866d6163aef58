"""A trace replayed on several workers per phase: who gets which request. A toy is in the engines' place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from live import toy
from live.fake_nvml import Cards
from live.helpers import ROOT, everything_finished, steady

from biscale_gym.config import read_yaml, validate
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live.demand import prepared
from biscale_gym.live.replay import Replay
from biscale_gym.live.routing import start_level
from biscale_gym.live.settings import LiveSettings


def test_requests_go_round_a_phases_workers_by_weight(
    cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards.state.cards = 4
    toy.without_vllm(monkeypatch, cards)
    placement = [
        {"phase": "prefill", "tp": 1, "count": 1, "weight": 2.0},
        {"phase": "prefill", "tp": 1, "count": 1, "weight": 1.0},
        {"phase": "decode", "tp": 1, "count": 2},
    ]
    scenario = load_scenario("live-smoke", {"placement": placement, "duration_s": 3.0, "training_s": 60.0})
    values = read_yaml(ROOT / "configs" / "live" / "cpu.yaml")
    settings = validate(LiveSettings, values | {"device": {"kind": "nvml", "gpus": [0, 1, 2, 3]}}, "toy")
    with toy.ToyPool(scenario, settings, tmp_path) as pool:
        replay = Replay(pool, steady(9, 0.1), None, prepared(scenario, None, 0)[1], tmp_path / "records")
        outcome = replay.run()
    everything_finished(outcome)
    assert outcome.source == "measured"
    assert np.bincount(outcome.requests.prefill_instance).tolist() == [6, 3]
    assert sorted(np.bincount(outcome.requests.decode_instance)[2:].tolist()) == [4, 5]
    tallies = [replay.tallies[name] for name in ("prefill-0", "prefill-1")]
    assert tallies[0].turn == tallies[1].turn == 3.0
    tallies[1].turn = 0.0
    start_level(tallies[1], tallies[:1])  # one that was away does not catch up
    assert tallies[1].turn == 3.0
