"""Queries against straightforward Python over the run directory's own files."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.compare import compare
from rlaif.audit.explain import rule_in_words
from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.pair import question, question_of, show
from rlaif.audit.pairs import PairFilter, Sort, list_pairs, splits
from rlaif.audit.trace import trace
from rlaif.config import Filters
from rlaif.errors import UserError
from rlaif.judging.calibration import Calibration, panels_of
from rlaif.judging.verdicts import by_pair
from rlaif.records import Completion, Decision, Pair, Preference, Prompt, UpdateStep, Verdict, Vote
from rlaif.rundir.store import RunDir, read_json, read_rows, write_json
from tests.audit.conftest import STORED
from tests.data.make_run import write_header
from tests.review.runs import reviewed
from tests.stubs import stub_job, stub_loop

pytestmark = pytest.mark.slow

Facts = dict[str, Any]
OPENINGS = {"pairwise": "You compare two answers", "pairwise_evaluate": "Someone wrote these guidelines"}
"""How the judge's templates begin."""


def facts(run: RunDir, evaluation: bool = False) -> dict[str, Facts]:
    """Pair id → what the files say about it, in the order of the log."""
    prompts = {p.id: p.text for n in ("train", "held_out") for p in read_rows(run.path / f"prompts/{n}.jsonl", Prompt)}
    out: dict[str, Facts] = {}
    answers: dict[str, str] = {}
    for k in run.evaluations():
        answers |= {c.id: c.text for c in run.evaluation(k).read("completions", Completion)}
    for k in run.evaluations() if evaluation else run.iterations():
        here = run.evaluation(k) if evaluation else run.iteration(k)
        if not here.is_complete("pairs"):
            continue
        answers |= {c.id: c.text for c in here.read("completions", Completion)}
        text = read_json(here.path / ("metrics.json" if evaluation else "plan.json"))["constitution"]
        decisions = {d.pair_id: d for d in here.read("decisions", Decision)}
        votes: dict[str, list[Vote]] = defaultdict(list)
        for v in here.read("votes", Vote):
            votes[v.ballot.pair_id].append(v)
        for p in here.read("pairs", Pair):
            out[p.id] = {
                "number": k, "pair": p, "decision": decisions[p.id], "votes": votes[p.id],
                "text": f"{text['name']}@{text['version']}", "hash": text["hash"],
                "words": " | ".join([prompts[p.prompt_id], answers[p.first], answers[p.second]]).lower(),
                "length": len(answers[p.first]) + len(answers[p.second]),
            }  # fmt: skip
    return out


def disagreeing(f: Facts) -> bool:
    """Two voices, each of one mind over all its votes, name different sides."""
    voices = defaultdict(set)
    for v in f["votes"]:
        if not v.ballot.guard:
            b = v.ballot
            voices[b.judge, b.voice, b.principles, b.sample_index].add(v.outcome)
    sides = {next(iter(o)) for o in voices.values() if len(o) == 1}
    return {"first", "second"} <= sides


def agreement_in(low: float, high: float) -> Callable[[Facts], bool]:
    return lambda f: (a := f["decision"].verdict.agreement) is not None and low <= a <= high


ASKED: list[tuple[Facts, Callable[[Facts], bool]]] = [
    ({}, lambda f: True),
    ({"iteration": 2}, lambda f: f["number"] == 2),
    ({"constitution": "rules@2"}, lambda f: f["text"] == "rules@2"),
    ({"status": "kept"}, lambda f: f["decision"].status == "kept"),
    ({"status": "review"}, lambda f: f["decision"].status == "review"),
    ({"reason": "order_flip"}, lambda f: "order_flip" in f["decision"].reasons),
    ({"reason": "low_agreement"}, lambda f: "low_agreement" in f["decision"].reasons),
    ({"principle": "wish"}, lambda f: any("wish" in v.ballot.principles for v in f["votes"])),
    ({"principle": "no_such"}, lambda f: False),
    ({"judge": "contrary"}, lambda f: any("contrary" in v.ballot.judge for v in f["votes"])),
    ({"min_agreement": 0.7}, agreement_in(0.7, 1)),
    ({"max_agreement": 0.8}, agreement_in(0, 0.8)),
    ({"flipped": True}, lambda f: f["decision"].verdict.order_flip),
    ({"flipped": False}, lambda f: not f["decision"].verdict.order_flip),
    ({"disagreeing": True}, disagreeing),
    ({"disagreeing": False}, lambda f: not disagreeing(f)),
    ({"text": "QUESTION 1"}, lambda f: "question 1" in f["words"]),
    ({"text": "answer 0.5"}, lambda f: "answer 0.5" in f["words"]),
    ({"text": "100%"}, lambda f: False),
    ({"text": "n 1", "disagreeing": True, "constitution": "rules@1"},
     lambda f: "n 1" in f["words"] and disagreeing(f) and f["text"] == "rules@1"),
]  # fmt: skip


