"""`rlaif audit RUN replay-set`: which old pairs may train, why not the others, and the index that it is read from."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.pair import show
from rlaif.audit.replay import replay
from rlaif.audit.replay_iteration import Iteration
from rlaif.audit.replay_old_pairs import decided_anew, old_decisions
from rlaif.audit.replay_set import ReplaySet, replay_set
from rlaif.audit.replay_settings import settings_of
from rlaif.audit.text_log import text_log
from rlaif.audit.trace import trace
from rlaif.cli import app
from rlaif.learning.replay_index import update_index
from rlaif.records import Preference, Vote
from rlaif.rundir.store import RunDir, write_json
from rlaif.view.report import make_report
from tests.test_old_pairs import Wishes, old_pairs, preferences, went

pytestmark = pytest.mark.slow


def test_the_set_says_what_may_train_and_why_the_rest_may_not(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, {"wish": 1, "tone": 3, "more": 4}]
    run = went(tmp_path, *texts, replay={"max_age": 2})
    found = replay_set(run)
    n = [len(preferences(run, k, "judge")) for k in range(3)]
    assert [(g.constitution, g.mixed_in, g.age, g.pairs, g.may_train) for g in found.groups] == [
        ("rules@3", 2, 1, n[2], n[2]), ("rules@2", 1, 2, n[1], n[1]), ("rules@1", 0, 3, n[0], 0),
    ]  # fmt: skip
    assert found.groups[1].standing == {"kept": n[1]}
    assert found.groups[2].why_not == {"too_old": n[0]}
    assert (found.pairs, found.may_train, found.iteration) == (sum(n), n[1] + n[2], 3)
    told = CliRunner().invoke(app, ["audit", str(run.path), "replay-set"])
    assert told.exit_code == 0, told.output
    assert f"iteration 4 could replay {n[1] + n[2]} of {sum(n)} kept pairs under rules@3" in told.stdout
    as_json = CliRunner().invoke(app, ["audit", str(run.path), "replay-set", "--json"]).stdout
    assert ReplaySet.model_validate_json(as_json) == found


def test_the_set_is_held_against_the_text_of_the_next_iteration(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1}, {"wish": 2}]
    run = went(tmp_path, *texts, schedule={0: "rules@1", 2: "rules@2"}, iterations=2)
    found = replay_set(run)
    assert str(found.constitution) == "rules@2"
    assert (found.may_train, found.may_differ) == (0, None), "as scheduled, and nobody has looked at a pair yet"
    assert [g.why_not for g in found.groups] == [{"unknown": g.pairs} for g in found.groups]
    header = run.header
    write_json(run.path / "run.json", header | {"job": header["job"] | {"schedule": {0: "rules@1", 2: "rules@7"}}})
    found = replay_set(run)
    assert (str(found.constitution), found.may_train) == ("rules@1", found.pairs)
    assert found.may_differ == "the job names rules@7 for it, and the run has no copy of that yet"


def test_the_set_says_where_another_text_may_be_next(tmp_path: Path) -> None:
    """An edit since then lies outside of the run."""
    run = went(tmp_path, {"wish": 1}, constitution="rules", iterations=2)
    found = replay_set(run)
    assert (str(found.constitution), found.may_train) == ("rules@1", found.pairs)
    told = CliRunner().invoke(app, ["audit", str(run.path), "replay-set"]).stdout
    said = "note: another text may be in force then: the job follows `rules`, which is read again then"
    assert said in " ".join(told.split())


@pytest.mark.parametrize("harm", ["gone", "torn", "damaged", "behind", "no state"])
def test_an_index_that_cant_be_used_is_made_again_from_the_log(tmp_path: Path, harm: str) -> None:
    run = went(tmp_path, {"wish": 1}, iterations=3)
    file = run.path / "replay" / "index.jsonl"
    state = run.path / "replay" / "index.json"
    whole, expected = file.read_bytes(), replay_set(run)
    if harm == "gone":
        shutil.rmtree(run.path / "replay")
    elif harm == "torn":
        file.write_bytes(whole[:-9])
    elif harm == "damaged":
        file.write_bytes(b"x" * len(whole))
    elif harm == "behind":
        lines = [line for line in whole.splitlines(keepends=True) if b'"mixed_in":2' not in line]
        file.write_bytes(b"".join(lines))
        write_json(state, {"through": 1, "size": file.stat().st_size})
    else:
        state.unlink()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    assert replay_set(run) == expected
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before, "an audit writes nothing"
    if harm == "damaged":  # its length is right: only who reads it finds out
        return
    update_index(run, 2)
    assert file.read_bytes() == whole


def test_a_stored_run_of_every_schema_has_a_replay_set(stored: RunDir) -> None:
    found = replay_set(stored)
    assert found.pairs == sum(g.pairs for g in found.groups) > 0
    assert {reason for g in found.groups for reason in g.why_not} <= {"unknown", "too_old"}


def test_the_log_of_texts_and_the_set_call_a_pair_the_same(stored: RunDir, tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}]
    back = went(tmp_path, *texts, schedule={0: "rules@1", 1: "rules@2", 2: "rules@1", 3: "rules@2"}, iterations=4)
    for run, expected in ((stored, {"unknown"}), (back, {"expired"})):
        old = text_log(run).texts[-1].old_pairs
        assert old is not None
        now = run.plan(run.iterations()[-1]).constitution.hash
        in_set = Counter[str]()
        for group in (g for g in replay_set(run).groups if g.hash != now):
            in_set += Counter(group.standing)
        assert in_set.keys() == expected
        assert {what: getattr(old, what) for what in in_set} == in_set


def test_an_update_that_mixed_texts_is_told(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}]
    run = went(tmp_path, *texts, replay={"on_change": "keep"})
    others, all_of_it = len(preferences(run, 1, "replay")), len(run.iteration(1).read("preferences", Preference))
    assert others > 0
    line = (
        f"iteration 2: {others} of the {all_of_it} preferences that it trained on were judged under another text than "
        "the one in force (rules@1)"
    )
    told = CliRunner().invoke(app, ["audit", str(run.path)])
    assert f"mixed texts {line}" in told.stdout
    with Index.open(run) as index:
        assert f"An update mixed texts, {line}." in make_report(index, run).caveats
    expiring = went(tmp_path / "expiring", *texts)
    assert "mixed texts" not in CliRunner().invoke(app, ["audit", str(expiring.path)]).stdout


def test_what_judging_again_cost_counts(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}]
    run = went(tmp_path, *texts, replay={"on_change": "rejudge"})
    new = len(run.iteration(1).read("rejudged_votes", Vote))
    with Index.open(run) as index:
        found = overview(index, run)
        asked = index.rows("SELECT count(*) AS n FROM rejudged_votes")[0]["n"]
        stood = index.rows("SELECT sum(asked) AS n FROM old_pairs")[0]["n"]
        turned = old_pairs(run, 1)[0]
        [later] = show(index, run, turned.pair_id).later
    assert (later.constitution, later.standing, later.asked) == ("rules@2", turned.standing, 1)
    told = CliRunner().invoke(app, ["audit", str(run.path), "show", turned.pair_id]).stdout
    assert f"iteration 2, rules@2: {turned.standing}; 3 votes carried over, 1 lost, 1 ballots cast anew" in told
    evaluated = sum(len(run.evaluation(k).read("votes", Vote)) for k in run.evaluations() if k)
    at_change = len(run.iteration(1).read("change_votes", Vote))
    assert asked == stood == new > 0
    assert sum(c.votes for c in found.cost) == found.totals.votes + evaluated + new + at_change
    assert [problem for problem in found.problems if "old_pairs" in problem or "rejudged" in problem] == []


THREE_TEXTS: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, {"wish": (4, 2.0), "tone": 3, "more": 5}]


@pytest.mark.parametrize("on_change", ["rejudge", "expire"])
def test_a_replay_decides_old_pairs_again_as_the_run_did(tmp_path: Path, on_change: str) -> None:
    texts: list[Wishes] = THREE_TEXTS if on_change == "rejudge" else [{"wish": (1, 9.0), "tone": 2}, {"wish": 1}]
    texts = [*texts, {**texts[-1], "new": 6}]
    run = went(tmp_path, *texts, replay={"on_change": on_change})
    decided = {k: sum(r.decision is not None for r in old_pairs(run, k)) for k in run.iterations()}
    found = replay(run, *settings_of(run, run.path))
    assert {o.iteration: o.pairs for o in found.old_pairs} == {k: n for k, n in decided.items() if n} != {}
    for k in decided:
        again = Iteration(run, k, settings_of(run, run.path)[0])
        rows = decided_anew(again)
        assert [(was, now) for was, now in old_decisions(again, rows)] == [(r.decision, r.decision) for r in rows]
    assert (found.problems, found.notes) == ((), ())


def test_a_replay_says_what_other_settings_make_of_old_pairs(tmp_path: Path) -> None:
    run = went(tmp_path, *THREE_TEXTS[:2], replay={"on_change": "rejudge"})
    rows = old_pairs(run, 1)
    [found] = replay(run, *settings_of(run, run.path, overrides=["filters.min_agreement=1"])).old_pairs
    agreed = sum(r.decision is not None and r.decision.verdict.agreement == 1 for r in rows)
    assert (found.pairs, found.kept_after) == (len(rows), agreed)
    assert found.newly_dropped == found.kept_before - agreed > 0
    told = CliRunner().invoke(app, ["audit", str(run.path), "replay", "--set", "filters.min_agreement=1"])
    assert "earlier pairs in iteration" in told.stdout
    # Another reading of the scores asks nothing else.
    [colder] = replay(
        run, *settings_of(run, run.path, overrides=["judge.score_temperature=0.1"], parser=True)
    ).old_pairs
    assert (colder.pairs, colder.kept_after > 0) == (len(rows), True)


def test_a_replay_notices_a_decision_on_an_old_pair_that_doesnt_follow(tmp_path: Path) -> None:
    run = went(tmp_path, *THREE_TEXTS[:2], replay={"on_change": "rejudge"})
    file = run.iteration(1).path / "old_pairs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    n = next(n for n, row in enumerate(old_pairs(run, 1)) if row.decision and row.decision.winner == "first")
    changed = lines[n].replace('"winner":"first"', '"winner":"second"')
    file.write_text("".join([*lines[:n], changed, *lines[n + 1 :]]))
    [found] = replay(run, *settings_of(run, run.path)).old_pairs
    assert (found.reversed, found.newly_kept, found.newly_dropped) == (1, 0, 0)
    told = CliRunner().invoke(app, ["audit", str(run.path), "replay"])
    assert "every decision is as it was made" not in told.stdout
    (run.iteration(0).path / "votes.jsonl").write_text("")
    damaged = replay(run, *settings_of(run, run.path))
    assert damaged.old_pairs == ()
    assert any("the earlier pairs that iteration 2 decided anew are left out" in p for p in damaged.problems)


def test_a_label_that_was_made_anew_is_traced_to_all_its_votes(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, {"wish": 4, "tone": 3}]
    run = went(tmp_path, *texts, iterations=4, replay={"on_change": "rejudge"})
    with Index.open(run) as index:
        found = trace(index, run, "4")
    anew = {(p.iteration, p.pair_id): p for p in found.rows if p.rejudged}
    assert {k for k, _ in anew} == {1, 2, 3}
    for k, pair in anew:
        row = anew[k, pair]
        about = next(r for i in range(k, -1, -1) for r in old_pairs(run, i) if r.pair_id == pair)
        assert about.decision is not None
        parts = [(row.votes_file, row.vote_lines), *((r.votes_file, r.vote_lines) for r in row.rejudged)]
        votes = [
            Vote.model_validate_json(Path(file).read_text().splitlines()[n - 1]) for file, lines in parts for n in lines
        ]
        assert {v.ballot.pair_id for v in votes} == {pair}
        assert len({v.ballot.id for v in votes}) == len(votes) == about.carried + about.lost + about.asked
        # The newest answer of each principle makes the verdict.
        electing = {v.ballot.voice: v.p_first for v in votes if not v.ballot.guard}
        assert about.decision.verdict.p_first == pytest.approx(sum(p or 0 for p in electing.values()) / len(electing))
    assert not [p for p in found.rows if p.source != "replay" and p.rejudged]
    for r in found.iterations:
        rows = [p for p in found.rows if (p.iteration, p.constitution) == (r.iteration, r.constitution)]
        assert r.votes == sum(len(p.vote_lines) + sum(len(v.vote_lines) for v in p.rejudged) for p in rows)
    told = CliRunner().invoke(app, ["audit", str(run.path), "trace", "4", "--limit", "99"], env={"COLUMNS": "300"})
    assert f"{len(row.vote_lines)} in {row.judged_in + 1}: line " in told.stdout
    assert f", 1 in {row.rejudged[-1].iteration + 1}: line " in told.stdout


def test_a_text_that_came_back_is_traced_to_its_own_votes_alone(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1}, {"wish": 2}, {"wish": 1}, replay={"on_change": "rejudge"})
    with Index.open(run) as index:
        rows = trace(index, run, "3").rows
    again = {p.judged_in: bool(p.rejudged) for p in rows if (p.iteration, p.source) == (2, "replay")}
    assert again == {0: False, 1: True}
