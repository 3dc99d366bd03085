"""All votes on one pair, added up. Pure: an abstention stays an abstention, a tie stays a tie.

In: votes, principle weights, where wanted juror weights. Out: a `Verdict` a pair, and for a jury a `JurorFit`.

p(first) is balanced on three levels, each a mean of the level below: an order counts as much as the other within
its voice (judge, template or contrast, sample), a voice as much as any other within its principle, and principles
count by weight. A voice that was asked in both orders and answered in one only can't be balanced: its answer is
left out, or the slot that it was shown in would decide. `mean` adds p(first) of the votes (soft votes, as in RLAIF,
arXiv 2309.00267; 1, 0 or, for a tie, 0.5 where there is none), `majority` adds outcomes. The winner is the side of
that mean; agreement is the share of the votes' weight that names it, a tie vote naming neither. Guards are counted
apart: they veto, they don't elect; one that was asked and has no valid vote is counted as missing.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from rlaif.intervals import share
from rlaif.records import Order, Outcome, Record, Side, Verdict, VoiceKey, Vote

Method = Literal["mean", "majority", "dawid_skene"]

_HARD = {"first": 1.0, "second": 0.0, "tie": 0.5}
_EPSILON = 1e-9
_LEAST_JURORS = 3
LEAST_FIT = 20
"""Pairs without which no weight of a juror is fitted: on a handful any two jurors may agree by chance."""
_CLEAR = 0.05
"""Of Youden's J: nearer to 0 a juror is neither believed nor contrary."""


class Confusion(Record):
    """What one juror said in one order, against the truth that the whole jury's votes make likely."""

    juror: str
    order: Order
    votes: int
    first_given_first: float
    """P(says first | first is better)."""
    second_given_second: float

    @property
    def informedness(self) -> float:
        """Youden's J: 1 always right, 0 says the same whatever is true, -1 always contrary."""
        return self.first_given_first + self.second_given_second - 1


class JurorFit(Record):
    """Juror weights: fitted by Dawid-Skene over all pairs of an iteration, or learned from labels."""

    fitted: bool
    """False when there are too few pairs, too few jurors to tell who is right, or no more that are believed than
    contrary ones; all weights are then 1."""
    source: Literal["votes", "labels"] = "votes"
    """What the weights were fitted to: the votes of the whole jury, or labelled pairs."""
    pairs: int
    weights: dict[str, float]
    """Juror → weight, 0 to 1."""
    confusions: tuple[Confusion, ...] = ()


