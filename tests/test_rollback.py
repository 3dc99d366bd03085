"""Rollback: the run goes on from an earlier state, what it was stays readable, and a kill anywhere loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from rlaif.audit.index import Index
from rlaif.audit.verify import verify
from rlaif.config import ChatSettings
from rlaif.errors import UserError
from rlaif.judging.spending import Spent, Wasted, spent_on
from rlaif.loop.branch import branch, rollback
from rlaif.records import Decision, Vote
from rlaif.review.labels import read_labels
from rlaif.review.queue import Queue
from rlaif.rundir.stages import VOTES
from rlaif.rundir.store import RunDir, read_grown, write_json
from tests.conftest import rlaif_here
from tests.judging.fault_server import FaultServer
from tests.kill_driver import in_child
from tests.review.runs import give, reviewed
from tests.test_branch import go_on, keep, made
from tests.test_loop_chat import chat_job, chat_loop, greater_number

pytestmark = pytest.mark.slow

BEFORE = "run.before-rollback-1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Four iterations, with the checkpoint after the second kept."""
    found = go_on(tmp_path, filters={"min_kept_pairs": 1})
    keep(found, 1)
    return found


def content(path: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_run_goes_on_from_an_earlier_state_and_what_it_was_stays(tmp_path: Path, run: RunDir) -> None:
    before, policies = content(run.path), made(run)
    kept = rollback(run.path, 2)
    assert kept.path == tmp_path / BEFORE
    assert content(kept.path) == before
    assert run.iterations() == [0, 1]
    assert run.parent is not None
    assert (run.parent.run, run.parent.iterations) == (BEFORE, 2)
    assert [(e.kind, e.message) for e in run.events()][-1] == (
        "rolled_back",
        f"goes on from {BEFORE} after 2 iterations",
    )
    assert verify(run).findings == verify(kept).findings == ()
    go_on(tmp_path)
    assert made(run) == policies
    assert verify(run).findings == ()
    assert {p.name for p in tmp_path.iterdir()} == {"run", BEFORE, "base", "constitutions", "casts.log"}


def test_what_was_paid_for_what_is_set_aside_counts_still(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server))
        write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": loop.job.model_dump(mode="json")})
        loop.run()
    run, settings = loop.dir, loop.job.judge
    assert isinstance(settings, ChatSettings)
    keep(run, 0)

    def spent(some: RunDir) -> Spent:
        folders = [*map(some.iteration, some.iterations()), *map(some.evaluation, some.evaluations())]
        votes = [v for here in folders for name in VOTES for v in here.durable(name, Vote)]
        return spent_on(votes, settings, read_grown(some.path / "judge_wasted.jsonl", Wasted))

    assert spent(run).calls == server.requests
    before = rollback(run.path, 1)
    assert run.iterations() == [0]
    assert spent(run) == spent(before)
    child = branch(before, 1, "child")
    assert spent(child).calls < server.requests, "a branch has paid for none of what its parent did later"


def test_a_second_rollback_has_a_name_of_its_own(tmp_path: Path, run: RunDir) -> None:
    rollback(run.path, 2)
    go_on(tmp_path)
    keep(run, 1)
    assert rollback(run.path, 2).path.name == "run.before-rollback-2"
    assert [e.kind for e in run.events()].count("rolled_back") == 2
    assert verify(run).findings == ()


def test_what_an_unfinished_iteration_left_goes(tmp_path: Path, run: RunDir) -> None:
    (run.iteration(3).path / "metrics.json").unlink()
    keep(run, 2)
    rollback(run.path, 3)
    assert run.iterations() == [0, 1, 2]


def test_a_branch_of_what_was_rolled_back_still_holds(tmp_path: Path, run: RunDir) -> None:
    child = branch(run, 4, "child")
    rollback(run.path, 2)
    assert verify(child).findings == ()


def test_who_reads_the_run_meanwhile_reads_what_it_is_now(tmp_path: Path) -> None:
    """A server's index and its queue are opened before the rollback, and asked after it."""
    done = reviewed(tmp_path)
    keep(done, 1)
    queue, index = Queue(done), Index.open(done)
    sent = {
        k: [d.pair_id for d in done.iteration(k).read("decisions", Decision) if d.status == "review"] for k in (1, 3)
    }
    assert sent[1]
    assert sent[3]
    assert queue.counts().sent > len(sent[1])
    give(done, sent[3][0], "first")
    give(done, sent[1][0], "first")
    kept = rollback(done.path, 2)
    assert [label.pair_id for label in read_labels(kept).labels] == [sent[3][0], sent[1][0]]
    assert [label.pair_id for label in read_labels(done).labels] == [sent[1][0]]
    with pytest.raises(UserError, match=r"no pair .* was sent to review"):
        queue.answer(sent[3][1], "1", "ann")
    queue.answer(sent[1][1], "1", "ann")
    assert queue.counts().labelled == 2
    index.refresh()
    tables = ("votes", "decisions", "completions", "events", "labels", "iterations", "evaluations")
    counts = [index.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in tables]
    index.path.unlink()
    fresh = Index.open(done)
    assert counts == [fresh.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in tables]
    assert index.rows("SELECT max(iteration) AS n FROM decisions")[0]["n"] == 1


