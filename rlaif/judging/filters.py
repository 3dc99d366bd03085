"""Which labels are trusted: small rules, each with a typed reason. Pure.

A pair trains only if no rule speaks against it. A rule can only drop: the winner is always the one that the
votes named, and a dropped pair has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlaif.config import Filters
from rlaif.records import Decision, DropReason, Pair, Verdict

Rule = Callable[[Verdict, Filters], bool]


def decide(verdict: Verdict, pair: Pair, settings: Filters, texts: Mapping[str, str]) -> Decision:
    """The filter's word on one pair; `texts` maps completion id to text.

    Raises:
        ValueError: the verdict is about another pair.
    """
    if verdict.pair_id != pair.id:
        raise ValueError(f"verdict on {verdict.pair_id}, pair {pair.id}")
    reasons: list[DropReason] = ["identical"] if identical(pair, texts) else []
    reasons += [reason for reason, speaks_against in RULES.items() if speaks_against(verdict, settings)]
    winner = verdict.outcome if verdict.outcome in ("first", "second") and not reasons else None
    return Decision(
        pair_id=pair.id,
        status="dropped" if winner is None else "kept",
        reasons=tuple(reasons),
        winner=winner,
        verdict=verdict,
    )


def count_reasons(decisions: Sequence[Decision]) -> dict[DropReason, int]:
    """How many pairs each rule spoke against; a pair with two reasons counts under both."""
    counts: dict[DropReason, int] = {}
    for decision in decisions:
        for reason in decision.reasons:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def identical(pair: Pair, texts: Mapping[str, str]) -> bool:
    """The two texts are equal but for surrounding space: there is nothing to prefer."""
    return texts[pair.first].strip() == texts[pair.second].strip()


def too_few_votes(verdict: Verdict, settings: Filters) -> bool:
    """Fewer valid votes than `min_votes`, and in any case fewer than one."""
    return verdict.valid_votes < max(settings.min_votes, 1)


def abstained(verdict: Verdict, settings: Filters) -> bool:
    """More than `max_abstention_share` of the votes are abstentions."""
    lost = sum(verdict.abstentions.values())
    return lost > settings.max_abstention_share * (lost + verdict.valid_votes)


def tie(verdict: Verdict, settings: Filters) -> bool:
    """The votes are even."""
    return verdict.outcome == "tie"


def guard(verdict: Verdict, settings: Filters) -> bool:
    """A guard voted for the loser, that is, against the winner."""
    against = {"first": verdict.guard_second, "second": verdict.guard_first}
    return settings.guards and against.get(verdict.outcome, 0) > 0


def order_flip(verdict: Verdict, settings: Filters) -> bool:
    """A voice named another side when the pair was shown the other way round; inert without slots."""
    return verdict.order_flip


def low_agreement(verdict: Verdict, settings: Filters) -> bool:
    """The winner has less than `min_agreement` of the votes' weight."""
    # The tolerance is for the rounding of weights that sum to one.
    return verdict.agreement is not None and verdict.agreement < settings.min_agreement - 1e-9


def low_margin(verdict: Verdict, settings: Filters) -> bool:
    """p(first) is nearer to 0.5 than `min_margin`."""
    return verdict.p_first is not None and abs(verdict.p_first - 0.5) < settings.min_margin


RULES: dict[DropReason, Rule] = {
    "too_few_votes": too_few_votes,
    "abstained": abstained,
    "tie": tie,
    "guard": guard,
    "order_flip": order_flip,
    "low_agreement": low_agreement,
    "low_margin": low_margin,
}