def aggregate(
    votes: Sequence[Vote],
    weights: Mapping[str, float] | None = None,
    method: Method = "mean",
    juror_weights: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict of a pair's votes.

    `method` says what a vote counts: its p(first), or with `majority` its outcome; `dawid_skene` is the mean with juror
    weights. `weights` maps principle id to weight (`Constitution.weights`), 1 when absent, `juror_weights` judge to
    weight (`JurorFit.weights`), 1 when absent; a juror of weight 0 has no valid vote. The outcome is `abstain`
    without a valid electing vote, `tie` when the mean is even.

    Raises:
        ValueError: no votes, or votes on different pairs.
    """
    pair_ids = {v.ballot.pair_id for v in votes}
    if len(pair_ids) != 1:
        raise ValueError(f"aggregate takes the votes on one pair, got {len(pair_ids)}")
    jurors = juror_weights or {}
    electing = [v for v in votes if not v.ballot.guard]
    voices = _balanced_voices([v for v in electing if jurors.get(v.ballot.judge, 1.0) > 0])
    valid = [v for orders in voices.values() for answers in orders.values() for v in answers]
    guards = Counter(v.outcome for v in votes if v.ballot.guard)
    outcome: Outcome = "abstain"
    p_first = agreement = None
    if valid:
        shares = _shares(voices, weights or {}, jurors)
        p_first = sum(share * _p_first(v, method) for share, v in zip(shares, valid, strict=True))
        p_first = min(max(p_first, 0.0), 1.0)
        even = abs(p_first - 0.5) < _EPSILON
        outcome = "tie" if even else "first" if p_first > 0.5 else "second"
        agreement = min(sum(share for share, v in zip(shares, valid, strict=True) if v.outcome == outcome), 1.0)
    slots = [_slot(v) for orders in voices.values() if len(orders) > 1 for answers in orders.values() for v in answers]
    return Verdict(
        pair_id=pair_ids.pop(),
        outcome=outcome,
        p_first=p_first,
        agreement=agreement,
        valid_votes=len(valid),
        electing_votes=len(electing),
        abstentions=dict(Counter(v.abstain_reason for v in electing if v.abstain_reason is not None)),
        order_flip=any(flips(chain.from_iterable(orders.values())) for orders in voices.values()),
        slot_first=slots.count("first"),
        slot_votes=len(slots) - slots.count(None),
        guard_first=guards["first"],
        guard_second=guards["second"],
        guard_missing=_silent([v for v in votes if v.ballot.guard]),
    )


def position_bias(slot_first: float | None, slot_votes: float | None) -> float | None:
    """Share of the votes for a slot (`Verdict.slot_votes`, of one verdict or summed) that name the one shown first:
    0.5 without a bias, None without such votes."""
    return share(slot_first, slot_votes)


def by_pair(votes: Sequence[Vote]) -> dict[str, list[Vote]]:
    """Votes by pair id, in order of first appearance."""
    out: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        out[vote.ballot.pair_id].append(vote)
    return dict(out)


def flips(votes: Iterable[Vote]) -> bool:
    """Whether one voice gave another answer when the order changed; a tie is an answer, an abstention none.

    False for a judge without slots, and for a voice that answered in one order only.
    """
    answers = [(v.ballot.order, v.outcome) for v in votes if v.ballot.order != "none" and v.outcome != "abstain"]
    return len({order for order, _ in answers}) == 2 and len({outcome for _, outcome in answers}) > 1


class _Named(NamedTuple):
    """What of a vote a fit looks at: there may be millions."""

    pair_id: str
    juror: str
    order: Order
    outcome: Outcome

    @classmethod
    def of(cls, vote: Vote) -> _Named:
        b = vote.ballot
        return cls(sys.intern(b.pair_id), sys.intern(b.judge), b.order, vote.outcome)


def fit_jurors(votes: Iterable[Vote]) -> JurorFit:
    """Weights of the jurors by Dawid-Skene (1979), fitted without labels over the votes on all pairs.

    A juror is fitted in each order by itself, so that naming a slot shows as what it is: the same answer whatever
    is true. Its weight is the mean of Youden's J over its orders, at least 0. So a juror that always names the slot
    shown first, or votes at random, loses its weight; one that is always contrary loses it too and is not turned
    round: a winner must have been named by a juror that is believed. With fewer than three jurors nothing tells who
    is right, and all keep weight 1, and so they do on fewer than LEAST_FIT pairs. The same when no more are clearly
    believed than are clearly contrary: the fit then rests on one of two camps, and either could be the contrary
    one.
    """
    asked, named = set[str](), list[_Named]()
    for v in votes:
        if not v.ballot.guard:
            asked.add(v.ballot.judge)
            if v.outcome in ("first", "second"):
                named.append(_Named.of(v))
    jurors = sorted(asked)
    pairs = len({v.pair_id for v in named})
    if len({v.juror for v in named}) < _LEAST_JURORS or pairs < LEAST_FIT:
        return JurorFit(fitted=False, pairs=pairs, weights=dict.fromkeys(jurors, 1.0))
    confusions = _dawid_skene(named)
    mean = _informedness(confusions)
    believed, contrary = (sum(sign * j > _CLEAR for j in mean.values()) for sign in (1, -1))
    if believed <= contrary:
        return JurorFit(fitted=False, pairs=pairs, weights=dict.fromkeys(jurors, 1.0), confusions=tuple(confusions))
    weights = {juror: round(max(mean.get(juror, 0.0), 0.0), 6) for juror in jurors}
    return JurorFit(fitted=True, pairs=pairs, weights=weights, confusions=tuple(confusions))


def learn_jurors(votes: Sequence[Vote], labels: Mapping[str, Side]) -> JurorFit:
    """Weights of the jurors from labelled pairs: Youden's J as in `fit_jurors`, against the labels (pair id → side)
    instead of what the jury makes likely. So who is right is not a question of who is more; two jurors are enough. None
    is negative: what a contrary juror says turned round doesn't carry over to other pairs."""
    jurors = sorted({v.ballot.judge for v in votes if not v.ballot.guard})
    named = [v for v in votes if not v.ballot.guard and v.outcome in ("first", "second") and v.ballot.pair_id in labels]
    pairs = len({v.ballot.pair_id for v in named})
    equal = JurorFit(fitted=False, source="labels", pairs=pairs, weights=dict.fromkeys(jurors, 1.0))
    if pairs < LEAST_FIT:
        return equal
    said: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for v in named:
        truth = (1.0, 0.0) if labels[v.ballot.pair_id] == "first" else (0.0, 1.0)
        said[v.ballot.judge, v.ballot.order].append((*truth, float(v.outcome == "first")))
    confusions = tuple(_confusion(juror, order, mine) for (juror, order), mine in sorted(said.items()))
    mean = _informedness(confusions)
    # A coin's luck would order the pairs that the others agree on.
    weights = {juror: round(j, 6) if (j := mean.get(juror, 0.0)) > _CLEAR else 0.0 for juror in jurors}
    if not any(weights.values()):  # nobody is right more often than not: the threshold has to say so
        return equal.model_copy(update={"confusions": confusions})
    return JurorFit(fitted=True, source="labels", pairs=pairs, weights=weights, confusions=confusions)


def juror_verdicts(votes: Sequence[Vote]) -> dict[str, dict[str, Outcome]]:
    """Juror → pair → the outcome of its own votes alone."""
    return {
        juror: {pair: aggregate(cast).outcome for pair, cast in by_pair(mine).items()}
        for juror, mine in by_juror(votes).items()
    }


def by_juror(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    """Votes by who cast them, in order of first appearance; those of guards left out."""
    out: dict[str, list[Vote]] = {}
    for vote in votes:
        if not vote.ballot.guard:
            out.setdefault(vote.ballot.judge, []).append(vote)
    return out


def jurors_for(method: Method, votes: Iterable[Vote], calibrated: JurorFit | None = None) -> JurorFit | None:
    """The juror weights that a way of adding up asks for: those that were calibrated, or a fit over these votes."""
    if method != "dawid_skene":
        return None
    return calibrated or fit_jurors(votes)


def _dawid_skene(named: Sequence[_Named]) -> list[Confusion]:
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    workers = [f"{v.order} {v.juror}" for v in named]
    table = pd.DataFrame({"task": [v.pair_id for v in named], "worker": workers, "label": [v.outcome for v in named]})
    likely = DawidSkene(n_iter=100).fit_predict_proba(table).reindex(columns=["first", "second"], fill_value=0.0)
    truth = likely.loc[table["task"]].to_numpy()  # [votes, 2]
    out = []
    for worker, rows in table.groupby("worker", sort=True).indices.items():
        says_first = (table["label"].to_numpy()[rows] == "first").astype(float)
        first, second = truth[rows, 0], truth[rows, 1]
        order, _, juror = str(worker).partition(" ")
        out.append(_confusion(juror, order, list(zip(first, second, says_first, strict=True))))
    return out


def _confusion(juror: str, order: str, said: Sequence[tuple[float, float, float]]) -> Confusion:
    """From (P(first is better), P(second is), 1 if it said first) for each vote.

    One imagined vote for each side under either truth: a few lucky votes don't make an oracle, and a juror never seen
    under one truth is not believed about it.
    """
    firsts, seconds = sum(first for first, _, _ in said), sum(second for _, second, _ in said)
    right_first = sum(first * says for first, _, says in said)
    right_second = sum(second * (1 - says) for _, second, says in said)
    return Confusion.model_validate(
        {
            "juror": juror,
            "order": order,
            "votes": len(said),
            "first_given_first": (right_first + 1) / (firsts + 2),
            "second_given_second": (right_second + 1) / (seconds + 2),
        }
    )


def _informedness(confusions: Sequence[Confusion]) -> dict[str, float]:
    """Juror → mean of Youden's J over its orders."""
    of: dict[str, list[float]] = defaultdict(list)
    for c in confusions:
        of[c.juror].append(c.informedness)
    return {juror: sum(values) / len(values) for juror, values in of.items()}


_Orders = dict[str, list[Vote]]


def _silent(votes: Sequence[Vote]) -> int:
    """How many of the voices have no valid vote."""
    asked = {v.ballot.voice_key for v in votes}
    return len(asked - {v.ballot.voice_key for v in votes if v.outcome != "abstain"})


def _balanced_voices(electing: Sequence[Vote]) -> dict[VoiceKey, _Orders]:
    """Voice → order → valid votes; a voice that was asked in two orders and answered in one is left out."""
    voices: dict[VoiceKey, _Orders] = {}
    for v in electing:
        orders = voices.setdefault(v.ballot.voice_key, {})
        answers = orders.setdefault(v.ballot.order, [])
        if v.outcome != "abstain":
            answers.append(v)
    return {voice: orders for voice, orders in voices.items() if all(orders.values())}


def _shares(
    voices: Mapping[VoiceKey, _Orders], weights: Mapping[str, float], jurors: Mapping[str, float]
) -> list[float]:
    """Each vote's share of the election, voice by voice and order by order; they sum to 1."""
    of_principles: dict[tuple[str, ...], float] = defaultdict(float)
    for voice in voices:
        of_principles[voice.principles] += jurors.get(voice.judge, 1.0)
    weight = {
        principles: sum(weights.get(p, 1.0) for p in principles) / len(principles) if principles else 1.0
        for principles in of_principles
    }
    total = sum(weight.values())
    return [
        weight[voice.principles]
        / total
        * jurors.get(voice.judge, 1.0)
        / of_principles[voice.principles]
        / len(orders)
        / len(answers)
        for voice, orders in voices.items()
        for answers in orders.values()
        for _ in answers
    ]


def _p_first(vote: Vote, method: Method) -> float:
    return _HARD[vote.outcome] if vote.p_first is None or method == "majority" else vote.p_first


def _slot(vote: Vote) -> Literal["first", "second"] | None:
    """The slot that a vote named; None for a tie, or a judge without slots."""
    if vote.ballot.order == "none" or vote.outcome not in ("first", "second"):
        return None
    return "first" if (vote.outcome == "first") == (vote.ballot.order == "forward") else "second"
