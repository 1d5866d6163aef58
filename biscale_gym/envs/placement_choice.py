"""Choosing a window's placement an instance at a time: what fits, and what the chooser sees.

``BiScale/Placement-v0`` and a trained placement policy in a comparison share it, so both see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.cluster.placement import PHASES, Placement, PlacementError, layout
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.envs.cluster_layout import SLOTS_PER_PHASE
from biscale_gym.envs.layout import Entry
from biscale_gym.envs.placement_layout import MOST_INSTANCES, PAST_WINDOWS, PEAKS_S, log_rate, placement_entries
from biscale_gym.envs.settings import ClassTableSettings
from biscale_gym.planning.classes import Column, InstanceClass, Measurement, fitting_degrees
from biscale_gym.planning.relaxation import usable_table
from biscale_gym.profiles import Profile
from biscale_gym.traces import Trace

Vector = NDArray[np.float64]
Row = NDArray[np.float32]


@dataclass(frozen=True)
class WindowView:
    """What is known when a window is placed.

    Attributes:
        share: windows before it / windows of the whole run.
        mean_rate_rps: the operator's estimate of the mean rate.
        past_rps: mean rates of the windows that are over, in order.
        last_arrivals_s: arrivals of the last one, from its start.
        window_s: its length.
        previous: the placement that serves now.
    """

    share: float
    mean_rate_rps: float
    past_rps: tuple[float, ...]
    last_arrivals_s: Vector
    window_s: float
    previous: Placement | None

    def _peaks_rps(self) -> list[float]:
        peaks = [0.0] * len(PEAKS_S)
        if len(self.last_arrivals_s):
            for position, length_s in enumerate(PEAKS_S):
                bins = np.arange(0.0, self.window_s + length_s, length_s)
                peaks[position] = float(np.histogram(self.last_arrivals_s, bins)[0].max()) / length_s
        return peaks

    def rates_rps(self) -> tuple[list[float], list[float]]:
        """Mean rates of the last windows, latest first, 0 before the first; and the last one's busiest stretches."""
        rates = list(reversed(self.past_rps[-PAST_WINDOWS:]))
        return rates + [0.0] * (PAST_WINDOWS - len(rates)), self._peaks_rps()


