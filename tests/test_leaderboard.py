"""scripts/leaderboard.py: what it runs, what its tables say of the runs, and how it fills its page."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from biscale_gym.config import ConfigError
from biscale_gym.control.rollout import RunJob, RunOutcome
from biscale_gym.evaluation.faults import EvaluationError
from biscale_gym.evaluation.matrix import record_of
from biscale_gym.evaluation.records import RecordStore
from biscale_gym.evaluation.statistics import interquartile_mean
from tests.evaluation import fakes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "leaderboard.md"
INSTANCES = [{"phase": phase, "tp": 2, "count": 2} for phase in ("prefill", "decode")]


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("leaderboard")


def board(script: ModuleType, **changes: object):
    values = {
        "reference": "biscale",
        "randomisation": "h100-uncertainty",
        "workloads": [{"name": "one", "scenario": "smoke"}, {"name": "two", "scenario": "paper-67"}],
        "rows": [
            {"name": "biscale", "controller": "biscale"},
            {"name": "hasty", "controller": "reckless"},
            {"name": "learned", "controller": "learned", "trained": ["prefill", "decode"]},
        ],
    }
    return script.Board.model_validate(values | changes)


def pairs(folder: Path, places: tuple[str, ...]) -> list[Path]:
    """A training seed's folder per place; the model of a phase is at ``place``, which has ``{name}`` in it."""
    for number, place in enumerate(places):
        for name in ("prefill", "decode"):
            path = folder / f"seed-{number}" / f"{place.format(name=name)}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return [folder / f"seed-{number}" for number in range(len(places))]


# -- what is run -------------------------------------------------------------------------------------------------------


def test_the_board_is_whole(script: ModuleType) -> None:
    whole = script.load_board()
    cells = script.cells_of(whole, ("nominal", "randomised"), 10, ())
    assert len(cells) == 2 * len(whole.workloads) * len(whole.rows)
    assert {"paper-67", "paper-85", "tight"} <= {workload.name for workload in whole.workloads}
    for cell in cells:
        family = "h100-uncertainty" if cell.family == "randomised" else None
        assert {job.randomisation for own in cell.jobs for job in own} == {family}
        assert {job.played_split for own in cell.jobs for job in own} == {"test"}
        recorded_once = cell.workload.trace is not None and family is None
        assert [len(own) for own in cell.jobs] == [1 if recorded_once else 10]


def test_a_learned_row_runs_every_training_seed_on_every_traffic_seed(script: ModuleType, tmp_path: Path) -> None:
    folders = pairs(tmp_path, script.MODEL_PLACES)
    cells = {cell.row.name: cell for cell in script.cells_of(board(script), ("nominal",), 4, folders)}
    jobs = cells["learned"].jobs
    assert [[job.seed for job in own] for own in jobs] == [[0, 1, 2, 3]] * 3
    models = [own[0].controller_settings["decode"] for own in jobs]
    assert [Path(model).relative_to(tmp_path).as_posix() for model in models] == [
        "seed-0/decode",
        "seed-1/decode/policy",
        "seed-2/decode/best/policy",
    ]
    assert len(cells["biscale"].jobs) == 1, "nothing of BiScale is trained"
    assert [len(own) for own in script.cells_of(board(script), ("nominal",), 4, ())[2].jobs] == [4]


def test_rows_and_workloads_can_be_chosen(script: ModuleType) -> None:
    few = script.chosen(board(script), "learned", "two")
    assert [row.name for row in few.rows] == ["biscale", "learned"], "the reference is always there"
    assert [workload.name for workload in few.workloads] == ["two"]
    assert script.chosen(board(script), "", "") == board(script)
    with pytest.raises(EvaluationError, match="no row 'learnd'; did you mean 'learned'"):
        script.chosen(board(script), "learnd", "")


def test_a_missing_model_is_named_with_the_places_looked_at(script: ModuleType, tmp_path: Path) -> None:
    (folder,) = pairs(tmp_path, ("{name}",))
    (folder / "decode.safetensors").unlink()
    with pytest.raises(EvaluationError, match=r"seed-0: no decode model; looked for .*decode/best/policy.safetensors"):
        script.cells_of(board(script), ("nominal",), 1, [folder])