@pytest.fixture(params=["stored chat run", "likelihood stub"])
def run(request: pytest.FixtureRequest, stored: RunDir, tmp_path: Path) -> RunDir:
    if request.param == "stored chat run":
        return stored
    job = stub_job(filters={"min_agreement": 0.6, "min_kept_pairs": 3})
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    return RunDir.open(tmp_path / "run")


@pytest.mark.parametrize("evaluation", [False, True])
def test_every_filter_finds_what_the_files_say(run: RunDir, evaluation: bool) -> None:
    expected = facts(run, evaluation)
    seen = 0
    with Index.open(run) as index:
        for fields, wanted in ASKED:
            page = list_pairs(index, PairFilter(**fields, evaluation=evaluation), limit=1000)
            ids = [i for i, f in expected.items() if wanted(f)]
            assert [r.pair_id for r in page.rows] == ids, fields
            assert page.total == len(ids)
            seen += 0 < len(ids) < len(expected)
    assert seen >= (2 if evaluation else 7)  # or the filters were tried on nothing


def test_a_hash_prefix_names_a_constitution(stored: RunDir) -> None:
    wanted = next(f for f in facts(stored).values() if f["text"] == "rules@2")
    with Index.open(stored) as index:
        by_hash = list_pairs(index, PairFilter(constitution=wanted["hash"][:6]))
        assert by_hash == list_pairs(index, PairFilter(constitution="rules@2"))
        assert by_hash.total == 10


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", ["log", "agreement", "margin", "length"])
def test_sorts_and_pages(stored: RunDir, sort: Sort, descending: bool) -> None:
    found = facts(stored)
    keys: dict[str, Callable[[str], float]] = {
        "log": lambda i: list(found).index(i),
        "agreement": lambda i: found[i]["decision"].verdict.agreement,
        "margin": lambda i: abs(found[i]["decision"].verdict.p_first - 0.5),
        "length": lambda i: found[i]["length"],
    }
    expected = sorted(found, key=keys[sort], reverse=descending)  # equal ones stay in the order of the log
    with Index.open(stored) as index:
        pages = [list_pairs(index, None, sort, descending, limit=7, offset=n) for n in range(0, 28, 7)]
    ids = [r.pair_id for page in pages for r in page.rows]
    assert [keys[sort](i) for i in ids] == pytest.approx([keys[sort](i) for i in expected])
    assert sorted(ids) == sorted(found)  # nothing twice, nothing left out
    assert {page.total for page in pages} == {len(found)}


def test_a_row_says_what_the_decision_says(run: RunDir) -> None:
    found = facts(run)
    with Index.open(run) as index:
        for row in list_pairs(index, limit=1000).rows:
            f = found[row.pair_id]
            d = f["decision"]
            assert (row.iteration, row.constitution) == (f["number"], f["text"])
            assert (row.status, row.reasons, row.winner) == (d.status, d.reasons, d.winner)
            v = d.verdict
            assert (row.outcome, row.agreement, row.p_first) == (v.outcome, v.agreement, v.p_first)
            assert (row.order_flip, row.valid_votes) == (v.order_flip, v.valid_votes)
            assert row.abstentions == sum(v.abstentions.values())
            assert row.prompt.lower() + " | " + row.first_preview.lower() in f["words"]


def at_change(run: RunDir, k: int) -> list[Vote]:
    """Votes on held-out answers at a change of text."""
    here = run.iteration(k)
    return here.read("change_votes", Vote) if here.is_complete("change_votes") else []


