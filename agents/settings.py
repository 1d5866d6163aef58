"""Settings of the controllers in this package.

Presets are in ``configs/agents/``; docs/controllers.md says where each value is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from biscale_gym.config import Settings, SettingsT, load_preset, validate

PRESETS = "agents"
"""Folder of this package's presets in ``configs/``."""


class PrefillMPCSettings(Settings):
    """Tier 2, prefill (:mod:`agents.prefill_mpc`)."""

    search: Literal["greedy", "exact", "dp"] = "greedy"
    """How the clocks of the projected batches are searched."""
    objective: Literal["window-energy", "busy-energy", "mean-power"] = "window-energy"
    headroom: float = Field(default=0.95, gt=0.0, le=1.0)
    """Share of the TTFT SLO that planned completions may use."""
    horizon_batches: int = Field(default=8, ge=1, le=8)
    idle_clock_mhz: int = Field(default=885, gt=0)
    """Clock of an instance without work (the nearest one of the run): the next prompt starts at it."""
    guard_margin: float = Field(default=0.05, ge=0.0)
    """Relative excess of observed over predicted latency that sends the instance to the top clock."""
    switch_time_s: float = Field(default=0.0, ge=0.0)
    """Expected time until a new clock lands, charged to the first batch; 0 plans as if clocks changed at once."""
    grid_step_s: float = Field(default=0.002, gt=0.0)
    """Time step of the ``dp`` search."""
    replan_on_arrival: bool = True


class DecodeSlackSettings(Settings):
    """Tier 2, decode (:mod:`agents.decode_slack`)."""

    variant: Literal["paper", "floored", "credit"] = "paper"
    headroom: float = Field(default=0.95, gt=0.0, le=1.0)
    """Share of the TPOT SLO that one predicted iteration may last."""
    guard_margin: float = Field(default=0.05, ge=0.0)
    """Relative excess of observed over predicted latency that sends the instance to the top clock."""
    kv_high: float = Field(default=0.85, gt=0.0, le=1.0)
    """KV utilisation above which the top clock is held."""
    kv_low: float = Field(default=0.70, ge=0.0, le=1.0)
    """KV utilisation below which it is released."""
    idle_clock_mhz: int = Field(default=885, gt=0)
    """Clock of an instance without a batch (the nearest one of the run)."""
    change_every_iterations: int = Field(default=10, ge=0)
    """``floored``, ``credit``: least number of iterations between two changes."""
    switch_time_s: float = Field(default=0.02, ge=0.0)
    """``floored``, ``credit``: expected switching time; changes are at least ten of them apart."""
    latency_falls_with_clock: bool = True
    """The model's latency never rises with the clock, so that the scan may start at the last answer."""

    @model_validator(mode="after")
    def _hysteresis(self) -> DecodeSlackSettings:
        if self.kv_low > self.kv_high:
            raise ValueError(f"kv_low ({self.kv_low}) must not exceed kv_high ({self.kv_high})")
        return self


class Tier1Settings(Settings):
    """Tier 1, class tables and placement (:mod:`agents.placement`)."""

    headroom: float = Field(default=0.95, gt=0.0, le=1.0)
    """Share of the SLO that a class's simulated latency quantile may use."""
    quantile: float = Field(default=0.99, gt=0.0, lt=1.0)
    margin: float = Field(default=0.05, ge=0.0)
    """Capacity kept above the forecast rate, the paper's alpha."""
    forecast: Literal["last-window", "peak", "ewma", "oracle"] = "last-window"
    """Rate that the next window is planned for (:mod:`agents.forecast`)."""
    peak_s: float = Field(default=60.0, gt=0.0)
    """``peak``: length of the parts of the last window of which the busiest counts."""
    ewma_weight: float = Field(default=0.5, gt=0.0, le=1.0)
    """``ewma``: weight of the last window; 1 forgets all others."""
    keep_within: float = Field(default=0.0, ge=0.0)
    """The present placement stays while its power exceeds the optimum's by no more than this share; 0: never."""
    count_unallocated: bool = False
    """Whether the idle power of GPUs that no instance takes is part of the objective."""
    requests_per_probe: int = Field(default=10_000, ge=100)
    warmup_s: float = Field(default=30.0, ge=0.0)
    """Start of a probe that is simulated but not counted."""
    rate_tolerance: float = Field(default=0.02, gt=0.0, lt=0.5)
    """Relative width at which the bisection for a class's greatest rate stops."""
    seed: int = Field(default=2602, ge=0)
    """Thinning and shifts of the training trace; the same for every class."""


class BiScaleSettings(Settings):
    """Both tiers."""

    tier1: Tier1Settings = Tier1Settings()
    prefill: PrefillMPCSettings = PrefillMPCSettings()
    decode: DecodeSlackSettings = DecodeSlackSettings()


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` laid over it, group by group."""
    result = dict(values)
    for name, change in changes.items():
        present = result.get(name)
        if isinstance(present, dict) and isinstance(change, Mapping):
            result[name] = _merged(present, change)
        else:
            result[name] = change
    return result


def load_settings(model: type[SettingsT], preset: str, changes: Mapping[str, Any]) -> SettingsT:
    """A preset of this package, or a YAML file, with some values changed.

    Raises:
        ConfigError: no such preset, or an unknown or wrong value, named with its place.
    """
    values = load_preset(model, PRESETS, preset).model_dump(mode="json")
    return validate(model, _merged(values, changes), f"settings of {preset!r}")
