"""Pages of the environments: tables as the code has them, and programs that run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import pytest
import yaml

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.control.scenario import load_scenario
from biscale_gym.envs import cluster_layout, layout
from biscale_gym.envs.episodes import OPTIONS
from biscale_gym.envs.settings import TRACES

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "environments"
INDEX = (PAGES / "index.md").read_text()
TIPS = (ROOT / "docs" / "rl-tips.md").read_text()


def programs(page: Path) -> list[Any]:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [pytest.param(text, id=f"{page.name} {number}") for number, text in enumerate(found)]


@pytest.fixture
def tables(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("environment_tables")


def test_the_tables_are_the_codes(tables: ModuleType) -> None:
    for name, named in tables.tables().items():
        page = (PAGES / f"{name}.md").read_text()
        assert page == tables.filled(page, named), f"{name}.md: run python scripts/environment_tables.py"


def test_a_page_that_has_drifted_is_found(tables: ModuleType) -> None:
    page = (PAGES / "prefill.md").read_text()
    drifted = page.replace("`work_left`", "`work_done`")
    assert tables.filled(drifted, tables.tables()["prefill"]) == page != drifted
    with pytest.raises(ValueError, match="entries"):
        tables.filled(page.replace("<!-- entries -->", ""), tables.tables()["prefill"])


def last_index(table: str) -> int:
    return int(table.splitlines()[-1].split("|")[1].split("–")[-1])


def test_the_tables_are_as_long_as_the_spaces(tables: ModuleType) -> None:
    scenario = load_scenario(tables.SCENARIO)
    clocks = len(scenario.clocks_mhz)
    made = tables.tables()
    for phase in ("prefill", "decode"):
        assert last_index(made[phase]["entries"]) + 1 == layout.size(phase, clocks)
        assert f"{layout.size(phase, clocks)} numbers with the seven clocks" in (PAGES / f"{phase}.md").read_text()
    assert clocks == 7
    assert last_index(made["cluster"]["entries"]) + 1 == cluster_layout.SIZE
    assert f"{cluster_layout.SIZE} numbers" in (PAGES / "cluster.md").read_text()
    assert last_index(made["cluster"]["actions"]) + 1 == cluster_layout.SLOTS
    classes = last_index(made["placement"]["actions"])
    numbers = last_index(made["placement"]["entries"]) + 1
    assert f"{numbers} numbers with the {classes} classes" in (PAGES / "placement.md").read_text()


def test_the_placement_tables_are_the_environments(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SCENARIO", "smoke")
    env: Any = gymnasium.make("BiScale/Placement-v0", scenario="smoke", requests_per_probe=1_000)
    named = tables.tables()["placement"]
    assert last_index(named["entries"]) + 1 == env.observation_space.shape[0]
    assert last_index(named["actions"]) == env.unwrapped.commit
    clocks = load_scenario("smoke").clocks_mhz
    columns = [(phase, tp, clock) for phase, tp in tables.placement_columns() for clock in clocks]
    assert columns == [(row.phase, row.tp, row.clock_mhz) for row in env.unwrapped.classes]


@pytest.mark.parametrize("env_id", ["Prefill", "Decode", "Cluster"])
def test_what_info_tells_is_on_the_page(env_id: str) -> None:
    env = gymnasium.make(f"BiScale/{env_id}-v0", scenario="smoke", episode_s=2.0)
    _, info = env.reset(seed=0)
    own = {name for name in info if name not in OPTIONS}
    assert {name for name in own if f"`{name}`" not in INDEX} == set()
    assert {name for name in OPTIONS if f"`{name}`" not in INDEX} == set()


def test_the_sizes_of_the_splits_are_told() -> None:
    assert f"{TRACES['train']} training, {TRACES['validation']} validation and {TRACES['test']} test" in INDEX


@pytest.mark.parametrize("program", [text for page in sorted(PAGES.glob("*.md")) for text in programs(page)])
def test_the_programs_run(program: str) -> None:
    if "parallel" in program:
        pytest.importorskip("pettingzoo")
    if "/Live-" in program:
        pytest.importorskip("vllm", reason="no vLLM here (make live-cpu makes .venv-live)")
    exec(compile(program, "docs/environments", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("program", programs(ROOT / "docs" / "rl-tips.md") + programs(ROOT / "README.md"))
def test_the_programs_of_learners_run(program: str) -> None:
    pytest.importorskip("stable_baselines3")
    exec(compile(program, "docs", "exec"), {"__name__": "__main__"})


def test_the_zoos_hyperparameters_are_taken() -> None:
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    (text,) = re.findall(r"^```yaml\n(.*?)^```", TIPS, re.MULTILINE | re.DOTALL)
    ((env_id, told),) = yaml.safe_load(text).items()
    lanes, steps = told.pop("n_envs"), told.pop("n_timesteps")
    policy, schedule = told.pop("policy"), told.pop("learning_rate")
    assert steps > 0
    assert schedule.startswith("lin_")
    envs = make_vec_env(env_id, lanes, env_kwargs={"scenario": "smoke", "episode_s": 2.0})
    PPO(policy, envs, learning_rate=float(schedule.removeprefix("lin_")), device="cpu", **told)
    assert lanes * told["n_steps"] % told["batch_size"] == 0


# -- scripts/environment_scores.py -------------------------------------------------------------------------------------


def test_scores_hold_agents_against_the_highest_clock(load_script: Callable[[str], ModuleType]) -> None:
    scores = load_script("environment_scores")
    for env_id in ("BiScale/Prefill-v0", "BiScale/Cluster-v0"):
        rows = [row.strip("| ").split(" | ") for row in scores.scores(env_id, "smoke", "validation", 2, 5.0)]
        assert [name for name, *_ in rows] == ["highest clock", "BiScale", "lowest clock", "random clocks"]
        assert rows[0][1] == "100 %"
        ratio, half = (float(part) for part in rows[1][1].removesuffix(" %").split(" ± "))
        assert 0.0 < ratio < 100.0
        assert half > 0.0


def test_scores_play_the_same_episode_alike(load_script: Callable[[str], ModuleType]) -> None:
    scores = load_script("environment_scores")
    made = scores.agents("BiScale/Decode-v0", "smoke", 3.0)["random clocks"]
    first, second = (scores.play(*made(), seed, "test") for seed in (1, 1))
    assert first == second
    assert scores.play(*made(), 2, "test") != first


def test_random_actions_keep_to_masks(load_script: Callable[[str], ModuleType]) -> None:
    scores = load_script("environment_scores")
    env: Any = gymnasium.make("BiScale/Placement-v0", scenario="smoke", requests_per_probe=1_000)
    env.reset(seed=0)
    agent = scores.RandomAction(env)
    for _ in range(40):
        *_, truncated, info = env.step(agent.predict()[0])
        assert not info["refused"]
        if truncated:
            break


# -- scripts/ppo_speed.py ----------------------------------------------------------------------------------------------


def test_the_speed_of_ppo_is_measured(
    load_script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("stable_baselines3")
    speed = load_script("ppo_speed")
    made = speed.kinds("BiScale/Prefill-v0", 4, 2, {"scenario": "smoke", "episode_s": 5.0})
    assert [make().num_envs for name, make in made.items() if "Subproc" not in name] == [2, 4]
    *_, native = made.values()
    assert speed.step_us(native, 400) > 0.0
    assert speed.learning_rate(native, 64, n_steps=16, batch_size=32) > 0.0
