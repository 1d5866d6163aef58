"""docs/training.md says what is true of presets and settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from biscale_gym.config import preset_names
from biscale_gym.training import settings as module

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()


def rows(part: str) -> list[list[str]]:
    """Cells of a part's table, without its two heading lines."""
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def tables() -> dict[str, list[list[str]]]:
    parts = re.split(r"<!-- settings: (\w+) -->", PAGE)[1:]
    return {
        name: rows(part.partition("<!-- /settings -->")[0]) for name, part in zip(parts[::2], parts[1::2], strict=True)
    }


def default_of(model: type[BaseModel], name: str) -> object:
    field = model.model_fields[name]
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_setting_is_told_with_its_default(name: str) -> None:
    model = getattr(module, name)
    told: dict[str, str] = {}
    for names, default, *_ in tables()[name]:
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    assert told.keys() == model.model_fields.keys()
    for setting, default in told.items():
        expected = default_of(model, setting)
        if default:
            assert yaml.safe_load(default if default != "none" else "null") == expected, setting
        else:
            assert expected in ("", None), setting


def test_every_group_has_a_table() -> None:
    groups = [
        value.__name__
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and value.__name__ != "WrapperSettings"
    ]
    # The environments have it, too.
    assert sorted(tables()) == sorted([*groups, module.ShieldSettings.__name__])


def test_every_preset_is_told() -> None:
    told = {
        name
        for cells in rows(PAGE.partition("## What a run leaves")[0])
        for name in re.findall(r"`([\w-]+)`", cells[0])
    }
    assert told == set(preset_names("training"))
