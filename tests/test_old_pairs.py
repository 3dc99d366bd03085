"""A new text and old pairs: which votes answer what it asks, what is asked again, and what may train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.text_log import text_log
from rlaif.learning.replay_set import members
from rlaif.records import Decision, OldPair, Preference, Vote
from rlaif.rundir.store import RunDir, write_json
from tests.stubs import Quiet, stub_job, stub_loop

Wishes = dict[str, int | tuple[int, float]]
"""Principle → the number of its words, and its weight where that isn't 1."""


def written(root: Path, version: int, wishes: Wishes, summary: str = "Text.") -> None:
    """`constitutions/rules/v<version>.yaml`: a guard, and principles with contrasts of their own."""
    parts = ["  - {id: answers, rule: Answer the question., guard: true}"]
    for name, wish in wishes.items():
        n, weight = wish if isinstance(wish, tuple) else (wish, 1.0)
        parts.append(
            f"""
  - id: {name}
    rule: Rule {n}.
    weight: {weight}
    prefer: w{20 + n}
    avoid: w{40 + n}
    paraphrases:
      - {{use: select, prefer: w{20 + n} w9, avoid: w{40 + n} w9}}
      - {{use: evaluate, prefer: w{20 + n} w11, avoid: w{40 + n} w11}}"""
        )
    folder = root / "constitutions" / "rules"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"v{version}.yaml").write_text(f"summary: {summary}\nprinciples:\n" + "\n".join(parts) + "\n")


def went(root: Path, *texts: Wishes, progress: Quiet | None = None, **changes: Any) -> RunDir:
    """A run over these texts, each in force for an iteration, the last one to the end of `iterations`."""
    for version, wishes in enumerate(texts, 1):
        written(root, version, wishes)
    tree: dict[str, Any] = {
        "schedule": {k: f"rules@{k + 1}" for k in range(len(texts))},
        "iterations": len(texts),
        "filters": {"min_kept_pairs": 1, "min_agreement": 0.5},
        "eval": {"every": 9, "prompts": 2},
        **changes,
        "replay": {"share": 0.9, **changes.get("replay", {})},
    }
    job = stub_job(**tree)
    loop = stub_loop(root, job, progress=progress)
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": job.model_dump(mode="json")})
    loop.run()
    return RunDir.open(loop.dir.path)


def standing(run: RunDir, k: int) -> Counter[str]:
    return Counter(row.standing for row in old_pairs(run, k))


def old_pairs(run: RunDir, k: int) -> list[OldPair]:
    here = run.iteration(k)
    return here.read("old_pairs", OldPair) if here.is_complete("old_pairs") else []


def preferences(run: RunDir, k: int, source: str) -> list[Preference]:
    return [p for p in run.iteration(k).read("preferences", Preference) if p.source == source]


def cast(root: Path) -> Counter[str]:
    """How often each ballot was cast."""
    return Counter((root / "casts.log").read_text().split())


def test_a_changed_principle_expires_the_pairs_that_were_asked_about_it(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, {"wish": 1, "tone": 3})
    fresh = preferences(run, 0, "judge")
    assert standing(run, 1) == {"expired": len(fresh)}
    [row] = {(r.carried, r.lost, r.asked, r.decision) for r in old_pairs(run, 1)}
    assert row == (3, 1, 0, None), "the guard's two measures and `wish` are asked again as they were, `tone` isn't"
    assert preferences(run, 1, "replay") == []


@pytest.mark.parametrize(
    "after",
    [{"wish": 1, "tone": 2, "more": 3}, {"tone": 2, "wish": 1}, {"wish": (1, 1.01), "tone": 2}],
    ids=["a principle more", "another order", "a weight"],
)
def test_pairs_stay_where_all_that_was_asked_is_asked_again(tmp_path: Path, after: Wishes) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, after)
    fresh = {p.pair_id: p for p in preferences(run, 0, "judge")}
    assert standing(run, 1) == {"kept": len(fresh)}
    again = {p.pair_id: p for p in preferences(run, 1, "replay")}
    assert again
    now = run.plan(1).constitution.hash
    for pair_id, row in again.items():
        was = fresh[pair_id]
        assert row.constitution == now != was.constitution
        assert (row.chosen_id, row.iteration) == (was.chosen_id, 0)
        assert row.p_chosen == pytest.approx(was.p_chosen, abs=0.01)


def test_a_weight_alone_turns_a_pair_without_a_vote(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": (1, 9.0), "tone": 2}, {"wish": (1, 0.1), "tone": 2})
    found = standing(run, 1)
    assert found["turned"] >= 1
    assert found["expired"] == 0
    assert not run.iteration(1).is_complete("rejudged_votes")
    turned = next(row for row in old_pairs(run, 1) if row.standing == "turned")
    [was] = [p for p in preferences(run, 0, "judge") if p.pair_id == turned.pair_id]
    [row] = [p for p in preferences(run, 1, "replay") if p.pair_id == turned.pair_id]
    assert (row.chosen_id, row.chosen, row.chosen_token_ids) == (was.rejected_id, was.rejected, was.rejected_token_ids)
    assert turned.decision is not None
    assert row.p_chosen is not None
    assert row.p_chosen > 0.5


def test_a_text_that_comes_back_finds_its_pairs_as_they_were(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1}, {"wish": 2}, {"wish": 1})
    assert standing(run, 1)["expired"] == len(preferences(run, 0, "judge"))
    assert standing(run, 2) == {"expired": len(preferences(run, 1, "judge"))}
    assert {p.pair_id for p in preferences(run, 2, "replay")} <= {p.pair_id for p in preferences(run, 0, "judge")}
    log = text_log(run).texts
    assert log[2].old_pairs is not None
    assert log[2].old_pairs.valid_again == len(preferences(run, 0, "judge"))