def test_a_recorded_trace_that_is_not_at_hand_is_left_out(script: ModuleType, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.csv"
    workloads = [{"name": "one", "scenario": "smoke"}, {"name": "real", "scenario": "smoke", "trace": str(trace)}]
    messages = script.Console(file=(text := io.StringIO()), width=400)
    with_trace = board(script, workloads=workloads)
    assert [one.name for one in script.present(with_trace, messages).workloads] == ["one"]
    assert f"real is left out: no file {trace}" in text.getvalue()
    trace.touch()
    assert script.present(with_trace, messages) == with_trace


# -- submissions -------------------------------------------------------------------------------------------------------


def form() -> str:
    """The submission form of the page."""
    return PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]


def test_the_form_of_the_page_is_a_submission(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(form())
    whole = script.load_board(None, [path])
    added = whole.rows[-1]
    assert added.name == yaml.safe_load(form())["name"]
    assert len(script.agents_of(added, ())) == len(added.training_seeds) >= 2
    told = {name for name in script.Submission.model_fields if f"`{name}`" in PAGE.read_text()}
    assert told | {"trained"} == set(script.Submission.model_fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": None}, "by: "),
        ({"trained_on": ""}, "trained_on: "),
        ({"trained": ["prefill"]}, "give one"),
        ({"name": "biscale"}, "'biscale' is named twice"),
        ({"contoller": "x"}, "did you mean 'controller'"),
    ],
)
def test_a_faulty_submission_is_refused(script: ModuleType, tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(form()) | change))
    with pytest.raises(ConfigError, match=message):
        script.load_board(None, [path])


# -- what the tables say -----------------------------------------------------------------------------------------------


def outcome(job: RunJob) -> RunOutcome:
    """Joules and attainment that depend on the agent, the workload and the seed; latencies as the fakes have them."""
    fake = fakes.outcome_of(job.model_copy(update={"controller": "biscale"}), requests=100)
    agent = str(job.controller_settings.get("prefill", ""))
    number = int(agent.partition("seed-")[2][:1] or 0)
    factor = {"biscale": 1.0, "reckless": 0.5, "learned": 0.9 + 0.01 * number}[job.controller]
    base_j = 1e6 * (7.0 + job.seed) * (2.0 if job.scenario == "paper-67" else 1.0)
    attained = {"biscale": 0.99, "reckless": 0.5, "learned": 0.995}[job.controller]
    row = fake.row | {"total_energy_j": factor * base_j, "joint_attainment": attained, "controller": job.controller}
    late_s = 9.0 if job.controller == "reckless" else 0.2
    row |= {"ttft_attainment": 0.0 if late_s > 1.0 else 1.0, "tpot_attainment": 1.0}
    return replace(fake, row=row, ttft_s=np.full(100, late_s), tpot_s=np.full(100, 0.05))


@pytest.fixture
def lines(script: ModuleType, tmp_path: Path):
    folders = pairs(tmp_path, ("{name}",) * 3)
    cells = script.cells_of(board(script), ("nominal",), 6, folders)
    store, records = RecordStore(tmp_path / "records"), {}
    for number, job in enumerate(job for cell in cells for own in cell.jobs for job in own):
        record, arrays = record_of(f"{number:016x}", job, outcome(job))
        store.append(record, arrays)
        records[script.key_of(job)] = record
    return script.lines_of(cells, "biscale", records, store)


def test_ratios_pair_every_agent_with_the_reference_on_its_seed(script: ModuleType, lines) -> None:
    learned = next(line for line in lines if line.cell.row.name == "learned")
    np.testing.assert_allclose(learned.ratio, np.repeat([[0.90], [0.91], [0.92]], 6, axis=1))
    np.testing.assert_allclose(learned.gain, 0.005)
    verdict = script.Verdict.of([learned])
    assert verdict.ratio.value == pytest.approx(float(interquartile_mean(learned.ratio.ravel())))
    assert 0.899 < verdict.ratio.low < 0.905 < 0.915 < verdict.ratio.high < 0.921, "the interval is over the agents"
    ours, theirs = learned.energy_j.ravel(), learned.reference_j
    ahead = (ours[:, None] < theirs[None, :]) + 0.5 * (ours[:, None] == theirs[None, :])
    assert verdict.improvement == pytest.approx(ahead.mean()), "runs of the reference on any seed, ties half"
    assert verdict.wins
    assert len(learned.summary.ttft_s) == 3 * 6 * 100


