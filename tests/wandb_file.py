"""Reads the file of a W&B run back: what wandb itself would upload.

The file is a log in LevelDB's format (blocks of 32 KiB; chunks of checksum, length and kind) after a header of seven
bytes, and each of its entries is a protobuf ``Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32_768
_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def entries(path: Path) -> Iterator[bytes]:
    """The log's entries, without one that is still being written; a checksum that does not fit is an error."""
    content = path.read_bytes()
    assert content.startswith(_HEADER), content[:7]
    at, parts = len(_HEADER), b""
    while at + 7 <= len(content):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + 7 : at + 7 + length]
        if len(data) < length:
            return
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum, f"{path}: damaged at byte {at}"
        at += 7 + length
        parts = data if kind in (_FULL, _FIRST) else parts + data
        if kind in (_FULL, _LAST):
            yield parts


def run_files(folder: Path) -> list[Path]:
    """The W&B run files under a run's folder, oldest first."""
    return sorted(folder.glob("wandb/*run-*/run-*.wandb"))


class RunFile:
    """A run as its file tells it."""

    def __init__(self, path: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.offline = path.parent.name.startswith("offline-run-")
        self.files = path.parent / "files"
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: list[Any] = []
        self.artifacts: list[Any] = []
        self.statistics = 0
        self.exit_status: int | None = None
        for entry in entries(path):
            record = Record.FromString(entry)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._update(self.config, record.run.config.update)
            elif kind == "config":
                self._update(self.config, record.config.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                self._update(row, record.history.item)
                self.history.append(row)
            elif kind == "summary":
                self._update(self.summary, record.summary.update)
            elif kind == "metric":
                self.metrics.append(record.metric)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "stats":
                self.statistics += 1
            elif kind == "exit":
                self.exit_status = record.exit.exit_code

    @staticmethod
    def _update(target: dict[str, Any], items: Any) -> None:
        for item in items:
            name = item.key or ".".join(item.nested_key)
            target[name] = json.loads(item.value_json)
