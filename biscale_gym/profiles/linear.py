"""The linear form: A + B·ΣL + C·ΣL² for prefill, and a linear decode step with one coefficient set per batch range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biscale_gym.config import nearest
from biscale_gym.profiles import layout as k
from biscale_gym.profiles.profile import Profile, ProfileError, Vector
from biscale_gym.profiles.settings import LinearCoefficients, LinearSettings


@dataclass(frozen=True)
class LinearProfile(Profile):
    """Published linear coefficients at the hardware's single clock; power is a constant placeholder."""

    def __post_init__(self) -> None:
        """Refuse a model without coefficients, and clocks that the coefficients say nothing about."""
        if self.model_name not in self._form.coefficients:
            known = sorted(self._form.coefficients)
            raise ProfileError(
                f"{self.hardware.description} has no coefficients for {self.model_name!r}; "
                f"{nearest(self.model_name, known)}"
            )
        if len(self.clocks_mhz) != 1:
            raise ProfileError(
                f"{self.hardware.description}: the linear form knows one clock, the preset lists {len(self.clocks_mhz)}"
            )

    @property
    def _form(self) -> LinearSettings:
        assert self.hardware.linear is not None
        return self.hardware.linear

    @property
    def tensor_parallel_degrees(self) -> tuple[int, ...]:
        """TP degrees with coefficients for this model."""
        return tuple(sorted(self._form.coefficients[self.model_name]))

    def _compile(self, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
        form = self._form
        rows = k.HEADER
        table = rows + len(clocks_mhz) * k.ROW
        # The set for large batches must be in the table, which is continued from its last two rows.
        last = max(max_batch, form.large_batch + 1)
        vector = np.zeros(table + (last + 1) * len(clocks_mhz) * k.ENTRY)
        vector[k.KIND], vector[k.CLOCKS], vector[k.MAX_BATCH], vector[k.TP] = k.LINEAR, len(clocks_mhz), last, tp
        vector[k.DECODE], vector[k.BATCH_STRIDE] = table, len(clocks_mhz) * k.ENTRY
        vector[k.KV_SEGMENTS], vector[k.KV_STEP] = 1, math.inf
        vector[k.LIMIT_W] = math.inf
        coefficients = form.coefficients[self.model_name][tp]
        row = vector[rows:table].reshape(-1, k.ROW)
        row[:, k.GHZ] = np.asarray(clocks_mhz) / 1000
        row[:, k.IDLE], row[:, k.BASE_W], row[:, k.BUSY_W] = form.idle_power_w, form.busy_power_w, form.busy_power_w
        row[:, k.HEADROOM_W] = math.inf
        row[:, k.FIXED_S] = 1e-3 * (coefficients.prefill.a_ms + form.prefill_extra_ms + form.engine_ms)
        row[:, k.TOKEN_S] = 1e-3 * (coefficients.prefill.ms_per_token + form.engine_ms_per_token)
        row[:, k.SQUARE_S] = 1e-3 * coefficients.prefill.ms_per_square
        entries = vector[table:].reshape(last + 1, len(clocks_mhz), k.ENTRY)
        entries[:, :, k.A], entries[:, :, k.C] = self._decode(coefficients, np.arange(last + 1))
        return vector

    def _decode(self, coefficients: LinearCoefficients, batch: np.ndarray) -> tuple[Vector, Vector]:
        """Seconds per iteration and per KV token of each batch size, both shaped (n, 1)."""
        form = self._form
        small, large = coefficients.small, coefficients.large
        use_large = batch >= form.large_batch
        a = np.where(use_large, large.a_ms, small.a_ms) + form.engine_ms
        per_token = np.where(use_large, large.ms_per_token, small.ms_per_token)
        per_sequence = np.where(use_large, large.ms_per_sequence, small.ms_per_sequence)
        # The published form counts the token being produced: per_token x (K + batch).
        fixed_s = 1e-3 * (a + (per_token + per_sequence) * batch)
        token_s = 1e-3 * (per_token + form.engine_ms_per_token)
        return fixed_s[:, None], token_s[:, None]
