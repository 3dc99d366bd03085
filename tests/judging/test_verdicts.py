"""Votes added up: weights by principle, guards apart, nothing coerced."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.judging.verdicts import aggregate, by_pair, fit_jurors, flips
from tests.judging.vote_makers import MIRROR, WEIGHTS, make_vote, mirrored, vote_lists


def test_a_principle_asked_twice_counts_once():
    votes = [make_vote("first", 0, 0.9), make_vote("first", 1, 0.7), make_vote("second", 2, 0.1, principle="plain")]
    verdict = aggregate(votes, {"brief": 1.0, "plain": 1.0})
    assert verdict.p_first == pytest.approx((0.8 + 0.1) / 2)
    assert verdict.outcome == "second"
    assert verdict.agreement == pytest.approx(0.5)


def test_weights_decide_between_principles():
    votes = [make_vote("first", 0, 0.9), make_vote("second", 1, 0.1, principle="plain")]
    assert aggregate(votes, {"brief": 3.0, "plain": 1.0}).p_first == pytest.approx(0.7)
    assert aggregate(votes).outcome == "tie"


def test_abstentions_are_counted_by_reason_and_never_vote():
    votes = [make_vote("abstain", 0, reason="empty"), make_vote("abstain", 1, reason="infra_error"),
             make_vote("second", 2, 0.4)]  # fmt: skip
    verdict = aggregate(votes)
    assert (verdict.outcome, verdict.valid_votes, verdict.agreement) == ("second", 1, 1.0)
    assert verdict.abstentions == {"empty": 1, "infra_error": 1}


def test_without_a_valid_vote_there_is_no_verdict_to_speak_of():
    verdict = aggregate([make_vote("abstain"), make_vote("first", 1, guard=True)])
    assert (verdict.outcome, verdict.p_first, verdict.agreement) == ("abstain", None, None)
    assert verdict.guard_first == 1


def test_guards_are_counted_apart():
    votes = [make_vote("first", 0, 0.6), make_vote("second", 1, guard=True), make_vote("tie", 2, guard=True)]
    verdict = aggregate(votes)
    assert (verdict.outcome, verdict.p_first, verdict.guard_first, verdict.guard_second) == ("first", 0.6, 0, 1)


def test_a_guard_that_was_asked_and_said_nothing_is_missing():
    def guard(outcome, n, order, voice="g"):
        return make_vote(outcome, n, voice=voice, order=order, guard=True, reason="infra_error")

    votes = [make_vote("first", 0), guard("abstain", 1, "forward"), guard("abstain", 2, "reversed")]
    verdict = aggregate(votes)
    assert (verdict.outcome, verdict.guard_missing, verdict.abstentions) == ("first", 1, {})
    answered = [guard("tie", 3, "forward", "h"), guard("abstain", 4, "reversed", "h")]
    assert aggregate(votes + answered).guard_missing == 1
    assert aggregate([votes[0], *answered]).guard_missing == 0


def test_order_flip_needs_one_voice_in_both_orders():
    def flipped(*votes):
        return aggregate(votes).order_flip

    forward = make_vote("first", 0, voice="v", order="forward")
    assert flipped(forward, make_vote("second", 1, voice="v", order="reversed"))
    assert flipped(forward, make_vote("tie", 1, voice="v", order="reversed"))
    assert not flipped(forward, make_vote("first", 1, voice="v", order="reversed"))
    assert not flipped(forward, make_vote("second", 1, voice="w", order="reversed"))
    assert not flipped(make_vote("first", 0, voice="v"), make_vote("second", 1, voice="v"))


def test_what_flips_is_an_answer_in_another_order():
    forward, back = make_vote("first", order="forward"), make_vote("tie", order="reversed")
    assert flips([forward, back])
    assert not flips([forward, make_vote("abstain", order="reversed")])
    assert not flips([forward, make_vote("second", order="forward")])
    assert not flips([])


def in_orders(*answers, voice="v", start=0):
    """One voice's votes: (order, outcome, p(first))."""
    return [make_vote(o, start + n, p, voice=voice, order=order) for n, (order, o, p) in enumerate(answers)]


