"""The device that settings name, opened."""

from __future__ import annotations

import time

from biscale_gym.cluster.placement import Phase
from biscale_gym.config import ConfigError
from biscale_gym.control.controllers import PlanContext
from biscale_gym.live.devices import Device
from biscale_gym.live.emulated import EmulatedDevice
from biscale_gym.live.errors import DeviceBusyError, DevicePermissionError
from biscale_gym.live.nvml_device import NvmlDevice
from biscale_gym.live.settings import EmulatedDeviceSettings, NvmlDeviceSettings

HANDOVER_S = 15.0
"""The watchdog of a controller that has died keeps its GPUs until their clocks are given back; that takes no longer."""


def open_device(
    settings: EmulatedDeviceSettings | NvmlDeviceSettings, name: str, phase: Phase, tp: int, context: PlanContext
) -> tuple[Device, str]:
    """An instance's device, and what there is to tell of it.

    Cards whose clocks this process may not set are observed only; the second value says so, with the remedy.

    Args:
        settings: of the device, with this instance's cards alone.
        name: of the instance, for messages.
        phase: of the instance.
        tp: of the instance.
        context: the clocks and the profile of an emulated card.

    Raises:
        DeviceError, ConfigError, ProfileError: it cannot be opened at all.
    """
    if isinstance(settings, EmulatedDeviceSettings):
        cluster = context.scenario.cluster
        profile = cluster.profile().for_phase(phase)
        return EmulatedDevice(profile, tp, context.clocks_mhz, cluster.switching_settings()), ""
    if len(settings.gpus) != tp:
        raise ConfigError(f"{name}: tp is {tp}, but device.gpus names {len(settings.gpus)} cards")
    try:
        return _controlled(settings), ""
    except DevicePermissionError as error:
        return NvmlDevice(settings.gpus, "observe-only"), f"clocks are observed only: {error}"


def _controlled(settings: NvmlDeviceSettings) -> NvmlDevice:
    end_s = time.monotonic() + HANDOVER_S
    while True:
        try:
            return NvmlDevice(settings.gpus, settings.mode, watchdog_s=settings.watchdog_s)
        except DeviceBusyError as error:
            if error.holder_lives or time.monotonic() > end_s:
                raise
            time.sleep(0.1)
