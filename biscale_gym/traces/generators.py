"""Workload presets, and traces generated from them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from biscale_gym.config import nearest, preset_names, presets_dir, read_yaml, validate
from biscale_gym.traces.arrivals import draw_arrivals
from biscale_gym.traces.lengths import draw_lengths
from biscale_gym.traces.settings import WorkloadSettings
from biscale_gym.traces.trace import Trace, TraceError

KIND = "workloads"


@cache
def load_workload(name_or_path: str) -> WorkloadSettings:
    """The preset ``configs/workloads/<name>.yaml``, or a YAML file of your own given by its path.

    ``arrivals``, ``lengths`` and ``arrivals.bands`` may each be the name of another workload, whose own are then taken.

    Raises:
        ConfigError: a fault in the file.
        TraceError: no such preset (the nearest is named), or workloads that refer to each other in a circle.
    """
    return validate(WorkloadSettings, _resolved(name_or_path, ()), f"workload {name_or_path!r}")


def _resolved(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise TraceError(f"workloads refer to each other in a circle: {' -> '.join((*seen, name))}")
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = presets_dir() / KIND / f"{name}.yaml"
        if not path.is_file():
            raise TraceError(f"no workload preset {name!r}; {nearest(name, preset_names(KIND))}")
    values = {"name": path.stem, **read_yaml(path)}
    for part in ("arrivals", "lengths"):
        if isinstance(values.get(part), str):
            values[part] = _resolved(values[part], (*seen, name))[part]
    arrivals = values.get("arrivals")
    if isinstance(arrivals, dict) and isinstance(arrivals.get("bands"), str):
        lender = _resolved(arrivals["bands"], (*seen, name))["arrivals"]
        values["arrivals"] = {**arrivals, "bands": lender.get("bands", ())}
    return values


def generate(workload: WorkloadSettings, rate_rps: float, duration_s: float, seed: int) -> Trace:
    """A trace of the workload: arrivals in [0, duration_s) at a mean of ``rate_rps``.

    The course of the rate, the arrivals and the lengths have a random stream each: a changed rate keeps the bursts
    where they are and the lengths in their order. How burstiness scales with the rate: see ``arrivals``.

    Raises:
        TraceError: rate or duration is not positive and finite, or no request falls into the duration.
    """
    for what, value in (("rate_rps", rate_rps), ("duration_s", duration_s)):
        if not (math.isfinite(value) and value > 0.0):
            raise TraceError(f"generate: {what} is {value}, expected a positive number")
    path_rng, arrival_rng, length_rng = np.random.default_rng(seed).spawn(3)
    arrival_s = draw_arrivals(workload.arrivals, rate_rps, duration_s, path_rng, arrival_rng)
    if arrival_s.size == 0:
        raise TraceError(
            f"generate: no request of {workload.name!r} in {duration_s:g} s at {rate_rps:g} requests/s with seed {seed}"
        )
    prompt_tokens, output_tokens = draw_lengths(workload.lengths, arrival_s.size, length_rng)
    return Trace(arrival_s, prompt_tokens, output_tokens, workload.name)
