"""A calibration, told."""

from __future__ import annotations

from rich.table import Table

from biscale_gym.calibration.calibrate import Calibration


def table(calibration: Calibration) -> Table:
    """Errors of every form on points that its fit did not see."""
    made = Table(title="errors on operating points left out of the fit: mean, 90th percentile")
    for column in ("form", "TP", "phase", "points", "latency %", "power %"):
        made.add_column(column, justify="left" if column in ("form", "phase") else "right")
    for error in calibration.errors:
        power = "–" if error.power_percent is None else f"{error.power_percent:.1f}, {error.power_p90_percent:.1f}"
        made.add_row(
            f"{error.form}{' (chosen)' if error.form == calibration.form else ''}",
            str(error.tp),
            error.phase,
            str(error.points),
            f"{error.latency_percent:.1f}, {error.latency_p90_percent:.1f}",
            power,
        )
    return made