def test_what_a_rollback_refuses(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(UserError, match="the nearest that is kept whole is after 2"):
        rollback(run.path, 1)
    with pytest.raises(UserError, match="nothing came after that"):
        rollback(run.path, 4)
    with run.lock(), pytest.raises(UserError, match="another process writes this run"):
        rollback(run.path, 2)
    with pytest.raises(UserError, match="no such run"):
        rollback(tmp_path / "nowhere", 2)
    assert not (tmp_path / "nowhere").exists()
    assert run.iterations() == [0, 1, 2, 3]


def kill_at(point: int) -> list[str]:
    """Kills this process before the n-th call that changes the disk; what the calls were."""
    calls: list[str] = []

    def wrap(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) - 1 == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    for owner, name in (
        (os, "link"),
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (RunDir, "event"),
    ):
        wrap(owner, name)
    return calls


def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, run: RunDir) -> None:
    before = content(run.path)

    def rolled_back(where: Path, point: int, calls: Path | None = None) -> None:
        seen = kill_at(point)
        rollback(where / "run", 2)
        if calls:
            calls.write_text(" ".join(seen))

    def copy(name: str) -> Path:
        shutil.copytree(run.path, tmp_path / name / "run")
        return tmp_path / name

    assert in_child(lambda: rolled_back(copy("whole"), -1, tmp_path / "calls")) == 0
    expected = content(tmp_path / "whole" / "run")
    calls = (tmp_path / "calls").read_text().split()
    assert {"link", "rename", "replace", "fsync", "rmtree", "event"} == set(calls)
    links = [n for n, call in enumerate(calls) if call == "link"]
    points = sorted({*range(len(calls)), len(calls)} - set(links[1:-1]))  # a kill among the links is like any other
    interrupted = 0
    for point in points:
        where = copy(f"kill{point}")
        killed = in_child(lambda where=where, point=point: rolled_back(where, point))
        assert killed == (-signal.SIGKILL if point < len(calls) else 0), point
        here = where / "run"
        if here.exists():
            done = RunDir.open(here).parent is not None
            assert content(where / BEFORE if done else here) == before, point
            if not done:
                rollback(here, 2)
        else:
            interrupted += 1
            for refused in (RunDir.open, lambda path: RunDir(path).lock().__enter__()):
                with pytest.raises(UserError, match=f"rlaif rollback {here} --to 2` finishes it"):
                    refused(here)
            rollback(here, 2)
        assert content(where / BEFORE) == before, point
        names = expected.keys() - {"events.jsonl", "heads.jsonl"}  # the time of the event, and what follows from it
        assert content(here).keys() == expected.keys(), point
        assert {n: content(here)[n] for n in names} == {n: expected[n] for n in names}, point
        assert verify(RunDir(here)).findings == (), point
        assert {p.name for p in where.iterdir()} == {"run", BEFORE}, point
    assert interrupted == 1


def test_a_branch_that_is_killed_touches_nothing(tmp_path: Path, run: RunDir) -> None:
    before = content(run.path)

    def branched(point: int) -> None:
        calls = kill_at(point)
        branch(run, 2, "child")
        (tmp_path / "calls").write_text(" ".join(calls))

    assert in_child(lambda: branched(-1)) == 0
    calls = (tmp_path / "calls").read_text().split()
    expected = content(tmp_path / "child")
    links = [n for n, call in enumerate(calls) if call == "link"]
    for point in sorted({*range(len(calls))} - set(links[1:-1])):
        shutil.rmtree(tmp_path / "child")
        assert in_child(lambda point=point: branched(point)) == -signal.SIGKILL, point
        if not (tmp_path / "child").exists():
            branch(run, 2, "child")
        assert content(tmp_path / "child").keys() == expected.keys(), point
        assert verify(RunDir(tmp_path / "child")).findings == (), point
        assert content(run.path) == before, point
        assert not list(tmp_path.glob("*.partial")), point


def test_the_commands(tmp_path: Path, run: RunDir) -> None:
    made = rlaif_here("branch", "run", "--at", "4", "--name", "child", "--json")
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert (said["run"], said["parent"]["run"], said["parent"]["iterations"]) == ("child", "run", 4)
    again = rlaif_here("branch", "run", "--at", "4", "--name", "child")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "rlaif: --name child: child is there already; take another name\n"
    longer = rlaif_here("branch", "run", "--at", "4", "--name", "longer")
    assert longer.stdout == "longer\n"
    assert longer.stderr == "go on with: rlaif run longer --set iterations=5 --allow-change\n"
    back = rlaif_here("rollback", "run", "--to", "2")
    assert (back.returncode, back.stdout) == (0, "run\n")
    assert back.stderr == f"as it was: {BEFORE}\ngo on with: rlaif run run\n"


def test_a_name_whose_rollback_was_interrupted_starts_no_run(tmp_path: Path, run: RunDir) -> None:
    rollback(run.path, 2)
    run.path.rename(tmp_path / "run.rolling-back")
    for command in (("run", "run"), ("status", "run"), ("audit", "run")):
        done = rlaif_here(*command)
        assert done.returncode == 2
        assert done.stderr == "rlaif: run: its rollback was interrupted; `rlaif rollback run --to 2` finishes it\n"
    assert rlaif_here("rollback", "run", "--to", "2").stderr.startswith(f"as it was: {BEFORE}\n")
    assert run.iterations() == [0, 1]
