"""Profile Llama-70B-shaped tensor-parallel shards on one GPU, with PyTorch alone.

    python scripts/profile_h100.py --tp 4 2 --out results/profile/h100.csv
    biscale-gym calibrate results/profile/h100.csv --out results/calibration/h100

Needs torch and PyYAML, and nvidia-ml-py for power; nothing of this package, so that it runs where only PyTorch is. One
GPU holds some of the layers of one rank, with random weights: the time of an iteration is that of these layers times
(all layers / these), plus the output head. What ranks exchange is not in it (``allreduce: absent``; ``calibrate`` adds
the model card's). Decode is captured in a CUDA graph, prefill runs eagerly. Every row is a window of at least two
seconds: mean time of an iteration, and the energy counter's joules over the window's seconds.

Clocks and power limits are read, never set. The file has the columns that ``biscale-gym calibrate`` reads; interrupted,
the sweep goes on. ``--device cpu --model`` with a tiny model runs everything but CUDA graphs and NVML.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("tp", "clock_mhz", "batch", "kv_tokens", "prefill_tokens", "sum_len_sq", "latency_ms", "point")
POWER = "power_w_per_gpu"
DTYPE_BYTES = 2
FREE_SHARE = 0.9
"""Of the GPU's memory that weights and KV may take."""
PREFILL_WORKSPACE_COPIES = 12
"""Activations of a prefill batch, in copies of tokens x width."""
IDLE_S = 5.0
COUNTER_S = 2.0


class ProfileFault(Exception):
    """Something the user can mend; the message is the whole story."""


