from __future__ import annotations

import json
from pathlib import Path

import pytest

from biscale_gym import cli
from biscale_gym.control import rollout, simulate
from biscale_gym.evaluation import tracked
from biscale_gym.evaluation.records import RecordStore

from evaluation import fakes  # isort: skip

_ENERGIES = ("prefill", "decode", "idle", "switching", "unallocated", "total")
ROW_KEYS = {
    *(f"{part}_energy_j" for part in _ENERGIES),
    *(f"{latency}_p{percent}_s" for latency in ("ttft", "tpot") for percent in (50, 90, 99)),
    *(f"{which}_attainment" for which in ("joint", "ttft", "tpot")),
    *(f"requests_{state}" for state in ("arrived", "finished", "in_flight", "rejected")),
    *("scenario", "controller", "seed", "split", "record"),
    *("prefill_j_per_token", "decode_j_per_token", "gpus_used"),
}
COMMANDS = ["", "compare", "simulate", "validate", "live", "trace", "trace fetch", "trace generate", "list", "sweep"]


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("rate_rps: 1.0\n")
    return path


@pytest.fixture(autouse=True)
def _instant_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "run", fakes.run)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), "--help") == 0
    assert "usage: biscale-gym" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ([], None),
        (["--tensorboard"], (None, True)),
        (["--wandb"], ("biscale-gym", False)),
        (["--wandb", "x"], ("x", False)),
    ],
)
def test_compare_is_tracked_where_asked(
    asked: list[str],
    given: tuple[str | None, bool] | None,
    scenario: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(tracked, "track", lambda comparison, out, *how: calls.append((len(comparison.summaries), *how)))
    common = ["--scenario", scenario, "--controllers", "distserve,biscale", "--out", tmp_path / "out", "--no-plots"]
    assert call("compare", *common, *asked) == 0
    assert calls == ([] if given is None else [(2, *given)])


def test_compare_writes_rows_tables_and_plots(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows_file = tmp_path / "out", tmp_path / "rows.json"
    arguments = ["compare", "--scenario", scenario, "--controllers", "distserve,biscale", "--seeds", "2", "--out", out]
    assert call(*arguments, "--json", rows_file) == 0
    rows = json.loads(rows_file.read_text())["rows"]
    assert [(row["controller"], row["seed"]) for row in rows] == [
        ("distserve", 0), ("biscale", 0), ("distserve", 1), ("biscale", 1)
    ]  # fmt: skip
    assert all(set(row) >= ROW_KEYS for row in rows)
    assert "−35.0" in (out / "table.md").read_text()
    assert len((out / "table.csv").read_text().splitlines()) == 3
    assert list((out / "plots").glob("*.png"))
    shown = capsys.readouterr().out
    assert "−35.0" in shown
    assert "window 3: least violation taken" in shown


def test_rows_on_standard_output_have_it_to_themselves(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--controllers", "distserve", "--out", tmp_path / "out", "--no-plots", "--json", "-"]
    assert call("compare", "--scenario", scenario, *arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1
    assert not (tmp_path / "out" / "plots").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--scenario": "smok"}, "no scenario 'smok'"),
        ({"--controllers": "bisacle"}, "did you mean 'biscale'"),
        ({"--controllers": "nowhere.to:Find"}, "nowhere"),
        ({"--controllers": ","}, "no controller given"),
        ({"--seeds": "0"}, "--seeds 0: at least 1 is needed"),
        ({"--rate": "nan"}, "rate_rps"),
        ({"--workers": "0"}, "--workers 0: at least 1 is needed"),
        ({"--trace": "missing.csv"}, "missing.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    options = {"--scenario": str(scenario), "--controllers": "biscale", "--out": str(tmp_path / "out"), **changes}
    assert call("compare", *(word for pair in options.items() for word in pair)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("biscale-gym: error: ")
    assert message in error
    assert "\n" not in error


def test_runs_that_all_fail_through_the_input_are_one_line(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "run", fakes.refuse)
    arguments = ["--controllers", "distserve,biscale", "--out", tmp_path / "out"]
    assert call("compare", "--scenario", scenario, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "trace.csv:3: lengths must be positive" in error


def test_validate_holds_then_tells_what_changed(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert call("compare", "--scenario", scenario, "--controllers", "biscale", "--out", out, "--no-plots") == 0
    capsys.readouterr()
    assert call("validate", out) == 0
    assert "holds exactly" in capsys.readouterr().out
    monkeypatch.setattr(rollout, "run", fakes.run_otherwise)
    assert call("validate", out / "records.jsonl") == 1
    shown = capsys.readouterr().out
    assert "DOES NOT HOLD" in shown
    assert "total_energy_j: recorded" in shown


def test_simulate_writes_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def simulate_file(placement: Path, trace: Path, policy: str, seed: int) -> rollout.RunOutcome:
        asked.append((placement, trace, policy, seed))
        return fakes.outcome_of(rollout.RunJob(scenario="tiny", controller="distserve", seed=seed))

    monkeypatch.setattr(simulate, "simulate_file", simulate_file)
    rows = tmp_path / "rows.json"
    arguments = ["--placement", "p.yaml", "--trace", "t.csv", "--policy", "max-clock", "--seed", "3", "--json", rows]
    assert call("simulate", *arguments) == 0
    assert asked == [(Path("p.yaml"), Path("t.csv"), "max-clock", 3)]
    (row,) = json.loads(rows.read_text())["rows"]
    assert set(row) >= ROW_KEYS


def test_an_altered_record_stops_the_comparison(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--scenario", scenario, "--controllers", "biscale", "--out", tmp_path / "out", "--no-plots"]
    assert call(*arguments) == 0
    records = tmp_path / "out" / "records.jsonl"
    records.write_text(records.read_text().replace('"seed":0', '"seed":7'))
    capsys.readouterr()
    assert call(*arguments) == 2
    assert "records.jsonl:1: record" in capsys.readouterr().err


def test_a_broken_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,-3,5\n")
    assert call("trace", "describe", trace) == 2
    error = capsys.readouterr().err.strip()
    assert "bad.csv:3" in error
    assert "\n" not in error


def test_list_names_what_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list") == 0
    shown = capsys.readouterr().out
    for name in ("biscale", "h100-sxm5", "llama-3.3-70b", "sharegpt-like"):
        assert name in shown


def test_settings_of_the_scenario_are_replaced_and_named(scenario: Path, tmp_path: Path) -> None:
    out, rows_file = tmp_path / "out", tmp_path / "rows.json"
    options = ["--set", "slo.ttft_s=0.3", "--set", "cluster.precision=bf16", "--out", out, "--json", rows_file]
    assert call("compare", "--scenario", scenario, "--controllers", "distserve", *options) == 0
    (record,) = RecordStore(out).load().values()
    assert record.job["overrides"] == {"slo.ttft_s": 0.3, "cluster.precision": "bf16"}
    (row,) = json.loads(rows_file.read_text())["rows"]
    assert row["scenario"] == f"{scenario} cluster.precision=bf16 slo.ttft_s=0.3"
    assert (out / "plots" / "tiny-cluster.precision=bf16-slo.ttft_s=0.3-energy.png").is_file()


@pytest.mark.parametrize("text", ["bf16", "=3", "slo={"])
def test_a_setting_that_is_none_is_one_line(
    text: str, scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--scenario", scenario, "--controllers", "distserve", "--out", tmp_path / "out"]
    assert call(*arguments, "--set", text) == 2
    assert capsys.readouterr().err.startswith(f"biscale-gym: error: --set {text}: ")
