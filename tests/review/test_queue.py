"""The queue: whom it asks what, blind, and that two people don't get the same."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlaif.errors import RlaifError, UserError
from rlaif.judging.filters import certainty
from rlaif.records import Completion, Decision, Pair, Plan
from rlaif.review import queue as queue_module
from rlaif.review.labels import labels_path, read_labels
from rlaif.review.queue import Question, Queue, sent_to_review
from rlaif.rundir.store import RunDir, StageDir
from tests.review.runs import give, review_job, reviewed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reviewed")
    reviewed(root, schedule={0: "rules@1", 2: "rules@2"})
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    import shutil

    shutil.copytree(whole / "run", tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def sent(run: RunDir) -> list[Decision]:
    return [d for k in run.iterations() for d in sent_to_review(run.iteration(k))]


def all_questions(queue: Queue, author: str) -> list[Question]:
    out = []
    while (question := queue.next(author)) is not None:
        out.append(question)
        queue.answer(question.pair_id, "1", author)
    return out


def test_the_queue_is_every_pair_with_status_review(run: RunDir) -> None:
    decided = [d for k in run.iterations() for d in run.iteration(k).read("decisions", Decision)]
    waiting = {d.pair_id for d in decided if d.status == "review"}
    assert len(waiting) > 6
    assert Queue(run).counts().model_dump() == {
        "sent": len(waiting), "waiting": len(waiting), "claimed": 0, "labelled": 0, "stale": 0, "joined": 0,
        "outcomes": {}, "authors": {},
    }  # fmt: skip
    assert {q.pair_id for q in all_questions(Queue(run), "ann")} == waiting


def test_waiting_is_what_counts_say(run: RunDir) -> None:
    queue = Queue(run)
    assert queue.waiting() == queue.counts().waiting == len(sent(run))
    for n, d in enumerate(sent(run)[:3], 1):
        give(run, d.pair_id, "first")
        assert queue.waiting() == queue.counts().waiting == len(sent(run)) - n


class Growing(RunDir):
    """A run with one iteration more at every look; each is the first one over again, without its decisions' pairs."""

    grown = 0

    def iterations(self) -> list[int]:
        self.grown += 1
        return [*super().iterations(), *range(1000, 1000 + self.grown)]

    def iteration(self, k: int) -> StageDir:
        return super().iteration(k if k < 1000 else 0)

    def plan(self, k: int) -> Plan:
        return super().plan(k if k < 1000 else 0)