@dataclass(frozen=True)
class Shape:
    """One rank's part of a dense decoder with grouped-query attention and gated MLPs.

    Attributes:
        layers: of the whole model.
        hidden, heads, kv_heads, head_dim, mlp, vocabulary: of one rank, but for ``hidden``.
        tp: ranks.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tp: int

    @classmethod
    def of(cls, model: dict[str, Any], tp: int) -> Shape:
        """The shard of a model preset.

        Raises:
            ProfileFault: the degree does not divide the model, or the MLP is not gated.
        """
        for name in ("attention_heads", "kv_heads", "mlp_size", "vocabulary"):
            if model[name] % tp:
                raise ProfileFault(f"TP {tp} does not divide {name} = {model[name]}")
        if model["mlp_matrices"] != 3:
            raise ProfileFault(f"mlp_matrices = {model['mlp_matrices']}: only gated MLPs (3 matrices) are built")
        return cls(
            model["layers"],
            model["hidden_size"],
            model["attention_heads"] // tp,
            model["kv_heads"] // tp,
            model["head_dim"],
            model["mlp_size"] // tp,
            model["vocabulary"] // tp,
            tp,
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer's dense products on this rank."""
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.hidden * (attention + 3 * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Of the output head on this rank."""
        return self.hidden * self.vocabulary

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        """Keys and values on this rank."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES

    def layer_flop(self, tokens: int, attended: int) -> int:
        """Of one layer's dense products and attention, which reads ``attended`` (query, key) pairs."""
        return 2 * self.layer_parameters * tokens + 4 * self.heads * self.head_dim * attended


@dataclass(frozen=True)
class Point:
    """``count`` prompts (prefill) or sequences (decode) of ``tokens`` tokens each."""

    phase: str
    count: int
    tokens: int

    @property
    def label(self) -> str:
        """As the file names it."""
        return f"{self.phase} {self.count}x{self.tokens}"

    @property
    def work(self) -> tuple[int, int, int, int]:
        """Batch, KV tokens, prefill tokens, sum of squared lengths."""
        if self.phase == "decode":
            return self.count, self.count * self.tokens, 0, 0
        return 0, 0, self.count * self.tokens, self.count * self.tokens**2


def read_model(name_or_path: str) -> dict[str, Any]:
    """A model preset of this repository, or a YAML file.

    Raises:
        ProfileFault: it cannot be read, or lacks a dimension.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise ProfileFault("PyYAML is not installed: pip install pyyaml") from None
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = ROOT / "configs" / "models" / f"{name_or_path}.yaml"
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ProfileFault(f"{path}: cannot be read ({error})") from None
    for name in ("layers", "hidden_size", "attention_heads", "kv_heads", "head_dim", "mlp_size", "mlp_matrices"):
        if not isinstance(model, dict) or not isinstance(model.get(name), int):
            raise ProfileFault(f"{path}: no {name}")
    return dict(model)


# -- what runs ---------------------------------------------------------------------------------------------------------


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ProfileFault("PyTorch is not installed: https://pytorch.org/get-started") from None
    return torch


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary embedding of the last dimension, halves as Llama has them."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return _torch().cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decode_attention(query: Any, keys: Any, values: Any) -> Any:
    """Attention of one new token per sequence over its whole cache.

    The queries that share a KV head are its query rows, so that the cache is read once.

    Args:
        query: [batch, heads, head_dim].
        keys: [batch, KV heads, context, head_dim].
        values: as ``keys``.

    Returns:
        [batch, heads, head_dim].
    """
    batch, heads, dim = query.shape
    grouped = query.view(batch, keys.shape[1], heads // keys.shape[1], dim)
    return _torch().nn.functional.scaled_dot_product_attention(grouped, keys, values).reshape(batch, heads, dim)


def prefill_attention(query: Any, keys: Any, values: Any) -> Any:
    """Causal attention of whole prompts: [prompts, heads or KV heads, tokens, head_dim] to that of ``query``."""
    attend = _torch().nn.functional.scaled_dot_product_attention
    return attend(query, keys, values, is_causal=True, enable_gqa=query.shape[1] != keys.shape[1])


class Shard:
    """Some layers of one rank, and its part of the output head, with random weights.

    Args:
        shape: of the rank.
        layers: so many are held.
        device: torch's name.
        dtype: torch's; bfloat16 on GPUs.
    """

    def __init__(self, shape: Shape, layers: int, device: str, dtype: Any) -> None:
        torch = _torch()
        self.shape, self.layers, self.device, self.dtype = shape, layers, device, dtype
        s = shape

        def weight(rows: int, columns: int) -> Any:
            return torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5

        self.weights = [
            {
                "qkv": weight((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
                "out": weight(s.hidden, s.heads * s.head_dim),
                "gate_up": weight(2 * s.mlp, s.hidden),
                "down": weight(s.hidden, s.mlp),
            }
            for _ in range(layers)
        ]
        self.norm = torch.ones(s.hidden, device=device, dtype=dtype)
        self.head = weight(s.vocabulary, s.hidden)

    @property
    def parameters(self) -> int:
        """Of the layers' dense products."""
        return sum(matrix.numel() for layer in self.weights for matrix in layer.values())

    def _normed(self, x: Any) -> Any:
        return _torch().nn.functional.rms_norm(x, (self.shape.hidden,), self.norm, 1e-5)

    def _mlp(self, x: Any, layer: dict[str, Any]) -> Any:
        functional = _torch().nn.functional
        gate, up = functional.linear(x, layer["gate_up"]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, layer["down"])

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        torch = _torch()
        half = self.shape.head_dim // 2
        rates = 500_000.0 ** (-torch.arange(half, device=self.device, dtype=torch.float32) / half)
        angles = positions[..., None].float() * rates
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def prefill(self, count: int, tokens: int) -> Callable[[], Any]:
        """A function that runs the layers over ``count`` whole prompts."""
        torch, s = _torch(), self.shape
        given = torch.randn(count, tokens, s.hidden, device=self.device, dtype=self.dtype)
        cos, sin = self._angles(torch.arange(tokens, device=self.device))
        sizes = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)

        def run() -> Any:
            x = given
            for layer in self.weights:
                joined = torch.nn.functional.linear(self._normed(x), layer["qkv"])
                query, key, value = (
                    part.view(count, tokens, -1, s.head_dim).transpose(1, 2) for part in joined.split(sizes, dim=-1)
                )
                attended = prefill_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
                flat = attended.transpose(1, 2).reshape(count, tokens, -1)
                x = x + torch.nn.functional.linear(flat, layer["out"])
                x = x + self._mlp(self._normed(x), layer)
            return x

        return run

    def decode(self, batch: int, context: int) -> Callable[[], Any]:
        """A function that runs the layers over one new token of ``batch`` sequences with full caches."""
        torch, s = _torch(), self.shape
        given = torch.randn(batch, s.hidden, device=self.device, dtype=self.dtype)
        caches = [
            torch.randn(2, batch, s.kv_heads, context, s.head_dim, device=self.device, dtype=self.dtype)
            for _ in range(self.layers)
        ]
        cos, sin = self._angles(torch.full((1,), context - 1, device=self.device))
        sizes = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)

        def run() -> Any:
            x = given
            for layer, cache in zip(self.weights, caches, strict=True):
                joined = torch.nn.functional.linear(self._normed(x), layer["qkv"])
                query, key, value = (part.view(batch, -1, s.head_dim) for part in joined.split(sizes, dim=-1))
                cache[0, :, :, context - 1] = rotate(key, cos, sin)
                cache[1, :, :, context - 1] = value
                attended = decode_attention(rotate(query, cos, sin), cache[0], cache[1])
                x = x + torch.nn.functional.linear(attended.reshape(batch, -1), layer["out"])
                x = x + self._mlp(self._normed(x), layer)
            return x

        return run

    def output_head(self, rows: int) -> Callable[[], Any]:
        """A function that turns ``rows`` last hidden states into this rank's logits."""
        torch = _torch()
        given = torch.randn(rows, self.shape.hidden, device=self.device, dtype=self.dtype)
        return lambda: torch.nn.functional.linear(self._normed(given), self.head)