def test_an_order_counts_as_much_as_the_other():
    votes = in_orders(("forward", "first", 0.9), ("forward", "first", 0.8), ("reversed", "second", 0.05))
    verdict = aggregate(votes)
    assert verdict.p_first == pytest.approx((0.85 + 0.05) / 2)
    assert verdict.agreement == pytest.approx(0.5)
    assert verdict.outcome == "second"


def test_a_voice_counts_as_much_as_another_however_often_it_was_asked():
    votes = [*in_orders(("forward", "first", None), ("reversed", "first", None)), make_vote("second", 5, voice="w")]
    assert aggregate(votes).outcome == "tie"


def test_a_voice_that_answered_in_one_of_two_orders_is_left_out():
    half = in_orders(("forward", "first", 0.9), ("reversed", "abstain", None))
    verdict = aggregate(half)
    assert (verdict.outcome, verdict.valid_votes, verdict.abstentions) == ("abstain", 0, {"unparsed": 1})
    both = in_orders(("forward", "second", 0.1), ("reversed", "second", 0.2), voice="w", start=5)
    assert aggregate(half + both).p_first == pytest.approx(0.15)
    # Asked in one order only, there is nothing to balance it with.
    assert aggregate(half[:1]).outcome == "first"


def test_majority_counts_votes_and_mean_counts_how_sure_they_are():
    votes = [make_vote("first", 0, 0.51), make_vote("first", 1, 0.51), make_vote("second", 2, 0.1)]
    assert aggregate(votes, method="mean").outcome == "second"
    majority = aggregate(votes, method="majority")
    assert majority.outcome == "first"
    assert majority.p_first == majority.agreement == pytest.approx(2 / 3)


def test_slots_are_counted_where_a_voice_answered_in_both_orders():
    votes = [
        *in_orders(("forward", "first", None), ("reversed", "second", None)),  # the first slot twice
        *in_orders(("forward", "second", None), ("reversed", "tie", None), voice="w", start=5),  # the second once
        *in_orders(("forward", "first", None), voice="x", start=8),  # not asked the other way round
    ]
    verdict = aggregate(votes)
    assert (verdict.slot_first, verdict.slot_votes) == (2, 3)
    assert aggregate([make_vote("first")]).slot_votes == 0


@given(vote_lists(), st.sampled_from(["mean", "majority"]))
def test_swapping_twice_is_the_identity_and_once_mirrors(votes, method):
    verdict = aggregate(votes, WEIGHTS, method)
    other = aggregate([mirrored(v) for v in votes], WEIGHTS, method)
    assert aggregate([mirrored(mirrored(v)) for v in votes], WEIGHTS, method) == verdict
    assert other.outcome == MIRROR[verdict.outcome]
    assert other.agreement == pytest.approx(verdict.agreement)
    assert (other.guard_first, other.guard_second) == (verdict.guard_second, verdict.guard_first)
    if verdict.p_first is not None:
        assert other.p_first == pytest.approx(1 - verdict.p_first)


@given(vote_lists(), st.sampled_from(["mean", "majority"]))
def test_presenting_a_pair_the_other_way_round_changes_nothing_but_the_slots(votes, method):
    turn = {"forward": "reversed", "reversed": "forward", "none": "none"}
    turned = [v.model_copy(update={"ballot": v.ballot.model_copy(update={"order": turn[v.ballot.order]})})
              for v in votes]  # fmt: skip
    verdict, other = aggregate(votes, WEIGHTS, method), aggregate(turned, WEIGHTS, method)
    assert other.slot_first == verdict.slot_votes - verdict.slot_first
    assert other.model_copy(update={"slot_first": verdict.slot_first}) == verdict


@given(vote_lists(), st.sampled_from(["mean", "majority"]))
def test_a_winner_has_a_vote(votes, method):
    verdict = aggregate(votes, WEIGHTS, method)
    if verdict.outcome in ("first", "second"):
        assert verdict.outcome in {v.outcome for v in votes if not v.ballot.guard}
        assert 0 < verdict.agreement <= 1


@given(vote_lists())
def test_the_order_of_votes_does_not_matter(votes):
    a, b = aggregate(votes, WEIGHTS), aggregate(votes[::-1], WEIGHTS)
    assert (a.outcome, a.valid_votes, a.order_flip, a.guard_first) == (
        b.outcome, b.valid_votes, b.order_flip, b.guard_first
    )  # fmt: skip