def test_kept_as_judged_is_drawn_more_rarely_and_says_which_text_judged_it(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1}, {"wish": 2}, replay={"on_change": "keep"})
    fresh = {p.pair_id: p for p in preferences(run, 0, "judge")}
    assert standing(run, 1) == {"stale": len(fresh)}
    for row in preferences(run, 1, "replay"):
        assert row == fresh[row.pair_id].model_copy(update={"source": "replay"})


def test_a_run_that_replays_nothing_has_no_such_stage(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1}, {"wish": 2}, replay={"share": 0.0})
    assert not run.iteration(1).is_complete("old_pairs")
    assert "old_pairs" not in {e.kind for e in run.events()}


def test_what_a_change_did_is_told_and_logged(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, {"wish": 1, "tone": 3})
    [event] = [e for e in run.events() if e.kind == "old_pairs"]
    n = len(preferences(run, 0, "judge"))
    assert event.data == {"on_change": "expire", "asked": 0, "expired": n}
    assert event.message == f"old pairs under rules@2: {n} expired"
    found = text_log(run).texts[1].old_pairs
    assert found is not None
    assert (found.expired, found.kept, found.on_change) == (n, 0, "expire")


# Judged again.


def test_only_what_nobody_asked_yet_is_asked(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, replay={"on_change": "rejudge"})
    fresh = preferences(run, 0, "judge")
    new = run.iteration(1).read("rejudged_votes", Vote)
    assert len(new) == len(fresh) > 3
    assert {v.ballot.principles for v in new} == {("tone",)}
    assert {v.ballot.constitution for v in new} == {run.plan(1).constitution.hash}
    assert {(r.carried, r.lost, r.asked) for r in old_pairs(run, 1)} == {(3, 1, 1)}
    assert set(standing(run, 1)) <= {"kept", "turned", "dropped"}
    by_id = {r.pair_id: r for r in old_pairs(run, 1)}
    for row in preferences(run, 1, "replay"):
        decision = by_id[row.pair_id].decision
        assert decision is not None
        assert decision.winner is not None
        assert row.p_chosen == pytest.approx(max(decision.verdict.p_first or 0, 1 - (decision.verdict.p_first or 0)))
    assert set(cast(tmp_path).values()) == {1}


def test_a_verdict_on_carried_and_new_votes_is_that_of_the_whole_panel(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, replay={"on_change": "rejudge"})
    before = {d.pair_id: d for d in run.iteration(0).read("decisions", Decision)}
    votes = {(v.ballot.pair_id, v.ballot.voice): v.p_first for v in run.iteration(0).read("votes", Vote)}
    votes |= {(v.ballot.pair_id, v.ballot.voice): v.p_first for v in run.iteration(1).read("rejudged_votes", Vote)}
    for row in old_pairs(run, 1):
        assert row.decision is not None
        verdict = row.decision.verdict
        electing = [votes[row.pair_id, "wish/main"], votes[row.pair_id, "tone/main"]]
        assert verdict.p_first == pytest.approx(sum(p for p in electing if p is not None) / 2)
        assert verdict.valid_votes == before[row.pair_id].verdict.valid_votes == 2


def test_a_second_change_takes_over_what_the_first_one_asked(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, {"wish": 4, "tone": 3}]
    run = went(tmp_path, *texts, replay={"on_change": "rejudge"})
    new = run.iteration(2).read("rejudged_votes", Vote)
    assert {v.ballot.principles for v in new} == {("wish",)}
    assert {r.iteration for r in old_pairs(run, 2)} == {0, 1}
    assert set(cast(tmp_path).values()) == {1}


def test_a_removed_principle_costs_no_vote(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1, "tone": 2}, {"wish": 1}, replay={"on_change": "rejudge"})
    assert not run.iteration(1).is_complete("rejudged_votes")
    assert {(r.carried, r.lost, r.asked) for r in old_pairs(run, 1)} == {(3, 1, 0)}
    assert "waiting" not in standing(run, 1)


def test_a_budget_takes_the_closest_pairs_first_and_the_next_iteration_goes_on(tmp_path: Path) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}]
    limited = {"on_change": "rejudge", "rejudge": {"calls": 2}}
    run = went(tmp_path, *texts, iterations=4, replay=limited, prompts={"per_iteration": 12})
    n = len(preferences(run, 0, "judge"))
    assert n > 4
    assert standing(run, 1)["waiting"] == n - 2
    wish = {v.ballot.pair_id: v.p_first for v in run.iteration(0).read("votes", Vote) if v.ballot.voice == "wish/main"}
    margins = {r.pair_id: abs((wish[r.pair_id] or 0) - 0.5) for r in old_pairs(run, 1)}
    first = {r.pair_id for r in old_pairs(run, 1) if r.asked}
    assert max(margins[i] for i in first) <= min(margins[i] for i in margins if i not in first)
    assert [len(run.iteration(k).read("rejudged_votes", Vote)) for k in (1, 2, 3)] == [2, 2, min(2, n - 4)]
    assert not {r.pair_id for r in old_pairs(run, 1) if r.asked} & {r.pair_id for r in old_pairs(run, 2)}
    assert "waiting" not in standing(run, 2), "what waits still is no news"
    assert set(cast(tmp_path).values()) == {1}
    found = text_log(run).texts[1].old_pairs
    assert found is not None
    assert (found.waiting, found.rejudged, found.ballots) == (max(n - 6, 0), min(n, 6), min(n, 6))
    found_now = members(run, 4, run.plan(3).constitution.hash)
    waiting = {i for i, m in found_now.items() if m.standing == "waiting"}
    assert len(waiting) == max(n - 6, 0)
    for k in (1, 2, 3):
        assert not waiting & {p.pair_id for p in preferences(run, k, "replay")}
