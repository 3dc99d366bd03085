"""Which labels are trusted: small rules, each with a typed reason. Pure.

A pair trains only if no rule speaks against it. A rule can only drop: the winner is always the one that the
votes named, and a dropped pair has none. A calibrated filter has one threshold on consistency in place of
`order_flip`, `low_agreement` and `low_margin`: the pairs that it keeps are exactly those that were promised.

A job can name rules of its own (`filters.rules`), which can only drop, too; they are imported when a pair is decided.

`to_review` then takes the pairs of an iteration that a person is asked about (`filters.review`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from rlaif.config import Filters
from rlaif.errors import RlaifError, UserError
from rlaif.judging.calibration import EVERYTHING, Asked, Calibration
from rlaif.judging.verdicts import JurorFit, aggregate
from rlaif.own_code import of_rule
from rlaif.records import Ballot, CodeName, Decision, DropReason, Pair, Reason, ReviewRule, Side, Verdict, Vote

Rule = Callable[[Verdict, Filters], bool]

_ROUNDING = 1e-9
"""Of weights that sum to one: a verdict that is on a threshold must not fall under it by the last bit."""


def decide(
    verdict: Verdict,
    pair: Pair,
    settings: Filters,
    texts: Mapping[str, str],
    calibrated: bool | None = None,
    cut: Collection[str] = (),
) -> Decision:
    """The filter's word on one pair; `texts` maps completion id to text, `cut` are the ids of completions that the
    length limit cut off.

    `calibrated` is what `trusted` says where a calibration is in force, and None where none is.

    Raises:
        ValueError: the verdict is about another pair.
    """
    if verdict.pair_id != pair.id:
        raise ValueError(f"verdict on {verdict.pair_id}, pair {pair.id}")
    reasons: list[Reason] = ["identical"] if identical(pair, texts) else []
    rules = RULES if calibrated is None else VALIDITY
    reasons += [reason for reason, speaks_against in rules.items() if speaks_against(verdict, settings)]
    if calibrated is False:
        reasons.append("uncalibrated")
    if cut_off(verdict, pair, settings, cut):
        reasons.append("cut_off")
    said = own_reasons(verdict, settings)
    reasons += said
    winner = verdict.outcome if verdict.outcome in ("first", "second") and not reasons else None
    return Decision(
        pair_id=pair.id,
        status="dropped" if winner is None else "kept",
        reasons=tuple(reasons),
        winner=winner,
        verdict=verdict,
        said=said,
    )


def own_reasons(verdict: Verdict, settings: Filters) -> dict[CodeName, str]:
    """What the rules of the job's own (`filters.rules`) say against a verdict, by rule.

    Raises:
        RlaifError: a rule fails, or gives something else than a sentence or None.
    """
    out: dict[CodeName, str] = {}
    for name in settings.rules:
        rule = of_rule(name).made
        try:
            said = rule(verdict, settings)
        except Exception as e:  # theirs: whatever it is, the message says whose
            raise RlaifError(f"filters.rules {name}: pair {verdict.pair_id}: {type(e).__name__}: {e}") from e
        if said is not None and not (isinstance(said, str) and said.strip()):
            raise RlaifError(f"filters.rules {name}: pair {verdict.pair_id}: gave {said!r}; expected a reason, or None")
        if said is not None:
            out[name] = said
    return out


def decide_votes(
    pair: Pair,
    votes: Sequence[Vote],
    settings: Filters,
    texts: Mapping[str, str],
    weights: Mapping[str, float] | None = None,
    jurors: JurorFit | None = None,
    calibration: Calibration | None = None,
    slice_name: str = EVERYTHING,
    cut: Collection[str] = (),
    asked: Asked | None = None,
) -> Decision:
    """A pair's decision from the votes on it: added up, held against the calibration where there is one, filtered.

    `weights` are the constitution's, `jurors` what `jurors_for` says of all votes, `slice_name` the pair's, `cut` as in
    `decide`, `asked` how it was asked about (None: nobody knows).

    Raises:
        UserError: the votes aren't those that were calibrated, and `filters.uncalibrated` says stop.
    """
    verdict = aggregate(votes, weights, settings.aggregate, jurors.weights if jurors else None)
    promised = trusted(verdict, votes, calibration, settings, slice_name, asked) if calibration else None
    return decide(verdict, pair, settings, texts, promised, cut)


def decide_label(pair: Pair, label: Side, texts: Mapping[str, str]) -> Decision:
    """A pair that a data set labelled. Nobody voted on it, so no rule about votes speaks: it is dropped where its texts
    are identical, and kept otherwise."""
    same = identical(pair, texts)
    return Decision(
        pair_id=pair.id,
        status="dropped" if same else "kept",
        reasons=("identical",) if same else (),
        winner=None if same else label,
        verdict=Verdict(
            pair_id=pair.id, outcome="abstain", p_first=None, agreement=None, valid_votes=0, electing_votes=0
        ),
        source="data",
    )


def to_review(decisions: Sequence[Decision], settings: Filters) -> list[Decision]:
    """An iteration's decisions, those to ask a person about with status `review` and without a winner.

    Asked about is a pair with a verdict that can be doubted: neither identical, nor vetoed by a guard, nor short of
    valid votes (a judge that fails is mended, not outvoted). Their reasons stay; `review_rule` says what sent them.
    With a calibration, only pairs that it doesn't keep: its promise is about exactly those that it keeps.
    """
    review = settings.review
    if review is None:
        return list(decisions)
    doubtful = [d for d in decisions if _UNASKABLE.isdisjoint(d.reasons) and d.verdict.agreement is not None]
    if settings.calibration is not None:
        doubtful = [d for d in doubtful if d.status != "kept"]
    rules: dict[str, ReviewRule] = {}
    if review.below_agreement is not None:
        bound = review.below_agreement - _ROUNDING
        rules = {d.pair_id: "below_agreement" for d in doubtful if (d.verdict.agreement or 0.0) < bound}
    rest = sorted((d for d in doubtful if d.pair_id not in rules), key=certainty)
    rules |= {d.pair_id: "top_uncertain" for d in rest[: review.top_uncertain]}
    return [
        d.model_copy(update={"status": "review", "winner": None, "review_rule": rules[d.pair_id]})
        if d.pair_id in rules
        else d
        for d in decisions
    ]


def certainty(decision: Decision) -> tuple[float, float, str]:
    """A sort key, the least certain pair first: agreement, then |p(first) - 0.5|, then the pair's id."""
    verdict = decision.verdict
    margin = 0.5 if verdict.p_first is None else abs(verdict.p_first - 0.5)
    # Sums of the same votes in another order differ in the last bit, and ties have to be ties.
    return round(verdict.agreement or 0.0, 9), round(margin, 9), decision.pair_id


