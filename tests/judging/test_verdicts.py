"""Votes added up: weights by principle, guards apart, nothing coerced."""

from __future__ import annotations

import pytest
from hypothesis import given

from rlaif.judging.verdicts import aggregate, by_pair
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


def test_order_flip_needs_one_voice_in_both_orders():
    def flips(*votes):
        return aggregate(votes).order_flip

    forward = make_vote("first", 0, voice="v", order="forward")
    assert flips(forward, make_vote("second", 1, voice="v", order="reversed"))
    assert flips(forward, make_vote("tie", 1, voice="v", order="reversed"))
    assert not flips(forward, make_vote("first", 1, voice="v", order="reversed"))
    assert not flips(forward, make_vote("second", 1, voice="w", order="reversed"))
    assert not flips(make_vote("first", 0, voice="v"), make_vote("second", 1, voice="v"))


@given(vote_lists())
def test_swapping_twice_is_the_identity_and_once_mirrors(votes):
    verdict = aggregate(votes, WEIGHTS)
    other = aggregate([mirrored(v) for v in votes], WEIGHTS)
    assert aggregate([mirrored(mirrored(v)) for v in votes], WEIGHTS) == verdict
    assert other.outcome == MIRROR[verdict.outcome]
    assert other.agreement == pytest.approx(verdict.agreement)
    assert (other.guard_first, other.guard_second) == (verdict.guard_second, verdict.guard_first)
    if verdict.p_first is not None:
        assert other.p_first == pytest.approx(1 - verdict.p_first)


@given(vote_lists())
def test_a_winner_has_a_vote(votes):
    verdict = aggregate(votes, WEIGHTS)
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