def test_a_win_needs_the_slo_the_attainment_and_the_interval(script: ModuleType, lines) -> None:
    by_name = {line.cell.row.name: line for line in lines if line.cell.workload.name == "one"}
    assert not script.Verdict.of([by_name["hasty"]]).wins, "half the joules, but the SLO is broken"
    learned = by_name["learned"]
    assert not script.Verdict.of([replace(learned, gain=learned.gain - 0.006)]).wins
    assert not script.Verdict.of([replace(learned, ratio=learned.ratio + 0.085)]).wins, "the interval reaches 1"
    single = replace(learned, ratio=learned.ratio[:1, :1], gain=learned.gain[:1, :1])
    assert script.Verdict.of([single]).wins is None


def test_tables_rank_what_breaks_the_slo_last(script: ModuleType, lines) -> None:
    grids = list(script.grids_of(lines, "biscale", {"learned": (1.0, None)}))
    overall, one, two = grids
    assert overall.title.startswith("one, two, nominal")
    assert [row[0] for row in overall.rows] == [row[0] for row in one.rows] == ["learned", "biscale", "hasty ✗"]
    assert overall.warned == [False, False, True]
    assert overall.rows[0][5:] == ["one, two", "1.00, –"]
    assert overall.rows[1][1] == "–"
    assert overall.rows[2][4] == "broken: TTFT one, TTFT two"
    cells = dict(zip(two.header, two.rows[0], strict=True))
    assert cells["energy against biscale"].startswith("−9.0 % [−10.0, −8.0]")
    assert cells["difference, points"] == "+0.50 [+0.50, +0.50]"
    assert cells["runs"] == "3 × 6"
    assert cells["total MJ"] == f"{0.91 * 2 * 9.5:.3f}"


def test_a_cell_without_all_its_runs_has_no_line(script: ModuleType, tmp_path: Path) -> None:
    cells = script.cells_of(board(script), ("nominal",), 2, ())
    store, records = RecordStore(tmp_path / "records"), {}
    kept = [job for cell in cells for own in cell.jobs for job in own if (job.controller, job.seed) != ("reckless", 1)]
    for number, job in enumerate(kept):
        record, arrays = record_of(f"{number:016x}", job, outcome(job))
        store.append(record, arrays)
        records[script.key_of(job)] = record
    found = script.lines_of(cells, "biscale", records, store)
    assert {line.cell.row.name for line in found} == {"biscale", "learned"}


# -- the whole, and its page -------------------------------------------------------------------------------------------


def test_the_page_has_a_place_for_the_tables(script: ModuleType) -> None:
    filled = script.filled(PAGE.read_text(), "**new tables**")
    assert "**new tables**" in filled
    assert script.filled(filled, "**others**") == script.filled(PAGE.read_text(), "**others**")
    with pytest.raises(EvaluationError, match="the page needs <!-- leaderboard -->"):
        script.filled("no place\n", "")


def test_a_board_is_run_timed_written_and_resumed(script: ModuleType, tmp_path: Path) -> None:
    static = {"planner": "given", "instances": INSTANCES}
    biscale = {"tier1": {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}}
    small = board(
        script,
        workloads=[{"name": "smoke", "scenario": "smoke"}],
        rows=[
            {"name": "biscale", "controller": "biscale", "settings": biscale},
            {"name": "top clock", "controller": "max-clock", "settings": static},
        ],
    )
    page, found = tmp_path / "page.md", tmp_path / "lines.json"
    page.write_text("# Board\n\n<!-- leaderboard -->\n<!-- /leaderboard -->\n\nafter\n")
    rows = (small, 1, (), ("nominal", "randomised"), tmp_path / "out", 1, True, page, found)
    assert script.make(*rows) == 0
    text = page.read_text()
    assert text.startswith("# Board\n\n<!-- leaderboard -->\n\n**smoke, nominal hardware")
    assert text.endswith("<!-- /leaderboard -->\n\nafter\n")
    assert "`max-clock[instances=" in text
    assert ",planner=given]`" in text
    told = json.loads(found.read_text())["lines"]
    energy_j = {(one["row"], one["family"]): one["total_energy_j"][0][0] for one in told}
    assert len(set(energy_j.values())) == 4
    assert energy_j["biscale", "nominal"] < energy_j["top clock", "nominal"]
    assert script.make(*rows[:-3], False, None, None, runner=fakes.refuse) == 0, "every run is recorded"
    prefill_us, decode_us = script.decision_us(
        RunJob(scenario="smoke", controller="biscale", controller_settings=biscale), decisions=20
    )
    assert 0.0 < prefill_us < 1e3
    assert 0.0 < decode_us < 1e3
    held = RunJob(scenario="smoke", controller="max-clock", controller_settings=static)
    assert script.decision_us(held, decisions=20) == (None, None)
