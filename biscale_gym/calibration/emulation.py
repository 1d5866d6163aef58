"""What an emulated device makes of a CPU worker's iterations, as a table of the cluster model.

The worker's own latency is measured at the top clock. A lower clock stretches the batch by the emulated card's latency
there over that at the top clock, and leaves the host's part as it is; power is the emulated card's for this batch and
clock while it runs, its idle power in the host's part. So latency is measured, power and the clock's effect modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from biscale_gym.profiles.iterations import Iterations
from biscale_gym.profiles.profile import Profile
from biscale_gym.profiles.tabulated import ProfileTable

Floats = NDArray[np.float64]
MOST_HOST = 0.9
"""Share of an iteration that its host part may be where it is extrapolated."""


@dataclass(frozen=True)
class HostTime:
    """Milliseconds between two batches: a part per iteration, and one per sequence (decode) or token (prefill)."""

    decode_ms: tuple[float, float]
    prefill_ms: tuple[float, float]


def host_time(iterations: Iterations, host_ms: Floats) -> HostTime:
    """Non-negative linear fits to the rows of both phases, float64[n]."""

    def line(rows: NDArray[np.bool_], size: Floats) -> tuple[float, float]:
        design = np.column_stack([np.ones(rows.sum()), size[rows]])
        fixed, each = nnls(design, np.maximum(host_ms[rows], 0.0))[0]
        return float(fixed), float(each)

    return HostTime(
        line(iterations.batch > 0, iterations.batch), line(iterations.prefill_tokens > 0, iterations.prefill_tokens)
    )


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
        card: Profile, measured_s: Floats, line_ms: tuple[float, float], size: Floats, work: tuple[Floats | float, ...]
    ) -> tuple[Floats, Floats]:
        host_s = np.minimum(1e-3 * (line_ms[0] + line_ms[1] * size), MOST_HOST * measured_s)
        latency_ms = np.array([card.latency_ms(tp, clock, *work) for clock in clocks_mhz])
        batch_s = (measured_s - host_s) * latency_ms / latency_ms[-1]
        power_w = np.array([card.power_w(tp, clock, *work) for clock in clocks_mhz])
        latency_s = batch_s + host_s
        return latency_s, (batch_s * power_w + host_s * idle_w[:, None, None]) / latency_s

    decode_s, decode_w = stretched(
        emulated.for_phase("decode"), table.decode_latency_s[-1], host.decode_ms, batch, (batch, kv, 0.0, 0.0)
    )
    prefill_s, prefill_w = stretched(
        emulated.for_phase("prefill"),
        table.prefill_latency_s[-1],
        host.prefill_ms,
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
