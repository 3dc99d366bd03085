"""Labels join training at the next iteration, ahead of the judge's; none is lost, none joins twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlaif.learning import mixing
from rlaif.records import Completion, Decision, Pair, Preference, Side, UpdateStep
from rlaif.review.labels import labels_path, read_labels
from rlaif.review.queue import Queue, sent_to_review
from rlaif.rundir.store import RunDir
from tests.kill_driver import in_child
from tests.review.runs import give, loop_of, review_job, reviewed

pytestmark = pytest.mark.slow


def go_on(root: Path, iterations: int, **changes: Any) -> RunDir:
    return reviewed(root, iterations=iterations, **changes)


def preferences(run: RunDir, k: int, source: str | None = None) -> list[Preference]:
    rows = run.iteration(k).read("preferences", Preference)
    return [p for p in rows if source in (None, p.source)]


def metrics(run: RunDir, k: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.iteration(k).path / "metrics.json").read_text())
    return found


def kinds(run: RunDir) -> list[tuple[str, int | None]]:
    return [(e.kind, e.iteration) for e in run.events()]


def other(side: str) -> Side:
    return "second" if side == "first" else "first"


def test_labels_join_the_next_iteration_ahead_of_the_judges(tmp_path: Path) -> None:
    run = go_on(tmp_path, 2)
    asked = [d for k in (0, 1) for d in sent_to_review(run.iteration(k))]
    assert len(asked) >= 4
    against = {d.pair_id: other(d.verdict.outcome) for d in asked}
    for pair, side in against.items():
        give(run, pair, side)
    go_on(tmp_path, 3)

    rows = preferences(run, 2)
    human = [p for p in rows if p.source == "human"]
    assert {p.pair_id for p in human} == set(against)
    assert rows[: len(human)] == human
    assert {p.source for p in rows[len(human) :]} == {"judge"}
    steps = run.iteration(2).read("updates", UpdateStep)
    assert set(against) <= {pair for step in steps for pair in step.row_ids}
    assert metrics(run, 2)["human_pairs"] == len(human)
    assert metrics(run, 2)["trained_pairs"] == len(rows)
    assert ("labels_joined", 2) in kinds(run)

    for p in human:
        here = run.iteration(p.iteration)
        pair = next(x for x in here.read("pairs", Pair) if x.id == p.pair_id)
        of = {c.id: c for c in here.read("completions", Completion)}
        verdict = next(d.verdict for d in here.read("decisions", Decision) if d.pair_id == p.pair_id)
        chosen = pair.first if against[p.pair_id] == "first" else pair.second
        assert (p.chosen_id, {p.chosen_id, p.rejected_id}) == (chosen, {pair.first, pair.second})
        assert (p.chosen_token_ids, p.rejected_token_ids) == (of[p.chosen_id].token_ids, of[p.rejected_id].token_ids)
        assert (p.chosen, p.rejected) == (of[p.chosen_id].text, of[p.rejected_id].text)
        assert verdict.p_first is not None
        assert p.p_chosen == (verdict.p_first if chosen == pair.first else 1 - verdict.p_first)
        assert p.agreement == verdict.agreement

    meta = run.iteration(2).meta("preferences")["labels"]
    content = labels_path(run).read_bytes()
    assert meta["joined"] == against
    assert meta["sha256"] == hashlib.sha256(content[: meta["size"]]).hexdigest()


def test_pairs_in_review_train_only_when_labelled(tmp_path: Path) -> None:
    run = go_on(tmp_path, 2)
    for k in (0, 1):
        decisions = run.iteration(k).read("decisions", Decision)
        assert {p.pair_id for p in preferences(run, k)} == {d.pair_id for d in decisions if d.status == "kept"}
        found = metrics(run, k)
        counted = found["kept"] + found["review"] + sum(found["dropped_by_first_reason"].values())
        assert counted == found["pairs"] == len(decisions)
        assert found["review"] == len(sent_to_review(run.iteration(k))) > 0
        assert all(d.winner is None and d.review_rule for d in decisions if d.status == "review")
        assert all(d.review_rule is None for d in decisions if d.status != "review")


def test_ties_and_skips_never_train(tmp_path: Path) -> None:
    run = go_on(tmp_path, 1)
    for d, key in zip(sent_to_review(run.iteration(0)), ("t", "s", "t", "s"), strict=False):
        Queue(run).answer(d.pair_id, key, "ann")  # type: ignore[arg-type]
    go_on(tmp_path, 2)
    assert preferences(run, 1, "human") == []
    assert len(read_labels(run).labels) > 1


def test_a_label_joins_once_and_again_when_it_names_the_other_side(tmp_path: Path) -> None:
    run = go_on(tmp_path, 1)
    pair = sent_to_review(run.iteration(0))[0].pair_id
    give(run, pair, "first")
    go_on(tmp_path, 2)
    give(run, pair, "first", "bob")
    go_on(tmp_path, 3)
    give(run, pair, "second", "bob")
    go_on(tmp_path, 4)
    joined = {k: preferences(run, k, "human") for k in range(4)}
    assert {k: len(rows) for k, rows in joined.items()} == {0: 0, 1: 1, 2: 0, 3: 1}
    assert joined[1][0].chosen_id == joined[3][0].rejected_id
    assert Queue(run).counts().joined == 1


def test_a_label_under_another_text_waits_until_its_own_is_in_force_again(tmp_path: Path) -> None:
    texts = {"schedule": {0: "rules@1", 1: "rules@2", 3: "rules@1"}}
    run = go_on(tmp_path, 1, **texts)
    pair = sent_to_review(run.iteration(0))[0].pair_id
    give(run, pair, "first")
    go_on(tmp_path, 4, **texts)
    assert [len(preferences(run, k, "human")) for k in range(4)] == [0, 0, 0, 1]
    assert run.iteration(1).meta("preferences")["labels"]["stale"] == 1
    assert [x for x in kinds(run) if x[0].startswith("labels")] == [("labels_stale", 1), ("labels_joined", 3)]


def test_labels_count_for_the_least_number_of_pairs_and_a_skipped_update_owes_them(tmp_path: Path) -> None:
    def many(least: int) -> dict[str, Any]:
        return {"filters": {"min_kept_pairs": least, "review": {"top_uncertain": 4}}}

    run = go_on(tmp_path / "a", 2, **many(4))
    fresh = len(preferences(run, 1, "judge"))
    assert run.iteration(1).meta("updates")["skipped"] is (fresh < 4) is True
    asked = [d.pair_id for k in (0, 1) for d in sent_to_review(run.iteration(k))]
    give(run, asked[0], "first")
    go_on(tmp_path / "a", 3, **many(4))
    assert len(preferences(run, 2)) < 4, "the next assertion is about a skipped update"
    assert Queue(run).counts().joined == 0
    for pair in asked[1:]:
        give(run, pair, "second")
    go_on(tmp_path / "a", 4, **many(4))
    assert run.iteration(3).meta("updates")["skipped"] is False
    assert {p.pair_id for p in preferences(run, 3, "human")} == set(asked)
    assert Queue(run).counts().joined == len(asked)


def test_replay_comes_last_and_has_a_labelled_pair_as_its_label_has_it_now(tmp_path: Path) -> None:
    replay = {"replay": {"share": 0.9, "max_age": 4}}
    run = go_on(tmp_path, 1, **replay)
    pairs = [d.pair_id for d in sent_to_review(run.iteration(0))][:3]
    for pair in pairs:
        give(run, pair, "first")
    go_on(tmp_path, 2, **replay)
    assert {p.pair_id for p in preferences(run, 1, "human")} == set(pairs)
    give(run, pairs[0], "second")  # joins anew, so nothing of it is replayed
    Queue(run).answer(pairs[1], "t", "ann")  # names no side any more
    go_on(tmp_path, 4, **replay)
    for k in (2, 3):
        sources = [p.source for p in preferences(run, k)]
        assert sources == sorted(sources, key=["human", "judge", "replay"].index)
    assert [p.pair_id for p in preferences(run, 2, "human")] == pairs[:1]
    again = {p.pair_id: p for p in preferences(run, 2, "replay")}
    assert pairs[2] in again, "with a share of 0.9 all older pairs are replayed"
    assert not {pairs[0], pairs[1]} & set(again)
    later = {p.pair_id: p for p in preferences(run, 3, "replay")}
    assert later[pairs[0]].chosen_id == preferences(run, 2, "human")[0].chosen_id
    assert pairs[1] not in later


def test_a_label_on_a_pair_that_was_never_in_review_is_told_and_left_out(tmp_path: Path) -> None:
    run = go_on(tmp_path, 1)
    good = sent_to_review(run.iteration(0))[0].pair_id
    row = give(run, good, "first")
    stranger = row.model_copy(update={"pair_id": "stranger"})
    labels_path(run).write_text("{damaged\n" + labels_path(run).read_text() + stranger.model_dump_json() + "\n")
    go_on(tmp_path, 2)
    assert [p.pair_id for p in preferences(run, 1, "human")] == [good]
    told = [e.message for e in run.events() if e.kind == "alarm"]
    assert [m.split("review/")[1][:15] for m in told] == ["labels.jsonl:1:", "labels.jsonl: n"]
    assert "no pair stranger was sent to review" in told[1]


@pytest.mark.parametrize("at", ["preferences.jsonl.partial", "preferences.meta.json", "preferences.jsonl"])
def test_a_kill_in_the_mix_stage_loses_no_label(tmp_path: Path, at: str) -> None:
    run = go_on(tmp_path, 1)
    asked = [d.pair_id for d in sent_to_review(run.iteration(0))]
    assert len(asked) >= 2
    give(run, asked[0], "first")

    def killed() -> None:
        real_fsync, real_replace = os.fsync, os.replace

        def fsync(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(f"0001/{at}"):
                os.kill(os.getpid(), signal.SIGKILL)
            real_fsync(fd)

        def replace(src: Any, dst: Any) -> None:
            if str(dst).endswith(f"0001/{at}"):
                os.kill(os.getpid(), signal.SIGKILL)
            real_replace(src, dst)

        os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
        loop_of(tmp_path, review_job(iterations=2)).run()

    assert in_child(killed) == -signal.SIGKILL
    assert not run.iteration(1).is_complete("preferences")
    give(run, asked[1], "second")
    go_on(tmp_path, 2)
    assert {p.pair_id for p in preferences(run, 1, "human")} == {asked[0], asked[1]}
    assert [x for x in kinds(run) if x[0] == "labels_joined"] == [("labels_joined", 1)]
    assert len(read_labels(run).labels) == 2
    go_on(tmp_path, 3)
    assert preferences(run, 2, "human") == []


def test_a_label_that_comes_while_the_stage_runs_joins_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = go_on(tmp_path, 1)
    asked = [d.pair_id for d in sent_to_review(run.iteration(0))]
    give(run, asked[0], "first")
    real = mixing.labelled

    def labelled(run: RunDir, *read: Any) -> Any:
        if len(read_labels(run).labels) == 1:
            give(run, asked[1], "second")
        return real(run, *read)

    monkeypatch.setattr("rlaif.loop.training.labelled", labelled)
    go_on(tmp_path, 3)
    assert [[p.pair_id for p in preferences(run, k, "human")] for k in (1, 2)] == [[asked[0]], [asked[1]]]


def test_a_run_without_labels_says_nothing_about_them(tmp_path: Path) -> None:
    run = go_on(tmp_path, 2)
    assert "labels" not in run.iteration(1).meta("preferences")
    assert not [x for x in kinds(run) if x[0].startswith("labels")]
