"""Votes and pairs for tests: small makers and hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st

from rlaif.records import Ballot, Pair, Vote

MIRROR = {"first": "second", "second": "first", "tie": "tie", "abstain": "abstain"}


def make_vote(outcome, n=0, p_first=None, principle="brief", voice=None, guard=False, order="none", reason=None):
    ballot = Ballot(
        id=f"b{n}", pair_id="p", judge="j", voice=voice or f"{principle}/{n}", principles=(principle,), guard=guard,
        order=order, constitution="c", template="t",
    )  # fmt: skip
    if outcome == "abstain":
        reason = reason or "unparsed"
    return Vote(ballot=ballot, model="m", outcome=outcome, p_first=p_first, abstain_reason=reason, raw_reply="")


def mirrored(vote):
    """The vote on the swapped pair."""
    p = None if vote.p_first is None else 1 - vote.p_first
    return vote.model_copy(update={"outcome": MIRROR[vote.outcome], "p_first": p})


@st.composite
def vote_lists(draw, min_size=1):
    """Votes whose p(first) fits their outcome, over three principles, with guards and both orders."""
    votes = []
    for n in range(draw(st.integers(min_size, 7))):
        outcome = draw(st.sampled_from(["first", "second", "tie", "abstain"]))
        # Sixty-fourths are exact in binary, so mirroring a vote mirrors it exactly.
        sure = draw(st.integers(1, 32)) / 64
        p = {"first": 0.5 + sure, "second": 0.5 - sure, "tie": 0.5, "abstain": None}[outcome]
        votes.append(
            make_vote(
                outcome,
                n,
                p if draw(st.booleans()) else None,
                principle=draw(st.sampled_from(["brief", "plain", "kind"])),
                voice=draw(st.sampled_from(["v", "w", None])),
                guard=draw(st.integers(0, 4)) == 0,
                order=draw(st.sampled_from(["none", "forward", "reversed"])),
            )
        )
    return votes


PAIR = Pair(id="p", prompt_id="x", first="a", second="b", method="all")
WEIGHTS = {"brief": 1.0, "plain": 2.0, "kind": 0.5}
