"""From preset names to a profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from biscale_gym.config import load_preset, nearest, presets_dir
from biscale_gym.profiles.linear import LinearProfile
from biscale_gym.profiles.parametric import ParametricProfile
from biscale_gym.profiles.profile import Profile, ProfileError, check_precision
from biscale_gym.profiles.settings import HardwareSettings, ModelSettings, Precision
from biscale_gym.profiles.tabulated import ProfileTable, TabulatedProfile


def load_profile(hardware: str, model: str, precision: str, decode_precision: str | None = None) -> Profile:
    """The profile of a model preset on a hardware preset of ``configs/`` (or YAML files of your own, by path).

    Args:
        hardware: preset or path.
        model: preset or path.
        precision: of the weights.
        decode_precision: of the weights of decode instances, where it differs.

    Raises:
        ConfigError: no such preset, or a fault in it.
        ProfileError: a precision that the model has not, or a model that the hardware's form says nothing about.
    """
    if decode_precision not in (None, precision):
        return replace(
            load_profile(hardware, model, precision), decode=load_profile(hardware, model, str(decode_precision))
        )
    own_hardware = load_preset(HardwareSettings, "hardware", hardware)
    own_model = load_preset(ModelSettings, "models", model)
    name = Path(model).stem if model.endswith((".yaml", ".yml")) else model
    known = check_precision(own_model, name, precision)
    if own_hardware.parametric is not None:
        return ParametricProfile(own_hardware, own_model, name, known)
    if own_hardware.linear is not None:
        return LinearProfile(own_hardware, own_model, name, known)
    return TabulatedProfile(own_hardware, own_model, name, known, _tables(own_hardware, hardware, name, known))


def _tables(settings: HardwareSettings, hardware: str, model: str, precision: Precision) -> dict[int, ProfileTable]:
    """The tables that a table-form hardware names for one model."""
    assert settings.table is not None
    files = settings.table.files
    if model not in files:
        raise ProfileError(f"{settings.description} has no table for {model!r}; {nearest(model, sorted(files))}")
    folder = Path(hardware).parent if hardware.endswith((".yaml", ".yml")) else presets_dir() / "hardware"
    return {tp: ProfileTable.load(folder / path) for tp, path in files[model].get(precision, {}).items()}
