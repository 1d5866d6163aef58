"""The closed form: constants of a parametric hardware and a model's dimensions, laid out for the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from biscale_gym.config import nearest
from biscale_gym.profiles import layout as k
from biscale_gym.profiles.closed_form import fill_parametric
from biscale_gym.profiles.profile import Profile, ProfileError, Vector
from biscale_gym.profiles.randomisation import randomised
from biscale_gym.profiles.settings import ParametricSettings, RandomisationSettings


@dataclass(frozen=True)
class ParametricProfile(Profile):
    """Costs by the equations of docs/model-card.md, derived for any dense model from its dimensions."""

    def __post_init__(self) -> None:
        """Refuse a precision or TP degree that the hardware's constants do not cover."""
        known = sorted(self._form.latency.precisions)
        if self.precision not in known:
            raise ProfileError(
                f"{self.hardware.description} has no {self.precision} terms; {nearest(self.precision, list(known))}"
            )
        missing = [tp for tp in self.tensor_parallel_degrees if tp > 1 and tp not in self._form.latency.allreduce]
        if missing:
            raise ProfileError(
                f"{self.hardware.description}: parametric.latency.allreduce has no entry for TP {missing[0]}"
            )

    @property
    def _form(self) -> ParametricSettings:
        assert self.hardware.parametric is not None
        return self.hardware.parametric

    def _compile(self, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
        rows = k.HEADER
        table = rows + len(clocks_mhz) * k.ROW
        limit_start = table + (max_batch + 1) * len(clocks_mhz) * k.ENTRY
        vector = np.zeros(limit_start + k.LIMIT_KNOTS * k.LIMIT_ENTRY)
        vector[k.KIND], vector[k.CLOCKS], vector[k.MAX_BATCH], vector[k.TP] = (
            k.PARAMETRIC,
            len(clocks_mhz),
            max_batch,
            tp,
        )
        vector[k.DECODE], vector[k.BATCH_STRIDE] = table, len(clocks_mhz) * k.ENTRY
        vector[k.KV_SEGMENTS], vector[k.KV_STEP] = 1, math.inf
        vector[k.LIMIT_START] = limit_start
        self._fill_latency(vector, tp)
        self._fill_power(vector, tp)
        vector[rows + k.GHZ : table : k.ROW] = np.asarray(clocks_mhz) / 1000
        fill_parametric(vector)
        return vector

    def randomised(self, rng: np.random.Generator, ranges: RandomisationSettings) -> ParametricProfile:
        """The same model on a hardware whose uncertain constants are drawn anew; the nominal profile stays as it is."""
        hardware = self.hardware.model_copy(update={"parametric": randomised(self._form, rng, ranges)})
        decode = None if self.decode is None else replace(self.decode, hardware=hardware)
        return replace(self, hardware=hardware, decode=decode)

    def _fill_latency(self, vector: Vector, tp: int) -> None:
        """Scalars of the latency equations, in seconds and GHz."""
        latency, model = self._form.latency, self.model
        own = latency.precisions[self.precision]
        layers = model.layers / self._form.reference_layers
        width = model.hidden_size / self._form.reference_hidden_size
        flop_per_ghz = latency.tensor_tflops_per_ghz * 1e12
        lowest, highest = self.clocks_mhz[0] / 1000, self.top_clock_mhz / 1000
        vector[k.LOWEST_GHZ], vector[k.HIGHEST_GHZ] = lowest, highest
        vector[k.HOST_S], vector[k.HOST_S_PER_SEQUENCE] = 1e-3 * latency.host_ms, 1e-3 * latency.host_ms_per_sequence
        vector[k.NORM] = latency.roofline_norm
        vector[k.LOG_KNEE_GHZ] = math.log(latency.bandwidth_knee_ghz)
        vector[k.KNEE_POWER] = latency.bandwidth_knee_power
        # The bandwidth curve is relative to the top clock.
        vector[k.KNEE_SCALE] = (
            math.log1p((latency.bandwidth_knee_ghz / highest) ** latency.bandwidth_knee_power)
            / latency.bandwidth_knee_power
        )
        vector[k.TENSOR_LIMIT_GHZ] = latency.tensor_limit_ghz
        vector[k.LOG_TENSOR_LIMIT_GHZ] = math.log(latency.tensor_limit_ghz)
        vector[k.LOG_WEIGHT_S] = math.log(self.weight_bytes / (tp * own.bandwidth_tb_per_s * 1e12))
        compute_s_ghz = 2 * model.linear_parameters / (tp * own.efficiency * own.peak_multiple * flop_per_ghz)
        vector[k.LOG_COMPUTE_S_GHZ] = math.log(compute_s_ghz)
        vector[k.ATTENTION_S_GHZ] = model.attention_flop_per_square / (tp * latency.attention_efficiency * flop_per_ghz)
        vector[k.KV_S] = model.kv_bytes_per_token / (tp * latency.kv_tb_per_s * 1e12)
        if tp > 1:
            reduce = latency.allreduce[tp]
            calls = 2 * model.layers
            vector[k.REDUCE_S] = calls * 1e-6 * reduce.latency_us
            vector[k.REDUCE_S_PER_TOKEN] = calls * 2 * model.hidden_size / (reduce.gb_per_s * 1e9)
        vector[k.REDUCE_FLAT], vector[k.REDUCE_GHZ] = latency.allreduce_flat, latency.allreduce_ghz
        vector[k.LAUNCH_S] = 1e-3 * own.launch_ms * layers
        vector[k.LAUNCH_FLAT], vector[k.LAUNCH_GHZ] = latency.launch_flat, latency.launch_ghz
        vector[k.ELEMENTWISE_S] = 1e-6 * (own.token_us + own.sharded_token_us / tp) * layers * width

    def _fill_power(self, vector: Vector, tp: int) -> None:
        """Scalars of the power equations: watts, and joules per GPU of each kind of work."""
        power, model = self._form.power, self.model
        joule_per_byte = power.w_per_tb_per_s / 1e12 / tp
        joule_per_flop = power.w_per_tflops / 1e12 / tp * power.flop_energy[self.precision]
        vector[k.LIMIT_W] = power.limit_w
        vector[k.VOLTAGE_SLOPE], vector[k.VOLTAGE_FLOOR] = power.voltage_slope_per_ghz, power.voltage_floor
        vector[k.IDLE_W], vector[k.IDLE_SPAN_W] = power.idle_lowest_w, power.idle_highest_w - power.idle_lowest_w
        vector[k.WEIGHT_J] = joule_per_byte * self.weight_bytes
        vector[k.TOKEN_J] = joule_per_byte * tp * vector[k.ELEMENTWISE_S] * power.elementwise_tb_per_s * 1e12
        vector[k.KV_J] = joule_per_byte * model.kv_bytes_per_token
        vector[k.CLOCK_W_PER_GHZ] = power.w_per_ghz
        vector[k.LINEAR_J] = joule_per_flop * 2 * model.linear_parameters
        vector[k.HEAD_J] = joule_per_flop * 2 * model.head_parameters
        vector[k.ATTENTION_J] = joule_per_flop * model.attention_flop_per_square
        vector[k.PREFILL_TOKENS_HALF], vector[k.PREFILL_EXTRA] = power.prefill_half_tokens, power.prefill_factor - 1