# -- the card ----------------------------------------------------------------------------------------------------------


class Card:
    """One NVIDIA card's readings through NVML; nothing is ever set.

    Args:
        named: index or UUID, as ``CUDA_VISIBLE_DEVICES`` has it.

    Raises:
        ProfileFault: no nvidia-ml-py, no driver, or no such card.
    """

    def __init__(self, named: str = "0") -> None:
        try:
            self._nvml: Any = import_module("pynvml")
        except ModuleNotFoundError:
            raise ProfileFault("nvidia-ml-py is not installed: pip install nvidia-ml-py, or --no-power") from None
        try:
            self._nvml.nvmlInit()
            if named.isdecimal():
                self._handle = self._nvml.nvmlDeviceGetHandleByIndex(int(named))
            else:
                self._handle = self._nvml.nvmlDeviceGetHandleByUUID(named)
        except self._nvml.NVMLError as error:
            raise ProfileFault(f"NVML says {str(error)!r}: is the NVIDIA driver there (nvidia-smi)?") from None

    @property
    def uuid(self) -> str:
        """Of the card."""
        return str(self._nvml.nvmlDeviceGetUUID(self._handle))

    def _read(self, function: str, *arguments: Any) -> Any:
        """What a call says; None where the card or the library does not offer it."""
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def energy_j(self) -> float:
        """Joules since the driver was loaded.

        Raises:
            ProfileFault: the card has no energy counter.
        """
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        if millijoules is None:
            raise ProfileFault("the card has no energy counter (Volta or newer has; a MIG slice has not): --no-power")
        return float(millijoules) / 1e3

    def average_w(self) -> float | None:
        """``nvmlDeviceGetPowerUsage``: a mean over a second on an H100."""
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else float(milliwatts) / 1e3

    def instant_w(self) -> float | None:
        """``NVML_FI_DEV_POWER_INSTANT``."""
        values = self._read("nvmlDeviceGetFieldValues", [self._nvml.NVML_FI_DEV_POWER_INSTANT])
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return float(values[0].value.uiVal) / 1e3

    def clock_mhz(self) -> int | None:
        """SM clock now."""
        clock = self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        return None if clock is None else int(clock)

    def clocks_mhz(self) -> list[int]:
        """Supported SM clocks at the highest memory clock, ascending."""
        memory = self._read("nvmlDeviceGetSupportedMemoryClocks") or []
        return sorted(self._read("nvmlDeviceGetSupportedGraphicsClocks", max(memory)) or []) if memory else []

    def driver(self) -> str:
        """Its version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def counter_period_s(self, watch_s: float = COUNTER_S) -> float | None:
        """Median time between two steps of the energy counter; None: it did not step twice."""
        steps: list[float] = []
        last, end_s = self.energy_j(), time.monotonic() + watch_s
        while time.monotonic() < end_s:
            if (now_j := self.energy_j()) != last:
                last = now_j
                steps.append(time.monotonic())
            time.sleep(0.0005)
        gaps = [after - before for before, after in pairwise(steps)]
        return statistics.median(gaps) if gaps else None


def idle_w(card: Card, seconds: float) -> float:
    """Mean power over some seconds in which nothing is started here."""
    before_j, began_s = card.energy_j(), time.monotonic()
    time.sleep(seconds)
    return (card.energy_j() - before_j) / (time.monotonic() - began_s)


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A window of repeated runs.

    Attributes:
        run_s: mean time of a run.
        power_w: mean power; None without a card.
        clock_mhz: median SM clock of the window's samples; None without.
        instant_w, average_w: medians of both power readings.
    """

    run_s: float
    power_w: float | None
    clock_mhz: float | None = None
    instant_w: float | None = None
    average_w: float | None = None


