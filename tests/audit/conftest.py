"""Runs to ask, and an index folder of the test's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlaif.rundir.store import RunDir

STORED = Path(__file__).resolve().parent.parent / "data" / "run_schema1"


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes go."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RLAIF_CACHE", str(folder))
    return folder


@pytest.fixture
def stored() -> RunDir:
    """The stored run of schema 1, with a chat judge's votes."""
    return RunDir.open(STORED)


@pytest.fixture
def copy(tmp_path: Path) -> RunDir:
    """A copy of it, to be changed."""
    shutil.copytree(STORED, tmp_path / "run")
    return RunDir.open(tmp_path / "run")
