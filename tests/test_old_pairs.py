"""A new text and old pairs: which votes answer what it asks, what is asked again, and what may train."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from rlaif.audit.index import Index
from rlaif.audit.summary import status_of
from rlaif.audit.text_log import text_log
from rlaif.cli import app
from rlaif.config import Replay
from rlaif.constitutions.copies import constitution_copy
from rlaif.errors import UserError
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.learning.mixing import at_most
from rlaif.learning.replay_set import Member, distinct, draw, members
from rlaif.records import (
    Completion,
    Decision,
    IterationMetrics,
    OldPair,
    Pair,
    PolicyDistance,
    Preference,
    Prompt,
    TokenSequence,
    Vote,
)
from rlaif.review.queue import Queue, sent_to_review
from rlaif.rundir.store import RunDir, read_rows, write_json
from rlaif.view.app import make_app
from tests.conftest import project_job
from tests.kill_driver import in_child
from tests.review.runs import give, key_for, reviewed
from tests.stubs import Quiet, stub_job, stub_logprobs, stub_loop

pytestmark = pytest.mark.slow

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
        **({} if "constitution" in changes else {"schedule": {k: f"rules@{k + 1}" for k in range(len(texts))}}),
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
    replayed = {
        p.pair_id for p in preferences(run, 1, "replay")
    }  # the stub's fresh pairs have twins among the old ones
    turned = next(row for row in old_pairs(run, 1) if row.standing == "turned" and row.pair_id in replayed)
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


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ("expire", "rejudge", {"kept", "turned"}),
        ("expire", "keep", {"stale"}),
        ("keep", "expire", {"expired"}),
        ("keep", "rejudge", {"kept", "turned"}),
        ("rejudge", "expire", {"expired"}),
        ("rejudge", "keep", {"stale"}),
    ],
)
def test_a_run_goes_on_with_another_setting(tmp_path: Path, first: str, then: str, expected: set[str]) -> None:
    """What the first made of the pairs under the same text is looked at again, but for what has all its answers."""
    texts = ({"wish": 1, "tone": 2}, {"wish": 1, "tone": 3})
    limit = {"rejudge": {"calls": 3}} if first == "rejudge" else {}
    run = went(tmp_path, *texts, replay={"on_change": first, **limit})
    before = {row.pair_id: row.standing for row in old_pairs(run, 1)}
    went(tmp_path, *texts, iterations=4, replay={"on_change": then, **limit})
    after = {row.pair_id: row.standing for row in old_pairs(run, 2)}
    answered = {i for i, standing in before.items() if first == "rejudge" and standing != "waiting"}
    assert after.keys() == before.keys() - answered
    assert set(after.values()) <= expected
    assert after
    again = {p.pair_id for p in preferences(run, 2, "replay") if p.iteration == 0}
    assert again == (answered if then == "expire" else {*before})
    assert old_pairs(run, 3) == []


def test_a_mix_that_is_made_is_looked_at_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after it, and gone on with another setting: what nothing trains on isn't asked."""
    texts = ({"wish": 1, "tone": 2}, {"wish": 1, "tone": 3})

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    went(tmp_path, *texts, iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr("rlaif.loop.loop.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            went(tmp_path, *texts)
    here = RunDir(tmp_path / "run").iteration(1)
    for name in ("old_pairs.jsonl", "old_pairs.meta.json"):  # as a version that had no such stage left it
        (here.path / name).unlink()
    run = went(tmp_path, *texts, replay={"on_change": "rejudge"})
    assert not {"rejudged_votes", "old_pairs"} & {p.stem for p in here.path.glob("*.jsonl")}
    assert run.done() == [0, 1]


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


@pytest.mark.parametrize(
    "at",
    [
        "rejudged_votes.jsonl.partial",
        "rejudged_votes.jsonl",
        "old_pairs.meta.json",
        "old_pairs.jsonl",
        "policy_distances.jsonl.partial",
        "preferences.jsonl",
        "index.jsonl",
        "index.json",
    ],
)
def test_a_kill_loses_nothing_and_asks_nobody_twice(tmp_path: Path, at: str) -> None:
    texts: list[Wishes] = [{"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}]
    replay = {"on_change": "rejudge", "rejudge": {"calls": 3}, "half_life": 2, "half_distance": 0.1}

    def killed() -> None:
        real_fsync, real_replace = os.fsync, os.replace
        begun = tmp_path / "killed/run/iterations/0001"

        def die_at(path: str) -> None:
            if path.endswith(f"/{at}") and begun.exists():
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith("votes.jsonl.partial"):
                os.truncate(path, os.stat(path).st_size - (7 if path.endswith(f"/{at}") and begun.exists() else 0))
            die_at(path)
            real_fsync(fd)

        def replace(src: Any, dst: Any) -> None:
            die_at(str(dst))
            real_replace(src, dst)

        os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
        went(tmp_path / "killed", *texts, iterations=3, replay=replay)

    assert in_child(killed) == -signal.SIGKILL
    durable = {v.ballot.id for v in RunDir(tmp_path / "killed/run").iteration(1).durable("rejudged_votes", Vote)}
    before = cast(tmp_path / "killed")
    run = went(tmp_path / "killed", *texts, iterations=3, replay=replay)
    again = cast(tmp_path / "killed") - before
    assert not durable & again.keys()
    whole = went(tmp_path / "whole", *texts, iterations=3, replay=replay)
    for k in (1, 2):
        assert old_pairs(run, k) == old_pairs(whole, k)
        assert preferences(run, k, "replay") == preferences(whole, k, "replay")
    assert [e.message for e in run.events() if e.kind == "old_pairs"] == [
        e.message for e in whole.events() if e.kind == "old_pairs"
    ]
    index = Path("replay") / "index.jsonl"
    assert (run.path / index).read_text() == (whole.path / index).read_text()


class Looks(Quiet):
    """Notes what `rlaif status` says whenever votes came in."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run, self._name, self.seen = run, "", dict[str, str | None]()

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        self._name = name

    def advance(self, n: int) -> None:
        if (self._run / "run.json").exists():
            self.seen[self._name] = status_of(RunDir(self._run)).current_stage


def test_status_names_old_pairs_while_they_are_judged(tmp_path: Path) -> None:
    looks = Looks(tmp_path / "run")
    run = went(
        tmp_path, {"wish": 1, "tone": 2}, {"wish": 1, "tone": 3}, progress=looks, replay={"on_change": "rejudge"}
    )
    assert (looks.seen["judge"], looks.seen["rejudge"]) == ("votes", "old_pairs")
    here = run.iteration(1).path
    for name in ("metrics.json", "updates.jsonl", "preferences.jsonl", "old_pairs.jsonl"):
        (here / name).unlink()
    assert status_of(run).current_stage == "old_pairs", "all is asked, and nothing decided"


# No iteration mixes two texts.


REFERENCE = {"kind": "likelihood", "model": "another"}


class EditsAlways(Quiet):
    """Writes another text whenever the loop says what it is doing."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root, self.edits, self.at = root, 0, set[str]()

    def _edit(self, at: str) -> None:
        self.edits += 1
        self.at.add(at)
        written(self._root, 1, {"wish": self.edits % 15 + 1, "tone": 2 + self.edits % 2})

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        self._edit(name)

    def advance(self, n: int) -> None:
        self._edit("in a stage")

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        self._edit("after an iteration")


@pytest.mark.parametrize("on_change", ["expire", "rejudge"])
def test_no_iteration_mixes_two_texts_whenever_one_is_edited(tmp_path: Path, on_change: str) -> None:
    editing = EditsAlways(tmp_path)
    replay = {"on_change": on_change, "rejudge": {"calls": 9}, "half_distance": 1.0}
    run = went(
        tmp_path, {"wish": 1, "tone": 2}, progress=editing, constitution="rules", iterations=4, replay=replay,
        eval={"every": 1, "prompts": 2, "retention": True, "deciding_voices": True, "reference_judge": REFERENCE},
    )  # fmt: skip
    of_an_iteration = {"new text", "sample", "score", "judge", "update", "after an iteration"}
    of_an_evaluation = {
        "held-out",
        "sanity",
        "untempered",
        "KL",
        "evaluate",
        "deciding",
        "reference",
        "probes",
        "texts",
    }
    assert of_an_iteration | of_an_evaluation | {"earlier text"} <= editing.at
    assert {"rejudge", "distance"} & editing.at == ({"rejudge", "distance"} if on_change == "rejudge" else set())
    texts = [run.plan(k).constitution.hash for k in range(4)]
    assert len(set(texts)) > 2
    for k, text in enumerate(texts):
        here = run.iteration(k)
        asked = here.read("votes", Vote)
        if here.is_complete("rejudged_votes"):
            asked += here.read("rejudged_votes", Vote)
        assert {v.ballot.constitution for v in asked} == {text}
        assert {p.constitution for p in here.read("preferences", Preference)} == {text}
        assert {r.constitution for r in old_pairs(run, k)} <= {text}
        if here.is_complete("change_votes"):
            assert {v.ballot.constitution for v in here.read("change_votes", Vote)} == {text}
        for name in ("votes", "deciding_votes", "reference_votes"):
            assert {v.ballot.constitution for v in run.evaluation(k + 1).read(name, Vote)} == {text}
        if k and run.evaluation(k + 1).is_complete("earlier_votes"):
            before = {v.ballot.constitution for v in run.evaluation(k + 1).read("earlier_votes", Vote)}
            assert before == {*texts[:k]} - {text}


# What is drawn.


def member(pair_id: str, mixed_in: int = 0, standing: str = "valid") -> Member:
    sides = {"prompt_token_ids": (1,), "chosen_token_ids": (2,), "rejected_token_ids": (3,)}
    row = Preference(
        pair_id=pair_id, iteration=mixed_in, source="judge", constitution="t", prompt_id="p", chosen_id=f"{pair_id}-a",
        rejected_id=f"{pair_id}-b", prompt="p", chosen="a", rejected="b", p_chosen=0.9, agreement=1.0, **sides,
    )  # fmt: skip
    return Member(row, mixed_in, None, standing, relabelled=False)


def share_drawn(old: dict[str, Member], settings: Replay, distances: dict[str, float], draws: int = 2000) -> float:
    """How often `a` comes before `b`."""
    first = [draw(old, 1, settings, 4, seed, distances)[0].pair_id for seed in range(draws)]
    return first.count("a") / draws


@pytest.mark.parametrize(
    ("settings", "a", "distance", "expected"),
    [
        ({}, member("a"), 0.0, 1 / 2),
        ({"half_life": 1}, member("a", mixed_in=2), 0.0, 4 / 5),
        ({"half_distance": 0.1}, member("a"), 0.1, 1 / 3),
        ({"stale_weight": 0.25}, member("a", standing="stale"), 0.0, 1 / 5),
        ({"half_distance": 0.1}, member("a"), 1e6, 0.0),
    ],
)
def test_chances_are_as_the_weights_say(settings: dict[str, Any], a: Member, distance: float, expected: float) -> None:
    found = share_drawn({"a": a, "b": member("b")}, Replay(**settings), {"a": distance, "b": 0.0})
    assert found == pytest.approx(expected, abs=0.035)


def test_a_pair_is_drawn_once_and_one_that_may_not_train_never() -> None:
    old = {i: member(i) for i in "abcd"} | {i: member(i, standing="expired") for i in "ef"}
    rows = draw(old, 9, Replay(), 1, 0)
    assert sorted(p.pair_id for p in rows) == list("abcd")
    assert {p.source for p in rows} == {"replay"}
    assert draw(old, 2, Replay(), 1, 0) == rows[:2]
    assert [p.pair_id for p in draw(old, 4, Replay(), 1, 2)] != [p.pair_id for p in rows]


@pytest.mark.parametrize("percent", [10, 30, 40, 50, 60, 75, 90])
def test_a_share_is_the_most_that_is_replayed(percent: int) -> None:
    for fresh in range(100):
        replayed = at_most(percent / 100, fresh)
        assert 100 * replayed <= percent * (fresh + replayed)
        assert 100 * (replayed + 1) > percent * (fresh + replayed + 1), "one more were too many"


def test_a_pair_without_a_distance_counts_as_the_farthest() -> None:
    """Not as unmoved: the rows of a data set would be the likeliest of all."""
    old, settings = {i: member(i) for i in "abc"}, Replay(half_distance=0.1)
    distances = {"b": 0.0, "c": 0.2, "not in the pool": 9.0}
    assert share_drawn(old, settings, distances) == pytest.approx(1 / 6, abs=0.035)
    assert share_drawn(old, settings, {}) == pytest.approx(1 / 3, abs=0.035)


def with_tokens(m: Member, chosen: int, rejected: int) -> Member:
    sides = {"chosen_token_ids": (chosen,), "rejected_token_ids": (rejected,)}
    return m._replace(row=m.row.model_copy(update=sides))


def test_of_twins_the_newest_is_left_and_none_of_what_is_fresh() -> None:
    """The same tokens under several pair ids, whichever side was chosen."""
    old = {
        "9-a": with_tokens(member("9-a", 0), 2, 3),
        "0-a": with_tokens(member("0-a", 1), 3, 2),  # newer, though its id comes before
        "1-a": with_tokens(member("1-a", 2, "expired"), 2, 3),  # the newest that may train counts
        "0-b": with_tokens(member("0-b", 2), 2, 4),
        "0-c": with_tokens(member("0-c", 1), 2, 5),
    }
    fresh = with_tokens(member("3-b", 3), 4, 2).row
    assert sorted(distinct(old, [fresh])) == ["0-a", "0-c"]
    assert distinct(old, [fresh]) == distinct(dict(reversed(old.items())), [fresh])


def test_distances_are_those_of_the_learner_that_trains_on(tmp_path: Path) -> None:
    run = went(tmp_path, {"wish": 1}, iterations=3, replay={"half_distance": 0.5})
    assert not run.iteration(0).is_complete("policy_distances")
    rows = run.iteration(2).read("policy_distances", PolicyDistance)
    assert {d.pair_id for d in rows} == {p.pair_id for k in (0, 1) for p in preferences(run, k, "judge")}
    weights = run.plan(2).policy.digest  # of the stub learner, its digest is all that it computes with
    sampled = {c.id: c for k in (0, 1) for c in run.iteration(k).read("completions", Completion)}
    of_pair = {p.pair_id: p for k in (0, 1) for p in preferences(run, k, "judge")}
    for d in rows:
        p = of_pair[d.pair_id]
        sides = [sampled[p.chosen_id], sampled[p.rejected_id]]
        texts = [TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids) for c in sides]
        now = [sum(logps) for logps in stub_logprobs(weights, texts)]
        moved = sum(abs(a - (c.logprob or 0)) for a, c in zip(now, sides, strict=True))
        assert d.distance == pytest.approx(moved / d.tokens)
        assert d.tokens == sum(len(c.token_ids) for c in sides)
    assert any(d.distance > 0 for d in rows)


# People's labels.


def asked_at_the_terminal(run: RunDir, author: str) -> str:
    return CliRunner().invoke(app, ["review", str(run.path), "--author", author], input="q\n").output


def asked_on_the_page(run: RunDir, author: str) -> str:
    client = TestClient(make_app(run, Index.open(run)), base_url="http://127.0.0.1")
    client.cookies.set("rlaif_author", author)
    shown: str = client.get("/review").text
    return shown


def test_a_person_is_asked_again_under_the_new_text_and_their_word_trains_again(tmp_path: Path) -> None:
    texts: dict[str, Any] = {"schedule": {0: "rules@1", 1: "rules@2"}, "replay": {"share": 0.0, "on_change": "rejudge"}}
    run = reviewed(tmp_path, iterations=1, **texts)
    pair = sent_to_review(run.iteration(0))[0].pair_id
    give(run, pair, "first")
    reviewed(tmp_path, iterations=2, **texts)
    assert run.iteration(1).meta("preferences")["labels"]["stale"] == 1
    queue = Queue(run)
    assert queue.counts().stale == 1
    for _ in range(queue.waiting()):  # those without a label come first, then the author's own of another text
        question = queue.next("ann")
        assert question is not None
        assert not question.again
        queue.answer(question.pair_id, "t", "ann", constitution=question.constitution.hash)
    assert queue.next("bob") is None, "nobody is asked about another's label"
    again = queue.next("ann")
    assert again is not None
    assert (again.pair_id, again.again, again.constitution.hash) == (pair, True, run.plan(1).constitution.hash)
    queue.release("ann")
    assert "you labelled this pair under another text" in asked_at_the_terminal(run, "ann")
    assert "You labelled this pair under another text" in asked_on_the_page(run, "ann")
    assert "Nothing waits for you now" in asked_on_the_page(run, "bob")
    key = key_for(pair, "ann", "first")
    label = queue.answer(pair, key, "ann", constitution=again.constitution.hash)
    assert label.constitution == run.plan(1).constitution.hash
    assert (queue.next("ann"), queue.counts().stale) == (None, 0)
    reviewed(tmp_path, iterations=4, **texts)
    human = [preferences(run, k, "human") for k in range(4)]
    assert [len(rows) for rows in human] == [0, 0, 1, 0]
    assert human[2][0].constitution == run.plan(2).constitution.hash
    with pytest.raises(UserError, match="no text 0123 was in force in this run"):
        queue.answer(pair, key, "ann", constitution="0123")


def test_a_label_of_another_text_trains_again_though_it_names_the_same_side(tmp_path: Path) -> None:
    texts: dict[str, Any] = {"schedule": {0: "rules@1", 2: "rules@2"}, "replay": {"share": 0.0, "on_change": "rejudge"}}
    run = reviewed(tmp_path, iterations=1, **texts)
    pair = sent_to_review(run.iteration(0))[0].pair_id
    give(run, pair, "first")
    reviewed(tmp_path, iterations=3, **texts)
    queue = Queue(run)
    queue.answer(pair, key_for(pair, "ann", "first"), "ann", constitution=run.plan(2).constitution.hash)
    reviewed(tmp_path, iterations=5, **texts)
    human = [[p.constitution for p in preferences(run, k, "human")] for k in range(5)]
    assert human == [[], [run.plan(0).constitution.hash], [], [run.plan(2).constitution.hash], []]


def test_without_rejudge_a_stale_label_waits(tmp_path: Path) -> None:
    texts: dict[str, Any] = {"schedule": {0: "rules@1", 1: "rules@2"}}
    run = reviewed(tmp_path, iterations=1, **texts)
    give(run, sent_to_review(run.iteration(0))[0].pair_id, "first")
    reviewed(tmp_path, iterations=2, **texts)
    queue = Queue(run)
    assert queue.counts().stale == 0
    shown = {d.pair_id for k in (0, 1) for d in sent_to_review(run.iteration(k))}
    questions = [queue.question(i, "ann") for i in shown]
    assert all(q.constitution.hash == run.plan(q.iteration).constitution.hash for q in questions)
    assert not any(q.again for q in questions)


def test_a_limit_that_nothing_counts_against_is_refused() -> None:
    def job(rejudge: dict[str, Any], **judge: Any) -> Any:
        return stub_job(judge=judge, replay={"on_change": "rejudge", "rejudge": rejudge})

    with pytest.raises(UserError, match="`likelihood` counts no tokens"):
        job({"tokens": 100})
    chat = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    assert job({"tokens": 100}, **chat)
    with pytest.raises(UserError, match="no price for `m`, and"):
        job({"money": 1.0}, **chat)
    assert job({"money": 1.0}, **chat, prices={"m": {"prompt": 1, "completion": 1}})


def test_a_real_judge_says_of_an_old_pair_what_it_says_of_a_new_one(tiny_model: Path, tmp_path: Path) -> None:
    """Carried and new votes together are what the judge says when it is asked everything anew; on a real update."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    replay = {"share": 0.5, "on_change": "rejudge", "half_life": 2, "half_distance": 0.5}
    job = project_job(tmp_path, tiny_model, replay=replay)
    written(tmp_path, 1, {"wish": 1, "tone": 2})
    written(tmp_path, 2, {"wish": 1, "tone": 3})
    run = execute(job, tmp_path / "runs" / "tiny", tmp_path, Quiet())
    old = {r.pair_id: r for r in old_pairs(run, 2)}
    assert {(r.carried, r.asked) for r in old.values()} == {(3, 1)}

    kind = kind_of(job.judge)
    judge, name = kind.open(lambda message: None)
    prompts = {p.id: p for p in read_rows(run.path / "prompts" / "train.jsonl", Prompt)}
    pairs = [p for k in (0, 1) for p in run.iteration(k).read("pairs", Pair) if p.id in old]
    sampled = {c.id: c for k in (0, 1) for c in run.iteration(k).read("completions", Completion)}
    asked = [Candidate.of(sampled[i], prompts[p.prompt_id]) for p in pairs for i in (p.first, p.second)]
    text = constitution_copy(run, run.plan(2).constitution.hash)
    ballots = kind.ballots(pairs, text, "decide", job.seed, name)
    anew = by_pair([v for chunk in judge.cast(ballots, pairs, asked, text) for v in chunk])
    for pair_id, row in old.items():
        decision, expected = row.decision, aggregate(anew[pair_id], text.weights)
        assert decision is not None
        assert decision.verdict.p_first == pytest.approx(expected.p_first, abs=1e-3)
        if decision.winner:
            assert decision.winner == expected.outcome

    moved = run.iteration(2).read("policy_distances", PolicyDistance)
    assert {d.pair_id for d in moved} == {i for i, r in old.items() if r.standing in ("kept", "turned")}
    assert all(0 < d.distance < 5 for d in moved)
    still = run.iteration(1).read("policy_distances", PolicyDistance)
    by_iteration = [sum(d.distance for d in rows) / len(rows) for rows in (still, moved)]
    assert by_iteration[1] > by_iteration[0], "two updates move a policy further than one"