def measured(run: Callable[[], Any], device: str, window_s: float, card: Card | None, graph: bool) -> Window:
    """Run again and again for at least ``window_s``.

    Args:
        run: enqueues the work.
        device: torch's name.
        window_s: least length.
        card: to read power from.
        graph: capture the work in a CUDA graph and replay that.
    """
    torch = _torch()
    cuda = device.startswith("cuda")

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(3):
            run()
        wait()
        if graph and cuda:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            run = captured.replay
        began_s = time.perf_counter()
        run()
        wait()
        # So many runs between two looks at the clock that looking costs nothing.
        burst = max(1, int(0.1 / max(time.perf_counter() - began_s, 1e-6)))
        before_j = None if card is None else card.energy_j()
        samples: list[tuple[float | None, float | None, float | None]] = []
        began_s, runs = time.perf_counter(), 0
        while time.perf_counter() - began_s < window_s:
            for _ in range(burst):
                run()
            if card is not None:  # while the burst still runs
                samples.append((card.clock_mhz(), card.instant_w(), card.average_w()))
            wait()
            runs += burst
        took_s = time.perf_counter() - began_s
        power_w = None if card is None or before_j is None else (card.energy_j() - before_j) / took_s
    medians = []
    for column in range(3):
        values = [sample[column] for sample in samples]
        known = [float(value) for value in values if value is not None]
        medians.append(statistics.median(known) if known else None)
    return Window(took_s / runs, power_w, *medians)


def row_of(point: Point, shard: Shard, layers: Window, head: Window, clock_mhz: int) -> dict[str, Any]:
    """A row of the file: the layers' window scaled to all layers, and the head's."""
    layers_s = layers.run_s * shard.shape.layers / shard.layers
    batch, kv_tokens, prefill_tokens, sum_len_sq = point.work
    row: dict[str, Any] = {
        "tp": shard.shape.tp,
        "clock_mhz": clock_mhz,
        "batch": batch,
        "kv_tokens": kv_tokens,
        "prefill_tokens": prefill_tokens,
        "sum_len_sq": sum_len_sq,
        "latency_ms": round(1e3 * (layers_s + head.run_s), 6),
        "point": point.label,
    }
    if layers.power_w is not None and head.power_w is not None:
        joules = layers_s * layers.power_w + head.run_s * head.power_w
        row[POWER] = round(joules / (layers_s + head.run_s), 3)
    return row


def points_of(
    shape: Shape,
    layers: int,
    memory_bytes: float,
    prompts: Sequence[int],
    counts: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
) -> list[Point]:
    """Points that fit into the memory beside the weights, prefill first; of several prompts, only up to the longest."""
    weights = DTYPE_BYTES * (layers * shape.layer_parameters + shape.head_parameters)
    free = memory_bytes * FREE_SHARE - weights
    prefill = {(count, length) for count in counts for length in prompts if count * length <= max(prompts)}
    room = free / (DTYPE_BYTES * PREFILL_WORKSPACE_COPIES * max(shape.hidden, shape.mlp))
    kv_room = free / (shape.kv_bytes_per_token_and_layer * layers)
    points = [Point("prefill", count, length) for count, length in sorted(prefill) if count * length <= room]
    points += [Point("decode", b, c) for b in batches for c in contexts if b * c <= kv_room]
    return points


