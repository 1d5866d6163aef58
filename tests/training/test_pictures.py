"""Pictures of a trained policy, and the episodes that they show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biscale_gym.metrics import ttft_s
from biscale_gym.training import pictures
from biscale_gym.training.evaluation import Evaluator, watched
from biscale_gym.training.models import load_model
from biscale_gym.training.run import Result
from biscale_gym.training.settings import TrainingSettings

pytest.importorskip("matplotlib")
Make = Callable[..., TrainingSettings]


def lines_of(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_what_is_shown_is_the_first_episode_of_the_evaluation(
    tiny: Make, tmp_path: Path, trained: Callable[..., Result]
) -> None:
    settings = tiny({"total_steps": 128, "evaluation.episodes": 1})
    trained(settings, tmp_path / "run")
    model = load_model(tmp_path / "run" / "best")
    seen = watched(settings, model)["smoke"]
    assert list(seen) == ["policy", "max-clock", "biscale"]
    evaluator = Evaluator(settings)
    slo_s = 0.6
    for name, played in {"policy": evaluator.play(model, "smoke"), **evaluator.references()["smoke"]}.items():
        latencies_s = ttft_s(seen[name].requests())
        served = latencies_s[~np.isnan(latencies_s)]
        # Requests in flight at the end are judged, too, where their deadline is over.
        assert len(served) <= played.requests[0] <= len(latencies_s)
        assert (served <= slo_s).sum() == pytest.approx(played.attainment * played.requests[0])
    arrivals = [watch.requests().arrival_s.tolist() for watch in seen.values()]
    assert arrivals[0] == arrivals[1] == arrivals[2]
    timeline = seen["max-clock"].timeline()
    assert timeline["clock_mhz"].shape == timeline["power_w"].shape == (len(timeline["time_s"]), 1)
    assert timeline["label"].tolist()[0].startswith("prefill 0 TP")
    assert np.all(timeline["clock_mhz"][1:] == 1830.0)
    assert timeline["time_s"][0] >= 0.0
    lasts_s = np.diff(timeline["time_s"])
    assert np.all(lasts_s > 0.0)
    energy_j = float((timeline["power_w"][:-1, 0] * lasts_s).sum())
    assert energy_j == pytest.approx(evaluator.references()["smoke"]["max-clock"].energy_j[0], rel=0.1)


def test_a_cluster_has_both_phases(tiny: Make, tmp_path: Path, trained: Callable[..., Result]) -> None:
    settings = tiny({"env_id": "BiScale/Cluster-v0", "total_steps": 128, "evaluation.references": ["max-clock"]})
    trained(settings, tmp_path / "run", tensorboard=True)
    drawn = [line["name"] for line in lines_of(tmp_path / "run", "figure")]
    assert drawn == ["latency/smoke", "timeline/smoke/policy", "timeline/smoke/max-clock"]
    (table,) = [line for line in lines_of(tmp_path / "run", "table") if line["name"] == "latencies"]
    assert {(row[1], row[2]) for row in table["rows"]} == {
        (agent, metric) for agent in ("policy", "max-clock") for metric in ("TTFT", "TPOT")
    }


def test_nothing_is_drawn_unless_somebody_looks(tiny: Make, tmp_path: Path, trained: Callable[..., Result]) -> None:
    trained(tiny({"total_steps": 128}), tmp_path / "run")
    assert not (tmp_path / "run" / "figures").exists()


def test_a_run_without_pictures_is_done_all_the_same(
    tiny: Make, tmp_path: Path, trained: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(pictures, "latency_figure", broken)
    with pytest.warns(UserWarning, match="no pictures: RuntimeError: no ink"):
        result = trained(tiny({"total_steps": 128}), tmp_path / "run", tensorboard=True)
    assert result.status == 0
    assert (tmp_path / "run" / "result.json").exists()
    assert lines_of(tmp_path / "run", "end")[-1]["exit_status"] == 0
