"""Pairs that exist in place of fresh ones: taken over as they are stored, or judged again; noticed when they change."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.verify import verify
from rlaif.data.prompts import exclude_held_out, held_out_id
from rlaif.errors import RlaifError, UserError
from rlaif.loop.branch import branch
from rlaif.loop.source import open_source
from rlaif.loop.source_run import StoredPairs
from rlaif.records import (
    BaseLogprob,
    Completion,
    Decision,
    EvaluationMetrics,
    IterationMetrics,
    Pair,
    Preference,
    Score,
    UpdateStep,
    Vote,
    digest,
)
from rlaif.rundir.store import RunDir, read_record
from tests.conftest import project_job
from tests.data.make_run import write_header
from tests.offline import offline_job, offline_loop
from tests.stubs import Quiet, stub_job, stub_loop, write_texts
from tests.test_resume import outcome

pytestmark = pytest.mark.slow

SAME = ("completions", "scores", "pairs", "decisions", "preferences")


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Four stub iterations, with a change of text before the third."""
    root = tmp_path_factory.mktemp("online")
    job = stub_job()
    loop = stub_loop(root, job)
    write_header(loop.dir.path, job)
    loop.run()
    return loop.dir


def rows(run: RunDir, k: int, stage: str) -> str:
    return (run.iteration(k).path / f"{stage}.jsonl").read_text()


def casts(root: Path) -> list[str]:
    file = root / "casts.log"
    return file.read_text().split() if file.exists() else []


def test_an_offline_counterpart_has_the_rows_and_the_policies_of_the_run(online: RunDir, tmp_path: Path) -> None:
    """Same seed, same base, the run's own pairs: nothing can differ."""
    loop = offline_loop(tmp_path, offline_job(online.path))
    loop.run()
    assert loop.dir.iterations() == online.iterations()
    for k in online.iterations():
        for stage in SAME:
            assert sorted(rows(loop.dir, k, stage).splitlines()) == sorted(rows(online, k, stage).splitlines()), stage
        assert loop.dir.iteration(k).policy_made() == online.iteration(k).policy_made()
        plan = loop.dir.plan(k)
        assert (plan.source.iteration, plan.constitution) == (k, online.plan(k).constitution)
    held_out = {v.ballot.id for n in (2, 4) for v in loop.dir.evaluation(n).read("votes", Vote)}
    held_out |= {v.ballot.id for v in loop.dir.iteration(2).read("change_votes", Vote)}
    assert {*casts(tmp_path)} == held_out, "of pairs that train nobody was asked"
    assert verify(loop.dir).holds


def test_votes_that_are_taken_over_cost_nothing(online: RunDir, tmp_path: Path) -> None:
    loop = offline_loop(tmp_path, offline_job(online.path))
    loop.run()
    votes = loop.dir.iteration(0).read("votes", Vote)
    assert all(v.cached and not v.attempts for v in votes)
    theirs = online.iteration(0).read("votes", Vote)
    free = {"cached": True, "attempts": 0}
    assert [v.model_copy(update=free) for v in theirs] == [v.model_copy(update=free) for v in votes]
    metrics = read_record(loop.dir.iteration(0).path / "metrics.json", IterationMetrics)
    assert (metrics.judge_calls, metrics.judge_tokens, metrics.ballots_saved) == (0, 0, 0)


def test_iterations_start_over_under_ids_of_their_own(online: RunDir, tmp_path: Path) -> None:
    loop = offline_loop(tmp_path, stub_job(iterations=5, source={"run": str(online.path), "iterations": "2-3"}))
    loop.run()
    assert [loop.dir.plan(k).source.iteration for k in range(5)] == [2, 3, 2, 3, 2]
    for record, stage in ((Completion, "completions"), (Pair, "pairs")):
        ids = [row.id for k in range(5) for row in loop.dir.iteration(k).read(stage, record)]
        assert len(ids) == len({*ids})
    ballots = [v.ballot.id for k in range(5) for v in loop.dir.iteration(k).read("votes", Vote)]
    assert len(ballots) == len({*ballots})
    texts = [sorted(c.text for c in loop.dir.iteration(k).read("completions", Completion)) for k in (0, 2, 4)]
    assert texts[0] == texts[1] == texts[2]
    winners = [[d.winner for d in loop.dir.iteration(k).read("decisions", Decision)] for k in (0, 2)]
    assert winners[0] == winners[1] == [d.winner for d in online.iteration(2).read("decisions", Decision)]
    assert verify(loop.dir).holds


