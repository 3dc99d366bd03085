"""The bench counts what it says: right before and after each rule, coverage, orders, lengths, and no invented label."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rlaif.config import Filters, Judge, Price
from rlaif.constitution import parse_constitution
from rlaif.errors import UserError
from rlaif.judging.ballots import make_ballots
from rlaif.judging.bench import (
    alpha_interval,
    by_judge,
    calibrate,
    candidate,
    cast_votes,
    decide_rows,
    jurors_of,
    krippendorff_alpha,
    slices,
    split_trial,
    split_trials,
    summarise,
)
from rlaif.judging.labelled import Labelled, read_labelled
from rlaif.judging.recorded import parse_where, read_recorded
from rlaif.judging.report import calibration_lines, draw_risk_coverage, tables, trial_table
from rlaif.records import Usage, Vote
from tests.judging.vote_makers import make_vote

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets aren't in ../shared/data")
CONSTITUTION = parse_constitution(
    """
summary: Test.
principles:
  - {id: answers, rule: Answer the question., guard: true}
  - {id: brief, rule: Be brief., prefer: Be brief., avoid: Be long., paraphrases: [{prefer: Short., avoid: Long.}]}
""",
    "test",
    1,
    "test.yaml",
)


def row(n, label="first", slice="brevity", **more):
    return Labelled(
        id=f"r{n}", key=f"r{n}", file="f", slice=slice, prompt="Why?", first="So.", second="Because of much",
        label=label, **({"constitution": "test@1"} | more),
    )  # fmt: skip


class FakeJudge:
    """Votes `answers[pair id]`, one outcome for each voice; guards are even."""

    def __init__(self, answers):
        self.answers = answers

    def ask(self, pairs, candidates, constitution):
        for b in make_ballots(pairs, constitution, "fake"):
            outcome = "tie" if b.guard else self.answers[b.pair_id][b.voice == "brief/main"]
            reason = "empty" if outcome == "abstain" else None
            yield [Vote(ballot=b, model="fake", outcome=outcome, abstain_reason=reason, raw_reply="")]


ROWS = [row(0), row(1), row(2, "second"), row(3, slice="lists"), row(4, slice="lists")]
ANSWERS = {
    "r0": ("first", "first"),  # kept, right
    "r1": ("second", "second"),  # kept, wrong
    "r2": ("second", "first"),  # a tie: wrong, dropped
    "r3": ("abstain", "first"),  # right, kept
    "r4": ("abstain", "abstain"),  # no verdict: wrong, dropped
}


def judged(rows=ROWS, answers=ANSWERS):
    votes = cast_votes(rows, FakeJudge(answers).ask, lambda _: CONSTITUTION)
    return decide_rows(rows, votes, Filters(), lambda _: CONSTITUTION.weights)


def counts(share):
    return share.hits, share.of


def test_counts_before_and_after_the_filter():
    brevity, lists, everything = slices("fake", judged())
    assert (brevity.name, brevity.pairs) == ("brevity", 3)
    assert [counts(s) for s in (brevity.verdict_accuracy, brevity.coverage, brevity.kept_accuracy)] == [
        (1, 3),
        (2, 3),
        (1, 2),
    ]
    assert counts(brevity.vote_accuracy) == (3, 6)  # guards don't count
    assert counts(lists.kept_accuracy) == (1, 1)
    assert (everything.name, counts(everything.verdict_accuracy), counts(everything.coverage)) == (
        "all",
        (2, 5),
        (3, 5),
    )
    assert brevity.reasons == {"tie": 1, "low_agreement": 1}
    assert everything.abstentions == {"empty": 3}


def test_rule_by_rule():
    (*_, everything) = slices("fake", judged())
    assert [(r.rule, r.dropped, counts(r.coverage), counts(r.accuracy)) for r in everything.rules] == [
        ("too_few_votes", 1, (4, 5), (2, 4)), ("tie", 1, (3, 5), (2, 3))
    ]  # fmt: skip


def test_a_row_without_a_constitution_takes_the_default():
    asked = []
    bare = [row(0, constitution=None)]
    cast_votes(bare, FakeJudge(ANSWERS).ask, lambda r: asked.append(r) or CONSTITUTION, "mine@3")
    assert asked == ["mine@3"]
    with pytest.raises(UserError, match="name no constitution"):
        cast_votes(bare, FakeJudge(ANSWERS).ask, lambda _: CONSTITUTION)


def test_of_an_answer_that_stops_in_the_middle_nobody_knows_how_it_ended():
    assert candidate(row(0), "first").finish_reason == "stop"
    assert candidate(row(0), "second").finish_reason is None


def vote(pair, outcome, order="forward", voice="v", judge="j", **more):
    one = make_vote(outcome, f"{pair}{order}{voice}{judge}", voice=voice, order=order)
    ballot = one.ballot.model_copy(update={"pair_id": pair, "judge": judge})
    return one.model_copy(update={"ballot": ballot, **more})


def both(pair, forward, reversed_, **more):
    return [vote(pair, forward, "forward", **more), vote(pair, reversed_, "reversed", **more)]


def test_orders_and_slots():
    votes = [
        *both("r0", "first", "first"),
        *both("r1", "first", "second"),  # the first slot twice
        *both("r2", "tie", "tie"),  # consistent in naming nobody: not a consistent label
        *both("r3", "first", "abstain"),  # answered once
    ]
    found = summarise("j", "all", decide_rows(ROWS, votes, Filters()))
    assert counts(found.order_consistency) == (1, 3)
    assert counts(found.position_bias) == (3, 4)
    assert found.pairs == 4
    assert counts(found.coverage) == (1, 4)


def test_alpha_between_voices():
    same = [*both("r0", "first", "first"), *both("r1", "second", "second")]
    assert krippendorff_alpha(same) == pytest.approx(1.0)
    apart = [*both("r0", "first", "second"), *both("r1", "second", "first")]
    assert krippendorff_alpha(apart) < 0
    assert krippendorff_alpha(both("r0", "first", "first")) is None
    assert krippendorff_alpha([vote("r0", "first"), vote("r1", "second")]) is None
    assert krippendorff_alpha(both("r0", "first", "abstain")) is None


def test_alpha_has_an_interval():
    rng = random.Random(1)
    votes = []
    for n in range(200):
        one = rng.choice(("first", "second"))
        votes += both(f"r{n}", one, one if rng.random() < 0.8 else "second")
    alpha, (low, high) = krippendorff_alpha(votes), alpha_interval(votes)
    assert low < alpha < high
    assert 0.1 < high - low < 0.3
    assert alpha_interval(votes) == (low, high)
    few = votes[: 2 * 50]
    assert alpha_interval(few)[1] - alpha_interval(few)[0] > 1.5 * (high - low)
    assert alpha_interval(both("r0", "first", "first")) is None
    assert alpha_interval(both("r0", "first", "second") * 20) is not None
    assert alpha_interval([]) is None


def test_a_judge_that_goes_by_length_in_one_order_shows_before_the_filter():
    # Forward it names the longer one (the second), reversed the slot: three of four verdicts are ties.
    votes = [*both("r0", "second", "first"), *both("r1", "second", "first"), *both("r2", "second", "first"),
             *both("r3", "first", "first")]  # fmt: skip
    lengths = summarise("j", "all", decide_rows(ROWS, votes, Filters())).lengths
    assert counts(lengths.judge_names_longer) == (3, 8)
    assert counts(lengths.judge_names_longer_kept) == (0, 1)


def test_money_by_the_jobs_prices():
    settings = Judge(kind="chat", model="m", base_url="http://h/v1", prices={"m": Price(prompt=10, completion=20)})
    spent = {"usage": Usage(prompt_tokens=100_000, completion_tokens=50_000)}
    votes = both("r0", "first", "first", judge="chat:m@h", **spent)
    some = decide_rows(ROWS, votes, Filters())
    assert summarise("j", "all", some, settings).cost.money == pytest.approx(4.0)
    assert summarise("j", "all", some).cost.money is None
    free = settings.model_copy(update={"prices": {"other": Price(prompt=1, completion=1)}})
    assert summarise("j", "all", some, free).cost.money is None
    assert (
        summarise("j", "all", decide_rows(ROWS, both("r0", "first", "first"), Filters()), settings).cost.money is None
    )


def test_a_slice_under_several_constitutions_is_refused():
    def under(constitution, slice, ids):
        rows = [row(n, constitution=f"{constitution}@1", slice=slice) for n in ids]
        votes = [v for r in rows for v in both(r.id, "first", "first")]
        votes = [v.model_copy(update={"ballot": v.ballot.model_copy(update={"constitution": constitution})})
                 for v in votes]  # fmt: skip
        return decide_rows(rows, votes, Filters())

    good = under("c1", "one", range(110))
    with pytest.raises(UserError, match=r"slice all: .* several constitutions \(c1@1, c2@1\).*--where constitution="):
        calibration(good + under("c2", "one", range(110, 120)))
    found = calibration(good + under("c2", "two", range(110, 150)), sliced=True)
    assert [len(t.panels) for t in found.slices.values()] == [1, 1]
    votes = [list(j.votes) for j in (good[0], under("c2", "two", [110])[0])]
    assert [found.mismatch(v, Filters(), s) for v, s in zip(votes, ("one", "two"), strict=True)] == [None, None]
    assert found.mismatch(votes[1], Filters(), "one") == (
        "slice one was calibrated on other questions (these are of two)"
    )


def test_lengths_before_and_after():
    # `second` is the longer one in every row but the last, whose answers are even.
    rows = [row(0), row(1, "second"), row(2), row(3).model_copy(update={"second": "So?"})]
    votes = [*both("r0", "second", "second"), *both("r1", "second", "second"), *both("r2", "first", "first"),
             vote("r2", "second", voice="w"), *both("r3", "first", "first")]  # fmt: skip
    lengths = summarise("j", "all", decide_rows(rows, votes, Filters(min_agreement=1.0))).lengths
    assert counts(lengths.longer_is_better) == (1, 4)
    assert counts(lengths.judge_names_longer) == (5, 7)  # also votes on r2, a tie between its two voices
    assert counts(lengths.judge_names_longer_kept) == (2, 2)


def test_cost():
    spent = {"usage": Usage(prompt_tokens=100, completion_tokens=5), "latency_s": 0.5}
    votes = [
        vote("r0", "first", **spent),
        vote("r0", "first", "reversed", **spent, attempts=2),
        vote("r1", "first", **spent, cached=True, attempts=0),
        vote("r1", "second", "reversed", **spent),
    ]
    cost = summarise("j", "all", decide_rows(ROWS, votes, Filters())).cost
    assert (cost.calls, cost.prompt_tokens, cost.completion_tokens, cost.seconds) == (4, 300, 15, 2.0)
    assert (cost.tokens_per_kept_pair, cost.seconds_per_kept_pair) == (315, 2.0)


def test_votes_that_say_nothing_of_their_cost_cost_nothing_that_is_known():
    silent = [vote("r0", "first", attempts=0), vote("r0", "first", "reversed", attempts=0)]
    cost = summarise("j", "all", decide_rows(ROWS, silent, Filters())).cost
    assert set(cost.model_dump().values()) == {None}
    (table,) = [t for t in tables([summarise("j", "all", decide_rows(ROWS, silent, Filters()))], "t")
                if "length" in str(t.title)]  # fmt: skip
    assert [c._cells for c in table.columns][-6:] == [["-"]] * 6


def test_the_risk_curve_takes_equal_scores_together():
    votes = [*both("r0", "first", "first"), *both("r1", "second", "second"), *both("r2", "tie", "second"),
             *both("r3", "first", "second")]  # fmt: skip
    found = summarise("j", "all", decide_rows(ROWS, votes, Filters()))
    assert [(p.coverage, p.error) for p in found.risk] == [(0.5, 0.5), (0.75, pytest.approx(1 / 3))]


def test_judges_one_by_one_or_as_a_jury():
    votes = [vote("r0", "first", judge="a"), vote("r0", "second", judge="b"), vote("r0", "first", judge="c")]
    assert list(by_judge(votes)) == ["a", "b", "c"]
    assert list(by_judge(votes, jury=True)) == ["jury"]
    assert jurors_of(votes, Filters()) is None
    assert jurors_of(votes, Filters(aggregate="dawid_skene")).fitted


def steady(n, error_every):
    """Rows and order-consistent votes that are wrong on every n-th."""
    rows = [row(i) for i in range(n)]
    votes = [v for i in range(n) for v in both(f"r{i}", *["second" if i % error_every == 0 else "first"] * 2)]
    return decide_rows(rows, votes, Filters())


def test_a_good_judge_is_accepted_on_halves_and_a_bad_one_refused():
    good = split_trial("j", "s", steady(200, 50), 40, 0.1, 0.1)
    assert (good.accepted.hits, good.coverage, good.coverage_when_accepted) == (40, 1.0, 1.0)
    assert good.error == pytest.approx(0.02, abs=0.01)
    bad = split_trial("j", "s", steady(200, 3), 40, 0.1, 0.1)
    assert (bad.accepted.hits, bad.coverage, bad.coverage_when_accepted, bad.error) == (0, 0.0, None, None)
    assert split_trial("j", "s", steady(200, 8), 20, 0.1, 0.1) == split_trial("j", "s", steady(200, 8), 20, 0.1, 0.1)


def calibration(some, sliced=False):
    return calibrate(some, Filters(), 0.1, 0.1, "agreement", sliced, "chat", ["l.jsonl"], "d", "2026-01-01T00:00:00Z")


def test_a_calibration_filters_the_pairs_that_it_was_made_from():
    some = steady(100, 50)
    found = calibration(some)
    assert found.slices["all"].kept == 100
    assert (found.models, len(found.panels)) == (("m",), 1)
    votes = [v for j in some for v in j.votes]
    kept = decide_rows([j.row for j in some], votes, Filters(calibration="c"), calibration=found)
    assert all(j.kept for j in kept)
    other = [v.model_copy(update={"model": "another"}) for v in votes]
    dropped = decide_rows(
        [j.row for j in some], other, Filters(calibration="c", uncalibrated="drop"), calibration=found
    )
    assert {j.decision.reasons for j in dropped} == {("uncalibrated",)}


def test_what_a_calibration_says():
    assert calibration_lines(calibration(steady(100, 50)))[0].startswith(
        "all: keep agreement >= 1. 2 wrong of 100 kept"
    )
    assert "can't be used at alpha=0.1 on this slice. Strictest" in calibration_lines(calibration(steady(100, 3)))[0]
    assert "keeps the 22 pairs that a test needs" in calibration_lines(calibration(steady(20, 50)))[0]
    assert list(calibration(judged(), sliced=True).slices) == ["brevity", "lists"]


def test_tables_and_picture(tmp_path):
    results = slices("fake", judged())
    assert [t.row_count for t in tables(results, "t")] == [3, 4, 3, 2, 3]
    assert trial_table(split_trials("j", steady(60, 9), 5, 0.1, 0.1, "agreement", 0), 0.1, 0.1).row_count == 1
    for ending in ("png", "svg"):
        draw_risk_coverage(results, tmp_path / f"r.{ending}", 0.1)
        assert (tmp_path / f"r.{ending}").stat().st_size > 5_000
    with pytest.raises(UserError, match=r"must end in .png or .svg"):
        draw_risk_coverage(results, tmp_path / "r.pdf")
    with pytest.raises(UserError, match="can't write it"):
        draw_risk_coverage(results, tmp_path / "no" / "r.png")


def llmbar(subset, *where):
    rows = read_labelled([DATA / "llmbar" / f"{subset}.json"]).rows
    rows, votes = read_recorded(DATA / "llmbar" / "recorded_verdicts.csv", rows, where=parse_where(where))[:2]
    return decide_rows(rows, votes, Filters())


@needs_data
@pytest.mark.parametrize(("judge", "right", "kept", "right_kept"),
                         [("GPT-4", 0.955, 0.95, 0.979), ("ChatGPT", 0.815, 0.71, 0.944)])  # fmt: skip
def test_known_figures_of_one_strategy(judge, right, kept, right_kept):
    found = summarise(judge, "natural", llmbar("natural", f"judge={judge}", "strategy=Vanilla"))
    assert found.pairs == 100
    assert found.vote_accuracy.share == pytest.approx(right)
    assert found.coverage.share == pytest.approx(kept)
    assert found.order_consistency.share == pytest.approx(kept)
    assert round(found.kept_accuracy.share, 3) == right_kept


@needs_data
def test_known_figures_of_the_calibrated_filter():
    def trial(judge, subset):
        return split_trial(judge, subset, llmbar(subset, f"judge={judge}"), 200, 0.1, 0.1)

    gpt4 = trial("GPT-4", "natural")
    assert gpt4.coverage >= 0.90
    assert gpt4.error < 0.05
    assert trial("ChatGPT", "natural").accepted.share > 0.2
    assert trial("ChatGPT", "adv_neighbor").accepted.hits == 0
