"""``Profile``: one model in one precision on one hardware, whatever the form its costs are known in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from biscale_gym.config import config_hash, nearest
from biscale_gym.profiles import kernels
from biscale_gym.profiles.settings import HardwareSettings, ModelSettings, Precision, RandomisationSettings

Vector = NDArray[np.float64]


class ProfileError(ValueError):
    """A profile that cannot be built or asked so; the message names the nearest valid choice."""


@njit(cache=True)
def _costs(model: Vector, b: Vector, kv: Vector, m: Vector, s2: Vector, out: Vector) -> None:
    """Latency, power and effective clock of many iterations at the vector's only clock; ``out`` has shape (n, 3)."""
    for i in range(b.size):
        out[i, 0], out[i, 1] = kernels.iteration_cost(model, 0, b[i], kv[i], m[i], s2[i])
        out[i, 2] = kernels.effective_clock_mhz(model, 0, b[i], kv[i], m[i], s2[i])


@dataclass(frozen=True)
class Profile(ABC):
    """What iterations of one model cost on one hardware.

    Attributes:
        hardware: the GPU's settings, including one form of its costs.
        model: the model's dimensions.
        model_name: name of the model preset (linear and table forms look coefficients up by it).
        precision: of the weights.
        decode: the same model on the same hardware in the precision of decode instances; None: this profile serves
            both phases.
    """

    hardware: HardwareSettings
    model: ModelSettings
    model_name: str
    precision: Precision
    decode: Profile | None = field(default=None, kw_only=True)

    @abstractmethod
    def _compile(self, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
        """The compiled vector; arguments are already checked."""

    def compile(self, tp: int, clocks_mhz: Sequence[int], max_batch: int) -> Vector:
        """The flat vector that the kernels read, for one TP degree and one ascending list of clocks.

        Decode look-ups are exact tables up to ``max_batch`` sequences; larger batches cost a closed-form evaluation.

        Raises:
            ProfileError: a TP degree or clock that the hardware does not have, or an unsorted list.
        """
        if tp not in self.tensor_parallel_degrees:
            known = ", ".join(str(degree) for degree in self.tensor_parallel_degrees)
            raise ProfileError(
                f"TP {tp} is not supported by {self.hardware.description} for {self.model_name}; valid: {known}"
            )
        clocks = tuple(int(clock) for clock in clocks_mhz)
        if not clocks or list(clocks) != sorted(set(clocks)):
            raise ProfileError(f"clocks must be a non-empty ascending list without repeats, got {list(clocks_mhz)}")
        valid = set(self.clocks_mhz)
        for clock in clocks:
            if clock not in valid:
                closest = min(self.clocks_mhz, key=lambda choice: abs(choice - clock))
                raise ProfileError(
                    f"{self.hardware.description} has no clock {clock} MHz; the nearest is {closest} MHz"
                )
        if max_batch < 1:
            raise ProfileError(f"max_batch must be at least 1, got {max_batch}")
        return self._compile(tp, clocks, max_batch)

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """All supported clocks, ascending."""
        return self.hardware.clocks.mhz

    @property
    def top_clock_mhz(self) -> int:
        """The highest supported clock."""
        return self.clocks_mhz[-1]

    @property
    def tensor_parallel_degrees(self) -> tuple[int, ...]:
        """TP degrees whose costs are known."""
        return self.hardware.tensor_parallel_degrees

    @property
    def context_tokens(self) -> int:
        """Longest context of the model."""
        return self.model.context_tokens

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights."""
        return self.model.weight_bytes(self.precision)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token."""
        return self.model.kv_bytes_per_token

    @property
    def hash(self) -> str:
        """Identifies everything that a compiled vector depends on."""
        parts = {
            "hardware": self.hardware.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "model_name": self.model_name,
            "precision": self.precision,
        }
        return config_hash(parts if self.decode is None else {**parts, "decode": self.decode.hash})

    def for_phase(self, phase: Literal["prefill", "decode"]) -> Profile:
        """The profile of a phase's instances."""
        return self.decode if phase == "decode" and self.decode is not None else self

    def kv_capacity_tokens(
        self, tp: int, pp: int = 1, utilisation: float | None = None, reserve_gb: float | None = None
    ) -> int:
        """KV tokens that an instance of ``tp`` x ``pp`` GPUs holds beside the weights; <= 0: the model does not fit.

        ``utilisation`` and ``reserve_gb`` (per GPU) default to the hardware's settings.
        """
        memory = self.hardware.memory
        share = memory.utilisation if utilisation is None else utilisation
        reserve = memory.reserve_gb if reserve_gb is None else reserve_gb
        free_bytes = (share * memory.gpu_gb - reserve) * 1e9 * tp * pp - self.weight_bytes
        return math.floor(free_bytes / self.kv_bytes_per_token)

    def kv_capacity_for(self, phase: Literal["prefill", "decode"], tp: int, pp: int = 1) -> int:
        """KV tokens of an instance of a phase, ``tight_prefill`` included where the hardware's settings allow it."""
        tokens = self.for_phase(phase).kv_capacity_tokens(tp, pp)
        tight = self.hardware.memory.tight_prefill
        if tokens <= 0 and phase == "prefill" and tight is not None:
            tightened = self.kv_capacity_tokens(tp, pp, tight.utilisation, tight.reserve_gb)
            tokens = tightened if tightened >= tight.least_kv_tokens else tokens
        return tokens

    def _evaluate(
        self, tp: int, clock_mhz: int, batch: ArrayLike, kv: ArrayLike, prefill: ArrayLike, sum_len_sq: ArrayLike
    ) -> NDArray[np.float64]:
        """Costs of iterations at one clock, shape broadcast(inputs) + (3,)."""
        columns = np.broadcast_arrays(
            *(np.asarray(value, dtype=np.float64) for value in (batch, kv, prefill, sum_len_sq))
        )
        flat = [np.ascontiguousarray(column).ravel() for column in columns]
        largest = max(1, int(np.ceil(flat[0].max(initial=1.0))))
        out = np.empty((flat[0].size, 3))
        b, kv_total, m, s2 = flat
        _costs(self.compile(tp, [clock_mhz], largest), b, kv_total, m, s2, out)
        return out.reshape((*columns[0].shape, 3))

    def latency_ms(
        self,
        tp: int,
        clock_mhz: int,
        batch: ArrayLike = 0,
        kv_tokens: ArrayLike = 0,
        prefill_tokens: ArrayLike = 0,
        sum_len_sq: ArrayLike = 0,
    ) -> NDArray[np.float64]:
        """Latency [ms] of iterations at one clock; arguments as in ``kernels.iteration_cost``, broadcast."""
        return 1e3 * self._evaluate(tp, clock_mhz, batch, kv_tokens, prefill_tokens, sum_len_sq)[..., 0]

    def power_w(
        self,
        tp: int,
        clock_mhz: int,
        batch: ArrayLike = 0,
        kv_tokens: ArrayLike = 0,
        prefill_tokens: ArrayLike = 0,
        sum_len_sq: ArrayLike = 0,
    ) -> NDArray[np.float64]:
        """Power per GPU [W] of iterations at one clock."""
        return self._evaluate(tp, clock_mhz, batch, kv_tokens, prefill_tokens, sum_len_sq)[..., 1]

    def effective_clock_mhz(
        self,
        tp: int,
        clock_mhz: int,
        batch: ArrayLike = 0,
        kv_tokens: ArrayLike = 0,
        prefill_tokens: ArrayLike = 0,
        sum_len_sq: ArrayLike = 0,
    ) -> NDArray[np.float64]:
        """Clock the card runs at [MHz], the board limit considered."""
        return self._evaluate(tp, clock_mhz, batch, kv_tokens, prefill_tokens, sum_len_sq)[..., 2]

    def idle_power_w(self, tp: int, clock_mhz: int) -> float:
        """Power per GPU [W] at one clock while nothing is computed."""
        return float(kernels.idle_power_w(self.compile(tp, [clock_mhz], 1), 0))

    def randomised(self, rng: np.random.Generator, ranges: RandomisationSettings) -> Profile:
        """A member of the family of hardware that the sources allow, drawn from ``rng``.

        Raises:
            ProfileError: only the parametric form has constants to vary.
        """
        raise ProfileError(f"{self.hardware.description}: only a parametric hardware can be randomised")


def check_precision(model: ModelSettings, model_name: str, precision: str) -> Precision:
    """``precision`` if the model has it.

    Raises:
        ProfileError: it has not; the nearest is named.
    """
    for known in model.precisions:
        if known == precision:
            return known
    raise ProfileError(
        f"model {model_name!r} has no precision {precision!r}; {nearest(precision, list(model.precisions))}"
    )
