from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.plots import (
    clock_figure,
    energy_bars,
    file_name,
    latency_distributions,
    timelines,
    window_figures,
    write_plots,
)
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.summary import Summary, summarise
from biscale_gym.evaluation.windows import clock_shares, window_arrays

from .fakes import outcome_of

pytest.importorskip("matplotlib").use("agg")

Make = Callable[..., list[RunJob]]


@pytest.fixture
def summaries(make_jobs: Make, store: RecordStore) -> list[Summary]:
    for index, job in enumerate(make_jobs(("distserve", "biscale", "reckless"))):
        store.append(*record_of(f"id{index}", job, outcome_of(job)))
    return summarise(list(store.load().values()), store)


def test_every_plot_is_written_as_png_and_svg(summaries: list[Summary], store: RecordStore, tmp_path: Path) -> None:
    files = write_plots(summaries, store, tmp_path / "plots")
    kinds = ["energy", "latency", "windows", "clocks", "biscale-timeline", "distserve-timeline", "reckless-timeline"]
    assert [file.name for file in files] == [f"tiny-{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")]
    assert all(file.stat().st_size > 5000 for file in files)


def test_only_the_kinds_asked_for_are_drawn(summaries: list[Summary], store: RecordStore, tmp_path: Path) -> None:
    files = write_plots(summaries, store, tmp_path / "plots", ("clocks",))
    assert [file.name for file in files] == ["tiny-clocks.png", "tiny-clocks.svg"]


def test_windows_are_drawn_with_the_slo(summaries: list[Summary], store: RecordStore) -> None:
    windows = [[window_arrays(store.arrays(record)) for record in summary.records] for summary in summaries]
    prefill, _, ttft, tpot = window_figures(summaries, windows).axes
    assert [container.get_label() for container in prefill.containers] == ["biscale", "distserve", "reckless"]
    drawn = {container.get_label(): container.lines[0].get_ydata().tolist() for container in ttft.containers}
    assert drawn == {
        summary.controller: (1e3 * each[0]["ttft_p99_s"]).tolist()
        for summary, each in zip(summaries, windows, strict=True)
    }
    for panel, slo_ms in ((ttft, 600.0), (tpot, 100.0)):
        assert slo_ms in [line.get_ydata()[0] for line in panel.get_lines()]


def test_the_clocks_bars_fill_the_time(summaries: list[Summary], store: RecordStore) -> None:
    shares = [clock_shares(store.arrays(summary.records[0])) for summary in summaries]
    for panel in clock_figure(summaries, shares).axes:
        for index in range(len(summaries)):
            assert sum(bars[index].get_height() for bars in panel.containers) == pytest.approx(100.0)


def test_the_bars_add_up_to_the_total(summaries: list[Summary]) -> None:
    by_phase, by_use = energy_bars(summaries).axes
    for panel in (by_phase, by_use):
        heights = [sum(bars[index].get_height() for bars in panel.containers) for index in range(len(summaries))]
        assert heights == pytest.approx([s.mean("total_energy_j") / 1e6 for s in summaries])
    names = [label.get_text() for label in by_phase.get_xticklabels()]
    assert names == ["biscale", "distserve", "reckless\n(breaks SLO)"]


def test_the_distributions_show_the_slo_and_each_p99(summaries: list[Summary]) -> None:
    ttft, tpot = latency_distributions(summaries).axes
    assert "SLO 600 ms" in [text.get_text() for text in ttft.texts]
    assert "SLO 100 ms" in [text.get_text() for text in tpot.texts]
    assert len(ttft.get_legend().get_texts()) == 3
    assert ttft.get_xlabel().endswith("(ms)")


def test_a_timeline_has_a_row_per_instance(summaries: list[Summary], make_jobs: Make) -> None:
    timeline = outcome_of(make_jobs(("biscale",))[0]).timeline
    figure = timelines(summaries[0], timeline)
    panels = [panel for panel in figure.axes if panel.get_title(loc="left")]
    assert len(panels) == 8
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["decode 3 TP4", "decode 4 TP4"]


def test_a_phase_without_instances_and_a_single_sample_are_drawn(summaries: list[Summary], make_jobs: Make) -> None:
    timeline = outcome_of(make_jobs(("biscale",))[0], samples=1).timeline
    only_prefill = {key: values[..., :3] if key != "time_s" else values for key, values in timeline.items()}
    figure = timelines(summaries[0], only_prefill)
    assert "no instance" in [text.get_text() for panel in figure.axes for text in panel.texts]


def test_a_module_and_class_make_a_file_name() -> None:
    assert file_name("my.agents:Best Policy") == "my.agents-Best-Policy"