def test_overview_is_the_metrics_of_the_run(run: RunDir) -> None:
    with Index.open(run) as index:
        found = overview(index, run)
    for row in found.iterations:
        metrics = read_json(run.iteration(row.iteration).path / "metrics.json")
        assert (row.pairs, row.votes, row.kept) == (metrics["pairs"], metrics["votes"], metrics["kept"])
        assert row.reasons == metrics["dropped_by_first_reason"]
        assert row.agreement == pytest.approx(metrics["mean_agreement"])
        assert row.position_bias == pytest.approx(metrics["position_bias"])
        more = at_change(run, row.iteration)  # in the metrics; the table has the iteration's own pairs alone
        assert (row.order_flips, row.calls + sum(v.attempts for v in more)) == (
            metrics["order_flips"], metrics["judge_calls"]
        )  # fmt: skip
        assert (
            row.tokens + sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in more)
            == (metrics["judge_tokens"])
        )
        assert row.loss == pytest.approx(metrics["loss"])
        assert row.abstentions == sum(metrics["abstentions"].values())
        assert row.skipped == (metrics["steps"] == 0)
        assert row.trained_pairs == (0 if row.skipped else metrics["trained_pairs"])
    assert [(c.iteration, c.constitution) for c in found.changes] == [(0, "rules@1"), (2, "rules@2")]
    assert found.totals.kept == sum(r.kept for r in found.iterations)
    kept = [p for k in run.iterations() if not run.iteration(k).meta("updates")["skipped"]
            for p in run.iteration(k).read("preferences", Preference)]  # fmt: skip
    assert len(kept) < sum(len(run.iteration(k).read("preferences", Preference)) for k in run.iterations())
    assert found.totals.preferences == len(kept) == sum(r.trained_pairs for r in found.iterations)
    assert found.totals.replayed == sum(p.source == "replay" for p in kept)
    assert sum(c.votes for c in found.cost) == sum(
        len(f["votes"]) for evaluation in (False, True) for f in facts(run, evaluation).values()
    ) + sum(len(at_change(run, k)) for k in run.iterations())
    assert [e.updates for e in found.evaluations] == run.evaluations()
    assert found.problems == ()


def test_replies_from_the_cache_cost_nothing(copy: RunDir) -> None:
    folders = [*map(copy.iteration, copy.iterations()), *map(copy.evaluation, copy.evaluations())]
    paid: dict[str, list[Vote]] = defaultdict(list)
    tokens: Counter[str] = Counter()
    for folder in folders:
        votes = folder.read("votes", Vote) if folder.is_complete("votes") else []
        now = [v.model_copy(update={"cached": True, "attempts": 0}) if i % 3 else v for i, v in enumerate(votes)]
        if votes:
            (folder.path / "votes.jsonl").write_text("".join(v.model_dump_json() + "\n" for v in now))
        for v in now:
            if not v.cached:
                paid[v.ballot.judge].append(v)
                tokens[str(folder.path)] += v.usage.prompt_tokens + v.usage.completion_tokens
    with Index.open(copy) as index:
        found = overview(index, copy)
    assert [row.tokens for row in found.iterations] == [tokens[str(copy.iteration(k).path)] for k in copy.iterations()]
    for cost in found.cost:
        usage = [v.usage for v in paid[cost.judge]]
        assert cost.calls == len(usage) < cost.votes == cost.calls + cost.cached
        assert cost.prompt_tokens == sum(u.prompt_tokens for u in usage)
        assert cost.completion_tokens == sum(u.completion_tokens for u in usage)
        if "careful" in cost.judge:
            assert cost.money == pytest.approx((0.4 * cost.prompt_tokens + 1.6 * cost.completion_tokens) / 1e6)


