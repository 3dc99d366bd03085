"""The bench counts what it says: right before and after each rule, coverage, orders, lengths, and no invented label."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from rlaif.config import ChatSettings, Filters, Policy, Price, parse_job
from rlaif.constitutions.constitution import parse_constitution
from rlaif.data.labelled import Labelled, read_labelled
from rlaif.data.recorded import parse_where, read_recorded
from rlaif.errors import UserError
from rlaif.judging.ballots import make_ballots
from rlaif.judging.calibration import Asked
from rlaif.judging.verdicts import learn_jurors
from rlaif.records import Message, Usage, Vote
from rlaif.trust.bench import (
    Share,
    alpha_interval,
    as_judged,
    by_judge,
    calibrate,
    candidate,
    cast_votes,
    check_jurors,
    decide_rows,
    jurors_of,
    keeps,
    krippendorff_alpha,
    promises,
    slices,
    split_trials,
    summarise,
)
from rlaif.trust.report import (
    calibration_lines,
    draw_risk_coverage,
    juror_lines,
    mix_lines,
    promise_lines,
    tables,
    trial_table,
)
from tests.judging.vote_makers import make_vote
from tests.public_data import folder, needs

LLMBAR = folder("llmbar")
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
    settings = ChatSettings(
        kind="chat", model="m", base_url="http://h/v1", prices={"m": Price(prompt=10, completion=20)}
    )
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
    assert counts(lengths.longer_is_better) == (1, 3)
    assert lengths.equal == 1
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
    assert [list(c.cells) for c in table.columns][-6:] == [["-"]] * 6


def test_the_risk_curve_takes_equal_scores_together():
    votes = [*both("r0", "first", "first"), *both("r1", "second", "second"), *both("r2", "tie", "second"),
             *both("r3", "first", "second")]  # fmt: skip
    found = summarise("j", "all", decide_rows(ROWS, votes, Filters()))
    assert [(p.coverage, p.error) for p in found.risk] == [(0.5, 0.5), (0.75, pytest.approx(1 / 3))]


@pytest.mark.slow
def test_judges_one_by_one_or_as_a_jury():
    votes = [v for n in range(20) for v in (vote(f"r{n}", "first", judge="a"), vote(f"r{n}", "second", judge="b"),
                                            vote(f"r{n}", "first", judge="c"))]  # fmt: skip
    assert list(by_judge(votes)) == ["a", "b", "c"]
    assert list(by_judge(votes, jury=True)) == ["jury"]
    assert jurors_of(votes, Filters()) is None
    assert jurors_of(votes, Filters(aggregate="dawid_skene")).fitted
    few = jurors_of(votes[3:], Filters(aggregate="dawid_skene"))  # 19 pairs are a handful
    assert (few.fitted, few.pairs, set(few.weights.values())) == (False, 19, {1.0})


def split_trial(judge, *arguments):
    (found,) = split_trials(judge, *arguments)
    return found


def steady(n, error_every):
    """Rows and order-consistent votes that are wrong on every n-th."""
    rows = [row(i) for i in range(n)]
    votes = [v for i in range(n) for v in both(f"r{i}", *["second" if i % error_every == 0 else "first"] * 2)]
    return decide_rows(rows, votes, Filters())


def test_a_good_judge_is_accepted_on_halves_and_a_bad_one_refused():
    good = split_trial("j", steady(200, 50), 40, 0.1, 0.1)
    assert (good.accepted.hits, good.coverage, good.coverage_when_accepted) == (40, 1.0, 1.0)
    assert good.error == pytest.approx(0.02, abs=0.01)
    bad = split_trial("j", steady(200, 3), 40, 0.1, 0.1)
    assert (bad.accepted.hits, bad.coverage, bad.coverage_when_accepted, bad.error) == (0, 0.0, None, None)
    assert split_trial("j", steady(200, 8), 20, 0.1, 0.1) == split_trial("j", steady(200, 8), 20, 0.1, 0.1)


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


@pytest.mark.slow
def test_tables_and_picture(tmp_path):
    results = slices("fake", judged())
    assert [t.row_count for t in tables(results, "t")] == [3, 4, 3, 2, 3]
    assert trial_table(split_trials("j", steady(60, 9), 5, 0.1, 0.1), 0.1, 0.1).row_count == 1
    for ending in ("png", "svg"):
        draw_risk_coverage(results, tmp_path / f"r.{ending}", 0.1)
        assert (tmp_path / f"r.{ending}").stat().st_size > 5_000
    with pytest.raises(UserError, match=r"must end in .png or .svg"):
        draw_risk_coverage(results, tmp_path / "r.pdf")
    with pytest.raises(UserError, match="can't write it"):
        draw_risk_coverage(results, tmp_path / "no" / "r.png")


def llmbar(subset, *where):
    rows = read_labelled([LLMBAR / f"{subset}.json"]).rows
    rows, votes = read_recorded(LLMBAR / "recorded_verdicts.csv", rows, where=parse_where(where))[:2]
    return decide_rows(rows, votes, Filters())


@needs("llmbar", "GPT-4 and ChatGPT come out as right, and as often kept, as their votes say when counted by hand")
@pytest.mark.parametrize(("judge", "right", "kept", "right_kept"),
                         [("GPT-4", 0.955, 0.95, 0.979), ("ChatGPT", 0.815, 0.71, 0.944)])  # fmt: skip
def test_known_figures_of_one_strategy(judge, right, kept, right_kept):
    found = summarise(judge, "natural", llmbar("natural", f"judge={judge}", "strategy=Vanilla"))
    assert found.pairs == 100
    assert found.vote_accuracy.share == pytest.approx(right)
    assert found.coverage.share == pytest.approx(kept)
    assert found.order_consistency.share == pytest.approx(kept)
    assert round(found.kept_accuracy.share, 3) == right_kept


@pytest.mark.slow
@needs("llmbar", "a calibrated filter keeps GPT-4 on natural pairs, and never accepts ChatGPT on adversarial ones")
def test_known_figures_of_the_calibrated_filter():
    def trial(judge, subset):
        return split_trial(judge, llmbar(subset, f"judge={judge}"), 200, 0.1, 0.1)

    gpt4 = trial("GPT-4", "natural")
    assert gpt4.coverage >= 0.90
    assert gpt4.error < 0.05
    assert trial("ChatGPT", "natural").accepted.share > 0.2
    assert trial("ChatGPT", "adv_neighbor").accepted.hits == 0


def test_votes_on_one_pair_are_no_independent_draws():
    """Six voices that always say the same are known as well as one."""
    one = [(f"p{n}", n % 10 < 7) for n in range(60)]
    alone, six = Share.clustered(one), Share.clustered(one * 6)
    plain = Share.count(six.hits, six.of)
    assert (six.hits, six.of, six.share) == (252, 360, 0.7)
    assert (six.low, six.high) == (alone.low, alone.high)
    assert six.high - six.low > 2 * (plain.high - plain.low)
    assert Share.clustered(one * 6) == six
    certain = Share.clustered([(f"p{n}", True) for n in range(30)] * 6)
    assert (certain.low, certain.high) == (Share.count(30, 30).low, 1.0)
    few = Share.clustered([("p", True), ("p", True), ("q", True), ("q", False)])
    assert few.low < 0.3
    assert Share.clustered([]) == Share.count(0, 0)


@needs("llmbar", "the interval of order consistency is wider on real votes than if they were independent")
def test_the_interval_of_order_consistency_on_real_votes():
    """Fifteen strategies of one judge on a hundred pairs: half again as wide as if votes were independent."""
    found = summarise("GPT-4", "natural", llmbar("natural", "judge=GPT-4")).order_consistency
    plain = Share.count(found.hits, found.of)
    assert (found.high - found.low) / (plain.high - plain.low) > 1.3


def in_slices(*wrong_every):
    """A hundred pairs a slice, the n-th of each wrong."""
    rows = [row(100 * s + n, slice=f"s{s}") for s in range(len(wrong_every)) for n in range(100)]
    votes = [v for r in rows for v in both(r.id, *["second" if int(r.id[1:]) % wrong_every[int(r.slice[1:])] == 0
                                                   else "first"] * 2)]  # fmt: skip
    return decide_rows(rows, votes, Filters())


def test_splits_try_the_rule_that_calibrate_fits():
    some = in_slices(50, 4)  # .02 and .25 wrong: .135 of both
    assert [t.name for t in split_trials("j", some, 5, 0.2, 0.1)] == ["all"]
    assert [t.name for t in split_trials("j", some, 5, 0.2, 0.1, sliced=True)] == ["s0", "s1"]
    assert list(calibration(some).slices) == ["all"]
    assert list(calibration(some, sliced=True).slices) == ["s0", "s1"]
    (mixed,) = split_trials("j", some, 40, 0.2, 0.1)
    assert mixed.accepted.share > 0.5
    assert mixed.broken.hits == 0  # .135 of all pairs are wrong
    assert mixed.broken_other_half.of == 40


def test_splits_count_how_often_the_promise_is_broken():
    # .115 of all are wrong: a half that is accepted at alpha = .1 breaks the promise.
    rows = [row(n) for n in range(200)]
    votes = [v for n, r in enumerate(rows) for v in both(r.id, *["second" if n < 23 else "first"] * 2)]
    (found,) = split_trials("j", decide_rows(rows, votes, Filters()), 200, 0.1, 0.3)
    assert 0 < found.accepted.hits == found.broken.hits < 0.3 * 200
    assert found.broken.low < found.broken.share < found.broken.high
    assert "error over 0.1" in [str(c.header) for c in trial_table([found], 0.1, 0.3).columns]


def test_a_promise_that_other_pairs_break_is_said():
    good, bad = steady(100, 50), steady(100, 2)
    found = calibration(good)
    votes = [v for j in bad for v in j.votes]
    measured = decide_rows([j.row for j in bad], votes, Filters(calibration="c"), calibration=found)
    (promise,) = promises("j", measured, found, lambda j: j.kept)
    assert (promise.kept, promise.error.share, promise.broken) == (100, 0.5, True)
    (line,) = promise_lines([promise])
    assert "promised an error of at most 0.1 among kept pairs; it is 0.500 of 100 here (95 % 0.404-0.596)" in line
    (kept,) = promises("j", good, found, lambda j: keeps(j, found))
    assert not kept.broken
    assert promise_lines([kept]) == []


def test_a_promise_about_a_mix_is_not_one_about_its_parts():
    some = in_slices(100, 3)
    found = calibrate(some, Filters(), 0.23, 0.1, "agreement", False, "chat", ["l"], "d", "2026-01-01T00:00:00Z")
    assert found.accepted
    said = mix_lines(promises("", some, found, lambda j: keeps(j, found)))
    assert len(said) == 1
    assert said[0].startswith("slice s1: the error among kept pairs is 0.330 of 100 here")


def a_jury(n, *jurors):
    """Rows and one vote a juror; a juror is the share of pairs on which it is right, bad ones on the same pairs."""
    rows = [row(i, "first" if i % 2 else "second") for i in range(n)]
    votes = []
    for i, r in enumerate(rows):
        other = {"first": "second", "second": "first"}[r.label]
        for name, right in jurors:
            votes.append(vote(r.id, r.label if (i * 37 % 100) < 100 * right else other, judge=name))
    return rows, votes


CAMPS = (("alone", 0.85), ("x", 0.1), ("y", 0.12), ("z", 0.2))
"""One juror that is right, and three that are wrong together."""


@pytest.mark.slow
def test_the_labels_contradict_a_fit_that_believes_the_wrong_camp():
    rows, votes = a_jury(100, *CAMPS)
    filters = Filters(aggregate="dawid_skene")
    fit = jurors_of(votes, filters)
    some = decide_rows(rows, votes, filters, jurors=fit)
    assert fit.weights["alone"] == 0
    checks = {c.juror: c for c in check_jurors("j", some, fit)}
    assert all(c.contradicted for c in checks.values())
    assert checks["alone"].right.share == pytest.approx(0.85)
    said = " ".join(juror_lines("jury", fit, list(checks.values())))
    assert "the labels contradict the weight 0.00 of alone, which alone is right on 0.850 of 100 pairs" in said


def test_a_calibration_learns_a_jurys_weights_from_its_labels():
    rows, votes = a_jury(150, *CAMPS)
    filters = Filters(aggregate="dawid_skene")
    some = decide_rows(rows, votes, filters, jurors=jurors_of(votes, filters))

    def redecide(judged, jurors):
        return decide_rows([j.row for j in judged], [v for j in judged for v in j.votes], filters, jurors=jurors)

    arguments = (some, filters, 0.25, 0.1, "agreement", False, "chat", ["l"], "d", "2026-01-01T00:00:00Z")
    found = calibrate(*arguments, redecide=redecide)
    assert (found.jurors.source, found.jurors.fitted) == ("labels", True)
    assert found.jurors.weights["alone"] > 0.6
    assert {found.jurors.weights[j] for j in "xyz"} == {0.0}
    assert found.accepted
    assert not calibrate(*arguments).accepted  # as the votes alone have it
    (trial,) = split_trials("j", some, 5, 0.25, 0.1, redecide=redecide)
    assert trial.accepted.hits > 0
    few = a_jury(19, *CAMPS)
    handful = learn_jurors(few[1], {r.id: r.label for r in few[0]})
    assert (handful.fitted, set(handful.weights.values())) == (False, {1.0})


@pytest.mark.slow
def test_weights_learned_from_labels_keep_the_promise():
    """Six jurors of whom none knows much: tested on the pairs that taught them, weights that fit their luck pass
    .13 of the time where the promise is broken."""
    rng = random.Random(5)
    alpha, delta = 0.25, 0.1
    filters = Filters(aggregate="dawid_skene")

    def drawn(n):
        rows = [row(i, rng.choice(("first", "second"))) for i in range(n)]
        other = {"first": "second", "second": "first"}
        return rows, [
            vote(r.id, r.label if rng.random() < p else other[r.label], judge=f"j{k}")
            for r in rows
            for k, p in enumerate([0.6] * 6)
        ]

    def redecide(judged, jurors):
        return decide_rows([j.row for j in judged], [v for j in judged for v in j.votes], filters, jurors=jurors)

    rows, votes = drawn(1500)
    population = decide_rows(rows, votes, filters)
    broken, draws = 0, 120
    for _ in range(draws):
        rows, votes = drawn(60)
        found = calibrate(decide_rows(rows, votes, filters), filters, alpha, delta, "agreement", False, "chat", ["l"],
                          "d", "2026-01-01T00:00:00Z", redecide=redecide)  # fmt: skip
        if found.accepted:
            kept = [j for j in redecide(population, found.jurors) if keeps(j, found)]
            broken += sum(not j.correct for j in kept) > alpha * len(kept)
    assert binomtest(broken, draws, delta, alternative="greater").pvalue >= 0.001


def test_labelled_answers_are_asked_about_as_sampled_ones_are():
    ended = row(0, first_finish="length", second_finish="stop")
    assert [candidate(ended, s).finish_reason for s in ("first", "second")] == ["length", "stop"]
    assert [m.role for m in candidate(ended, "first", "Be kind.").messages] == ["system", "user"]
    assert candidate(ended, "first", "Be kind.").messages[0].content == "Be kind."
    own = row(0, messages=(Message(role="system", content="Mine."), Message(role="user", content="Why?")))
    assert candidate(own, "first", "Be kind.").messages == own.messages
    seen = []

    def ask(pairs, candidates, constitution):
        seen.extend(candidates)
        yield []

    cast_votes([ended], ask, lambda _: CONSTITUTION, system_prompt="Be kind.")
    assert {c.messages[0].content for c in seen} == {"Be kind."}


JOB = {"constitution": "assistant"}


def asked_by(ends=(None, None), **changes):
    return Asked.by(parse_job({**JOB, **changes}, "test"), ends)


def test_what_is_asked_otherwise_is_named_key_by_key():
    some = steady(60, 50)
    judge = {"judge": {"kind": "chat", "model": "m"}}

    def mismatch(calibrated, run):
        found = calibrate(some, Filters(), 0.1, 0.1, "agreement", False, "chat", ["l"], "d", "t",
                          facts=asked_by(**calibrated).facts)  # fmt: skip
        return found.mismatch(some[0].votes, Filters(), asked=asked_by(**run))

    kind, cold = {"policy": {"system_prompt": "Be kind."}}, {"judge": {"missing_eos_penalty": 0}}
    assert mismatch(judge, judge) is None
    assert mismatch({**judge, **kind}, {**judge, **kind}) is None
    assert mismatch({**judge, **kind}, judge) == "policy.system_prompt is at its default, calibrated was Be kind."
    assert mismatch(judge, {**judge, **kind}) == "policy.system_prompt is Be kind., calibrated was at its default"
    assert mismatch({}, cold) == "judge.missing_eos_penalty is 0.0, calibrated was at its default"


def test_a_cut_off_answer_is_not_what_was_calibrated_on_ended_ones():
    some = steady(60, 50)
    votes, cut = some[0].votes, ("stop", "length")

    def found(*ends):
        rows = [j.row.model_copy(update={"first_finish": a, "second_finish": b})
                for j, (a, b) in zip(some, [*ends, *[("stop", "stop")] * 60][:60], strict=True)]  # fmt: skip
        judged = [j.model_copy(update={"row": r}) for j, r in zip(some, rows, strict=True)]
        return calibrate(judged, Filters(), 0.1, 0.1, "agreement", False, "likelihood", ["l"], "d", "t")

    ended, mixed = found(), found(*[cut] * 20)
    assert (ended.judged.answers, ended.judged.cut_off, ended.judged.one_cut_off) == (120, 0, 0)
    assert (mixed.judged.cut_off, mixed.judged.one_cut_off) == (20, 20)
    assert "pays judge.missing_eos_penalty, and no labelled pair had one" in ended.mismatch(
        votes, Filters(), asked=asked_by(cut)
    )
    assert mixed.mismatch(votes, Filters(), asked=asked_by(cut)) is None
    # Where both are cut off the penalty decides nothing, and so it does where there is none.
    for how in (asked_by(("length", "length")), asked_by(("stop", "stop")),
                asked_by(cut, judge={"kind": "chat", "model": "m"})):  # fmt: skip
        assert ended.mismatch(votes, Filters(), asked=how) is None
    drop, stop = (Filters(calibration="c.json", uncalibrated=u) for u in ("drop", "stop"))
    row_ = some[0].row.model_copy(update={"first_finish": "stop", "second_finish": "length"})
    for settings in (drop, stop):  # no mistake in the job
        (judged,) = decide_rows([row_], votes, settings, calibration=ended, asked=asked_by())
        assert judged.decision.reasons == ("uncalibrated",)
    other = asked_by(policy={"system_prompt": "Be kind."})
    with pytest.raises(UserError, match=r"filters.calibration c.json: policy.system_prompt is Be kind."):
        decide_rows([row_], votes, stop, calibration=ended, asked=other)


def test_labelled_answers_are_judged_without_their_thoughts():
    thought = row(0).model_copy(update={"first": "<think>Hm.</think>So.", "second": "No marks"})
    (found,) = as_judged([thought], Policy())
    assert (found.first, found.second) == ("So.", "No marks")
    assert as_judged([thought], Policy(thinking="judge")) == [thought]


def test_a_bench_that_is_made_anew_says_how_its_answers_ended():
    from benchmarks.make_judge_bench import labelled as made

    long = "Bread keeps fresh when it lies in a cool dry box, wrapped in paper or cloth. " + " ".join(
        f"Then word{chr(97 + i)} follows." for i in range(12)
    )
    short = {"text": "Keep bread in a dry box.", "finish_reason": "stop"}
    samples = [
        {"prompt": f"How do I keep bread fresh {'again ' * i}?", "system": None, **side}
        for i in range(12)
        for side in (short, {"text": long, "finish_reason": "length"})
    ]
    rows = made(samples)
    assert {r["principle"] for r in rows} >= {"brevity", "thorough"}
    for r in rows:
        ends = {"first": r["first_finish_reason"], "second": r["second_finish_reason"]}
        assert {r[side]: end for side, end in ends.items()} == {short["text"]: "stop", long: "length"}
