"""One lane's part of a vector environment's info."""

from __future__ import annotations

from typing import Any

import numpy as np


def lane_info(infos: dict[str, Any], lane: int) -> dict[str, Any]:
    """What the lane's single environment would have reported, from Gymnasium's arrays and their ``_name`` masks."""
    own: dict[str, Any] = {}
    for name, values in infos.items():
        if name.startswith("_") or (f"_{name}" in infos and not infos[f"_{name}"][lane]):
            continue
        if isinstance(values, dict):
            own[name] = lane_info(values, lane)
        else:
            value = values[lane]
            own[name] = value.item() if isinstance(value, np.generic) else value
    return own
