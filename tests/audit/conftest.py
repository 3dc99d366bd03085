"""Runs to ask, and an index folder of the test's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlaif.rundir.store import RunDir

DATA = Path(__file__).resolve().parent.parent / "data"
STORED = DATA / "run_schema1"
ALL_STORED = [STORED, DATA / "run_schema2"]
"""One of each schema; the same answers, votes and decisions."""


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes go."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RLAIF_CACHE", str(folder))
    return folder


@pytest.fixture(params=ALL_STORED, ids=lambda path: path.name)
def stored(request: pytest.FixtureRequest) -> RunDir:
    """A stored run of each schema, with a chat judge's votes."""
    return RunDir.open(request.param)


@pytest.fixture
def copy(tmp_path: Path) -> RunDir:
    """A copy of the run of schema 1, to be changed."""
    shutil.copytree(STORED, tmp_path / "run")
    return RunDir.open(tmp_path / "run")
