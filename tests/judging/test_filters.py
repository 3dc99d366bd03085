"""Filters: each rule drops what it is named for, and can only drop."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlaif.config import Filters
from rlaif.judging.filters import count_reasons, decide
from rlaif.judging.verdicts import aggregate
from tests.judging.vote_makers import MIRROR, PAIR, WEIGHTS, make_vote, mirrored, vote_lists

TEXTS = {"a": "one", "b": "two"}
FIRST = make_vote("first", 0, 0.9)
FORWARD = make_vote("first", 0, 0.9, voice="v", order="forward")


def decision(*votes, texts=TEXTS, **settings):
    return decide(aggregate(votes, WEIGHTS), PAIR, Filters(**settings), texts)


def settings_strategy():
    return st.builds(
        Filters,
        min_votes=st.integers(1, 3),
        max_abstention_share=st.sampled_from([0.0, 0.5, 1.0]),
        min_agreement=st.sampled_from([0.0, 0.6, 1.0]),
        min_margin=st.sampled_from([0.0, 0.1, 0.3]),
        guards=st.booleans(),
    )


@pytest.mark.parametrize(
    ("votes", "settings", "reasons"),
    [
        ([FIRST], {}, ()),
        ([FIRST], {"min_votes": 2}, ("too_few_votes",)),
        ([FIRST, make_vote("abstain", 1)], {}, ()),
        ([FIRST, make_vote("abstain", 1), make_vote("abstain", 2)], {}, ("abstained",)),
        ([make_vote("abstain", 1)], {"max_abstention_share": 1.0}, ("too_few_votes",)),
        ([make_vote("tie", 1)], {"min_agreement": 0}, ("tie",)),
        ([FIRST, make_vote("second", 1, guard=True)], {}, ("guard",)),
        ([FIRST, make_vote("second", 1, guard=True)], {"guards": False}, ()),
        ([FIRST, make_vote("first", 1, guard=True)], {}, ()),
        ([FIRST, make_vote("second", 1, 0.4)], {}, ("low_agreement",)),
        ([FIRST, make_vote("tie", 1, 0.5)], {}, ("low_agreement",)),
        ([FIRST, make_vote("second", 1, 0.4)], {"min_agreement": 0.5}, ()),
        ([make_vote("first", 0, 0.55)], {"min_margin": 0.1}, ("low_margin",)),
        (
            [FORWARD, make_vote("first", 1, 0.9, voice="v", order="reversed")],
            {},
            (),
        ),
        (
            [FORWARD, make_vote("second", 1, 0.4, voice="v", order="reversed")],
            {"min_agreement": 0},
            ("order_flip",),
        ),
    ],
)  # fmt: skip
def test_rules(votes, settings, reasons):
    got = decision(*votes, **settings)
    assert got.reasons == reasons
    assert (got.status == "kept") == (got.winner is not None) == (not reasons)


def test_identical_texts_are_dropped_however_sure_the_votes():
    got = decision(FIRST, texts={"a": "same\n", "b": " same"})
    assert (got.status, got.winner, got.reasons) == ("dropped", None, ("identical",))
    assert count_reasons([got, decision(FIRST)]) == {"identical": 1}


METHODS = st.sampled_from(["mean", "majority"])


@given(vote_lists(), settings_strategy(), METHODS)
def test_reversing_the_pair_mirrors_the_decision(votes, settings, method):
    one = decide(aggregate(votes, WEIGHTS, method), PAIR, settings, TEXTS)
    other = decide(aggregate([mirrored(v) for v in votes], WEIGHTS, method), PAIR.swap(), settings, TEXTS)
    # A mean that is a rounding error away from a threshold may fall on either side of it.
    p = one.verdict.p_first
    assume(p is None or abs(abs(p - 0.5) - settings.min_margin) > 1e-9 or settings.min_margin == 0)
    assert other.status == one.status
    assert set(other.reasons) == set(one.reasons)
    assert other.winner == (MIRROR[one.winner] if one.winner else None)


@given(vote_lists(), settings_strategy(), METHODS, st.sampled_from([None, True, False]))
def test_no_rule_invents_a_winner(votes, settings, method, calibrated):
    got = decide(aggregate(votes, WEIGHTS, method), PAIR, settings, TEXTS, calibrated)
    if got.winner is not None:
        assert got.status == "kept"
        assert got.winner == got.verdict.outcome
        assert got.winner in {v.outcome for v in votes if not v.ballot.guard}


@hypothesis_settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(vote_lists(), settings_strategy(), st.sampled_from(["brief", "plain", "kind"]), st.integers(1, 3), METHODS)
def test_agreeing_votes_never_turn_kept_into_dropped(votes, settings, principle, number, method):
    before = decide(aggregate(votes, WEIGHTS, method), PAIR, settings, TEXTS)
    assume(before.status == "kept")
    # New voices that agree and are as sure as any: one that is less sure would lower the mean.
    p = 1.0 if before.winner == "first" else 0.0
    more = [make_vote(before.winner, 100 + n, p, principle=principle) for n in range(number)]
    after = decide(aggregate([*votes, *more], WEIGHTS, method), PAIR, settings, TEXTS)
    assert (after.status, after.winner) == ("kept", before.winner)


@given(vote_lists(), settings_strategy())
def test_a_stricter_filter_never_adds_a_pair(votes, settings):
    verdict = aggregate(votes, WEIGHTS)
    strict = Filters(min_votes=settings.min_votes + 1, max_abstention_share=0, min_agreement=1, min_margin=0.4)
    if decide(verdict, PAIR, strict, TEXTS).status == "kept":
        assert decide(verdict, PAIR, settings, TEXTS).status == "kept"


def test_a_verdict_on_another_pair_is_refused():
    with pytest.raises(ValueError, match="pair"):
        decide(aggregate([FIRST]), PAIR.model_copy(update={"id": "q"}), Filters(), TEXTS)