def test_votes_on_two_pairs_are_refused():
    other = make_vote("first", 1)
    other = other.model_copy(update={"ballot": other.ballot.model_copy(update={"pair_id": "q"})})
    with pytest.raises(ValueError, match="2"):
        aggregate([make_vote("first"), other])
    assert list(by_pair([make_vote("first"), other])) == ["p", "q"]


def jury(pairs, *jurors, seed=0):
    """Votes in both orders on pairs whose better side is known to the jurors: functions of (truth, order, rng)."""
    rng = random.Random(seed)
    votes, truth = [], {}
    for n in range(pairs):
        truth[f"p{n}"] = rng.choice(["first", "second"])
        for juror in jurors:
            for order in ("forward", "reversed"):
                vote = make_vote(juror(truth[f"p{n}"], order, rng), len(votes), voice="v", order=order)
                ballot = vote.ballot.model_copy(update={"pair_id": f"p{n}", "judge": juror.__name__})
                votes.append(vote.model_copy(update={"ballot": ballot}))
    return votes, truth


def named(function, name):
    function.__name__ = name
    return function


def right(share, name):
    return named(lambda truth, order, rng: truth if rng.random() < share else MIRROR[truth], name)


CONTRARY = named(lambda truth, order, rng: MIRROR[truth], "contrary")
FIRST_SLOT = named(lambda truth, order, rng: "first" if order == "forward" else "second", "first_slot")
COIN = named(lambda truth, order, rng: rng.choice(["first", "second"]), "coin")
GOOD = (right(0.9, "good"), right(0.85, "fair"), right(0.8, "fine"))


@pytest.mark.parametrize("bad", [CONTRARY, FIRST_SLOT, COIN], ids=lambda f: f.__name__)
def test_a_juror_that_knows_nothing_loses_its_weight(bad):
    votes, _ = jury(60, *GOOD, bad)
    fit = fit_jurors(votes)
    assert fit.fitted
    assert fit.pairs == 60
    assert fit.weights[bad.__name__] < 0.2
    assert all(fit.weights[g.__name__] > 0.4 for g in GOOD)  # informedness is 0.8, 0.7, 0.6; 60 pairs are few
    assert {(c.juror, c.order) for c in fit.confusions} == {(j.__name__, o) for j in (*GOOD, bad)
                                                           for o in ("forward", "reversed")}  # fmt: skip


def test_weights_make_better_verdicts_than_heads():
    votes, truth = jury(200, *GOOD, CONTRARY, FIRST_SLOT, named(lambda t, o, r: MIRROR[t], "contrary_too"))
    weights = fit_jurors(votes).weights

    def correct(juror_weights):
        return sum(aggregate(v, juror_weights=juror_weights).outcome == truth[p] for p, v in by_pair(votes).items())

    assert correct(weights) > correct(None) + 10


def test_a_contrary_juror_alone_on_a_pair_elects_nobody():
    votes, _ = jury(60, *GOOD, CONTRARY)
    weights = fit_jurors(votes).weights
    assert weights["contrary"] == 0
    alone = [v for v in votes if v.ballot.judge == "contrary" and v.ballot.pair_id == "p0"]
    verdict = aggregate(alone, juror_weights=weights)
    assert (verdict.outcome, verdict.valid_votes) == ("abstain", 0)


def test_two_camps_of_one_can_not_tell_who_is_contrary():
    votes, _ = jury(60, GOOD[0], FIRST_SLOT, CONTRARY)
    fit = fit_jurors(votes)
    assert (fit.fitted, set(fit.weights.values())) == (False, {1.0})
    assert len(fit.confusions) == 6


def test_two_jurors_can_not_tell_who_is_right():
    votes, _ = jury(20, GOOD[0], CONTRARY)
    fit = fit_jurors(votes)
    assert (fit.fitted, fit.weights, fit.confusions) == (False, {"good": 1.0, "contrary": 1.0}, ())
    assert fit_jurors([]).weights == {}


def test_a_juror_that_always_abstains_has_no_weight():
    votes, _ = jury(30, *GOOD, named(lambda t, o, r: "abstain", "silent"))
    assert fit_jurors(votes).weights["silent"] == 0
