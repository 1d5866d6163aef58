"""``biscale-gym train``."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from biscale_gym import cli
from biscale_gym.config import load_preset
from biscale_gym.training.commands import trial
from biscale_gym.training.run import load_settings, read_result
from biscale_gym.training.settings import TrainingSettings

from wandb_file import RunFile, run_files  # isort: skip

Make = Callable[..., TrainingSettings]


@pytest.fixture
def config(tiny: Make, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    return path


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *arguments])
    return int(left.value.code or 0)


def test_a_run_and_its_messages(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(str(config), "--set", "total_steps=256", "seed=3", "--set", "early_stop.patience=9") == 0
    settings, folder = load_settings("results/train/tiny-3")
    assert (settings.total_steps, settings.seed) == (256, 3)
    assert settings.early_stop is not None
    assert settings.early_stop.patience == 9
    assert folder is not None
    result = read_result(folder)
    assert result.best is not None
    told = capsys.readouterr().err
    assert "of biscale; within the SLO" in told
    assert "the best so far" in told
    assert status_of(str(config), "--set", "seed=3") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert status_of(str(folder), "--set", "seed=3") == 2
    assert "goes on as it began" in capsys.readouterr().err
    assert status_of(str(folder)) == 0
    assert "this run is done" in capsys.readouterr().err
    assert status_of("smoky") == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_hyperparameters_from_a_file_of_the_zoo(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo = tmp_path / "ppo.yml"
    zoo.write_text(
        "BiScale/Prefill-v0:\n  n_envs: 4\n  n_timesteps: !!float 128\n  policy: MlpPolicy\n  n_steps: 16\n"
        '  batch_size: 64\n  policy_kwargs: "dict(net_arch=[8, 8], activation_fn=nn.ReLU)"\n'
    )
    script = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(config), "--conf-file", str(zoo), "--out", "zoo"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 0
    settings, _ = load_settings("zoo")
    assert (settings.lanes, settings.total_steps, settings.net_arch, settings.activation) == (4, 128, (8, 8), "relu")
    assert settings.hyperparameters == {"n_steps": 16, "batch_size": 64}


def test_a_trial_of_a_search_goes_on_with_what_it_finds(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    figures = trial(str(config), {"total_steps": 256, "hyperparameters.gamma": 0.9}, folder)
    assert load_settings(str(folder))[0].hyperparameters["gamma"] == 0.9
    best = read_result(folder).best
    assert best is not None
    assert (figures["best/energy"], figures["best/objective"]) == (best.energy, best.objective)
    assert trial(str(config), {"total_steps": 256}, folder) == figures


def test_the_smoke_preset_is_small() -> None:
    settings = load_preset(TrainingSettings, "training", "smoke")
    assert settings.total_steps <= 250_000
    assert settings.evaluation.references[-1] == "biscale"


def test_a_sweep_by_optuna_trains_its_trials(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = {
        "name": "two rates",
        "command": ["${program}", "train", str(config), "--set", "${args_no_hyphens}"],
        "method": "grid",
        "metric": {"name": "best/objective"},
        "parameters": {
            "hyperparameters.learning_rate": {"values": [1e-5, 1e-3]},
            "total_steps": {"value": 256},
            "net_arch": {"values": [[8, 8]]},
        },
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(SystemExit) as left:
        cli.main(["sweep", "sweep.yaml", "--out", "out"])
    assert not left.value.code
    assert "every trial: out/trials.csv" in capsys.readouterr().out
    settings, folder = load_settings("out/trial-0001")
    assert folder is not None
    assert settings.hyperparameters["learning_rate"] == 1e-3
    assert settings.net_arch == (8, 8)
    best = read_result(folder).best
    assert best is not None
    assert json.loads((folder / "trial.json").read_text())["best/objective"] == best.objective
    assert trial("no longer looked at", {}, folder, None)["best/objective"] == best.objective


def test_a_wandb_run_of_a_training_reads_back(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert status_of(str(config), "--out", "out", "--wandb", "testbed") == 0
    (path,) = run_files(Path("out"))
    run = RunFile(path)
    assert (run.run.project, run.run.job_type, run.exit_status) == ("testbed", "train", 0)
    assert run.config["env_id"] == "BiScale/Prefill-v0"
    for group in ("train/", "validation/", "best/"):
        steps = [row["global_step"] for row in run.history if any(name.startswith(group) for name in row)]
        assert steps == sorted(steps)
        assert set(steps) <= {128 * iteration for iteration in range(1, 5)}
        assert steps
    assert run.summary["best/objective"] == read_result(Path("out")).best.objective  # type: ignore[union-attr]
    assert [row["scenarios.nrows"] for row in run.history if "scenarios.nrows" in row] == [2]
    assert {(one.name, one.type) for one in run.artifacts} >= {("best", "model"), ("final", "model")}
    best_at = read_result(Path("out")).best_at
    agents = ("policy", "max-clock", "biscale")
    for name in ("latency/smoke", *(f"timeline/smoke/{agent}" for agent in agents)):
        (picture,) = [row for row in run.history if row.get(f"{name}._type") == "image-file"]
        assert picture["global_step"] == best_at
        drawn = Path("out") / "figures" / f"{name.replace('/', '-')}-{best_at}.png"
        assert (run.files / picture[f"{name}.path"]).read_bytes() == drawn.read_bytes()
    (table,) = [row for row in run.history if row.get("latencies._type") == "table-file"]
    content = json.loads((run.files / table["latencies.path"]).read_text())
    assert content["columns"] == ["scenario", "agent", "metric", "percentile", "ms"]
    assert {tuple(row[:3]) for row in content["data"]} == {("smoke", agent, "TTFT") for agent in agents}
    for agent in agents:
        curve = [row[4] for row in content["data"] if row[1] == agent]
        assert len(curve) == 101
        assert curve == sorted(curve)


def test_runs_of_wandbs_agents_have_folders_of_their_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run0")
    assert status_of(str(config), "--set", "total_steps=128", "hyperparameters.learning_rate=1e-05") == 0
    settings, _ = load_settings("results/train/tiny-run0")
    assert settings.hyperparameters["learning_rate"] == 1e-5
    logged = [json.loads(line) for line in Path("results/train/tiny-run0/run.jsonl").read_text().splitlines()]
    assert any("best/objective" in line.get("metrics", {}) for line in logged)
