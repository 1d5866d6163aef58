"""The learned controller: models by name and path, BiScale's parts in their place, and runs in a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents.biscale import BiScale
from agents.errors import AgentError
from agents.learned import MODELS, Learned, find_model, find_planner, shipped_models
from biscale_gym.cluster.placement import PHASES
from biscale_gym.config import ConfigError, preset_names, validate
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.rollout import RunJob, run
from biscale_gym.control.scenario import load_scenario
from biscale_gym.control.workload import requests_for
from biscale_gym.envs import layout
from biscale_gym.envs.mlp import ClockMLP, load_model
from biscale_gym.envs.network import ModelError
from biscale_gym.envs.policies import PlannerPolicy
from biscale_gym.evaluation.identity import run_id
from biscale_gym.training.algorithms import make_model
from biscale_gym.training.environments import make_lanes
from biscale_gym.training.export import export_model
from biscale_gym.training.settings import TrainingSettings

QUICK = {"forecast": {"requests_per_probe": 400, "warmup_s": 2.0}}
CLOCKS_MHZ = (930, 1410, 1830)
"""Of the scenario smoke."""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biscale_gym.planning.table_cache.cache_root", lambda: tmp_path_factory.getbasetemp() / "tables")
        yield


def constant(phase: Any, position: int) -> ClockMLP:
    """A network that always answers the same clock."""
    size = layout.size(phase, len(CLOCKS_MHZ))
    bias = np.zeros(len(CLOCKS_MHZ), np.float32)
    bias[position] = 1.0
    return ClockMLP(phase, CLOCKS_MHZ, (0.01, 1.0), (np.zeros((size, len(CLOCKS_MHZ)), np.float32),), (bias,))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    for phase in PHASES:
        constant(phase, 2).save(tmp_path / phase)
    return {phase: str(tmp_path / phase) for phase in PHASES}


def played(seed: int = 0, **settings: Any) -> Any:
    return run(RunJob(scenario="smoke", controller="agents.learned:Learned", controller_settings=settings, seed=seed))


def test_the_shipped_models_are_whole_small_and_say_how_they_were_made() -> None:
    assert shipped_models() == ["decode", "prefill"]
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 1_000_000
    for name in shipped_models():
        model = load_model(MODELS / name)
        assert model.phase == name
        assert {"settings", "settings_hash", "fingerprint", "score"} <= set(model.about)


def test_models_decide_the_clocks(models: dict[str, str]) -> None:
    outcome = played(**models, load=QUICK)
    clocks = outcome.timeline["clock_mhz"][100:]
    assert np.nanmin(clocks) == np.nanmax(clocks) == 1830.0
    slower = {phase: models[phase] for phase in PHASES}
    constant("decode", 0).save(Path(slower["decode"]))
    assert played(**slower, load=QUICK).row["decode_energy_j"] < outcome.row["decode_energy_j"]


def test_biscale_in_every_part_is_biscale() -> None:
    probes = {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}
    mine = played(prefill="biscale", decode="biscale", placement="biscale", biscale={"tier1": probes})
    theirs = run(RunJob(scenario="smoke", controller="biscale", controller_settings={"tier1": probes}))
    figures = {name: value for name, value in theirs.row.items() if name != "controller"}
    assert {name: mine.row[name] for name in figures} == pytest.approx(figures, nan_ok=True)
    assert mine.action_digest == theirs.action_digest


def test_its_placement_fits_the_clocks_that_run(models: dict[str, str]) -> None:
    scenario = load_scenario("smoke")
    profile = scenario.cluster.profile()
    requests = requests_for(scenario, profile, "test", 0, None, None)
    context = PlanContext(scenario, profile, requests.training, 80.0, clocks_mhz=(*CLOCKS_MHZ, 1980))
    fast = Learned(**models, load=QUICK)
    constant("decode", 0).save(Path(models["decode"]))
    slow = Learned(**models, load=QUICK)
    placements = [learned.plan(context) for learned in (fast, slow)]
    decode = [sum(spec.gpus for spec in placement.of("decode")) for placement in placements]
    assert decode[0] < decode[1]


def test_an_overload_is_in_the_notes(models: dict[str, str]) -> None:
    outcome = run(
        RunJob(
            scenario="smoke",
            controller="agents.learned:Learned",
            controller_settings={**models, "load": QUICK},
            rate_rps=400.0,
            overrides={"duration_s": 10.0, "window_s": 10.0, "warmup_s": 1.0},
        )
    )
    assert "no placement carries 400.00 (prefill) and 400.00 (decode) mean requests/s" in outcome.provenance["notes"][0]


def test_a_changed_model_is_another_run(models: dict[str, str]) -> None:
    job = RunJob(scenario="smoke", controller="learned", controller_settings=dict(models))
    before = run_id(job)
    assert run_id(job) == before
    constant("prefill", 0).save(Path(models["prefill"]))
    assert run_id(job) != before


def test_a_training_runs_folder_is_found(tmp_path: Path) -> None:
    constant("decode", 1).save(tmp_path / "best" / "policy")
    assert find_model(str(tmp_path / "best"), "decode").phase == "decode"


def test_what_cannot_be_used_is_refused_by_name(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="no shipped model 'prefil'"):
        Learned(prefill="prefil")
    with pytest.raises(AgentError, match="is a decode model, a prefill model is needed"):
        Learned(prefill=models["decode"])
    with pytest.raises(ModelError, match="no such file"):
        Learned(prefill=str(tmp_path / "nowhere" / "policy"))
    with pytest.raises(ConfigError, match="prefil"):
        Learned(prefil="prefill")
    with pytest.raises(ModelError, match=r"no 930 MHz"):
        run(
            RunJob(
                scenario="smoke",
                controller="agents.learned:Learned",
                controller_settings={**models, "load": QUICK},
                overrides={"clocks_mhz": [1110, 1410, 1830]},
            )
        )


def test_biscales_own_settings_stay_its_own() -> None:
    learned = Learned(prefill="biscale", decode="biscale", biscale={"decode": {"headroom": 0.8}})
    assert learned.settings.biscale.decode.headroom == 0.8
    assert BiScale().settings.decode.headroom == 0.95


@pytest.mark.parametrize("name", [one for one in preset_names("scenarios") if "smoke" not in one])
def test_the_shipped_models_serve_every_scenario(name: str) -> None:
    scenario = load_scenario(name)
    profile = scenario.cluster.profile()
    requests = requests_for(load_scenario("smoke"), profile, "train", 0, None, None)
    clocks_mhz = (*scenario.clocks_mhz, scenario.top_clock_mhz)
    context = PlanContext(scenario, profile, requests.training, scenario.rate_rps, clocks_mhz=clocks_mhz)
    assert all(policy is not None for policy in Learned().policies(context))


@pytest.mark.parametrize(
    ("slo", "phase"),
    [({"ttft_s": 0.2, "tpot_s": 0.1}, "prefill"), ({"ttft_s": 40.0, "tpot_s": 0.1}, "prefill")]
    + [({"ttft_s": 0.6, "tpot_s": tpot_s}, "decode") for tpot_s in (0.03, 0.2)],
)
def test_an_slo_outside_of_those_trained_for_is_refused(slo: dict[str, float], phase: str) -> None:
    with pytest.raises(ModelError, match=rf"the {phase} model was trained for SLOs from .* the run has"):
        run(RunJob(scenario="paper-67", controller="learned", overrides={"slo": slo}))


@pytest.fixture(scope="module")
def trained_planner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A placement policy of random weights, large enough that its choices vary, and where it was exported."""
    values = {
        "env_id": "BiScale/Placement-v0",
        "scenarios": ["smoke"],
        "env": {"requests_per_probe": 400, "probe_warmup_s": 2.0},
        "algorithm": "maskable-ppo",
        "hyperparameters": {"n_steps": 8, "batch_size": 8},
        "lanes": 1,
        "total_steps": 8,
    }
    settings = validate(TrainingSettings, values, "test")
    model = make_model(settings, make_lanes(settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in model.policy.parameters():
            weights *= 8.0
    folder = tmp_path_factory.mktemp("planner")
    assert export_model(model, settings, folder, {"step": 0}) == ["policy.onnx", "policy.safetensors", "policy.json"]
    return model, folder


def test_a_trained_placement_policy_plans_as_in_its_environment(trained_planner: tuple[Any, Path]) -> None:
    model, folder = trained_planner
    table = {"requests_per_probe": 400, "probe_warmup_s": 2.0}
    env: Any = gymnasium.make("BiScale/Placement-v0", scenario="smoke", **table)
    agent = PlannerPolicy(Learned(prefill="biscale", decode="biscale", placement=str(folder)), env)
    seen, over = [], False
    observation, _ = env.reset(seed=0)
    while not over:
        masks = env.unwrapped.action_masks()
        wanted, _ = model.predict(observation, action_masks=masks, deterministic=True)
        if not env.unwrapped.chosen:
            plan: list[int] = []
        plan.append(int(wanted))
        if wanted == env.unwrapped.commit:
            view = env.unwrapped.demand.context(env.unwrapped.window, env.unwrapped.placement)
            placement = agent._controller.plan(view)
            assert placement == env.unwrapped.choice.placed(plan[:-1])
            seen.append(placement)
        observation, _, _, over, _ = env.step(int(wanted))
    assert len(seen) == len(env.unwrapped.demand.borders_s)


def test_a_trained_placement_policy_runs_in_a_comparison(trained_planner: tuple[Any, Path]) -> None:
    _, folder = trained_planner
    settings = {"prefill": "biscale", "decode": "biscale", "placement": str(folder)}
    job = RunJob(scenario="smoke", controller="agents.learned:Learned", controller_settings=settings)
    assert run(job).row["requests_finished"] > 0
    with pytest.raises(ModelError, match=r"TTFT SLOs from .* to .* s, the run has 9 s"):
        run(job.model_copy(update={"overrides": {"slo.ttft_s": 9.0}}))
    with pytest.raises(
        ModelError, match=r"chooses among 18 classes, the run has 12; only one of them has \w+ TP\d at 1830 MHz"
    ):
        run(job.model_copy(update={"overrides": {"clocks_mhz": [930, 1410]}}))


@pytest.fixture(scope="module")
def trained_cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where a policy of all clocks, of random weights, was exported."""
    values = {
        "env_id": "BiScale/Cluster-v0",
        "scenarios": ["smoke"],
        "hyperparameters": {"n_steps": 8, "batch_size": 8},
        "lanes": 1,
        "total_steps": 8,
    }
    settings = validate(TrainingSettings, values, "test")
    folder = tmp_path_factory.mktemp("cluster")
    export_model(make_model(settings, make_lanes(settings)), settings, folder, {"step": 0})
    return str(folder)


def test_a_policy_of_all_clocks_runs_in_a_comparison(trained_cluster: str) -> None:
    probes = {"requests_per_probe": 400, "warmup_s": 2.0, "rate_tolerance": 0.05}
    settings = {"cluster": trained_cluster, "biscale": {"tier1": probes}}
    outcome = played(**settings)
    assert outcome.row["requests_finished"] > 0
    clocks = outcome.timeline["clock_mhz"][1:]
    assert len(np.unique(clocks[~np.isnan(clocks)])) > 1
    assert played(**settings).action_digest == outcome.action_digest


def test_a_policy_of_all_clocks_leaves_no_room_for_others(trained_cluster: str, models: dict[str, str]) -> None:
    with pytest.raises(AgentError, match="cluster is a model of all clocks at once, and prefill is set, too"):
        Learned(cluster=trained_cluster, prefill=models["prefill"])
    with pytest.raises(AgentError, match="use placement=biscale"):
        Learned(cluster=trained_cluster, placement="load-curves")
    with pytest.raises(ModelError, match="has format 1, this version reads 'cluster 1' here"):
        Learned(cluster=models["prefill"])
    with pytest.raises(ModelError, match="has format 'cluster 1', this version reads 1 or 'lstm 1' here"):
        Learned(prefill=trained_cluster)


def test_an_unknown_placement_names_the_nearest() -> None:
    with pytest.raises(AgentError, match=r"no placement 'load-curve'; .*load-curves"):
        find_planner("load-curve")