def test_show_is_the_log(run: RunDir) -> None:
    trained: dict[str, list[tuple[int, str]]] = defaultdict(list)
    steps: dict[tuple[int, str], list[int]] = defaultdict(list)
    for k in run.iterations():
        for p in run.iteration(k).read("preferences", Preference):
            trained[p.pair_id].append((k, p.source))
        for s in run.iteration(k).read("updates", UpdateStep):
            for i in s.row_ids:
                steps[k, i].append(s.step)
    assert any(len(v) > 1 for v in trained.values())  # a replayed pair
    with Index.open(run) as index:
        for pair_id, f in itertools.chain(facts(run).items(), facts(run, True).items()):
            detail = show(index, run, pair_id)
            assert detail.pair == f["pair"]
            assert detail.decision == f["decision"]
            assert list(detail.votes) == f["votes"]
            assert detail.first is not None
            assert detail.second is not None
            assert (detail.first.id, detail.second.id) == (f["pair"].first, f["pair"].second)
            assert detail.constitution_text == (run.path / "constitutions" / f["hash"] / "source.yaml").read_text()
            assert [(t.iteration, t.source) for t in detail.preferences] == trained[pair_id]
            assert [t.skipped for t in detail.preferences] == [
                run.iteration(k).meta("updates")["skipped"] for k, _ in trained[pair_id]
            ]
            assert [list(t.steps) for t in detail.preferences] == [steps[k, pair_id] for k, _ in trained[pair_id]]
            assert {r.name for r in detail.rules if not r.passed} == set(f["decision"].reasons)
            file, _, line = detail.vote_lines[0].rpartition(":")
            assert f["votes"][0] == Vote.model_validate_json(Path(file).read_text().splitlines()[int(line) - 1])


def test_a_pair_is_explained_by_the_threshold_of_its_prompts_slice(tmp_path: Path) -> None:
    job = stub_job(filters={"min_kept_pairs": 3})
    loop = stub_loop(tmp_path, job)
    loop.train = [p.model_copy(update={"category": ("easy", "hard", None)[i % 3]}) for i, p in enumerate(loop.train)]
    loop.run()
    job = stub_job(filters={"min_kept_pairs": 3, "calibration": "c.json"})
    write_header(tmp_path / "run", job)
    run = RunDir.open(tmp_path / "run")
    (run.path / "prompts/train.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in loop.train))
    accepted = {"accepted": True, "pairs": 50, "kept": 40, "errors": 0, "error_bound": 0.05}
    refused = {**accepted, "accepted": False, "threshold": None}
    votes = by_pair([v for k in run.iterations() for v in run.iteration(k).read("votes", Vote)])
    calibration = Calibration.model_validate({
        "made": "2026-01-01T00:00:00+00:00", "alpha": 0.1, "delta": 0.1, "score": "margin", "aggregate": "mean",
        "slices": {"hard": refused, "easy": accepted | {"threshold": 0.25}}, "judge_kind": "likelihood",
        "models": ("stub",), "panels": panels_of(votes), "min_votes": 1, "max_abstention_share": 0.5, "guards": True,
        "labelled": ("x",), "labelled_digest": "0",
    })  # fmt: skip
    write_json(run.path / "calibration.json", calibration.model_dump(mode="json"))
    category = {p.id: p.category for p in loop.train}
    asked = defaultdict(set)
    with Index.open(run) as index:
        for f in facts(run).values():
            (line,) = [r for r in show(index, run, f["pair"].id).rules if r.name == "uncalibrated"]
            asked[category[f["pair"].prompt_id]].add(line.threshold)
    assert asked == {
        "easy": {"at least 0.25 in slice easy"},
        "hard": {"nothing passes in slice hard"},
        None: {"a calibrated slice (hard, easy)"},
    }
    (run.path / "calibration.json").write_text("{}")
    with Index.open(run) as index:
        found = show(index, run, next(iter(facts(run))))
    assert found.rules == ()
    assert found.votes
    assert [p.startswith(f"{run.path}/calibration.json: ") for p in found.problems] == [True]


def test_a_pair_is_found_by_the_beginning_of_its_id(stored: RunDir) -> None:
    ids = list(facts(stored))
    shared = next(a for a, n in Counter(i[0] for i in ids).items() if n > 1)
    with Index.open(stored) as index:
        assert show(index, stored, ids[0][:9]).row.pair_id == ids[0]
        with pytest.raises(UserError, match="several pairs"):
            show(index, stored, shared)
        with pytest.raises(UserError, match="no pair `nowhere`"):
            show(index, stored, "nowhere")


def test_questions_are_those_that_were_sent(stored: RunDir) -> None:
    with Index.open(stored) as index:
        for pair_id in [*[*facts(stored)][::3], *[*facts(stored, True)][::3]]:
            for vote in show(index, stored, pair_id).votes:
                asked = question(index, stored, pair_id, vote.ballot.id)
                # Each template's own first words; its hash is the vote's.
                assert asked.startswith(f"[system]\n{OPENINGS[vote.ballot.voice.replace('_reasoned', '')]}")
                assert "BEGIN ANSWER A" in asked


def test_a_question_that_was_not_sent_says_so(copy: RunDir) -> None:
    path = copy.iteration(0).path / "votes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["prompt_hash"] = "0" * 16
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ballot = rows[0]["ballot"]
    with Index.open(copy) as index:
        asked = question(index, copy, ballot["pair_id"], ballot["id"])
    assert asked.startswith("Not what was sent: the vote notes prompt 0000000000000000")


def test_a_damaged_answer_is_named_and_the_rest_of_its_pair_shown(copy: RunDir) -> None:
    here = copy.iteration(0)
    pair = here.read("pairs", Pair)[0]
    path = here.path / "completions.jsonl"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if json.loads(line)["id"] == pair.first)
    lines[at] = lines[at].replace('"finish_reason":"', '"finish_reason":"un')
    path.write_text("\n".join(lines) + "\n")
    with Index.open(copy) as index:
        found = show(index, copy, pair.id)
    assert found.first is None
    assert found.second is not None
    assert found.votes
    (problem,) = found.problems
    assert problem.startswith(f"{path}:{at + 1}: not a Completion (")


