"""All votes on one pair, added up. Pure: an abstention stays an abstention, a tie stays a tie.

Weights: a principle's weight is shared equally by its valid votes, so a principle asked in many voices counts
no more than one asked once. p(first) is the weighted mean of the votes' p(first) (a soft vote, as in RLAIF,
arXiv 2309.00267); a vote without one counts as 1, 0 or, for a tie, 0.5. The winner is the side of that mean;
agreement is the weighted share of valid votes that name it, a tie vote naming neither. Guards are counted
apart: they veto, they don't elect.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from rlaif.records import Outcome, Verdict, Vote

_HARD = {"first": 1.0, "second": 0.0, "tie": 0.5}
_EPSILON = 1e-9


def aggregate(votes: Sequence[Vote], weights: Mapping[str, float] | None = None) -> Verdict:
    """The verdict of a pair's votes; `weights` maps principle id to weight (`Constitution.weights`), 1 when absent.

    The outcome is `abstain` without a valid electing vote, `tie` when the mean is even.

    Raises:
        ValueError: no votes, or votes on different pairs.
    """
    pair_ids = {v.ballot.pair_id for v in votes}
    if len(pair_ids) != 1:
        raise ValueError(f"aggregate takes the votes on one pair, got {len(pair_ids)}")
    electing = [v for v in votes if not v.ballot.guard]
    valid = [v for v in electing if v.outcome != "abstain"]
    guards = Counter(v.outcome for v in votes if v.ballot.guard)
    outcome: Outcome = "abstain"
    p_first = agreement = None
    if valid:
        share = _shares(valid, weights or {})
        p_first = sum(share[v.ballot.id] * _p_first(v) for v in valid)
        p_first = min(max(p_first, 0.0), 1.0)
        even = abs(p_first - 0.5) < _EPSILON
        outcome = "tie" if even else "first" if p_first > 0.5 else "second"
        agreement = min(sum(share[v.ballot.id] for v in valid if v.outcome == outcome), 1.0)
    return Verdict(
        pair_id=pair_ids.pop(),
        outcome=outcome,
        p_first=p_first,
        agreement=agreement,
        valid_votes=len(valid),
        abstentions=dict(Counter(v.abstain_reason for v in electing if v.abstain_reason is not None)),
        order_flip=_order_flip(valid),
        guard_first=guards["first"],
        guard_second=guards["second"],
    )


def by_pair(votes: Sequence[Vote]) -> dict[str, list[Vote]]:
    """Votes by pair id, in order of first appearance."""
    out: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        out[vote.ballot.pair_id].append(vote)
    return dict(out)


def _p_first(vote: Vote) -> float:
    return _HARD[vote.outcome] if vote.p_first is None else vote.p_first


def _shares(valid: Sequence[Vote], weights: Mapping[str, float]) -> dict[str, float]:
    """Ballot id → share of the election; the shares sum to 1."""
    counts = Counter(v.ballot.principles for v in valid)
    weight = {
        principles: sum(weights.get(p, 1.0) for p in principles) / max(len(principles), 1) if principles else 1.0
        for principles in counts
    }
    total = sum(weight.values())
    return {v.ballot.id: weight[v.ballot.principles] / counts[v.ballot.principles] / total for v in valid}


def _order_flip(valid: Sequence[Vote]) -> bool:
    """True when one voice named different sides in the two orders. A judge without slots has only order `none`."""
    named: dict[tuple[str, str, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for v in valid:
        b = v.ballot
        if b.order != "none":
            named[b.judge, b.voice, b.sample_index][b.order].add(v.outcome)
    return any(len(set().union(*orders.values())) > 1 for orders in named.values() if len(orders) == 2)