def identical(pair: Pair, texts: Mapping[str, str]) -> bool:
    """The two texts are equal but for surrounding space: there is nothing to prefer."""
    return texts[pair.first].strip() == texts[pair.second].strip()


def too_few_votes(verdict: Verdict, settings: Filters) -> bool:
    """Fewer valid votes than `min_votes`, and in any case fewer than one."""
    return verdict.valid_votes < max(settings.min_votes, 1)


def abstained(verdict: Verdict, settings: Filters) -> bool:
    """More than `max_abstention_share` of the votes are abstentions, or a guard that was asked has no valid vote."""
    if settings.guards and verdict.guard_missing:
        return True
    lost, votes = verdict.abstained_of
    return lost > settings.max_abstention_share * votes


def tie(verdict: Verdict, settings: Filters) -> bool:
    """The votes are even."""
    return verdict.outcome == "tie"


def guard(verdict: Verdict, settings: Filters) -> bool:
    """A guard voted for the loser, that is, against the winner."""
    against = {"first": verdict.guard_second, "second": verdict.guard_first}
    return settings.guards and against.get(verdict.outcome, 0) > 0


def order_flip(verdict: Verdict, settings: Filters) -> bool:
    """A voice gave another answer when the pair was shown the other way round; inert without slots."""
    return verdict.order_flip


