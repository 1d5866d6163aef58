"""Pictures of a trained policy at work: one episode of its evaluation, beside what the references do with the same one.

They go to whatever records the run has: how latencies are spread, and clock, queue, batch and power of every instance
over time. Nothing depends on them, so nothing that goes wrong here ends a run.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_gym.control.scenario import load_scenario
from biscale_gym.drawing import Latencies, drawing, latency_figure, timeline_figure
from biscale_gym.metrics import tpot_s, ttft_s
from biscale_gym.tracking import Tracker
from biscale_gym.training.environments import INSTANCES, PLACEMENT
from biscale_gym.training.evaluation import watched
from biscale_gym.training.settings import TrainingSettings
from biscale_gym.training.watching import Watch

PERCENTILES = range(101)


def track_pictures(tracker: Tracker, settings: TrainingSettings, model: Any, step: int) -> None:
    """Play the first evaluation episode of every scenario once more, and record its pictures and its distributions.

    A failure is a warning.

    Args:
        tracker: of the run.
        settings: of the run.
        model: an SB3 model of it.
        step: which it is of.
    """
    try:
        episodes = watched(settings, model)
        rows: list[list[Any]] = []
        with drawing(tracker.folder):
            for scenario, played in episodes.items():
                panels = _latencies(settings, scenario, played)
                _draw(tracker, f"latency/{scenario}", latency_figure(_title(settings, scenario), panels), step)
                rows += [
                    [scenario, name, panel.name, percent, 1e3 * float(np.quantile(values, percent / 100.0))]
                    for panel in panels
                    for name, values in panel.curves.items()
                    if len(values)
                    for percent in PERCENTILES
                ]
                if settings.env_id != PLACEMENT:  # whose steps are whole windows: there are no samples within them
                    for name, watch in played.items():
                        title = f"{_title(settings, scenario)}: {name}"
                        figure = timeline_figure(title, watch.timeline(), _phases(settings))
                        _draw(tracker, f"timeline/{scenario}/{name}", figure, step)
        tracker.table("latencies", ["scenario", "agent", "metric", "percentile", "ms"], rows, step)
    except Exception as error:  # the run is complete without them
        warnings.warn(f"no pictures: {type(error).__name__}: {error}", stacklevel=2)


def _draw(tracker: Tracker, name: str, figure: Any, step: int) -> None:
    import matplotlib.pyplot as plt

    tracker.figure(name, figure, step)
    plt.close(figure)


def _title(settings: TrainingSettings, scenario: str) -> str:
    return f"{scenario}, first episode of split {settings.evaluation.split}"


def _phases(settings: TrainingSettings) -> tuple[str, ...]:
    phase = INSTANCES.get(settings.env_id)
    return ("prefill", "decode") if phase is None else (phase,)


def _latencies(settings: TrainingSettings, scenario: str, played: dict[str, Watch]) -> list[Latencies]:
    """TTFT and TPOT, of the phases that the environment has."""
    served = load_scenario(scenario, settings.env.get("overrides"))
    overhead_s = 1e-3 * served.cluster.serving_overhead_ms

    def curves(of: Any) -> dict[str, NDArray[np.float64]]:
        return {name: _known(of(watch.requests())) for name, watch in played.items()}

    panels = {
        "prefill": Latencies("TTFT", served.slo.ttft_s, curves(lambda one: ttft_s(one, overhead_s))),
        "decode": Latencies("TPOT", served.slo.tpot_s, curves(lambda one: tpot_s(one, served.tpot_definition))),
    }
    return [panels[phase] for phase in _phases(settings)]


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """In ascending order, without those that there are not."""
    return np.sort(values[~np.isnan(values)])