@dataclass(frozen=True)
class PlacementChoice:
    """The classes that a cluster's placements are chosen from.

    Attributes:
        classes: the class table.
        cluster: what must hold the instances.
        slo: which the table was measured for.
    """

    classes: tuple[InstanceClass, ...]
    cluster: ClusterSettings
    slo: SloSettings

    @property
    def commit(self) -> int:
        """The action that ends the choice."""
        return len(self.classes)

    @property
    def entries(self) -> list[Entry]:
        """What is observed."""
        return placement_entries(len(self.classes))

    def ranges(self) -> tuple[Row, Row]:
        """Least and greatest value of every number observed."""
        low = np.concatenate([np.full(entry.size, entry.low) for entry in self.entries])
        high = np.concatenate([np.full(entry.size, entry.high) for entry in self.entries])
        return low.astype(np.float32), high.astype(np.float32)

    def placed(self, chosen: Sequence[int]) -> Placement:
        """The instances of the chosen classes: prefill first, large ones first; requests are shared by R_c."""
        rows = sorted(
            (self.classes[number] for number in chosen),
            key=lambda row: (PHASES.index(row.phase), -row.gpus, -row.clock_mhz),
        )
        return Placement(tuple(row.spec() for row in rows))

    def _fits(self, chosen: Sequence[int]) -> bool:
        phases = [self.classes[number].phase for number in chosen]
        if any(phases.count(phase) > SLOTS_PER_PHASE for phase in PHASES):
            return False
        placement = self.placed(chosen)
        if placement.gpus > self.cluster.gpus:
            return False
        try:
            layout(placement, self.cluster.nodes, self.cluster.gpus_per_node)
        except PlacementError:
            return False
        return True

    def masks(self, chosen: Sequence[int]) -> NDArray[np.bool_]:
        """What may be done now: bool[classes + 1].

        A class fits if the GPUs of the nodes hold one more instance of it and leave room for the phase that has none;
        the commit is allowed once both phases have an instance.
        """
        masks = np.zeros(len(self.classes) + 1, dtype=np.bool_)
        phases = {self.classes[number].phase for number in chosen}
        smallest = {
            phase: min((row.gpus, number) for number, row in enumerate(self.classes) if row.phase == phase)[1]
            for phase in PHASES
        }
        fitting: dict[tuple[str, int], bool] = {}
        for number, row in enumerate(self.classes):
            kind = (row.phase, row.gpus)
            if kind not in fitting:
                missing = [smallest[phase] for phase in PHASES if phase not in {*phases, row.phase}]
                fitting[kind] = self._fits([*chosen, number, *missing])
            masks[number] = fitting[kind] and row.rate_rps > 0.0
        masks[self.commit] = len(phases) == len(PHASES)
        return masks

    def _counts(self, placement: Placement | None) -> Vector:
        counts = np.zeros(len(self.classes))
        for spec in placement.instances if placement is not None else ():
            for number, row in enumerate(self.classes):
                if (row.phase, row.tp, row.pp, row.clock_mhz) == (spec.phase, spec.tp, spec.pp, spec.clock_mhz):
                    counts[number] += 1
        return counts

    def observe(self, view: WindowView, chosen: Sequence[int]) -> Row:
        """The ``entries``, cut to their ranges: float32[numbers]."""
        rates, peaks = view.rates_rps()
        counts = np.bincount(chosen, minlength=len(self.classes)).astype(np.float64)
        own_rates = np.array([row.rate_rps for row in self.classes])
        gpus = np.array([row.gpus for row in self.classes])
        capacity = [
            float(sum(counts[number] * row.rate_rps for number, row in enumerate(self.classes) if row.phase == phase))
            for phase in PHASES
        ]
        values = np.concatenate(
            [
                [self.slo.ttft_s, self.slo.tpot_s / 0.1],
                [view.share],
                [log_rate(view.mean_rate_rps)],
                log_rate(np.array(rates)),
                log_rate(np.array(peaks)),
                [(self.cluster.gpus - float(counts @ gpus)) / self.cluster.gpus],
                log_rate(np.array(capacity)),
                counts / MOST_INSTANCES,
                self._counts(view.previous) / MOST_INSTANCES,
                gpus / 8.0,
                log_rate(own_rates),
                np.array([row.joules_per_request for row in self.classes]) / 200.0,
            ]
        )
        row: Row = np.clip(np.nan_to_num(values), *self.ranges()).astype(np.float32)
        return row


def placement_choice(
    scenario: ScenarioSettings, profile: Profile, training: Trace, settings: ClassTableSettings
) -> tuple[PlacementChoice, tuple[str, ...]]:
    """The choice among all classes of a scenario's clocks; their table is measured, or read from disk.

    Returns:
        The choice, and what a record must say of relaxed SLOs.

    Raises:
        PlanningError: a phase has no class that serves this workload.
    """
    cluster = scenario.cluster
    measurement = Measurement(
        profile=profile,
        cluster=cluster,
        slo=scenario.slo,
        training=training,
        headroom=settings.headroom,
        quantile=settings.quantile,
        requests_per_probe=settings.requests_per_probe,
        warmup_s=settings.probe_warmup_s,
        rate_tolerance=settings.rate_tolerance,
        seed=settings.table_seed,
        tpot_definition=scenario.tpot_definition,
    )
    columns = tuple(
        Column(phase, tp, 1, tuple(scenario.clocks_mhz))
        for phase in PHASES
        for tp in fitting_degrees(profile, phase, cluster.gpus_per_node)
    )
    table, notes = usable_table(measurement, columns)
    return PlacementChoice(tuple(table), cluster, scenario.slo), notes
