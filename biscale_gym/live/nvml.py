"""NVIDIA cards through NVML; the only module that knows ``pynvml`` (of nvidia-ml-py).

Indices are NVML's, which ``CUDA_VISIBLE_DEVICES`` does not change. Every failure is a ``DeviceError`` that names the
GPU and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from biscale_gym.live.errors import DeviceError, DevicePermissionError

_REMEDIES = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "libnvidia-ml.so.1 is not there: install the NVIDIA driver, start a container with "
    "its GPUs (--gpus), or take the emulated device",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is not loaded: load it (nvidia-smi must work), start a "
    "container with its GPUs (--gpus), or take the emulated device",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "libnvidia-ml and the loaded driver differ in version: reboot, or reload "
    "the driver",
    "NVML_ERROR_NO_PERMISSION": "setting clocks needs root or CAP_SYS_ADMIN: run as root, give the container "
    "--cap-add SYS_ADMIN, or take mode observe-only, which reads power and sets nothing",
    "NVML_ERROR_NOT_SUPPORTED": "the card does not offer it; locked clocks need Volta or newer, the energy counter "
    "too, instant power Ampere or newer, and a MIG slice has none of them",
    "NVML_ERROR_GPU_IS_LOST": "the card has fallen off the bus: see the kernel's log, reboot",
}


def _pynvml() -> Any:
    try:
        return import_module("pynvml")
    except ModuleNotFoundError:
        raise DeviceError("nvidia-ml-py is not installed: pip install 'biscale-gym[live]' or nvidia-ml-py") from None


@contextmanager
def _told(what: str) -> Iterator[Any]:
    """Yields ``pynvml``; its errors leave as ours."""
    library = _pynvml()
    try:
        yield library
    except library.NVMLError as error:
        code = error.value
        name = next((n for n in _REMEDIES if getattr(library, n) == code), "")
        kind = DevicePermissionError if name == "NVML_ERROR_NO_PERMISSION" else DeviceError
        remedy = f"; {_REMEDIES[name]}" if name else ""
        raise kind(f"{what}: NVML says {str(error)!r} (code {code}){remedy}") from error


class Gpu:
    """One card.

    Attributes:
        index: NVML's.
        uuid, name: of the card.
        clocks_mhz: supported SM clocks at the highest memory clock, ascending.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        with _told(f"GPU {index}") as nvml:
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self.uuid: str = nvml.nvmlDeviceGetUUID(self._handle)
            self.name: str = nvml.nvmlDeviceGetName(self._handle)
        with self._doing("list its clocks") as nvml:
            memory_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(self._handle))
            listed = nvml.nvmlDeviceGetSupportedGraphicsClocks(self._handle, memory_mhz)
        self.clocks_mhz: tuple[int, ...] = tuple(sorted(listed))

    def _doing(self, what: str) -> Any:
        return _told(f"GPU {self.index} ({self.name}): cannot {what}")

    def lock_clock(self, clock_mhz: int) -> None:
        """Lock the SM clock; takes milliseconds."""
        with self._doing(f"lock the clock at {clock_mhz} MHz") as nvml:
            nvml.nvmlDeviceSetGpuLockedClocks(self._handle, clock_mhz, clock_mhz)

    def reset_clock(self) -> None:
        """Give the clock back to the driver; takes milliseconds."""
        with self._doing("give its clock back") as nvml:
            nvml.nvmlDeviceResetGpuLockedClocks(self._handle)

    def clock_mhz(self) -> int:
        """SM clock now."""
        with self._doing("read its clock") as nvml:
            return int(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded."""
        with self._doing("read its energy counter") as nvml:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def power_w(self) -> float:
        """Instant power (``nvmlDeviceGetPowerUsage`` is a mean over a second on these cards)."""
        with self._doing("read its power") as nvml:
            (value,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
            if value.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(value.nvmlReturn)
            return 1e-3 * int(value.value.uiVal)

    def slowed(self) -> bool:
        """Whether the driver runs the card below its locked clock on its own account: idle, power, heat."""
        with self._doing("read why its clock is what it is") as nvml:
            reasons = int(nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
            ours = nvml.nvmlClocksEventReasonApplicationsClocksSetting | nvml.nvmlClocksEventReasonNone
        return bool(reasons & ~ours)


@contextmanager
def session() -> Iterator[None]:
    """NVML is initialised inside the block."""
    with _told("NVML") as nvml:
        nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def driver_version() -> str:
    """Of the loaded driver; NVML must be initialised (``session``)."""
    with _told("NVML") as nvml:
        return str(nvml.nvmlSystemGetDriverVersion())


def open_gpus(indices: Sequence[int]) -> list[Gpu]:
    """The cards with these indices; NVML must be initialised (``session``).

    Raises:
        DeviceError: no such card (those that are there are named), a card twice, or none given.
    """
    with _told("NVML") as nvml:
        count = int(nvml.nvmlDeviceGetCount())
    there = f"this machine has {'GPUs' if count > 1 else 'GPU'} {', '.join(map(str, range(count)))}"
    for index in indices:
        if not 0 <= index < count:
            raise DeviceError(f"GPU {index}: {there if count else 'this machine has none'}")
    if not indices or len(set(indices)) != len(indices):
        raise DeviceError(f"a group needs GPUs, each once, got {list(indices)}")
    return [Gpu(index) for index in indices]
