"""The CSV file of a sweep: where its numbers come from, and a row per repeat."""

from __future__ import annotations

import csv
import os
import platform
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biscale_gym._version import __version__
from biscale_gym.live.errors import LiveError
from biscale_gym.live.profile_points import key_of
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.vllm_adapter.install import versions
from biscale_gym.profiles.iterations import POWER, provenance_line, read_profiled

COLUMNS = (
    *("tp", "clock_mhz", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq"),
    *("latency_ms", "host_ms", "point"),
)
CARD_COLUMNS = (*COLUMNS[:-1], POWER, "point")
SERVICE_COLUMNS = ("tp", "clock_mhz", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq", "latency_ms")
HANDOVER_COLUMNS = ("prompt_tokens", "ttft_ms", "prefill_ms", "handover_ms")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def system() -> str:
    """The operating system and its version."""
    return f"{platform.system()} {platform.release()}"


def engine(settings: LiveSettings) -> str:
    """The versions of vLLM's build and of torch."""
    found = versions(settings.engine)
    return ", ".join(f"{name} {version}" for name, version in found.items() if name != "nixl")


def provenance(identity: dict[str, Any], **told: Any) -> dict[str, Any]:
    """For a file's first line.

    Args:
        identity: what must be the same where a sweep goes on.
        told: what else is worth knowing.
    """
    return {
        "identity": {"host": socket.gethostname(), **identity},
        "latency": "measured",
        **told,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["biscale-gym", *sys.argv[1:]]),
        "biscale_gym": __version__,
    }


def quantities(latency_ms: float, power_w: float | None) -> tuple[float, ...]:
    """What of a row was measured: latency unless it is an idle one, power if there is any."""
    return tuple(value for value in (latency_ms, power_w) if value)


class ProfileFile:
    """The CSV file of a sweep: a row per repeat, written through at once.

    Args:
        path: started, or gone on with; a last line that was cut off is dropped.
        provenance: of this sweep.
        columns: of a row.

    Attributes:
        repeats: so far by point, TP degree and clock, a chunk being a point: what was measured in each.

    Raises:
        LiveError: the file was made on another device, engine or model.
        ProfileError: it is no profile.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
        self.path = path
        self.repeats: dict[str, list[tuple[float, ...]]] = {}
        self._columns = columns
        self._head = provenance_line(provenance) + ",".join(columns) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._go_on(provenance)
        else:
            path.write_text(self._head, encoding="utf-8")

    def _go_on(self, provenance: dict[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        if sum(not line.startswith("#") for line in whole.splitlines()) <= 1:
            self.path.write_text(self._head, encoding="utf-8")
            return
        found = read_profiled(self.path)
        former = found.provenance.get("identity", {})
        other = [name for name, value in provenance["identity"].items() if former.get(name) != value]
        if other:
            raise LiveError(f"{self.path} was made with another {', '.join(other)}; give another file to start anew")
        data, with_power = found.iterations, POWER in self._columns
        watts = data.power_w_per_gpu.tolist() if with_power else [None] * len(found)
        rows = (found.points.tolist(), data.tp.tolist(), data.clock_mhz.tolist(), data.latency_ms.tolist(), watts)
        for label, tp, clock_mhz, latency_ms, power_w in zip(*rows, strict=True):
            self._count(label, tp, clock_mhz, latency_ms, power_w)

    def _count(self, label: str, tp: float, clock_mhz: float, latency_ms: float, power_w: float | None) -> None:
        self.repeats.setdefault(key_of(label, tp, clock_mhz), []).append(quantities(latency_ms, power_w))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of one repeat."""
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns, lineterminator="\n").writerows(rows)
        for row in rows:
            self._count(row["point"], row["tp"], row["clock_mhz"], row["latency_ms"], row.get(POWER))


def handovers_path(path: Path) -> Path:
    """The file of hand-overs beside a profile."""
    return path.with_suffix(".handovers.csv")


def service_path(path: Path) -> Path:
    """The file of iterations in service beside a profile."""
    return path.with_suffix(".service.csv")


def keep(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file, which begins with its columns."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
