"""What an emulated device makes of a CPU worker's iterations, as a table of the cluster model.

The worker's own latency is measured at the top clock. A lower clock stretches the batch by the emulated card's latency
there over that at the top clock, and leaves the host's part as it is. A batch takes longer on a core that has slept: in
service because the worker was idle before (a factor that a served trace tells), below the top clock because the batch
before it was stretched by a sleep (a line that rows at a lower clock tell). It is slower once, whyever the core slept.
Power is the emulated card's for this batch and clock while it runs, its idle power in the host's part. So latency is
measured, power and the clock's effect modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_gym.calibration.lines import rising_line
from biscale_gym.profiles.fitted import predict
from biscale_gym.profiles.iterations import Iterations, Profiled
from biscale_gym.profiles.profile import Profile
from biscale_gym.profiles.tabulated import ProfileTable

Floats = NDArray[np.float64]
MOST_HOST = 0.9
"""Share of an iteration that its host part may be where it is extrapolated."""


@dataclass(frozen=True)
class HostTime:
    """What an iteration takes beside the batch as a sweep shows it.

    Attributes:
        decode_ms, prefill_ms: between two batches: per iteration, and per sequence (decode) or token (prefill).
        decode_slept_ms, prefill_slept_ms: what a batch takes longer after a sleep, before it is stretched: always, and
            per millisecond of the batch.
        decode_factor, prefill_factor: of a batch in service over one in the sweep.
    """

    decode_ms: tuple[float, float]
    prefill_ms: tuple[float, float]
    decode_slept_ms: tuple[float, float] = (0.0, 0.0)
    prefill_slept_ms: tuple[float, float] = (0.0, 0.0)
    decode_factor: float = 1.0
    prefill_factor: float = 1.0


def host_time(iterations: Iterations, host_ms: Floats) -> HostTime:
    """Non-negative lines through the rows of both phases, float64[n], by medians: a disturbed row does not count."""

    def line(rows: NDArray[np.bool_], size: Floats) -> tuple[float, float]:
        return rising_line(size[rows], host_ms[rows])

    return HostTime(
        line(iterations.batch > 0, iterations.batch), line(iterations.prefill_tokens > 0, iterations.prefill_tokens)
    )


def stretch(emulated: Profile, tp: int, clock_mhz: int, top_mhz: int, rows: Iterations) -> Floats:
    """By how much a clock lengthens batches of one phase, over the top clock: float64[n]."""
    card = emulated.for_phase("prefill" if rows.prefill_tokens.any() else "decode")
    work = (rows.batch, rows.kv_tokens, rows.prefill_tokens, rows.sum_len_sq)
    return card.latency_ms(tp, clock_mhz, *work) / card.latency_ms(tp, top_mhz, *work)


def slept_ms(
    lower: Profiled, top: Profiled, emulated: Profile, top_mhz: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lines, of decode and of prefill, through what lower clocks' rows took longer than the top clock's, unstretched.

    Args:
        lower: rows at lower clocks; those of points without a row at the top clock do not count.
        top: a row per TP degree and point.
        emulated: the card.
        top_mhz: the device's top clock.
    """

    def batches_ms(rows: Profiled) -> list[float]:
        found: list[float] = (rows.iterations.latency_ms - rows.host_ms).tolist()
        return found

    def keys(rows: Profiled) -> list[tuple[float, str]]:
        return list(zip(rows.iterations.tp.tolist(), rows.points.tolist(), strict=True))

    at_top = dict(zip(keys(top), batches_ms(top), strict=True))
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number, (key, batch_ms) in enumerate(zip(keys(lower), batches_ms(lower), strict=True)):
        if key in at_top:
            row = lower.iterations.rows(np.array([number]))
            factor = float(stretch(emulated, int(row.tp[0]), int(row.clock_mhz[0]), top_mhz, row)[0])
            found[bool(row.batch[0] > 0)].append((at_top[key], batch_ms / factor - at_top[key]))

    def line(points: list[tuple[float, float]]) -> tuple[float, float]:
        return rising_line(*np.array(points).T) if points else (0.0, 0.0)

    return line(found[True]), line(found[False])


def service_factors(served: Iterations, table: ProfileTable, host: HostTime, tp: int) -> tuple[float, float]:
    """Medians, over iterations in service, of a decode and of a prefill batch over what a sweep shows; 1 without any.

    Args:
        served: of one TP degree at the table's clock; latency is the batch's alone.
        table: of the sweep at that clock.
        host: its time between batches.
        tp: degree.
    """
    factors = []
    for mask, (fixed, each), size in (
        (served.batch > 0, host.decode_ms, served.batch),
        (served.prefill_tokens > 0, host.prefill_ms, served.prefill_tokens),
    ):
        if mask.any():
            told_ms = predict(table, tp, served.rows(mask))[:, 0]
            batch_ms = told_ms - np.minimum(fixed + each * size[mask], MOST_HOST * told_ms)
            factors.append(float(np.median(served.latency_ms[mask] / batch_ms)))
        else:
            factors.append(1.0)
    return factors[0], factors[1]


