"""A run of a newer rlaif, which added keys to every kind of file: read without them, said once, never "damaged"."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif import records
from rlaif.cli import app
from rlaif.data.prompts import load_prompts
from rlaif.errors import RlaifError, UserError
from rlaif.records import Pair, Vote
from rlaif.rundir.store import RunDir, read_grown, read_rows
from tests.audit.conftest import ALL_STORED

NEW = {"added_later": {"x": [1]}}
NESTED = ("ballot", "verdict", "usage", "asked", "constitution")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "TOLD", set())


def newer(tree: Any) -> Any:
    """A record as a later version might write it."""
    if not isinstance(tree, dict):
        return tree
    inner = {k: v | NEW for k, v in tree.items() if k in NESTED and isinstance(v, dict) and v}
    return tree | inner | NEW


@pytest.fixture(params=ALL_STORED, ids=lambda path: path.name)
def stored(request: pytest.FixtureRequest) -> Path:
    """A stored run of each schema."""
    path: Path = request.param
    return path


@pytest.fixture
def run(stored: Path, tmp_path: Path) -> RunDir:
    """The stored run, with more keys in every file but the texts'."""
    shutil.copytree(stored, tmp_path / "run")
    copy = RunDir(tmp_path / "run")
    for file in copy.path.rglob("*.json*"):
        if file.suffix == ".jsonl":
            lines = file.read_text().splitlines()
            file.write_text("".join(json.dumps(newer(json.loads(line))) + "\n" for line in lines))
        elif file.parent.parent.name != "constitutions" and file.name != "pins.json":
            file.write_text(json.dumps(newer(json.loads(file.read_text()))))
    header = json.loads((copy.path / "run.json").read_text())
    header["job"] |= {"later_setting": 1}
    header["job"]["judge"] |= {"later_setting": {"x": 1}}
    (copy.path / "run.json").write_text(json.dumps(header | {"schema_version": f"{header['schema_version']}.2"}))
    return RunDir.open(copy.path)


def ask(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("status", "RUN"),
        ("audit", "RUN"),
        ("audit", "RUN", "list", "--limit", "3"),
        ("audit", "RUN", "trace", "2"),
        ("audit", "RUN", "flips"),
        ("audit", "RUN", "disagree"),
        ("audit", "RUN", "replay", "--set", "filters.min_agreement=0.9"),
        ("audit", "RUN", "sql", "SELECT count(*) AS n FROM votes"),
        ("audit", "RUN", "sql", "SELECT step, row_ids, margin, accuracy FROM updates"),
    ],
    ids=lambda w: " ".join(w),
)
def test_every_question_is_answered_as_before(run: RunDir, stored: Path, words: tuple[str, ...]) -> None:
    before = ask(*(str(stored) if w == "RUN" else w for w in words))
    code, said, told = ask(*(str(run.path) if w == "RUN" else w for w in words))
    assert code == before[0] == 0, said + told
    # Where a line is folded depends on how long the run's path is.
    one, other = said.replace(str(run.path), "RUN"), before[1].replace(str(stored), "RUN")
    # Nor is a file with more keys as small.
    one, other = (re.sub(r"[\d.]+ [kMG]?B\b", "SIZE", text) for text in (one, other))
    assert one.split() == other.split()
    assert "damaged" not in said + told
    assert told.count("a newer rlaif wrote this run") <= 1


def test_it_is_said_once(run: RunDir, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in (0, 1):
        read_rows(run.iteration(k).path / "votes.jsonl", Vote)
        read_rows(run.iteration(k).path / "pairs.jsonl", Pair)
        run.plan(k)
    assert run.job().judge.kind
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("note: a newer rlaif wrote this run: its Vote has `")
    assert [v.model_dump() for v in read_rows(run.iteration(0).path / "votes.jsonl", Vote)] == [
        v.model_dump() for v in read_rows(stored / "iterations" / "0000" / "votes.jsonl", Vote)
    ]


def test_what_is_wrong_beside_new_keys_is_still_an_error(run: RunDir) -> None:
    path = run.iteration(0).path / "pairs.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "id"}) + "\n")
    with pytest.raises(RlaifError, match=r"pairs\.jsonl:1: not a Pair"):
        read_rows(path, Pair)
    assert read_grown(path, Pair) == []


@pytest.mark.parametrize("version", [1, "1.7", 1.5, 2, "2.0"])
def test_a_newer_minor_schema_is_read(copy: RunDir, version: Any) -> None:
    file = copy.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))
    assert RunDir.open(copy.path).schema == int(float(version))


@pytest.mark.parametrize("version", [3, "3.0"])
def test_only_a_newer_major_schema_is_refused(copy: RunDir, version: Any) -> None:
    file = copy.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))
    with pytest.raises(UserError, match="this rlaif reads up to 2; upgrade") as e:
        RunDir.open(copy.path)
    assert "damaged" not in str(e.value)


def test_what_people_write_stays_strict(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "Why?", "added_later": 1}]}\n')
    with pytest.raises(UserError, match="added_later"):
        load_prompts("p.jsonl", tmp_path)
