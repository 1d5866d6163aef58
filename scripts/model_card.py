"""The figures of docs/model-card.md: the h100-sxm5 closed form held against what was measured.

``python scripts/model_card.py`` prints the tables; ``--write`` puts them into the page, between its markers.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biscale_gym.profiles import Profile, load_profile

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- figures: python scripts/model_card.py --write -->", "<!-- end of figures -->"
ENERGY_CLOCKS_MHZ = (705, 885, 1005, 1200, 1410, 1620, 1980)


@dataclass(frozen=True)
class Anchor:
    """One measured point and the model's answer; errors in percent, power may be unmeasured."""

    group: str
    source: str
    label: str
    measured_ms: float
    modelled_ms: float
    measured_w: float | None
    modelled_w: float

    @property
    def latency_percent(self) -> float:
        """Signed error of the latency."""
        return 100 * (self.modelled_ms / self.measured_ms - 1)

    @property
    def power_percent(self) -> float | None:
        """Signed error of the power."""
        return None if self.measured_w is None else 100 * (self.modelled_w / self.measured_w - 1)


def anchors() -> list[Anchor]:
    """Every row of docs/model-card-anchors.csv with the model's answer at the top clock."""
    with (DOCS / "model-card-anchors.csv").open(newline="", encoding="utf-8") as stream:
        return [_anchor(row) for row in csv.DictReader(stream)]


def _anchor(row: dict[str, str]) -> Anchor:
    profile = load_profile("h100-sxm5", row["model"], row["precision"])
    tp, top = int(row["tp"]), profile.top_clock_mhz
    b, kv, m, s2 = (float(row[name]) for name in ("batch", "kv_tokens", "prefill_tokens", "sum_len_sq"))
    latency_ms = float(profile.latency_ms(tp, top, b, kv, m, s2))
    if row["input_tokens"]:
        # A colocated server prefills one new prompt per finished output: its share falls on every decode step.
        prompt = float(np.floor(float(row["input_tokens"])))
        latency_ms += b * float(profile.latency_ms(tp, top, 0, 0, prompt, prompt**2)) / float(row["output_tokens"])
    size = f"batch {b:.0f}" if b else f"{m:.0f} tokens"
    return Anchor(
        group=row["group"],
        source=row["source"],
        label=f"TP{tp}, {size}",
        measured_ms=float(row["latency_ms"]),
        modelled_ms=latency_ms,
        measured_w=float(row["power_w"]) if row["power_w"] else None,
        modelled_w=float(profile.power_w(tp, top, b, kv, m, s2)),
    )


def _anchor_table() -> list[str]:
    lines = [
        "| what | source | point | measured ms | model ms | error % | measured W | model W | error % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in anchors():
        watts = ("–", "–", "–")
        if point.measured_w is not None and point.power_percent is not None:
            watts = (f"{point.measured_w:.0f}", f"{point.modelled_w:.0f}", f"{point.power_percent:+.1f}")
        lines.append(
            f"| {point.group} | {point.source} | {point.label} | {point.measured_ms:.1f} | {point.modelled_ms:.1f} | "
            f"{point.latency_percent:+.1f} | {' | '.join(watts)} |"
        )
    return lines


def _summary_table() -> list[str]:
    lines = [
        "| what | points | latency: mean absolute error %, worst | power: mean absolute error %, worst |",
        "|---|---|---|---|",
    ]
    points = anchors()
    for group in dict.fromkeys(point.group for point in points):
        own = [point for point in points if point.group == group]
        latency = _spread([point.latency_percent for point in own])
        power = _spread([point.power_percent for point in own if point.power_percent is not None])
        lines.append(f"| {group} | {len(own)} | {latency} | {power} |")
    return lines


def _spread(percents: list[float]) -> str:
    if not percents:
        return "not measured"
    worst = max(percents, key=abs)
    return f"{np.mean(np.abs(percents)):.1f}, {worst:+.1f}"


def _energy_table(profile: Profile) -> list[str]:
    """Joules per token of one prefill and one decode iteration over the clock, relative to the top clock."""
    lines = ["| clock MHz | prefill 4096 tokens: ms, W, energy | decode batch 64: ms, W, energy |", "|---|---|---|"]
    work = ((0.0, 0.0, 4096.0, 4 * 1024.0**2), (64.0, 64 * 1024.0, 0.0, 0.0))
    top = [_joules(profile, profile.top_clock_mhz, iteration) for iteration in work]
    for mhz in ENERGY_CLOCKS_MHZ:
        cells = []
        for iteration, reference in zip(work, top, strict=True):
            latency_ms = float(profile.latency_ms(4, mhz, *iteration))
            power_w = float(profile.power_w(4, mhz, *iteration))
            change = 100 * (_joules(profile, mhz, iteration) / reference - 1)
            cells.append(f"{latency_ms:.1f}, {power_w:.0f}, {change:+.0f} %")
        lines.append(f"| {mhz} | {cells[0]} | {cells[1]} |")
    return lines


def _joules(profile: Profile, mhz: int, work: tuple[float, float, float, float]) -> float:
    return 1e-3 * float(profile.latency_ms(4, mhz, *work)) * float(profile.power_w(4, mhz, *work))


def _capacity_table() -> list[str]:
    lines = ["| weights | TP1 | TP2 | TP4 | TP8 |", "|---|---|---|---|---|"]
    for precision in ("bf16", "fp8"):
        profile = load_profile("h100-sxm5", "llama-3.3-70b", precision)
        cells = []
        for tp in (1, 2, 4, 8):
            decode, prefill = profile.kv_capacity_for("decode", tp), profile.kv_capacity_for("prefill", tp)
            only = f"{prefill:,} (prefill only)" if prefill > 0 else "does not fit"
            cells.append(f"{decode:,}" if decode > 0 else only)
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    return lines


def figures() -> str:
    """The Markdown between the page's markers."""
    parts = [
        "### Fit errors by group\n",
        *_summary_table(),
        "\n### Every anchor\n",
        *_anchor_table(),
        "\n### Energy of one iteration over the clock (70B bf16 TP4)\n",
        *_energy_table(load_profile("h100-sxm5", "llama-3.3-70b", "bf16")),
        "\n### KV tokens of an instance (70B)\n",
        *_capacity_table(),
    ]
    return "\n".join(parts)


def main() -> None:
    """Print the figures, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/model-card.md")
    if not parser.parse_args().write:
        print(figures())
        return
    page = DOCS / "model-card.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{figures()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
