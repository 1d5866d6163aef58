"""Hardware as uncertain as its sources: constants of the closed form, drawn anew."""

from __future__ import annotations

import numpy as np

from biscale_gym.profiles.settings import ParametricSettings, RandomisationSettings, SwitchingSettings


def randomised(form: ParametricSettings, rng: np.random.Generator, ranges: RandomisationSettings) -> ParametricSettings:
    """``form`` with every uncertain constant drawn uniformly from its range; seven draws, always in the same order."""

    def around_one(share: float) -> float:
        return float(rng.uniform(1 - share, 1 + share))

    efficiency = around_one(ranges.efficiency_share)
    knee_ghz = float(rng.uniform(*ranges.bandwidth_knee_ghz))
    floor = float(rng.uniform(*ranges.voltage_floor))
    bandwidth = around_one(ranges.bandwidth_share)
    launch = around_one(ranges.launch_share)
    dynamic = around_one(ranges.power_share)
    idle_w = float(rng.uniform(*ranges.idle_lowest_w))
    precisions = {
        name: terms.model_copy(
            update={
                "efficiency": terms.efficiency * efficiency,
                "bandwidth_tb_per_s": terms.bandwidth_tb_per_s * bandwidth,
                "launch_ms": terms.launch_ms * launch,
            }
        )
        for name, terms in form.latency.precisions.items()
    }
    latency = form.latency.model_copy(
        update={
            "bandwidth_knee_ghz": knee_ghz,
            # Only the product of efficiency and limit was measured.
            "tensor_limit_ghz": form.latency.tensor_limit_ghz / efficiency,
            "precisions": precisions,
        }
    )
    power = form.power.model_copy(
        update={
            "voltage_floor": floor,
            "w_per_tb_per_s": form.power.w_per_tb_per_s * dynamic,
            "w_per_tflops": form.power.w_per_tflops * dynamic,
            "w_per_ghz": form.power.w_per_ghz * dynamic,
            "idle_lowest_w": idle_w,
        }
    )
    return form.model_copy(update={"latency": latency, "power": power})


def randomised_switching(
    switching: SwitchingSettings, rng: np.random.Generator, ranges: RandomisationSettings
) -> SwitchingSettings:
    """``switching`` with its median scaled by a factor drawn uniformly from the range."""
    factor = float(rng.uniform(*ranges.switching_factor))
    return switching.model_copy(update={"median_ms": switching.median_ms * factor})