def test_a_source_that_starts_over_replays_no_pair_beside_its_twin(online: RunDir, tmp_path: Path) -> None:
    job = offline_job(online.path, iterations="0-1", replay={"share": 0.9}, filters={"min_kept_pairs": 1})
    loop = offline_loop(tmp_path, job)
    loop.run()
    replayed = 0
    for k in range(job.iterations):
        trained = loop.dir.iteration(k).read("preferences", Preference)
        pairs = [frozenset(row.sequences) for row in trained]
        assert len(pairs) == len({*pairs})
        replayed += sum(row.source == "replay" for row in trained)
    assert replayed > 0


def test_held_out_answers_are_judged_under_the_text_in_force(online: RunDir, tmp_path: Path) -> None:
    """Labels under the first text, the job's text is the second: every row says which judged it."""
    job = stub_job(iterations=2, schedule={0: "rules@2"}, source={"run": str(online.path), "iterations": "0-1"})
    loop = offline_loop(tmp_path, job)
    loop.run()
    first, second = online.plan(0).constitution, online.plan(2).constitution
    for k in (0, 1):
        plan = loop.dir.plan(k)
        assert (plan.constitution, plan.in_force.constitution) == (first, second)
        assert {p.constitution for p in loop.dir.iteration(k).read("preferences", Preference)} <= {first.hash}
    metrics = read_record(loop.dir.evaluation(2).path / "metrics.json", EvaluationMetrics)
    assert metrics.constitution == second
    assert {v.ballot.constitution for v in loop.dir.evaluation(2).read("votes", Vote)} == {second.hash}
    assert verify(loop.dir).holds
    assert not verify(loop.dir).notes
    # Every command names the text in force, and says that what trained was labelled under another one.
    with Index.open(loop.dir) as index:
        found = overview(index, loop.dir)
    assert [(c.iteration, c.hash) for c in found.changes] == [(0, second.hash)]
    assert found.source == f"pairs of {online.path}, iterations 1 to 2, labels as stored"
    updated = [here for k in (0, 1) if (here := loop.dir.iteration(k)).policy_made()]
    assert [(m.of_others, m.texts) for m in found.mixed] == [
        (len(here.read("preferences", Preference)), (str(first),)) for here in updated
    ]
    assert all(row.mean_words is None for row in found.iterations), "the policy sampled none of these answers"


def test_rejudged_pairs_are_judged_under_the_text_in_force(online: RunDir, tmp_path: Path) -> None:
    source = {"run": str(online.path), "iterations": "0-1", "rejudge": True}
    loop = offline_loop(tmp_path, stub_job(iterations=2, schedule={0: "rules@2"}, source=source))
    loop.run()
    second = online.plan(2).constitution
    for k in (0, 1):
        assert rows(loop.dir, k, "pairs") == rows(online, k, "pairs")
        votes = loop.dir.iteration(k).read("votes", Vote)
        assert {v.ballot.constitution for v in votes} == {second.hash}
        assert not any(v.cached for v in votes)
        assert {v.ballot.id for v in votes} <= {*casts(tmp_path)}
        assert loop.dir.plan(k).constitution == second
    assert rows(loop.dir, 0, "decisions") != rows(online, 0, "decisions")
    assert verify(loop.dir).holds