def low_agreement(verdict: Verdict, settings: Filters) -> bool:
    """The winner has less than `min_agreement` of the votes' weight."""
    return verdict.agreement is not None and verdict.agreement < settings.min_agreement - _ROUNDING


def low_margin(verdict: Verdict, settings: Filters) -> bool:
    """p(first) is nearer to 0.5 than `min_margin`."""
    return verdict.p_first is not None and abs(verdict.p_first - 0.5) < settings.min_margin - _ROUNDING


def cut_off(verdict: Verdict, pair: Pair, settings: Filters, cut: Collection[str]) -> bool:
    """The winner was cut off by the length limit, and the loser ended by itself. A cut-off answer trains without an end
    token: preferred to one with it, it teaches not to stop."""
    return settings.cut_off == "drop" and cut_off_won(verdict, pair, cut) is True


def cut_off_won(verdict: Verdict, pair: Pair, cut: Collection[str]) -> bool | None:
    """Of two answers one of which was cut off, whether that one is the winner; None for other pairs."""
    if verdict.outcome not in ("first", "second") or (pair.first in cut) == (pair.second in cut):
        return None
    return (pair.first if verdict.outcome == "first" else pair.second) in cut


def trusted(
    verdict: Verdict,
    votes: Sequence[Vote],
    calibration: Calibration,
    settings: Filters,
    slice_name: str = EVERYTHING,
    asked: Asked | None = None,
) -> bool:
    """The calibration is about these votes, and the verdict reaches its threshold (`uncalibrated` when not).

    That nothing like a pair was calibrated, since one of its answers was cut off, is no mistake in the job: the pair
    isn't trusted, and the promise holds for the others.

    Raises:
        UserError: the votes aren't those that were calibrated, and `filters.uncalibrated` says stop.
    """
    difference = calibration.mismatch(votes, settings, slice_name, asked and asked._replace(ends=(None, None)))
    _refuse(difference, settings)
    covered = difference is None and (asked is None or calibration.ends_mismatch(asked) is None)
    return covered and calibration.keeps(verdict, slice_name)


def check_calibrated(
    ballots: Sequence[Ballot],
    calibration: Calibration,
    settings: Filters,
    slice_name: str | None = None,
    asked: Asked | None = None,
) -> None:
    """Refuses a pair's questions before anybody is asked them.

    Raises:
        UserError: they aren't those that were calibrated, and `filters.uncalibrated` says stop.
    """
    _refuse(calibration.panel_mismatch(ballots, settings, slice_name, asked), settings)


def check_asked(calibration: Calibration, settings: Filters, asked: Asked) -> None:
    """Refuses how a job asks, before anything is loaded: settings that are not as calibrated.

    Raises:
        UserError: they aren't as calibrated, and `filters.uncalibrated` says stop.
    """
    _refuse(calibration.asked_mismatch(asked), settings)


def _refuse(difference: str | None, settings: Filters) -> None:
    if difference and settings.uncalibrated == "stop":
        raise UserError(
            f"filters.calibration {settings.calibration}: {difference}; calibrate again (`rlaif judge calibrate`), or "
            "set filters.uncalibrated: drop"
        )


VALIDITY: dict[DropReason, Rule] = {
    "too_few_votes": too_few_votes,
    "abstained": abstained,
    "tie": tie,
    "guard": guard,
}
"""Is there a label at all?"""
CONSISTENCY: dict[DropReason, Rule] = {
    "order_flip": order_flip,
    "low_agreement": low_agreement,
    "low_margin": low_margin,
}
"""Do the voices agree on it?"""
RULES: dict[DropReason, Rule] = {**VALIDITY, **CONSISTENCY}
_UNASKABLE: frozenset[DropReason] = frozenset({"identical", "too_few_votes", "abstained", "guard"})
"""Nothing to ask a person about: no difference, no verdict, or a side that doesn't answer at all."""
