"""Units: some prefill and some decode instances that serve together, and the load that they carry within the SLO.

What a phase does can be judged alone, in class tables. Whether one and the same request keeps TTFT *and* TPOT cannot:
that takes a simulation of both phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.settings import SloSettings
from biscale_gym.planning import table_cache
from biscale_gym.planning.classes import Measurement, measurement_key, source_digest
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.probe_trace import probe_trace
from biscale_gym.planning.probing import UnitOutcome, greatest_rate, serve_together

Attainment = Literal["separate", "joint"]
"""``separate``: the quantile of TTFT and that of TPOT each keep their SLO; ``joint``: that share of requests keeps
both.

At the same quantile ``joint`` implies ``separate``, not the other way round.
"""

ATTAINMENTS: tuple[Attainment, ...] = get_args(Attainment)

CACHE_KIND = "unit-rates"


@dataclass(frozen=True)
class Unit:
    """``prefills`` prefill and ``decodes`` decode instances of one number of pipeline stages, a node's worth per stage.

    Attributes:
        prefill, decode: what the instances are.
        prefills, decodes: how many of each.
    """

    prefill: InstanceSpec
    prefills: int
    decode: InstanceSpec
    decodes: int

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.prefill.pp

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one stage."""
        return self.prefills * self.prefill.tp + self.decodes * self.decode.tp

    @property
    def gpus(self) -> int:
        """GPUs of the unit."""
        return self.gpus_per_node * self.pp

    @property
    def instances(self) -> tuple[InstanceSpec, ...]:
        """The unit as a placement's entries."""
        return (self.prefill,) * self.prefills + (self.decode,) * self.decodes


@dataclass(frozen=True)
class MeasuredUnit:
    """A unit and the greatest mean rate that it carries within the SLO; 0 if none is."""

    unit: Unit
    rate_rps: float


def planned_slo(measurement: Measurement) -> SloSettings:
    """The SLO, less the headroom."""
    return SloSettings(ttft_s=measurement.limit_s("prefill"), tpot_s=measurement.limit_s("decode"))


def keeps(outcome: UnitOutcome, measurement: Measurement, attainment: Attainment) -> bool:
    """Whether an outcome keeps the SLO in the sense of ``attainment``."""
    if attainment == "joint":
        return outcome.within_both >= measurement.quantile
    slo = planned_slo(measurement)
    return outcome.ttft_s <= slo.ttft_s and outcome.tpot_s <= slo.tpot_s


def simulate_load(measurement: Measurement, placement: Placement, nodes: int, rate_rps: float) -> UnitOutcome:
    """What a placement does on the training demand at a mean rate."""
    trace = probe_trace(measurement.training, rate_rps, measurement.requests_per_probe, measurement.seed)
    return serve_together(
        measurement.profile,
        measurement.cluster.model_copy(update={"nodes": nodes}),
        placement,
        trace,
        slo=planned_slo(measurement),
        quantile=measurement.quantile,
        warmup_s=measurement.warmup_s,
        tpot_definition=measurement.tpot_definition,
    )


def unit_rate(measurement: Measurement, unit: Unit, attainment: Attainment, guess_rps: float) -> float:
    """The greatest mean rate that one unit, alone on its nodes, carries within the SLO; the search starts at a guess.

    Returns:
        Requests per second; 0 if the SLO is kept at no rate.
    """
    placement = Placement(unit.instances)
    rate_rps, _ = greatest_rate(
        lambda rate: simulate_load(measurement, placement, unit.pp, rate),
        lambda outcome: keeps(outcome, measurement, attainment),
        guess_rps,
        measurement.rate_tolerance,
    )
    return rate_rps


def measured_units(measurement: Measurement, units: Sequence[Unit], attainment: Attainment) -> tuple[MeasuredUnit, ...]:
    """Every unit's rate, in order, from disk where they have been measured before.

    Raises:
        PlanningError: no units are given.
    """
    if not units:
        raise PlanningError("no prefill and decode instance of this model share a node: it needs nodes of more GPUs")
    slo = planned_slo(measurement)
    what = {
        "attainment": attainment,
        "slo": [slo.ttft_s, slo.tpot_s],
        "units": [[unit.prefills, unit.decodes, unit.pp, unit.prefill.tp, unit.decode.tp] for unit in units],
        "clocks_mhz": [[unit.prefill.clock_mhz, unit.decode.clock_mhz] for unit in units],
    }
    key = measurement_key(measurement, source_digest(), what)
    rates = table_cache.load(CACHE_KIND, key)
    if rates is None:
        rates = []
        per_gpu_rps = measurement.training.rate_rps / (8.0 * units[0].gpus)
        for unit in units:
            rates.append(unit_rate(measurement, unit, attainment, per_gpu_rps * unit.gpus))
            # Units of one search carry alike per GPU.
            per_gpu_rps = rates[-1] / unit.gpus or per_gpu_rps
        about = {"profile": measurement.profile.model_name, "training": measurement.training.name}
        table_cache.store(CACHE_KIND, key, rates, {**about, "units": len(units)})
    return tuple(MeasuredUnit(unit, float(rate)) for unit, rate in zip(units, rates, strict=True))