@contextmanager
def _rows(path: Path, provenance: dict[str, Any], columns: Sequence[str]) -> Iterator[tuple[Any, dict[str, int]]]:
    """The file to append to, and how many rows it has per (TP, point) already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    have: dict[str, int] = {}
    if path.exists() and path.stat().st_size:
        text = path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
        lines = text.splitlines()
        former = json.loads(lines[0][1:])["identity"]
        other = [name for name, value in provenance["identity"].items() if former.get(name) != value]
        if other or tuple(lines[1].split(",")) != tuple(columns):
            raise ProfileFault(
                f"{path} was made with another {', '.join(other) or 'set of columns'}; give another --out"
            )
        for row in csv.DictReader(lines[1:]):
            key = f"{row['tp']} {row['point']}"
            have[key] = have.get(key, 0) + 1
    else:
        head = f"# {json.dumps(provenance)}\n{','.join(columns)}\n"
        path.write_text(head, encoding="utf-8")
    with path.open("a", newline="", encoding="utf-8", buffering=1) as stream:
        yield csv.DictWriter(stream, columns, lineterminator="\n"), have


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/profile/h100.csv"), help="CSV file")
    parser.add_argument("--model", default="llama-3.3-70b", help="model preset, or a YAML file")
    parser.add_argument("--tp", type=int, nargs="+", default=[4, 2], help="TP degrees whose shards are measured")
    parser.add_argument("--layers", type=int, default=4, help="layers that are held")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4], help="prompts of a prefill batch")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--window-s", type=float, default=2.0, help="least length of a window")
    parser.add_argument("--repeats", type=int, default=3, help="windows of a point")
    parser.add_argument("--device", default="cuda", help="torch's name of it; cpu to try the script")
    parser.add_argument("--no-power", action="store_true", help="measure latency alone")
    given = parser.parse_args(arguments)
    try:
        _sweep(given)
    except ProfileFault as fault:
        sys.exit(f"profile_h100: {fault}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; the same command goes on with {given.out}")


def _sweep(given: argparse.Namespace) -> None:
    torch = _torch()
    cuda = given.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ProfileFault(
            f"no CUDA device (torch {torch.__version__}); --device cpu tries the script with a tiny model"
        )
    model = read_model(given.model)
    card: Card | None = None
    notes: dict[str, Any] = {}
    clock_mhz = 1980  # the emulated card's top clock, where there is no card
    if cuda and not given.no_power:
        # Bare: before this process makes its context.
        card = Card(os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0])
        notes["idle_bare_w"] = round(idle_w(card, IDLE_S), 2)
    if cuda:
        torch.zeros(1, device=given.device)
    else:
        torch.set_num_threads(1)  # a tiny model needs no more
    if card is not None:
        cuda_uuid = str(torch.cuda.get_device_properties(0).uuid)
        if cuda_uuid not in card.uuid:
            raise ProfileFault(f"NVML's card {card.uuid} is not CUDA's {cuda_uuid}: name it in CUDA_VISIBLE_DEVICES")
        clocks = card.clocks_mhz()
        clock_mhz = clocks[-1] if clocks else clock_mhz
        notes |= {
            "idle_with_context_w": round(idle_w(card, IDLE_S), 2),
            "clocks_mhz": [clocks[0], clocks[-1], len(clocks)] if clocks else None,
            "energy_counter_period_s": card.counter_period_s(),
            "driver": card.driver(),
        }
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    preset = not given.model.endswith((".yaml", ".yml"))
    provenance = {
        "identity": {
            "device": name,
            "host": socket.gethostname(),
            "engine": f"torch {torch.__version__}",
            "hardware": "h100-sxm5",
            "model": given.model if preset else model,
            "precision": "bf16",
            "layers": given.layers,
        },
        "latency": "measured on one rank",
        "power": "absent" if card is None else "measured: energy counter over the window",
        "clocks": "as the driver chooses; the column holds the highest",
        "allreduce": "absent: one GPU alone",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        **notes,
    }
    columns = COLUMNS if card is None else (*COLUMNS[:-1], POWER, "point")
    dtype = torch.bfloat16
    with _rows(given.out, provenance, columns) as (writer, have):
        for tp in given.tp:
            shape = Shape.of(model, tp)
            memory = float(torch.cuda.get_device_properties(0).total_memory) if cuda else 4e9
            points = points_of(shape, given.layers, memory, given.prompts, given.counts, given.batches, given.contexts)
            if card is not None and f"{tp} idle" not in have:
                idle = dict.fromkeys(columns, 0) | {"tp": tp, "clock_mhz": clock_mhz, "point": "idle"}
                writer.writerow(idle | {POWER: notes["idle_with_context_w"]})
            shard = Shard(shape, given.layers, given.device, dtype)
            for number, point in enumerate(points, start=1):
                done = have.get(f"{tp} {point.label}", 0)
                if done >= given.repeats:
                    continue
                make = shard.decode if point.phase == "decode" else shard.prefill
                layers = make(point.count, point.tokens)
                head = shard.output_head(point.count)
                for _ in range(given.repeats - done):
                    window = measured(layers, given.device, given.window_s, card, point.phase == "decode")
                    last = measured(head, given.device, 0.25 * given.window_s, card, True)
                    writer.writerow(row_of(point, shard, window, last, clock_mhz))
                    _tell(tp, number, len(points), point, window)
                del layers, head
                if cuda:
                    torch.cuda.empty_cache()
            del shard
            if cuda:
                torch.cuda.empty_cache()
    print(f"{given.out}: done")


def _tell(tp: int, number: int, points: int, point: Point, window: Window) -> None:
    """A line of progress."""
    power = "" if window.power_w is None else f", {window.power_w:.0f} W"
    more = [("clock", window.clock_mhz, "MHz"), ("instant", window.instant_w, "W"), ("average", window.average_w, "W")]
    told = "".join(f", {name} {value:.0f} {unit}" for name, value, unit in more if value is not None)
    print(f"TP{tp} {number}/{points} {point.label}: layers {1e3 * window.run_s:.3f} ms{power}{told}", flush=True)


if __name__ == "__main__":
    main()