def test_requests_on_many_threads_read_a_growing_run(run: RunDir) -> None:
    queue, ids = Queue(Growing.open(run.path)), [d.pair_id for d in sent(run)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # another request finds a new iteration while this one looks at those that are known
    try:
        with ThreadPoolExecutor(8) as threads:
            asked = list(threads.map(lambda n: queue.question(ids[n % len(ids)], "ann").pair_id, range(160)))
    finally:
        sys.setswitchinterval(before)
    assert asked == [ids[n % len(ids)] for n in range(160)]


def test_held_out_pairs_are_never_asked_about(run: RunDir) -> None:
    held_out = [d for k in run.evaluations() if k for d in run.evaluation(k).read("decisions", Decision)]
    assert held_out
    assert {d.status for d in held_out} <= {"kept", "dropped"}


def test_the_newest_text_comes_first_then_the_newest_iteration_then_the_least_certain(run: RunDir) -> None:
    order = [q.pair_id for q in all_questions(Queue(run), "ann")]
    expected = [d.pair_id for k in (3, 2, 1, 0) for d in sorted(sent_to_review(run.iteration(k)), key=certainty)]
    assert order == expected


def test_a_question_is_blind(run: RunDir) -> None:
    for d in sent(run):
        told = json.dumps(Queue(run).question(d.pair_id, "ann").model_dump(mode="json"))
        for word in ("p_first", "agreement", "winner", "verdict", "reasons", 'first"', 'second"'):
            assert word not in told
    assert "rule: Answer the question." in Queue(run).question(sent(run)[0].pair_id, "ann").constitution_source


def test_sides_are_drawn_for_each_pair_and_author(run: RunDir) -> None:
    swapped = set()
    for k in run.iterations():
        texts = {c.id: c.text for c in run.iteration(k).read("completions", Completion)}
        pairs = {p.id: p for p in run.iteration(k).read("pairs", Pair)}
        for d in sent_to_review(run.iteration(k)):
            first = texts[pairs[d.pair_id].first]
            for author in ("ann", "bob"):
                question = Queue(run).question(d.pair_id, author)
                assert question == Queue(run).question(d.pair_id, author)
                swapped.add((author, question.shown[0] != first))
            by_author = [Queue(run).question(d.pair_id, a).shown[0] for a in ("ann", "bob", "cy", "di", "eve", "flo")]
            assert set(by_author) <= set(question.shown)
    assert swapped == {(author, side) for author in ("ann", "bob") for side in (True, False)}


def test_an_answer_is_mapped_back_to_the_pairs_sides(run: RunDir) -> None:
    k = run.iterations()[-1]
    texts = {c.id: c.text for c in run.iteration(k).read("completions", Completion)}
    pairs = {p.id: p for p in run.iteration(k).read("pairs", Pair)}
    for d in sent_to_review(run.iteration(k)):
        for author in ("ann", "bob", "cy"):
            shown = Queue(run).question(d.pair_id, author).shown
            label = Queue(run).answer(d.pair_id, "2", author)
            assert label.outcome in ("first", "second")
            named = pairs[d.pair_id].first if label.outcome == "first" else pairs[d.pair_id].second
            assert texts[named] == shown[1]
            assert (label.iteration, label.author) == (k, author)
    assert Queue(run).answer(d.pair_id, "t", "ann").outcome == "tie"
    assert Queue(run).answer(d.pair_id, "s", "ann").outcome == "skip"


def test_two_reviewers_get_different_pairs_and_the_last_one_nothing(run: RunDir) -> None:
    queue, total = Queue(run), len(sent(run))
    shown = [queue.next(f"author {n}") for n in range(total + 1)]
    assert shown[-1] is None
    assert len({q.pair_id for q in shown if q}) == total
    assert (queue.counts().waiting, queue.counts().claimed) == (total, total)


def test_asking_again_without_an_answer_gets_the_same_pair(run: RunDir) -> None:
    assert Queue(run).next("ann") == Queue(run).next("ann")
    assert Queue(run).counts().claimed == 1


def test_two_terminals_of_one_author_get_different_pairs_where_there_are_enough(run: RunDir) -> None:
    queue, total = Queue(run), len(sent(run))
    for d in sent(run)[: total - 2]:
        give(run, d.pair_id, "first")
    one, other = queue.next("ann", "1"), queue.next("ann", "2")
    assert one
    assert other
    assert one.pair_id != other.pair_id
    queue.answer(one.pair_id, "1", "ann", session="1")
    again = queue.next("ann", "1")
    assert again
    assert again.pair_id == other.pair_id


def test_a_released_or_expired_claim_frees_the_pair(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(run)
    first = queue.next("ann")
    assert first
    assert queue.next("bob") != first
    queue.release("ann")
    cy = queue.next("cy")
    assert cy
    assert cy.pair_id == first.pair_id
    now = queue_module.time.time()
    monkeypatch.setattr(queue_module.time, "time", lambda: now + queue_module.CLAIM_S + 1)
    di = queue.next("di")
    assert di
    assert di.pair_id == first.pair_id


def test_damaged_claims_cost_nothing(run: RunDir) -> None:
    queue = Queue(run)
    queue.next("ann")
    for damage in ("{", "[]", '{"a": 1}', '{"a": {"author": "x"}}'):
        (run.path / "review" / "claims.json").write_text(damage)
        assert queue.next("ann")


def test_a_skip_leaves_the_pair_to_others_and_comes_last_for_the_skipper(run: RunDir) -> None:
    queue = Queue(run)
    first = queue.next("ann")
    assert first
    queue.answer(first.pair_id, "s", "ann")
    bob = queue.next("bob")
    assert bob
    assert bob.pair_id == first.pair_id
    queue.release("bob")
    left = [queue.next("ann")]
    while left[-1] and left[-1].pair_id != first.pair_id:
        queue.answer(left[-1].pair_id, "t", "ann")
        left.append(queue.next("ann"))
    assert left[-1]
    assert len(left) == len(sent(run))


def test_counts(run: RunDir) -> None:
    pairs = [d.pair_id for d in sent(run)]
    give(run, pairs[0], "first")
    give(run, pairs[1], "second", "bob")
    give(run, pairs[1], "first", "bob")
    Queue(run).answer(pairs[2], "s", "bob")
    Queue(run).answer(pairs[3], "t", "ann")
    counts = Queue(run).counts()
    assert (counts.labelled, counts.waiting) == (3, len(pairs) - 3)
    assert counts.outcomes == {"first": 2, "tie": 1}
    assert counts.authors == {"ann": 2, "bob": 1}


def test_counting_writes_nothing(run: RunDir) -> None:
    before = sorted(run.path.rglob("*"))
    Queue(run).counts()
    assert sorted(run.path.rglob("*")) == before


def test_the_queue_keeps_up_with_a_growing_run(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=1)
    queue = Queue(run)
    before = queue.counts().sent
    reviewed(tmp_path, iterations=2)
    assert queue.counts().sent == len(sent(run)) > before


def test_what_is_no_answer_is_refused(run: RunDir) -> None:
    pair = sent(run)[0].pair_id
    kept = next(d for d in run.iteration(0).read("decisions", Decision) if d.status == "kept")
    with pytest.raises(UserError, match="no pair nonsense was sent to review"):
        Queue(run).answer("nonsense", "1", "ann")
    with pytest.raises(UserError, match=f"no pair {kept.pair_id} was sent to review"):
        Queue(run).answer(kept.pair_id, "1", "ann")
    with pytest.raises(UserError, match="expected 1, 2"):
        Queue(run).answer(pair, "first", "ann")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the name"):
        Queue(run).answer(pair, "1", "  ")
    assert not labels_path(run).exists()


def test_a_pair_whose_completion_is_gone_is_one_clear_line(run: RunDir) -> None:
    path = run.iteration(0).path / "completions.jsonl"
    path.write_text("")
    with pytest.raises(RlaifError, match=r"0000/completions\.jsonl: .* is missing"):
        Queue(run).question(sent_to_review(run.iteration(0))[0].pair_id, "ann")


def test_problems_of_the_labels_are_told(run: RunDir) -> None:
    give(run, sent(run)[0].pair_id, "first")
    labels_path(run).write_bytes(b"{damaged\n" + labels_path(run).read_bytes())
    queue = Queue(run)
    assert queue.counts().labelled == 1
    assert len(queue.problems) == len(read_labels(run).problems) == 1


def test_a_run_without_review_has_an_empty_queue(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=1, filters={"min_kept_pairs": 1})
    assert Queue(run).counts().sent == 0
    assert Queue(run).next("ann") is None
    assert review_job().filters.review is not None


def test_what_can_still_be_read_is_asked_about(run: RunDir) -> None:
    before = {k: [d.pair_id for d in sent_to_review(run.iteration(k))] for k in run.iterations()}
    path = run.iteration(0).path / "decisions.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    at = next(n for n, row in enumerate(rows) if before[0][0] in row)
    rows[at] = rows[at].replace('"agreement":', '"agreement":"high","was":', 1)
    path.write_text("".join(rows))
    plan = run.iteration(2).path / "plan.json"
    plan.unlink()
    queue = Queue(run)
    assert queue.counts().sent == sum(map(len, before.values())) - 1 - len(before[2])
    assert queue.next("ann") is not None
    assert [p.partition(": ")[0] for p in queue.problems] == [f"{path}:{at + 1}", str(plan)]
    assert all(p.endswith("left out") for p in queue.problems)


def first_waiting(run: RunDir) -> tuple[str, int]:
    question = Queue(run).next("zoe")
    assert question is not None
    Queue(run).release("zoe")
    return question.pair_id, question.iteration


def test_a_damaged_completion_costs_its_pair_only(run: RunDir) -> None:
    pair_id, k = first_waiting(run)
    (pair,) = (p for p in run.iteration(k).read("pairs", Pair) if p.id == pair_id)
    path = run.iteration(k).path / "completions.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    at = next(n for n, row in enumerate(rows) if f'"{pair.first}"' in row)
    rows[at] = rows[at][: len(rows[at]) // 2] + "\n"
    path.write_text("".join(rows))
    shared = {p.id for p in run.iteration(k).read("pairs", Pair) if pair.first in (p.first, p.second)}
    queue = Queue(run)
    asked = {q.pair_id for q in all_questions(queue, "ann")}
    assert asked == {d.pair_id for d in sent(run)} - shared
    assert queue.problems
    assert all(p.startswith(f"{path}:{at + 1}: ") and p.endswith("; its pair is left out") for p in queue.problems)
    assert json.loads((run.path / "review" / "claims.json").read_text()) == {}


@pytest.mark.parametrize("damage", ["gone", "{", "{}"])
def test_a_damaged_text_costs_its_pairs_only(run: RunDir, damage: str) -> None:
    texts = {k: run.plan(k).constitution.hash for k in run.iterations()}
    newest = texts[max(texts)]
    path = run.path / "constitutions" / newest / "constitution.json"
    path.unlink() if damage == "gone" else path.write_text(damage)
    queue = Queue(run)
    asked = {q.iteration for q in all_questions(queue, "ann")}
    assert asked == {k for k, text in texts.items() if text != newest}
    assert {p.partition(": ")[0].removesuffix(":1") for p in queue.problems} == {str(path)}


@pytest.mark.parametrize("content", [None, b"\xffsummary: what is left\n"])
def test_a_damaged_source_costs_nothing(run: RunDir, content: bytes | None) -> None:
    for path in (run.path / "constitutions").glob("*/source.yaml"):
        path.unlink() if content is None else path.write_bytes(content)
    question = Queue(run).next("ann")
    assert question is not None
    expected = "(the run's copy is missing)" if content is None else "\ufffdsummary: what is left\n"
    assert question.constitution_source == expected


def test_without_prompts_nothing_is_asked_and_one_line_says_why(run: RunDir) -> None:
    path = run.path / "prompts" / "train.jsonl"
    path.rename(path.with_suffix(".away"))
    queue = Queue(run)
    assert queue.next("ann") is None
    assert queue.problems == (f"{path}: No such file or directory; its pair is left out",)
    path.with_suffix(".away").rename(path)
    assert queue.next("ann") is not None  # as soon as it is back
    assert queue.problems == ()


def test_what_joined_is_counted_as_far_as_it_is_known(run: RunDir) -> None:
    meta = run.iteration(1).path / "updates.meta.json"
    meta.write_text("{}")
    queue = Queue(run)
    assert queue.counts().sent == len(sent(run))
    (problem,) = queue.problems
    assert problem.startswith(f"{meta}: not the meta file of a stage")


def test_a_label_that_is_stored_is_no_failure(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(run)
    question = queue.next("ann")
    assert question is not None

    def full(path: Path) -> None:
        raise RlaifError(f"{path.name}: no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "replacing", full)
        queue.answer(question.pair_id, "1", "ann")
    assert [x.pair_id for x in read_labels(run).labels] == [question.pair_id]
