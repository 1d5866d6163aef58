"""Every setting of the project: frozen pydantic models, and the presets in ``configs/`` that fill them.

A setting's unit is in its name. Unknown keys are errors that name the nearest valid one. ``config_hash`` identifies a
resolved configuration beside every result.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""YAML 1.1 takes 1e-4 for text."""


class ConfigError(ValueError):
    """A preset or configuration file that cannot be used; the message names the place and the nearest valid choice."""


class Settings(BaseModel):
    """Base of every settings model: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


@cache
def presets_dir() -> Path:
    """Folder of the shipped presets: beside the package in a wheel, at the top of a clone."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "configs", here.parent / "configs"):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"no configs/ folder beside {here} or its parent: the installation is incomplete")


def cache_root() -> Path:
    """Folder of everything this package caches: ``$BISCALE_GYM_CACHE``, else in the user's cache folder."""
    given = os.environ.get("BISCALE_GYM_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "biscale-gym"


def preset_names(kind: str) -> list[str]:
    """Names of the presets of one kind (a sub-folder of ``configs/``), sorted."""
    return sorted(path.stem for path in (presets_dir() / kind).glob("*.yaml"))


def nearest(name: str, choices: list[str]) -> str:
    """A readable hint: the nearest valid choice first, then all of them."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(choices) or '(none)'}"


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, read safely.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(loaded).__name__}")
    return loaded


def validate(model: type[SettingsT], values: dict[str, Any], where: str) -> SettingsT:
    """``values`` as ``model``; every fault is named with its place and, for unknown keys, the nearest valid key.

    Raises:
        ConfigError: any value is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"]
            if fault["type"] == "extra_forbidden":
                message = f"unknown key; {nearest(str(fault['loc'][-1]), _keys_at(model, fault['loc'][:-1]))}"
            faults.append(f"{where}: {place}: {message}")
        raise ConfigError("\n".join(faults)) from error


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) settings model at a fault's location."""
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            continue
        annotation = fields[part].annotation
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        if nested:
            current = nested[0]
    return sorted(getattr(current, "model_fields", {}))


def replaced(values: dict[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested settings with some of them replaced; a group that is None becomes one.

    Args:
        values: as ``model_dump`` gives them; not changed.
        overrides: dotted setting to value, e.g. ``{"cluster.precision": "bf16"}``.
        where: for messages.

    Raises:
        ConfigError: a group that is none; the nearest is named.
    """
    changed = copy.deepcopy(values)
    for dotted, value in overrides.items():
        at = changed
        *parents, last = dotted.split(".")
        for parent in parents:
            if at.get(parent, 0) is None:
                at[parent] = {}
            if not isinstance(at.get(parent), dict):
                groups = sorted(key for key, group in at.items() if isinstance(group, dict))
                raise ConfigError(
                    f"{where} has no settings group {parent!r} (in {dotted!r}); {nearest(parent, groups)}"
                )
            at = at[parent]
        at[last] = value
    return changed


def parsed_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts, as command lines give them, as overrides; values are read as YAML, and 1e-4 as a number.

    Raises:
        ConfigError: a text is not of this form.
    """
    values = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, for instance cluster.precision=bf16")
        try:
            values[key] = float(value) if _EXPONENT.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: the value is no YAML") from error
    return values


def load_preset(model: type[SettingsT], kind: str, name_or_path: str) -> SettingsT:
    """The preset ``configs/<kind>/<name>.yaml``, or a YAML file of your own given by its path.

    Raises:
        ConfigError: no such preset (the nearest is named), or a fault in the file.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = presets_dir() / kind / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ConfigError(f"no {kind} preset {name_or_path!r}; {nearest(name_or_path, preset_names(kind))}")
    return validate(model, read_yaml(path), str(path))


def config_hash(settings: Settings | dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON form."""
    values = settings.model_dump(mode="json") if isinstance(settings, Settings) else settings
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
