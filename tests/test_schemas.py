"""Runs of every schema: each opens in every command, and one of an older schema goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import rlaif
from rlaif.audit.index import Index
from rlaif.audit.verify import verify
from rlaif.cli import app
from rlaif.errors import RlaifError
from rlaif.loop import launch
from rlaif.records import SCHEMA_VERSION, IterationMetrics, UpdateStep
from rlaif.rundir.store import RunDir, read_record, read_rows
from rlaif.view.app import make_app
from tests.audit.conftest import ALL_STORED, STORED
from tests.stubs import Quiet, stub_job, stub_loop

pytestmark = pytest.mark.slow

PAIR = "a75b1dfe68c748c8"
OLD_STEP: dict[str, Any] = {
    "step": 3, "iteration": 1, "pair_ids": ["a", "b"], "loss": 0.6, "margin": 0.2, "accuracy": 0.5, "grad_norm": 2.0,
    "learning_rate": 1e-5, "seconds": 1.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=ALL_STORED, ids=lambda path: path.name)
def run(request: pytest.FixtureRequest) -> Path:
    """A stored run of each schema."""
    path: Path = request.param
    return path


def test_every_schema_has_its_stored_run() -> None:
    written = [json.loads((path / "run.json").read_text())["schema_version"] for path in ALL_STORED]
    assert written == list(range(1, SCHEMA_VERSION + 1))


def steps_of(run: RunDir) -> list[UpdateStep]:
    return [s for k in run.iterations() for s in read_rows(run.iteration(k).path / "updates.jsonl", UpdateStep)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("status", "RUN"), "4"),
        (("audit", "RUN"), "trained on 9 preferences (2 replayed, 0 human) in 5 steps"),
        (("audit", "RUN", "list", "--status", "kept"), "1-8 of 8 pairs"),
        (("audit", "RUN", "show", PAIR), "step"),
        (("audit", "RUN", "flips"), "second shown first"),
        (("audit", "RUN", "disagree"), PAIR),
        (("audit", "RUN", "trace", "3"), "9 preferences on 7 pairs in 5 steps"),
        (("audit", "RUN", "compare", str(STORED)), "pairs"),
        (("audit", "RUN", "replay"), "20"),
        (("audit", "RUN", "verify"), "everything holds"),
        (("audit", "RUN", "agreement"), ""),
        (("constitution", "log", "RUN"), "5 kept pairs were judged under another text"),
        (("report", "RUN", "--json"), "9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_run_of_every_schema_answers(run: Path, words: tuple[str, ...], expected: str) -> None:
    done = CliRunner().invoke(app, [str(run) if word == "RUN" else word for word in words])
    assert done.exit_code == 0, done.output
    assert expected in done.stdout
    assert "damaged" not in done.output
    assert "newer rlaif" not in done.output


def test_a_run_of_every_schema_is_shown_and_reported(run: Path, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    opened = RunDir.open(run)
    client = TestClient(make_app(opened, Index.open(opened)), base_url="http://127.0.0.1")
    for page in ("/", "/pairs", f"/pairs/{PAIR}", "/constitutions", "/review"):
        assert client.get(page).status_code == 200, page
    assert CliRunner().invoke(app, ["report", str(run), "--to", str(tmp_path / "r.html")]).exit_code == 0
    assert "rules@2" in (tmp_path / "r.html").read_text()


def test_both_stored_runs_took_the_same_steps() -> None:
    old, new = (steps_of(RunDir.open(path)) for path in ALL_STORED)
    assert old == new
    assert new[0].metrics == {"margin": 0.1, "accuracy": 1.0}


def test_a_run_of_every_schema_is_read_from_python(run: Path) -> None:
    pytest.importorskip("pandas")
    opened = rlaif.open_run(run)
    assert [*opened.steps()] == steps_of(RunDir.open(run))
    steps = opened.frame("steps")
    assert set(steps["metrics.margin"]) == {0.1}
    assert [m.learner_metrics.get("margin") for m in opened.iterations] == [pytest.approx(0.1)] * 3 + [None]


def test_one_query_asks_runs_of_every_schema(run: Path) -> None:
    steps = steps_of(RunDir.open(run))
    with Index.open(RunDir.open(run)) as index:
        found = index.rows("SELECT row_ids, pair_ids, margin, accuracy, metrics FROM updates ORDER BY step")
        assert [tuple(r["row_ids"]) for r in found] == [s.row_ids for s in steps]
        assert [r["pair_ids"] for r in found] == [r["row_ids"] for r in found]
        assert [{"margin": r["margin"], "accuracy": r["accuracy"]} for r in found] == [s.metrics for s in steps]
        assert [r["metrics"] for r in found] == [s.metrics for s in steps]
        sql = "SELECT (metrics->'learner_metrics'->>'margin')::DOUBLE AS m FROM iterations ORDER BY iteration"
        assert [r["m"] for r in index.rows(sql)] == [pytest.approx(0.1)] * 3 + [None]


# What schema 1 had otherwise.


def test_a_step_of_schema_1_is_lifted() -> None:
    step = UpdateStep.model_validate(OLD_STEP)
    assert step == UpdateStep.model_validate_json(json.dumps(OLD_STEP))
    assert step.row_ids == ("a", "b")
    assert step.metrics == {"margin": 0.2, "accuracy": 0.5}
    assert UpdateStep.model_validate_json(step.model_dump_json()) == step
    assert OLD_STEP["margin"] == 0.2, "what is read stays as it was"


@pytest.mark.parametrize("lacking", ["pair_ids", "margin", "accuracy", "loss"])
def test_a_step_of_schema_1_that_lacks_something_is_damaged(lacking: str) -> None:
    with pytest.raises(ValidationError):
        UpdateStep.model_validate({key: value for key, value in OLD_STEP.items() if key != lacking})


@pytest.mark.parametrize(("margin", "expected"), [(0.25, {"margin": 0.25}), (None, {})])
def test_metrics_of_schema_1_are_lifted(margin: float | None, expected: dict[str, float]) -> None:
    path = STORED / "iterations" / "0000" / "metrics.json"
    tree = json.loads(path.read_text()) | {"margin": margin}
    assert IterationMetrics.model_validate(tree).learner_metrics == expected
    with pytest.raises(ValidationError, match="learner_metrics"):
        IterationMetrics.model_validate({key: value for key, value in tree.items() if key != "margin"})


@pytest.mark.parametrize("stored", ALL_STORED, ids=lambda path: path.name)
def test_a_damaged_step_is_named_and_the_others_stay(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "run")
    path = tmp_path / "run" / "iterations" / "0001" / "updates.jsonl"
    lines = path.read_text().splitlines()
    left_out = "margin" if stored == STORED else "metrics"
    row = {key: value for key, value in json.loads(lines[1]).items() if key != left_out}
    path.write_text("".join(line + "\n" for line in [lines[0], json.dumps(row), *lines[2:]]))
    with pytest.raises(RlaifError, match=r"updates\.jsonl:2: not a UpdateStep"):
        read_rows(path, UpdateStep)
    with Index.open(RunDir.open(tmp_path / "run")) as index:
        assert [p for p in index.problems if p.startswith(f"{path}:2: ")]
        found = index.rows("SELECT line FROM updates WHERE iteration = 1 ORDER BY line")
        assert [r["line"] for r in found] == [1, *range(3, len(lines) + 1)]


# A run of schema 1 that goes on.


def go_on(root: Path, iterations: int) -> RunDir:
    """The stored run of schema 1 with more iterations, as `rlaif run` goes on with it; with stub workers."""
    job = stub_job(iterations=iterations, prompts={"per_iteration": 5}, filters={"min_kept_pairs": 1})
    run = RunDir(root / "run")
    launch.write_header(run, job, run.header["models"], {"rlaif": "today's"}, "iterations (4 -> 6)")
    run.event("resumed", "goes on")
    stub_loop(root, job, progress=Quiet()).run()
    return RunDir.open(root / "run")


def test_a_run_of_schema_1_goes_on_in_schema_2(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "iterations").rglob("*.json*")}
    run = go_on(tmp_path, 6)
    assert {p: p.read_bytes() for p in before} == before, "what was written stays as it was"
    assert run.header["schema_version"] == SCHEMA_VERSION
    assert run.header["rlaif"] == "0.1.0", "what it was begun with"
    (raised,) = [e for e in run.events() if e.kind == "schema_raised"]
    assert raised.message.startswith("run.json says schema 2 from here on (it was 1): an older rlaif can't read it")
    new = json.loads((run.iteration(4).path / "updates.jsonl").read_text().splitlines()[0])
    assert "metrics" in new
    assert "margin" not in new
    steps = steps_of(run)
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    assert len(steps) > 5
    with Index.open(run) as index:
        assert index.problems == []
        found = index.rows("SELECT margin FROM updates ORDER BY step")
        assert [r["margin"] for r in found] == [0.1] * len(steps)
    assert verify(run).findings == ()
    read_record(run.iteration(5).path / "metrics.json", IterationMetrics)


def test_the_header_is_raised_once(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    job = run.job()
    for _ in range(2):
        launch.write_header(run, job, run.header["models"], {})
    assert [e.kind for e in run.events()].count("schema_raised") == 1
    assert run.header["schema_version"] == SCHEMA_VERSION


def test_a_newer_minor_version_stays_in_the_header(tmp_path: Path) -> None:
    shutil.copytree(ALL_STORED[-1], tmp_path / "run")
    run = RunDir(tmp_path / "run")
    path = run.path / "run.json"
    path.write_text(json.dumps(run.header | {"schema_version": f"{SCHEMA_VERSION}.3"}))
    job = run.job().model_copy(update={"iterations": 9})
    launch.write_header(run, job, run.header["models"], {}, "iterations (4 -> 9)")
    assert run.header["schema_version"] == f"{SCHEMA_VERSION}.3"
    assert "schema_raised" not in [e.kind for e in run.events()]