@pytest.mark.parametrize("rejudge", [False, True])
@pytest.mark.parametrize("stop", ["take_over", "decide", "mix", "update", "gap_of"])
def test_a_run_that_is_stopped_goes_on(
    stop: str, rejudge: bool, online: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = offline_job(online.path, rejudge, iterations="1-2")
    whole = offline_loop(tmp_path / "whole", job)
    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(f"rlaif.loop.loop.{stop}", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            offline_loop(tmp_path / "stopped", job).run()
    stopped = offline_loop(tmp_path / "stopped", job)
    stopped.run()
    for k in whole.dir.iterations():
        for stage in (*SAME, "votes"):
            assert rows(stopped.dir, k, stage) == rows(whole.dir, k, stage)
        assert stopped.dir.iteration(k).policy_made() == whole.dir.iteration(k).policy_made()


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_source_that_grew_is_taken_as_it_was(online: RunDir, tmp_path: Path) -> None:
    """Without `iterations`, those that were judged at the start."""
    shutil.copytree(online.path, tmp_path / "theirs")
    held_back = tmp_path / "theirs" / "iterations" / "0003"
    held_back.rename(tmp_path / "later")
    theirs = RunDir(tmp_path / "theirs")
    one = stub_job(iterations=1, source={"run": str(theirs.path)})
    offline_loop(tmp_path / "ours", one).run()
    (tmp_path / "later").rename(held_back)
    loop = offline_loop(tmp_path / "ours", stub_job(iterations=4, source={"run": str(theirs.path)}))
    loop.run()
    assert [loop.dir.plan(k).source.iteration for k in range(4)] == [0, 1, 2, 0]


@pytest.fixture
def theirs(online: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A source of its own, of which the run in `ours` has planned an iteration and taken nothing yet."""
    shutil.copytree(online.path, tmp_path / "theirs")
    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.loop.take_over", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            offline_loop(tmp_path / "ours", offline_job(tmp_path / "theirs")).run()
    return RunDir(tmp_path / "theirs")


def test_a_source_that_goes_on_meanwhile_is_what_it_was(theirs: RunDir, tmp_path: Path) -> None:
    """What follows from the votes is written later than they are; earlier versions took it over."""
    ours = RunDir(tmp_path / "ours" / "run")
    row = BaseLogprob(completion_id="c", tokens=1, logprob=-1.0)
    later = theirs.iteration(0)
    later.rows("base_logprobs", BaseLogprob, lambda _: [[row]])
    offline_loop(tmp_path / "ours", offline_job(theirs.path)).source.check(ours.plan(0).source)
    content = json.loads((plan := ours.iteration(0).path / "plan.json").read_text())
    digests = {s: later.meta(s)["sha256"] for s in ("completions", "scores", "pairs", "votes", "base_logprobs")}
    content["source"]["sha256"] = digest(digests, 64)
    plan.write_text(json.dumps(content))
    offline_loop(tmp_path / "ours", offline_job(theirs.path)).source.check(ours.plan(0).source)


def test_a_source_that_changed_since_its_plan_is_noticed(theirs: RunDir, tmp_path: Path) -> None:
    file = theirs.iteration(0).path / "votes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(RlaifError, match=r"votes.jsonl: was changed after it was written"):
        offline_loop(tmp_path / "ours", offline_job(theirs.path)).run()
    meta = theirs.iteration(0).path / "votes.meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    with pytest.raises(UserError, match=r"iteration 0 of .*theirs isn't what it was when this run's plan was written"):
        offline_loop(tmp_path / "ours", offline_job(theirs.path)).run()


def test_iterations_that_are_not_there_are_named(online: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source.iterations: 2-7: the judged iterations of .* are 0-3"):
        StoredPairs(offline_job(online.path, iterations="2-7").source, tmp_path)


def test_held_out_prompts_never_train(online: RunDir, tmp_path: Path) -> None:
    """Some are held out here that trained there, and one has the id of another held-out one."""
    job = offline_job(online.path, iterations="0-1")
    loop = offline_loop(tmp_path, job)
    assert loop.source is not None
    asked = online.plan(0).prompt_ids
    known = {p.id: p for p in loop.train}
    other = known[asked[2]].model_copy(update={"messages": known[asked[3]].messages})
    held_out = [*loop.held_out, known[asked[0]], known[asked[1]], other]
    notes: list[str] = []
    loop.train = exclude_held_out(loop.source.prompts, held_out, notes.append)
    loop.source.settle(loop.train)
    loop.run()
    assert any("3 training prompts are held out" in said for said in notes)
    mine, theirs = loop.dir.iteration(0), online.iteration(0)
    left = {p.prompt_id for p in mine.read("pairs", Pair)}
    assert left == {*asked} - {*asked[:4]} | {held_out_id(known[asked[2]])}
    assert {c.prompt_id for c in mine.read("completions", Completion)} == left == {*loop.dir.plan(0).prompt_ids}
    assert len(mine.read("votes", Vote)) == len(theirs.read("votes", Vote)) * len(left) // len(asked)
    assert {s.prompt_id for s in mine.read("scores", Score)} == left


def test_an_iteration_whose_prompts_are_all_held_out_is_named(online: RunDir, tmp_path: Path) -> None:
    source = StoredPairs(offline_job(online.path, iterations="1").source, tmp_path)
    with pytest.raises(UserError, match=r"no prompt of iteration 1 of .*held out; leave it out"):
        source.settle([p for p in source.prompts if p.id not in online.plan(1).prompt_ids])


def test_another_tokenizers_run_is_refused(online: RunDir, tmp_path: Path) -> None:
    shutil.copytree(online.path, tmp_path / "theirs")
    header = json.loads((tmp_path / "theirs" / "run.json").read_text())
    header["models"]["tokenizer"] = "theirs"
    (tmp_path / "theirs" / "run.json").write_text(json.dumps(header))
    source = StoredPairs(offline_job(tmp_path / "theirs").source, tmp_path)
    source.check_tokenizer({"tokenizer": "theirs", "chat_template": "another"})
    with pytest.raises(UserError, match=r"theirs was sampled with another tokenizer \(theirs; policy.model has ours\)"):
        source.check_tokenizer({"tokenizer": "ours", "chat_template": None})


def test_a_source_is_counted_from_where_it_began(online: RunDir, tmp_path: Path) -> None:
    """As a branch has it, that goes on offline."""
    stub_loop(tmp_path, stub_job(iterations=3)).run()
    loop = offline_loop(tmp_path, offline_job(online.path, iterations="0-1"))
    loop.run()
    assert [loop.dir.plan(k).source and loop.dir.plan(k).source.iteration for k in range(4)] == [None, None, None, 0]
    ids = [p.id for k in range(4) for p in loop.dir.iteration(k).read("pairs", Pair)]
    assert len(ids) == len({*ids})


def go_on(root: Path, run: RunDir) -> None:
    job = run.job()
    loop = stub_loop(root, job, name=run.path.name)
    loop.source = open_source(job, root, run)
    assert loop.source is not None
    loop.source.settle(loop.train)
    loop.run()


@pytest.mark.parametrize(
    ("overrides", "then"),
    [
        ([], [0, 1, 0, 1, 0]),
        (["source.rejudge=true"], [0, 1, 0, 1, 0]),
        (["source.iterations=2-3"], [0, 1, 0, 2, 3]),
        (["source.iterations=null"], [0, 1, 0, 0, 1, 2]),
        (["source={run: theirs}"], [0, 1, 0, 0, 1]),
    ],
)
def test_a_branch_may_take_other_pairs(online: RunDir, tmp_path: Path, overrides: list[str], then: list[int]) -> None:
    """Another source begins at its first iteration; the same one goes on where it was."""
    shutil.copytree(online.path, tmp_path / "theirs")
    loop = offline_loop(tmp_path, offline_job(online.path, iterations="0-1", filters={"min_kept_pairs": 1}))
    for k in range(3):
        loop.iterate(k)
    child = branch(loop.dir, 3, "child", [*overrides, f"iterations={len(then)}"])
    go_on(tmp_path, child)
    assert [child.plan(k).source.iteration for k in child.done()] == then  # type: ignore[union-attr]
    assert verify(child).findings == ()


def test_a_text_of_the_source_alone_was_never_in_force(online: RunDir, tmp_path: Path) -> None:
    """Labels under two texts, none of them the job's: nothing changes, and nobody is asked about them."""
    job = stub_job(
        iterations=4, schedule={0: "rules@3"}, source={"run": str(online.path)}, filters={"min_kept_pairs": 1},
        eval={"every": 1, "prompts": 3, "retention": True}, learner={"reference": "at_change"},
    )  # fmt: skip
    write_texts(tmp_path, 3)
    loop = offline_loop(tmp_path, job)
    loop.run()
    assert len({loop.dir.plan(k).constitution.hash for k in range(4)}) == 2
    for found in loop.dir.evaluations_measured(range(5)):
        assert found.retention is not None
        assert found.retention.earlier == {}
    assert [loop.hand_over.reference_at_change(k) for k in range(4)] == [None] * 4


# A whole launch: the tiny model, real sampler, judge and learner.


def test_the_offline_counterpart_makes_the_same_updates_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    run = execute(project_job(tmp_path, tiny_model), tmp_path / "runs" / "online", tmp_path, Quiet())
    job = project_job(tmp_path, tiny_model, source={"run": "runs/online"})
    again = execute(job, tmp_path / "runs" / "offline", tmp_path, Quiet())
    for k in run.iterations():
        steps = [
            [s.model_copy(update={"seconds": 0}) for s in r.iteration(k).read("updates", UpdateStep)]
            for r in (run, again)
        ]
        assert steps[0] == steps[1]
        assert run.iteration(k).policy_made() == again.iteration(k).policy_made() is not None
        assert [r.iteration(k).is_complete("base_logprobs") for r in (run, again)] == [True, True], "as its judge found"
    assert (again.path / "prompts" / "train.jsonl").read_text() in (run.path / "prompts" / "train.jsonl").read_text()
    assert verify(again).holds


@pytest.mark.parametrize("rejudge", [False, True])
def test_a_branch_goes_on_offline(rejudge: bool, tiny_model: Path, tmp_path: Path) -> None:
    """On what its parent sampled before, under the text that is in force after the change."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    parent = execute(project_job(tmp_path, tiny_model, iterations=2), tmp_path / "runs" / "p", tmp_path, Quiet())
    source = f"source={{run: runs/p, iterations: 0-1, rejudge: {str(rejudge).lower()}}}"
    child = branch(parent, 2, "child", [source, "iterations=4", "replay.share=0"])
    execute(child.job(), child.path, tmp_path, Quiet())
    assert [k.source and k.source.iteration for k in map(child.plan, range(4))] == [None, None, 0, 1]
    old, new = parent.plan(0).constitution, child.plan(3).in_force.constitution
    assert old.hash != new.hash
    for k in (2, 3):
        judged_under = {p.constitution for p in child.iteration(k).read("preferences", Preference)}
        assert judged_under == {new.hash if rejudge else old.hash}
        texts = [
            {c.text for c in r.iteration(i).read("completions", Completion)} for r, i in ((child, k), (parent, k - 2))
        ]
        assert texts[0] == texts[1]
    evaluated = read_record(child.evaluation(4).path / "metrics.json", EvaluationMetrics).constitution
    assert evaluated == new
    assert [e.iteration for e in child.events() if e.kind == "constitution_changed"] == [2]
    assert verify(child).findings == ()


@pytest.mark.parametrize(
    "rejudge", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.nightly)]
)
def test_a_killed_run_trains_as_an_unkilled_one(rejudge: bool, online: RunDir, tmp_path: Path) -> None:
    """Killed at writes of every stage, some twice, and resumed to its end."""
    command = [sys.executable, "-m", "tests.kill_driver", str(tmp_path), "40", "0", str(online.path), str(int(rejudge))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {k["exits"][-1] for k in said["kills"]} == {0}
    assert {k["stage"] for k in said["kills"]} == {*said["stages"]}
    expected = outcome(tmp_path / "whole" / "run")
    for kill in said["kills"]:
        assert outcome(tmp_path / kill["folder"] / "run") == expected, kill["label"]
        assert not kill["again"], kill["label"]
