"""What a run's record says window by window, and at which clocks its GPUs worked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.evaluation.records import Record, RecordStore
from biscale_gym.evaluation.statistics import Interval, mean_interval
from biscale_gym.evaluation.summary import Slo, Summary, slo_of
from biscale_gym.evaluation.tables import Grid

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TARGETS = ("ttft", "tpot")
IDLE = 0
"""Stands for a clock in ``clock_shares``: instances without work."""
_WITHIN = 0.99


def window_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Floats]:
    """Figures of a run's windows by name, [W], out of its record's arrays."""
    prefix = "window_"
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def over_seeds(windows: Sequence[Mapping[str, Floats]], metric: str) -> list[Interval]:
    """Mean of a figure over the runs, window by window, with its 95 % interval."""
    return [mean_interval(values) for values in np.array([one[metric] for one in windows]).T]


def broken(windows: Mapping[str, Floats], slo: Slo) -> Bools:
    """Which windows break which target, bool[W, 2] (``TARGETS``).

    Broken: the P99 of the served requests exceeds the target, or less than 99 % of all judged ones are within it.
    """
    return np.stack(
        [
            (windows[f"{name}_p99_s"] > target_s) | (windows[f"{name}_attainment"] < _WITHIN)
            for name, target_s in zip(TARGETS, (slo.ttft_s, slo.tpot_s), strict=True)
        ],
        axis=1,
    )


def placements_by_window(record: Record, windows: int) -> list[str]:
    """The placement of every window; one that was planned once serves all."""
    planned = [str(placement) for _, placement in record.provenance["placements"]]
    return planned if len(planned) == windows else planned[:1] * windows


def clock_shares(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, dict[int, float]]:
    """Share of a phase's counted GPU time spent working at each clock (MHz), and without work (``IDLE``).

    Read off the timeline's samples: 900 a run, each instance weighted by its GPUs.
    """
    counted = arrays["timeline_time_s"] >= arrays["window_start_s"][0]
    clock_mhz, batch = arrays["timeline_clock_mhz"][counted], arrays["timeline_batch"][counted]
    there = np.isfinite(clock_mhz)
    state = np.where(there & (batch > 0), np.nan_to_num(clock_mhz), IDLE).astype(np.int64)
    labels = [str(label).split() for label in arrays["timeline_label"]]
    gpus = np.array([int(words[-1].removeprefix("TP")) for words in labels])
    shares: dict[str, dict[int, float]] = {}
    for phase in ("prefill", "decode"):
        own = np.array([words[0] == phase for words in labels])
        weight = np.where(there & own, gpus, 0)
        total = float(weight.sum())
        shares[phase] = {int(one): float(weight[state == one].sum()) / total for one in np.unique(state[weight > 0])}
    return shares


def mean_clock_shares(each: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    """Mean of several runs' ``clock_shares``, clocks ascending."""
    return {
        phase: {
            clock: float(np.mean([one[phase].get(clock, 0.0) for one in each]))
            for clock in sorted({clock for one in each for clock in one[phase]})
        }
        for phase in ("prefill", "decode")
    }


def window_grids(summaries: Sequence[Summary], store: RecordStore) -> Iterator[Grid]:
    """Per scenario one table: every window under every controller, means over the seeds."""
    for scenario in dict.fromkeys(summary.scenario for summary in summaries):
        yield _grid(scenario, [summary for summary in summaries if summary.scenario == scenario], store)


def _grid(scenario: str, own: Sequence[Summary], store: RecordStore) -> Grid:
    rows: list[tuple[int, list[str], bool]] = []
    for summary in own:
        windows = [window_arrays(store.arrays(record)) for record in summary.records]
        figures = {name: over_seeds(windows, name) for name in _SHOWN}
        breaks = np.array([broken(one, slo_of(summary.records[0])).any(axis=1) for one in windows]).sum(axis=0)
        planned = [
            placements_by_window(record, len(one["start_s"]))
            for record, one in zip(summary.records, windows, strict=True)
        ]
        for number, from_s in enumerate(windows[0]["start_s"]):
            (placement, often), *others = Counter(plan[number] for plan in planned).most_common()
            cells = [
                f"{from_s:.0f}–{windows[0]['end_s'][number]:.0f}",
                summary.controller,
                *(_figure(values[number], *_SHOWN[name]) for name, values in figures.items()),
                f"{breaks[number]} of {len(windows)}",
                placement + (f" ({often} of {len(windows)} seeds)" if others else ""),
            ]
            rows.append((number, cells, bool(breaks[number])))
    rows.sort(key=lambda row: row[0])
    header = ["window s", "controller", *_HEADINGS, "breaks SLO", "placement"]
    return Grid(f"{scenario}: by window", header, [row[1] for row in rows], [row[2] for row in rows])


_SHOWN = {
    "prefill_j_per_token": (1.0, 4),
    "decode_j_per_token": (1.0, 4),
    "ttft_p99_s": (1e3, 0),
    "tpot_p99_s": (1e3, 1),
}
"""Figure to its scale and decimals."""
_HEADINGS = ("prefill J/token", "decode J/token", "P99 TTFT ms", "P99 TPOT ms")


def _figure(interval: Interval, scale: float, decimals: int) -> str:
    half = "" if np.isnan(interval.low) else f" ± {scale * (interval.high - interval.value):.{decimals}f}"
    return f"{scale * interval.value:.{decimals}f}{half}"