def with_modelled_power(iterations: Iterations, emulated: Profile) -> Iterations:
    """The iterations with the emulated card's power, and an idle row per TP degree and clock."""
    power_w = np.empty(len(iterations))
    idle: list[tuple[float, float, float]] = []
    for tp, clock in sorted(set(zip(iterations.tp.tolist(), iterations.clock_mhz.tolist(), strict=True))):
        here = (iterations.tp == tp) & (iterations.clock_mhz == clock)
        for phase in ("prefill", "decode"):
            count = iterations.prefill_tokens if phase == "prefill" else iterations.batch
            own = iterations.rows(here & (count > 0))
            card = emulated.for_phase(phase)
            power_w[here & (count > 0)] = card.power_w(
                int(tp), int(clock), own.batch, own.kv_tokens, own.prefill_tokens, own.sum_len_sq
            )
        idle.append((tp, clock, emulated.idle_power_w(int(tp), int(clock))))
    columns = {name: getattr(iterations, name) for name in ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq")}
    none = np.zeros(len(idle))
    idle_tp, idle_clock, idle_w = (np.array(values) for values in zip(*idle, strict=True))
    return Iterations(
        tp=np.concatenate([iterations.tp, idle_tp]),
        clock_mhz=np.concatenate([iterations.clock_mhz, idle_clock]),
        latency_ms=np.concatenate([iterations.latency_ms, none]),
        power_w_per_gpu=np.concatenate([power_w, idle_w]),
        **{name: np.concatenate([values, none]) for name, values in columns.items()},
    )


def emulate(table: ProfileTable, host: HostTime, emulated: Profile, tp: int, clocks_mhz: Sequence[int]) -> ProfileTable:
    """The table of a worker behind an emulated device.

    Args:
        table: of the worker at one clock; its power is not used.
        host: its time between batches.
        emulated: the card whose clocks and power it takes.
        tp: cards that the worker stands for.
        clocks_mhz: ascending, of the device; the table's latencies are those of the last.
    """
    batch, kv = np.meshgrid(table.decode_batches, table.decode_kv_tokens, indexing="ij")
    tokens, length = np.meshgrid(table.prefill_tokens, table.prefill_mean_length, indexing="ij")
    idle_w = np.array([emulated.idle_power_w(tp, clock) for clock in clocks_mhz])

    def stretched(
        card: Profile,
        measured_s: Floats,
        line_ms: tuple[float, float],
        slept_ms: tuple[float, float],
        factor: float,
        size: Floats,
        work: tuple[Floats | float, ...],
    ) -> tuple[Floats, Floats]:
        host_s = np.minimum(1e-3 * (line_ms[0] + line_ms[1] * size), MOST_HOST * measured_s)
        latency_ms = np.array([card.latency_ms(tp, clock, *work) for clock in clocks_mhz])
        swept_s = measured_s - host_s
        slept_s = 1e-3 * slept_ms[0] + (1.0 + slept_ms[1]) * swept_s
        batch_s = np.maximum(factor * swept_s, slept_s) * latency_ms / latency_ms[-1]
        batch_s[-1] = factor * swept_s
        power_w = np.array([card.power_w(tp, clock, *work) for clock in clocks_mhz])
        latency_s = batch_s + host_s
        return latency_s, (batch_s * power_w + host_s * idle_w[:, None, None]) / latency_s

    decode_s, decode_w = stretched(
        emulated.for_phase("decode"),
        table.decode_latency_s[-1],
        host.decode_ms,
        host.decode_slept_ms,
        host.decode_factor,
        batch,
        (batch, kv, 0.0, 0.0),
    )
    prefill_s, prefill_w = stretched(
        emulated.for_phase("prefill"),
        table.prefill_latency_s[-1],
        host.prefill_ms,
        host.prefill_slept_ms,
        host.prefill_factor,
        tokens,
        (0.0, 0.0, tokens, tokens * length),
    )
    return ProfileTable(
        clocks_mhz=np.asarray(clocks_mhz, dtype=np.float64),
        idle_power_w=idle_w,
        decode_batches=table.decode_batches,
        decode_kv_tokens=table.decode_kv_tokens,
        decode_latency_s=decode_s,
        decode_power_w=decode_w,
        prefill_tokens=table.prefill_tokens,
        prefill_mean_length=table.prefill_mean_length,
        prefill_latency_s=prefill_s,
        prefill_power_w=prefill_w,
    )
