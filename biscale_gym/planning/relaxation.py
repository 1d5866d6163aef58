"""Planning where the SLO can be kept at no rate: the least relaxation under which something can be planned.

A single prompt may take longer than the TTFT SLO allows whatever the placement. A planner must then still answer, with
what violates least, and the record must say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from biscale_gym.cluster.placement import PHASES, Phase
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, class_table
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.units import Attainment, MeasuredUnit, Unit, measured_units

GREATEST_FACTOR = 256.0


def _relaxed(measurement: Measurement, phase: Phase, factor: float) -> Measurement:
    name = "ttft_s" if phase == "prefill" else "tpot_s"
    slo = measurement.slo.model_copy(update={name: factor * getattr(measurement.slo, name)})
    return replace(measurement, slo=slo)


def usable_table(
    measurement: Measurement, columns: Sequence[Column]
) -> tuple[tuple[InstanceClass, ...], tuple[str, ...]]:
    """The class table; the SLO of a phase that no class keeps at any rate is doubled until one does.

    Returns:
        The rows of both phases, and what the record must say of relaxed SLOs.

    Raises:
        PlanningError: a phase has no class that fits in memory, or none that serves at all.
    """
    rows: list[InstanceClass] = []
    notes = []
    for phase in PHASES:
        own = [column for column in columns if column.phase == phase]
        factor = 1.0
        table = class_table(measurement, own)
        while not any(row.rate_rps > 0.0 for row in table):
            factor *= 2.0
            if factor > GREATEST_FACTOR:
                raise PlanningError(f"no {phase} class serves this workload within {GREATEST_FACTOR:g} times the SLO")
            table = class_table(_relaxed(measurement, phase, factor), own)
        if factor > 1.0:
            what = "TTFT" if phase == "prefill" else "TPOT"
            notes.append(
                f"no {phase} class keeps the {what} SLO at any rate: planned for {factor:g} times it, the least "
                "relaxation (by doubling) that any class keeps"
            )
        rows += table
    return tuple(rows), tuple(notes)


def usable_units(
    measurement: Measurement, units: Sequence[Unit], attainment: Attainment
) -> tuple[tuple[MeasuredUnit, ...], tuple[str, ...]]:
    """What units carry; both SLOs are doubled until one unit keeps them.

    Returns:
        The units, and what the record must say of relaxed SLOs.

    Raises:
        PlanningError: there are no units, or none serves at all.
    """
    factor = 1.0
    measured = measured_units(measurement, units, attainment)
    while not any(one.rate_rps > 0.0 for one in measured):
        factor *= 2.0
        if factor > GREATEST_FACTOR:
            raise PlanningError(f"no unit serves this workload within {GREATEST_FACTOR:g} times the SLO")
        relaxed = _relaxed(_relaxed(measurement, "prefill", factor), "decode", factor)
        measured = measured_units(relaxed, units, attainment)
    if factor == 1.0:
        return measured, ()
    note = f"no unit keeps the SLO at any rate: planned for {factor:g} times it, the least relaxation (by doubling)"
    return measured, (f"{note} that any unit keeps",)