def test_a_template_may_include_from_a_folder(copy: RunDir) -> None:
    for folder in {p.parent for p in copy.path.glob("constitutions/*/*.jinja")}:
        (folder / "parts").mkdir()
        (folder / "_answers.jinja").rename(folder / "parts/_answers.jinja")
        for path in folder.glob("pairwise*.jinja"):
            path.write_text(path.read_text().replace('"_answers.jinja"', '"parts/_answers.jinja"'))
    with Index.open(copy) as index:
        detail = show(index, copy, next(iter(facts(copy))))
        for vote in detail.votes:
            assert question_of(copy, detail, vote.ballot.id).startswith("[system]\nYou compare two answers")


def test_the_likelihood_judges_contexts_are_told_in_words(tmp_path: Path) -> None:
    job = stub_job()
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    run = RunDir.open(tmp_path / "run")
    with Index.open(run) as index:
        pair_id = next(iter(facts(run)))
        votes = {v.ballot.voice: v.ballot.id for v in show(index, run, pair_id).votes}
        asked = question(index, run, pair_id, votes["wish/main"])
    assert "Prefer:\n\n[system]\nw21" in asked
    assert "Avoid:\n\n[system]\nw41" in asked


def test_trace_is_every_preference_that_was_trained_on(run: RunDir) -> None:
    made = {k: m["policy_digest"] for k in run.iterations() if not (m := run.iteration(k).meta("updates"))["skipped"]}
    assert len(made) < len(run.iterations())  # one was skipped
    last = max(made)
    expected = [(k, p) for k in made for p in run.iteration(k).read("preferences", Preference)]
    with Index.open(run) as index:
        found = trace(index, run, made[last][:8])
        assert [(r.iteration, r.pair_id, r.source) for r in found.rows] == [
            (k, p.pair_id, p.source) for k, p in expected
        ]
        assert found.preferences == len(expected) == sum(r.preferences for r in found.iterations)
        assert found.pairs == len({p.pair_id for _, p in expected})
        assert found.steps == sum(len(run.iteration(k).read("updates", UpdateStep)) for k in made)
        assert sum(t.preferences for t in found.texts) == len(expected)
        assert trace(index, run, str(last + 1)) == found
        assert trace(index, run, str(run.iteration(last).path / "policy")) == found
        for row in found.rows:
            lines = Path(row.votes_file).read_text().splitlines()
            votes = [Vote.model_validate_json(lines[n - 1]) for n in row.vote_lines]
            assert {v.ballot.pair_id for v in votes} == {row.pair_id}
            assert len(votes) == len(facts(run)[row.pair_id]["votes"])
        first = min(made)
        early = trace(index, run, str(first + 1), limit=1)
        assert (early.digest, len(early.rows)) == (made[first], 1)
        for wrong in ("ffffffff", "99", str(run.path)):
            with pytest.raises(UserError, match="newest policies"):
                trace(index, run, wrong)


