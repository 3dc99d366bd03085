"""Filters: each rule drops what it is named for, and can only drop."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlaif.config import Filters
from rlaif.judging.filters import certainty, decide, to_review
from rlaif.judging.verdicts import aggregate
from rlaif.records import Verdict
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
        ([FIRST, make_vote("abstain", 1, guard=True)], {}, ("abstained",)),
        ([FIRST, make_vote("abstain", 1, guard=True)], {"guards": False}, ()),
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


def test_the_share_of_abstentions_is_one_of_all_votes():
    """The answer that is left out, because its voice was silent in the other order, was a vote all the same."""
    votes = [make_vote("first", n, voice="v", order=order) for n, order in enumerate(("forward", "reversed"))]
    votes += [make_vote("first", 2, voice="w", order="forward"), make_vote("abstain", 3, voice="w", order="reversed")]
    verdict = aggregate(votes)
    assert (verdict.valid_votes, verdict.abstained_of) == (2, (1, 4))
    assert decision(*votes, max_abstention_share=0.25).reasons == ()
    assert decision(*votes, max_abstention_share=0.24).reasons == ("abstained",)
    assert verdict.model_copy(update={"electing_votes": None}).abstained_of == (1, 3)  # an older run's


def test_identical_texts_are_dropped_however_sure_the_votes():
    got = decision(FIRST, texts={"a": "same\n", "b": " same"})
    assert (got.status, got.winner, got.reasons) == ("dropped", None, ("identical",))


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


@pytest.mark.slow
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


# Review: which of an iteration's decisions go to people.


def verdicts():
    return st.builds(
        lambda n, p, agreement, guard_first: Verdict(
            pair_id=f"p{n}",
            outcome="abstain" if agreement is None else "tie" if p == 0.5 else "first" if p > 0.5 else "second",
            p_first=None if agreement is None else p,
            agreement=agreement,
            valid_votes=0 if agreement is None else 4,
            guard_first=guard_first,
        ),
        st.integers(0, 99),
        st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 1.0]),
        st.sampled_from([None, 0.0, 0.5, 0.75, 1.0]),
        st.integers(0, 1),
    )


def decided(verdict, texts=TEXTS, **settings):
    return decide(verdict, PAIR.model_copy(update={"id": verdict.pair_id}), Filters(**settings), texts)


def iterations():
    return st.lists(verdicts(), max_size=12, unique_by=lambda v: v.pair_id).map(lambda vs: [decided(v) for v in vs])


def review(decisions, **settings):
    filters = Filters(review=settings, **({"calibration": "c.json"} if settings.pop("calibration", False) else {}))
    return to_review(decisions, filters)


def asked(decisions):
    return {d.pair_id for d in decisions if d.status == "review"}


@given(iterations(), st.sampled_from([None, 0.0, 0.5, 0.8, 1.0]), st.integers(0, 5), st.booleans())
def test_review_takes_pairs_and_changes_no_other(decisions, bound, top, calibration):
    assume(bound is not None or top)
    after = review(decisions, below_agreement=bound, top_uncertain=top, calibration=calibration)
    assert [d.pair_id for d in after] == [d.pair_id for d in decisions]
    for old, new in zip(decisions, after, strict=True):
        assert (new.reasons, new.verdict) == (old.reasons, old.verdict)
        if new.status == "review":
            assert new.winner is None
            assert new.review_rule is not None
            assert not {"identical", "guard", "too_few_votes", "abstained"} & set(new.reasons)
            assert not (calibration and old.status == "kept")
        else:
            assert new == old
    sent = [d for d in after if d.review_rule == "top_uncertain"]
    assert len(sent) <= top
    below = {d.pair_id for d in after if d.review_rule == "below_agreement"}
    assert all(d.verdict.agreement < bound for d in after if d.pair_id in below)
    # None that could be asked about, and wasn't, is less certain than one that was.
    left = [d for d in after if d.status != "review" and d.verdict.agreement is not None and "guard" not in d.reasons]
    if not calibration and sent and left:
        assert max(map(certainty, sent)) < min(map(certainty, left))


@pytest.mark.slow
@given(iterations(), st.integers(1, 5), st.randoms())
def test_who_is_asked_about_does_not_depend_on_the_order_of_the_rows(decisions, top, random):
    shuffled = list(decisions)
    random.shuffle(shuffled)
    assert asked(review(decisions, top_uncertain=top)) == asked(review(shuffled, top_uncertain=top))


def test_no_review_leaves_everything_as_it_is():
    decisions = [decided(aggregate([FIRST], WEIGHTS))]
    assert to_review(decisions, Filters()) == decisions


def verdict_of(name, p, agreement, **more):
    outcome = "tie" if p == 0.5 else "first" if p > 0.5 else "second"
    return Verdict(pair_id=name, outcome=outcome, p_first=p, agreement=agreement, valid_votes=4, **more)


def test_the_least_agreed_go_first_and_then_the_nearest_to_half():
    decisions = [
        decided(verdict_of("sure", 0.99, 1.0)),
        decided(verdict_of("agreed", 0.55, 1.0)),
        decided(verdict_of("split", 0.5, 0.0)),
        decided(verdict_of("far", 0.7, 0.75)),
        decided(verdict_of("near", 0.6, 0.75)),
        decided(verdict_of("vetoed", 0.6, 0.5, guard_second=1)),
        decided(verdict_of("same", 0.6, 0.5), texts={"a": "x", "b": "x"}),
    ]
    order = ["split", "near", "far", "agreed", "sure"]
    for n in range(1, 6):
        assert asked(review(decisions, top_uncertain=n)) == set(order[:n])
    both = {d.pair_id: d.review_rule for d in review(decisions, below_agreement=0.75, top_uncertain=1)}
    assert both == {
        "sure": None, "agreed": None, "split": "below_agreement", "far": None, "near": "top_uncertain",
        "vetoed": None, "same": None,
    }  # fmt: skip


def test_an_agreement_on_the_bound_is_not_below_it():
    verdict = verdict_of("p", 0.7, 0.1 + 0.2 + 0.6)  # 0.8999...
    assert asked(review([decided(verdict)], below_agreement=0.9)) == set()


def test_with_a_calibration_what_is_kept_stays_kept():
    kept = decide(verdict_of(PAIR.id, 0.6, 0.5), PAIR, Filters(), TEXTS, calibrated=True)
    below = decide(verdict_of(PAIR.id, 0.6, 0.5), PAIR, Filters(), TEXTS, calibrated=False)
    assert asked(review([kept], below_agreement=1.0, top_uncertain=1, calibration=True)) == set()
    assert asked(review([below], below_agreement=1.0, calibration=True)) == {PAIR.id}


@pytest.mark.parametrize(
    ("outcome", "cut", "drops"),
    [
        ("first", {"a"}, True),  # half an answer preferred to a whole one
        ("second", {"b"}, True),
        ("first", {"b"}, False),
        ("second", {"a"}, False),
        ("first", {"a", "b"}, False),  # nothing to choose between
        ("first", set(), False),
    ],
)
def test_a_winner_that_was_cut_off_is_dropped_where_the_loser_ended(outcome, cut, drops):
    verdict = aggregate([make_vote(outcome, 0, 0.9 if outcome == "first" else 0.1)], WEIGHTS)
    for calibrated in (None, True):
        got = decide(verdict, PAIR, Filters(cut_off="drop"), TEXTS, calibrated, cut)
        assert got.reasons == (("cut_off",) if drops else ())
        assert (got.winner is None) == drops
    assert decide(verdict, PAIR, Filters(), TEXTS, None, cut).status == "kept"


def test_a_tie_has_no_winner_that_could_be_cut_off():
    got = decide(aggregate([make_vote("tie", 0)], WEIGHTS), PAIR, Filters(cut_off="drop"), TEXTS, None, {"a"})
    assert got.reasons[0] == "tie"
    assert "cut_off" not in got.reasons


@given(vote_lists(), st.sets(st.sampled_from(["a", "b"])))
@hypothesis_settings(deadline=None)
def test_the_rule_about_cut_off_winners_only_drops(votes, cut):
    verdict = aggregate(votes, WEIGHTS)
    with_it, without = (decide(verdict, PAIR, Filters(cut_off=v), TEXTS, None, cut) for v in ("drop", "keep"))
    assert with_it.winner in (without.winner, None)
    assert tuple(r for r in with_it.reasons if r != "cut_off") == without.reasons
