"""Compiled code is cached under a name that changes with any source that it may have been compiled from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from biscale_gym import _jit

PARTS = ("biscale_gym/profiles", "biscale_gym/cluster", "agents", "baselines")


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the same form, with one source per part."""
    for part in PARTS:
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "kernels.py").write_text("x = 1\n")
    (tmp_path / "biscale_gym" / "_jit.py").write_text("")
    monkeypatch.setattr(_jit, "__file__", str(tmp_path / "biscale_gym" / "_jit.py"))
    return tmp_path


@pytest.mark.parametrize("part", PARTS)
def test_an_edited_source_gives_another_folder(top: Path, part: str) -> None:
    source = top / part / "kernels.py"
    before = _jit._sources_digest()
    source.write_text("x = 2\n")
    assert _jit._sources_digest() != before
    source.write_text("x = 1\n")
    assert _jit._sources_digest() == before


@pytest.mark.parametrize("part", PARTS)
def test_a_new_or_renamed_source_gives_another_folder(top: Path, part: str) -> None:
    digests = [_jit._sources_digest()]
    (top / part / "more.py").write_text("")
    digests.append(_jit._sources_digest())
    (top / part / "more.py").rename(top / part / "less.py")
    digests.append(_jit._sources_digest())
    assert len(set(digests)) == 3


def test_other_files_change_nothing(top: Path) -> None:
    before = _jit._sources_digest()
    (top / "biscale_gym" / "cluster" / "notes.txt").write_text("x")
    (top / "biscale_gym" / "cli.py").write_text("x = 1\n")
    assert _jit._sources_digest() == before


def test_another_numba_caches_elsewhere(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _jit._sources_digest()
    monkeypatch.setattr(_jit.numba, "__version__", "0.0.0")
    assert _jit._sources_digest() != before


def test_the_folder_lies_in_the_one_that_the_user_chose(tmp_path: Path) -> None:
    program = "from biscale_gym import _jit; print(_jit._numba_config.CACHE_DIR, _jit._sources_digest())"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]
    shown = subprocess.check_output([sys.executable, "-c", program], env=environment, cwd=root, text=True)
    folder, digest = shown.split()
    assert Path(folder) == tmp_path / digest