def test_splits_say_what_each_voice_said(stored: RunDir) -> None:
    with Index.open(stored) as index:
        page = splits(index, PairFilter(flipped=True))
    assert page.total == len(page.rows) > 3
    for split in page.rows:
        assert any(v.forward and v.reversed and v.forward != v.reversed for v in split.voices)
        assert sum(len(v.forward) + len(v.reversed) for v in split.voices) == 8


def test_compare_finds_what_differs(copy: RunDir) -> None:
    path = copy.iteration(0).path / "decisions.jsonl"
    decisions = [json.loads(line) for line in path.read_text().splitlines()]
    turned = next(d for d in decisions if d["status"] == "kept")
    other = {"first": "second", "second": "first"}[turned["winner"]]
    turned["winner"] = turned["verdict"]["outcome"] = other
    path.write_text("".join(json.dumps(d) + "\n" for d in decisions))
    header = read_json(copy.path / "run.json")
    header["job"]["filters"]["min_agreement"] = 0.9
    (copy.path / "run.json").write_text(json.dumps(header))
    with Index.open(RunDir.open(STORED)) as first, Index.open(copy) as second:
        found = compare(first, second)
        same = compare(first, first)
    assert [(s.key, s.first, s.second) for s in found.settings] == [("filters.min_agreement", 0.75, 0.9)]
    assert found.comparable == same.comparable == 20
    assert (found.differing, found.reversed) == (1, 1)
    assert found.examples[0].first_pair == turned["pair_id"]
    assert found.examples[0].second_outcome == other
    assert (same.settings, same.differing) == ((), 0)


def test_abstentions_are_shown_among_all_votes_as_the_filter_counts_them() -> None:
    verdict = Verdict(
        pair_id="p", outcome="first", p_first=1.0, agreement=1.0, valid_votes=2, electing_votes=4,
        abstentions={"unparsed": 1},
    )  # fmt: skip
    assert rule_in_words("abstained", verdict, Filters())[0] == "1 of 4 votes abstained"


def test_pairs_in_review_are_not_counted_as_dropped(tmp_path: Path) -> None:
    run = reviewed(tmp_path)
    with Index.open(run) as index:
        found = overview(index, run)
    assert found.totals.review
    assert any(r.review for r in found.iterations)
    for r in found.iterations:
        metrics = read_json(run.iteration(r.iteration).path / "metrics.json")
        assert (r.reasons, r.review) == (metrics["dropped_by_first_reason"], metrics["review"])
    assert sum(found.totals.reasons.values()) == found.totals.dropped


def test_text_is_found_in_earlier_turns(copy: RunDir) -> None:
    path = copy.path / "prompts" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with Index.open(copy) as index:
        prompt = index.rows("SELECT prompt_id FROM pairs WHERE iteration = 0 LIMIT 1")[0]["prompt_id"]
    for row in rows:
        if row["id"] == prompt:
            row["messages"] = [{"role": "user", "content": "About Zebras."}, {"role": "assistant", "content": "Yes?"},
                               *row["messages"]]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with Index.open(copy) as index:
        found = list_pairs(index, PairFilter(text="zebra"))
        assert found.total
        assert {index.rows("SELECT prompt_id FROM pairs WHERE pair_id = ?", [r.pair_id])[0]["prompt_id"]
                for r in found.rows} == {prompt}  # fmt: skip
        assert all("Zebra" not in r.prompt for r in found.rows)


def test_a_text_that_is_not_utf8_is_shown_as_far_as_it_can_be_read(copy: RunDir) -> None:
    for path in (copy.path / "constitutions").glob("*/source.yaml"):
        path.write_bytes(b"\xff" + path.read_bytes())
    with Index.open(copy) as index:
        pair = index.rows("SELECT pair_id FROM pairs WHERE iteration = 0 LIMIT 1")[0]["pair_id"]
        text = show(index, copy, pair).constitution_text
    assert text is not None
    assert text.startswith("\ufffd")
