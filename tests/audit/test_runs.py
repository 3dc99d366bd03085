"""The tree of a folder's runs, and what a run takes on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlaif.audit.disk import disk_of, in_words
from rlaif.audit.runs import runs_in
from rlaif.errors import UserError
from rlaif.loop.branch import branch, rollback
from rlaif.records import EvaluationMetrics
from rlaif.rundir.store import RunDir, read_record
from tests.conftest import rlaif_here
from tests.test_branch import go_on

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two branches, one of which has one, and a run without relations. To be read."""
    root = tmp_path_factory.mktemp("runs")
    parent = go_on(root, filters={"min_kept_pairs": 1}, keep_checkpoints="all")
    branch(parent, 3, "late")
    early = branch(parent, 1, "early", ["iterations=2"])
    go_on(root, "early")
    branch(early, 2, "of early")
    go_on(root, "alone", iterations=1, monitors={"min_mean_words": 99})
    (root / "no run").mkdir()
    shutil.copytree(early.path, root / "being made.partial")
    return root


@pytest.fixture
def copies(runs: Path, tmp_path: Path) -> Path:
    """Copies of them, which share nothing, to be changed."""
    return Path(shutil.copytree(runs, tmp_path / "copies"))


def test_branches_stand_below_their_parents(runs: Path) -> None:
    rows = runs_in(runs)
    assert [(row.run, row.parent, row.at, row.depth) for row in rows] == [
        ("alone", None, None, 0),
        ("run", None, None, 0),
        ("early", "run", 1, 1),
        ("of early", "early", 2, 2),
        ("late", "run", 3, 1),
    ]
    alone, whole, early, _, late = rows
    assert [(r.iterations_done, r.iterations) for r in (alone, whole, early, late)] == [(1, 1), (4, 4), (2, 2), (3, 4)]
    assert [r.constitution for r in (alone, whole, early)] == ["rules@1", "rules@2", "rules@1"]
    assert (alone.alarms, whole.alarms) == (1, 0)
    metrics = read_record(RunDir(runs / "run").evaluation(4).path / "metrics.json", EvaluationMetrics)
    assert (whole.win_rate, whole.win_interval, whole.kl_per_token) == (
        metrics.win_rate, metrics.win_interval, metrics.kl_per_token,
    )  # fmt: skip
    assert late.updates == 2  # no evaluation was due after the third
    assert alone.shared == 0 < late.shared < late.bytes
    assert whole.bytes == sum(p.stat().st_size for p in (runs / "run").rglob("*") if p.is_file())


def test_a_run_that_was_rolled_back_is_a_branch_of_what_it_was(copies: Path) -> None:
    rollback(copies / "run", 2)
    rows = {row.run: row.parent for row in runs_in(copies)}
    assert rows == {
        "alone": None,
        "run.before-rollback-1": None,
        "run": "run.before-rollback-1",
        "early": "run",
        "of early": "early",
        "late": "run.before-rollback-1",  # the run isn't any more what it was after three iterations
    }


def test_a_parent_that_is_not_here(copies: Path) -> None:
    shutil.rmtree(copies / "run")
    rows = {row.run: (row.parent, row.at) for row in runs_in(copies)}
    assert rows["early"] == (None, 1)
    assert rows["of early"] == ("early", 2)


def test_a_damaged_run_takes_no_other_along(copies: Path) -> None:
    (copies / "late" / "run.json").write_text("{")
    (row,) = [row for row in runs_in(copies) if row.problem]
    assert row.run == "late"
    done = rlaif_here("runs", str(copies))
    assert done.returncode == 0
    assert done.stderr.startswith("late: ")
    assert len(done.stdout.splitlines()) == 6


def test_the_command(runs: Path) -> None:
    lines = rlaif_here("runs", str(runs)).stdout.splitlines()
    assert lines[0].split("\t") == [
        "run", "from", "iterations", "text", "win rate", "95%", "KL/token", "alarms", "size", "shared",
    ]  # fmt: skip
    assert [line.split("\t")[:3] for line in lines[2:5]] == [
        ["run", "", "4 of 4"],
        ["  early", "after 1", "2 of 2"],
        ["    of early", "after 2", "2 of 2"],
    ]
    said = json.loads(rlaif_here("runs", str(runs), "--json").stdout)
    assert [row["run"] for row in said] == ["alone", "run", "early", "of early", "late"]
    with pytest.raises(UserError, match="no such folder"):
        runs_in(runs / "nowhere")
    with pytest.raises(UserError, match="is a run itself"):
        runs_in(runs / "run")


def test_what_each_choice_costs(tmp_path: Path) -> None:
    """As the run itself has it after its end, with another choice each."""
    for name, choice in (("null", None), ("evaluated", "evaluated"), ("last", {"last": 3}), ("all", "all")):
        go_on(tmp_path, name, filters={"min_kept_pairs": 1}, keep_checkpoints=choice)
    go_on(tmp_path, "begun", iterations=2, filters={"min_kept_pairs": 1})
    begun = RunDir(tmp_path / "begun")
    header = begun.header
    header["job"]["iterations"] = 4
    (begun.path / "run.json").write_text(json.dumps(header))
    costs = {cost.keep: cost for cost in disk_of(begun).costs}
    assert list(costs) == ["null", "evaluated", "{last: 3}", "{every: 4}", "all"]
    for name, keep in (("null", "null"), ("evaluated", "evaluated"), ("last", "{last: 3}"), ("all", "all")):
        now = disk_of(RunDir(tmp_path / name))
        assert (costs[keep].policies, costs[keep].states) == (now.policies, now.states), keep
        assert costs[keep].bytes == pytest.approx(
            now.policy_bytes + now.state_bytes, rel=0.05
        )  # a digit more of a step


def test_status_tells_the_disk(runs: Path) -> None:
    said = rlaif_here("status", str(runs / "late")).stdout
    assert "goes on from run after 3 iterations" in said
    assert "of it shared with other runs; 3 policies 48 B, 3 learner's states" in said
    assert "checkpoints after 4 iterations, by keep_checkpoints (all here): not set " in said
    disk = json.loads(rlaif_here("status", str(runs / "late"), "--json").stdout)["disk"]
    assert disk["policies"] == 3


def test_sizes_in_words() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 12_345: "12 kB", 1_620_000_000: "1.6 GB", 5 * 10**15: "5000 TB"}
    assert {size: in_words(size) for size in sizes} == sizes
