"""Anchors: the same pairs, asked about again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.config import Job, Monitors
from rlaif.judging.kinds import ChatKind, LikelihoodKind
from rlaif.monitors import History, alarms, silent
from rlaif.records import AnchorCounts, IterationMetrics, Vote
from rlaif.rundir.store import RunDir, write_json
from tests.stubs import stub_job, stub_loop
from tests.test_monitors import measured

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def behind_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub judge has settings of a judge whose weights the run knows."""
    monkeypatch.setattr(LikelihoodKind, "frozen", False)


def job(pairs: int = 8, **changes: Any) -> Job:
    anchors = {"every": 2, "pairs": pairs}
    return stub_job(**{"monitors": {"anchors": anchors, "short_answers": {"action": "off"}}, **changes})


def anchored(run: RunDir) -> dict[int, AnchorCounts]:
    found = run.iterations_measured(run.iterations())
    return {m.iteration: m.anchors for m in found if m.anchors}


def test_a_judge_that_stays_says_the_same(tmp_path: Path) -> None:
    stub_loop(tmp_path, job(schedule={0: "rules@1"})).run()
    run = RunDir(tmp_path / "run")
    found = anchored(run)
    assert list(found) == [1, 3]
    assert [(a.pairs, a.moved) for a in found.values()] == [(6, 0), (8, 0)]
    first = {v.ballot.id for v in run.iteration(0).read("votes", Vote)}
    assert {v.ballot.id for v in run.iteration(1).read("anchor_votes", Vote)} == first
    assert not [e for e in run.events() if e.kind == "alarm"]


def test_what_is_asked_again_is_counted_in_what_the_judge_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    wanted = job(iterations=2, schedule={0: "rules@1"})
    loop = stub_loop(tmp_path, wanted)
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": wanted.model_dump(mode="json")})
    loop.run()
    votes = [len(loop.dir.iteration(k).read("votes", Vote)) for k in (0, 1)]
    again = len(loop.dir.iteration(1).read("anchor_votes", Vote))
    assert again
    assert [m.judge_calls for m in loop.dir.iterations_measured((0, 1))] == [votes[0], votes[1] + again]
    held_out = len(loop.dir.evaluation(2).read("votes", Vote))
    with Index.open(loop.dir) as index:
        [cost] = overview(index, loop.dir).cost
    assert cost.votes == sum(votes) + again + held_out


def test_what_anchors_cost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    told: dict[int, dict[str, Any]] = {}
    wanted = job(schedule={0: "rules@1"})
    loop = stub_loop(tmp_path, wanted)
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": wanted.model_dump(mode="json")})
    monkeypatch.setattr(loop, "track", lambda k, at, numbers: told.update({k: numbers}))
    loop.run()
    run = RunDir(tmp_path / "run")
    (metrics,) = run.iterations_measured([1])
    votes, again = (run.iteration(1).read(stage, Vote) for stage in ("votes", "anchor_votes"))
    calls = sum(v.attempts for v in (*votes, *again))
    assert again
    assert metrics.votes == len(votes), "what was asked about the iteration's own pairs"
    assert metrics.judge_calls == told[1]["pipeline/judge_calls"] == calls > sum(v.attempts for v in votes)
    with Index.open(run) as index:
        counted = {t: index.rows(f"SELECT count(*) AS n FROM {t}")[0]["n"] for t in ("votes", "anchor_votes")}
        found = overview(index, run)
    assert counted["anchor_votes"] == sum(len(run.iteration(k).read("anchor_votes", Vote)) for k in (1, 3))
    assert sum(c.votes for c in found.cost) == sum(counted.values())


def test_a_judge_that_changes_its_mind_is_told(tmp_path: Path) -> None:
    wanted = job(pairs=32, schedule={0: "rules@1"}, prompts={"per_iteration": 16})
    loop = stub_loop(tmp_path, wanted)
    for k in range(3):
        loop.iterate(k)
    loop.judge.target.contrary = True  # type: ignore[attr-defined]
    loop.iterate(3)
    (told,) = [e for e in loop.dir.events() if e.kind == "alarm"]
    assert (told.iteration, told.data["kind"]) == (3, "anchors")
    assert "the judge gives another verdict on" in told.message


def test_a_new_text_has_new_anchors(tmp_path: Path) -> None:
    """The text changes before iteration 3, whose pairs are the first ones under it."""
    stub_loop(tmp_path, job()).run()
    run = RunDir(tmp_path / "run")
    asked = {v.ballot.pair_id for v in run.iteration(3).read("anchor_votes", Vote)}
    assert asked == {v.ballot.pair_id for v in run.iteration(2).read("votes", Vote)}


def test_killed_while_it_is_asked_it_asks_for_the_rest(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path, job())
    loop.iterate(0)
    stream = loop.judge.stream

    def until_killed(method: str, **asked: Any) -> Any:
        again = method == "cast" and "ballots" in asked and asked["ballots"][0].id in before
        for chunk in stream(method, **asked):
            yield chunk
            if again:
                raise KeyboardInterrupt

    before = {v.ballot.id for v in loop.dir.iteration(0).read("votes", Vote)}
    loop.judge.stream = until_killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.iterate(1)
    here = loop.dir.iteration(1)
    durable = here.durable("anchor_votes", Vote)
    assert 0 < len(durable) < len(before)
    (tmp_path / "casts.log").unlink()
    stub_loop(tmp_path, job()).iterate(1)
    assert {v.ballot.id for v in here.read("anchor_votes", Vote)} == before
    assert not {v.ballot.id for v in durable} & set((tmp_path / "casts.log").read_text().split())


def test_after_a_kill_more_anchors_may_be_wanted(tmp_path: Path) -> None:
    """What was asked before it counts."""
    loop = stub_loop(tmp_path, job(pairs=3))
    for k in (0, 1):
        loop.iterate(k)
    (loop.dir.iteration(1).path / "metrics.json").unlink()
    stub_loop(tmp_path, job(pairs=6)).iterate(1)
    assert [a.pairs for a in anchored(loop.dir).values()] == [3]


def test_a_judge_whose_weights_the_run_knows_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LikelihoodKind, "frozen", True)
    stub_loop(tmp_path, job()).run()
    assert anchored(RunDir(tmp_path / "run")) == {}
    assert not list(tmp_path.rglob("anchor_votes*"))
    assert not ChatKind.frozen


@pytest.mark.parametrize(("moved", "told"), [(0, False), (7, False), (8, True), (32, True)])
def test_few_verdicts_may_move(moved: int, told: bool) -> None:
    metrics: IterationMetrics = measured(anchors=AnchorCounts(pairs=32, moved=moved))
    limits = Monitors.model_validate({"short_answers": {"action": "off"}})
    assert bool(alarms(limits, History([metrics]))) == told
    assert silent(limits, "anchors", History([metrics])) == (not told)


@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_too_few_verdicts_are_no_silence(pairs: int) -> None:
    """As after an outage: no alarm, and nothing to go back to either."""
    history = History([measured(anchors=AnchorCounts(pairs=pairs, moved=pairs))])
    limits = Monitors.model_validate({"short_answers": {"action": "off"}})
    assert not alarms(limits, history)
    assert not silent(limits, "anchors", history)
