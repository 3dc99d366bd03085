"""A judge against labelled pairs: how often is it right, before and after the filter, and on how many?

In: labelled pairs, the votes on them (cast now, or recorded) and the job's filters. Out: one `Slice` for each judge
and slice, and one for all slices. A pair is judged exactly as in a run: votes are aggregated, the filter decides. A
verdict, or a vote, that names no side counts as wrong. Intervals are Wilson's, 95 %, and take pairs (or votes) as
independent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rlaif.config import Filters, Judge
from rlaif.constitution import Constitution
from rlaif.errors import UserError
from rlaif.intervals import wilson
from rlaif.judging.ballots import juror_names
from rlaif.judging.calibration import (
    EVERYTHING,
    Calibration,
    Panel,
    ScoreKind,
    Threshold,
    calibrate_scores,
    panels_of,
    passes,
    score_of,
)
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import CONSISTENCY, RULES, decide_votes
from rlaif.judging.labelled import Labelled
from rlaif.judging.opened import Ask
from rlaif.judging.spending import spent_on
from rlaif.judging.verdicts import JurorFit, by_pair, jurors_for
from rlaif.records import (
    AbstainReason,
    Decision,
    DropReason,
    FinishReason,
    Message,
    Outcome,
    Record,
    Side,
    Usage,
    VoiceKey,
    Vote,
)

JURY = "jury"
_RESAMPLES = 1000
_SENTENCE_ENDS = tuple(".!?\"')”")


class Share(Record):
    """A share with its Wilson 95 % interval; None and (0, 1) when nothing was counted."""

    hits: int
    of: int
    share: float | None
    low: float
    high: float

    @classmethod
    def count(cls, hits: int, of: int) -> Share:
        """`hits` of `of`."""
        low, high = wilson(hits, of)
        return cls(hits=hits, of=of, share=hits / of if of else None, low=low, high=high)


class Judged(Record):
    """A labelled pair, the votes on it and the filter's decision."""

    row: Labelled
    votes: tuple[Vote, ...]
    decision: Decision

    @property
    def correct(self) -> bool:
        """The votes name the labelled side, whatever the filter says."""
        return self.decision.verdict.outcome == self.row.label

    @property
    def kept(self) -> bool:
        """The filter kept the pair."""
        return self.decision.status == "kept"

    @property
    def eligible(self) -> bool:
        """No rule but those on consistency speaks against the pair: a calibration may keep it."""
        return all(reason in CONSISTENCY or reason == "uncalibrated" for reason in self.decision.reasons)


class AfterRule(Record):
    """What is left when a rule and all before it have spoken."""

    rule: DropReason
    dropped: int
    """By this rule, of what was left."""
    coverage: Share
    accuracy: Share


class Lengths(Record):
    """The length column: does the label, or the judge, follow the longer answer (in characters)?"""

    longer_is_better: Share
    """Accuracy of "longer wins"; equal lengths count as wrong."""
    judge_names_longer: Share
    """Of votes that name a side, lengths differing, before the filter: a judge that goes by length in one order and
    by the slot in the other has a tie for a verdict."""
    judge_names_longer_kept: Share
    """Of kept pairs, lengths differing: the verdict does."""


class Cost(Record):
    """What the votes cost. Recorded votes cost what their log says; where it says nothing, all of it is None."""

    calls: int | None
    """Requests to a server; a reply from the cache is none, and costs no tokens."""
    prompt_tokens: int | None
    completion_tokens: int | None
    money: float | None
    """By the job's `judge.prices`; None where a model that was asked has none."""
    seconds: float | None
    """Latencies summed; requests under way together count each."""
    tokens_per_kept_pair: float | None
    seconds_per_kept_pair: float | None


class Abstained(Record):
    """A vote that named nothing, to be looked at."""

    pair_id: str
    order: Literal["forward", "reversed", "none"]
    reply: str
    """As the judge gave it; what went wrong, where there was none."""
    finish_reason: str | None


class RiskPoint(Record):
    """Pairs that score at least this: how many, and how often wrong."""

    score: float
    coverage: float
    error: float


class Slice(Record):
    """One judge on one slice."""

    judge: str
    name: str
    pairs: int
    vote_accuracy: Share
    """Votes that name the labelled side; for a judge asked in both orders the mean over the orders."""
    verdict_accuracy: Share
    """Verdicts that name the labelled side, before the filter."""
    coverage: Share
    """Kept pairs."""
    kept_accuracy: Share
    rules: tuple[AfterRule, ...]
    """Rule by rule, in the filter's order."""
    reasons: dict[DropReason, int] = Field(default_factory=dict)
    """How many pairs each rule spoke against; a pair may count under several."""
    order_consistency: Share
    """Of voices asked in both orders that answered both: the same side named twice."""
    position_bias: Share
    """Votes for the slot shown first, of votes for either; .5 is none."""
    abstentions: dict[AbstainReason, int] = Field(default_factory=dict)
    examples: dict[AbstainReason, Abstained] = Field(default_factory=dict)
    """The first vote of each reason to abstain."""
    alpha: float | None
    """Krippendorff's alpha between voices (each order a voice), nominal; None for a single voice."""
    alpha_interval: tuple[float, float] | None
    """95 %, by a bootstrap over pairs."""
    lengths: Lengths
    cost: Cost
    risk: tuple[RiskPoint, ...]
    """The risk-coverage curve, strictest first: by agreement, then margin; pairs without a winner are never kept."""


class SplitTrial(Record):
    """The filter calibrated on a random half and measured on the other, many times."""

    judge: str
    name: str
    splits: int
    accepted: Share
    coverage: float
    """Mean share of the other half that is kept; 0 for a split in which no threshold was accepted."""
    coverage_when_accepted: float | None
    error: float | None
    """Wrong ones among all pairs kept in the other halves."""


def candidate(row: Labelled, side: Side) -> Candidate:
    """One of a row's answers. The file has no finish reason: an answer that ends as a sentence ended by itself; of
    another one nobody knows, and the label, which is about the principle, need not care."""
    text = row.first if side == "first" else row.second
    finish: FinishReason | None = "stop" if text.rstrip().endswith(_SENTENCE_ENDS) else None
    return Candidate(
        completion_id=f"{row.id}-{side}",
        prompt_id=row.id,
        messages=(Message(role="user", content=row.prompt),),
        finish_reason=finish,
        text=text,
    )


def cast_votes(
    rows: Sequence[Labelled],
    ask: Ask,
    load: Callable[[str], Constitution],
    default: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Vote]:
    """A judge's votes on every row, under its constitution or the default one.

    `load` reads a constitution, `progress` gets numbers of new votes.

    Raises:
        UserError: a row names no constitution, and there is no default.
    """
    out: list[Vote] = []
    for reference in dict.fromkeys(r.constitution or default for r in rows):
        if reference is None:
            raise UserError("the labelled pairs name no constitution: --job FILE, or --set constitution=NAME")
        constitution = load(reference)
        mine = [r for r in rows if (r.constitution or default) == reference]
        pairs = [r.pair for r in mine]
        candidates = [candidate(r, side) for r in mine for side in ("first", "second")]
        for chunk in ask(pairs, candidates, constitution):
            out += chunk
            if progress:
                progress(len(chunk))
    return out


def jurors_of(votes: Sequence[Vote], filters: Filters, calibration: Calibration | None = None) -> JurorFit | None:
    """The juror weights that the filter asks for: those that were calibrated, or a fit over these votes."""
    return jurors_for(filters.aggregate, votes, calibration.jurors if calibration else None)


def decide_rows(
    rows: Sequence[Labelled],
    votes: Sequence[Vote],
    filters: Filters,
    weights: Callable[[Labelled], Mapping[str, float]] = lambda row: {},
    calibration: Calibration | None = None,
    jurors: JurorFit | None = None,
) -> list[Judged]:
    """The rows that have votes, with the filter's decisions; `weights` gives a row's principle weights."""
    of_pair = by_pair(votes)
    out = []
    for row in rows:
        if not (mine := of_pair.get(row.id)):
            continue
        decision = decide_votes(row.pair, mine, filters, row.texts, weights(row), jurors, calibration, row.slice)
        out.append(Judged(row=row, votes=tuple(mine), decision=decision))
    return out


def by_judge(votes: Sequence[Vote], jury: bool = False) -> dict[str, list[Vote]]:
    """Votes by judge, in order of appearance; a jury is one judge."""
    out: dict[str, list[Vote]] = {}
    for vote in votes:
        out.setdefault(JURY if jury else vote.ballot.judge, []).append(vote)
    return out


def slices(judge: str, judged: Sequence[Judged], settings: Judge | None = None) -> list[Slice]:
    """One slice per name, in order of appearance, then `all` when there are several; `settings` hold the prices."""
    groups = _by_slice(judged)
    out = [summarise(judge, name, mine, settings) for name, mine in groups.items()]
    return [*out, summarise(judge, EVERYTHING, judged, settings)] if len(groups) > 1 else out


def summarise(judge: str, name: str, judged: Sequence[Judged], settings: Judge | None = None) -> Slice:
    """Counts, shares and intervals of one set of judged pairs."""
    kept = [j for j in judged if j.kept]
    votes = [(v, j.row.label) for j in judged for v in j.votes if not v.ballot.guard]
    verdicts = [j.decision.verdict for j in judged]
    asked, consistent = _both_orders([v for v, _ in votes])
    return Slice(
        judge=judge,
        name=name,
        pairs=len(judged),
        vote_accuracy=Share.count(sum(v.outcome == label for v, label in votes), len(votes)),
        verdict_accuracy=Share.count(sum(j.correct for j in judged), len(judged)),
        coverage=Share.count(len(kept), len(judged)),
        kept_accuracy=Share.count(sum(j.correct for j in kept), len(kept)),
        rules=tuple(_after_rules(judged)),
        reasons=dict(Counter(reason for j in judged for reason in j.decision.reasons)),
        order_consistency=Share.count(consistent, asked),
        position_bias=Share.count(sum(v.slot_first for v in verdicts), sum(v.slot_votes for v in verdicts)),
        abstentions=dict(sum((Counter(v.abstentions) for v in verdicts), Counter())),
        examples=_examples([v for v, _ in votes]),
        alpha=krippendorff_alpha([v for v, _ in votes]),
        alpha_interval=alpha_interval([v for v, _ in votes]),
        lengths=_lengths(judged, kept),
        cost=_cost([v for j in judged for v in j.votes], len(kept), settings),
        risk=tuple(_risk(judged)),
    )


def split_trial(
    judge: str,
    name: str,
    judged: Sequence[Judged],
    splits: int,
    alpha: float,
    delta: float,
    kind: ScoreKind = "agreement",
    seed: int = 0,
) -> SplitTrial:
    """Calibrates on a random half (seeded), measures on the other, `splits` times."""
    rng = np.random.default_rng(seed)
    half = len(judged) // 2
    shares, wrong, kept_pairs = [], 0, 0
    accepted = 0
    for n in range(splits):
        order = [judged[i] for i in rng.permutation(len(judged))]
        found = _threshold(order[:half], alpha, delta, kind, seed + n)
        kept = [j for j in order[half:] if j.eligible and passes(j.decision.verdict, found, kind)]
        accepted += found.accepted
        shares.append(len(kept) / max(len(judged) - half, 1))
        kept_pairs += len(kept)
        wrong += sum(not j.correct for j in kept)
    return SplitTrial(
        judge=judge,
        name=name,
        splits=splits,
        accepted=Share.count(accepted, splits),
        coverage=float(np.mean(shares)),
        coverage_when_accepted=sum(shares) / accepted if accepted else None,
        error=wrong / kept_pairs if kept_pairs else None,
    )


def split_trials(
    judge: str, judged: Sequence[Judged], splits: int, alpha: float, delta: float, kind: ScoreKind, seed: int
) -> list[SplitTrial]:
    """A trial for each slice."""
    return [
        split_trial(judge, name, mine, splits, alpha, delta, kind, seed) for name, mine in _by_slice(judged).items()
    ]


def calibrate(
    judged: Sequence[Judged],
    filters: Filters,
    alpha: float,
    delta: float,
    kind: ScoreKind,
    sliced: bool,
    judge_kind: str,
    labelled: Sequence[str],
    labelled_digest: str,
    made: str,
    jurors: JurorFit | None = None,
    seed: int = 0,
) -> Calibration:
    """The calibration of a judge on its labelled pairs; `sliced` gives each slice a threshold of its own.

    Raises:
        UserError: a slice's pairs were judged under several constitutions: a promise about their mix is about none.
    """
    groups = _by_slice(judged) if sliced else {EVERYTHING: list(judged)}
    for name, mine in groups.items():
        under = dict.fromkeys(j.row.constitution or "the job's" for j in mine)
        if len({v.ballot.constitution for j in mine for v in j.votes}) > 1:
            raise UserError(
                f"slice {name}: its pairs are judged under several constitutions ({', '.join(under)}); a threshold is "
                "about one: calibrate each by itself (--where constitution=NAME)"
            )
    panels: tuple[Panel, ...] = panels_of({j.row.id: j.votes for j in judged})
    return Calibration(
        made=made,
        alpha=alpha,
        delta=delta,
        score=kind,
        slices={
            name: _threshold(mine, alpha, delta, kind, seed).model_copy(
                update={"panels": tuple(p.hash for p in panels_of({j.row.id: j.votes for j in mine}))}
            )
            for name, mine in groups.items()
        },
        judge_kind=judge_kind,
        models=tuple(sorted({v.model for j in judged for v in j.votes if v.outcome != "abstain"})),
        panels=panels,
        aggregate=filters.aggregate,
        jurors=jurors,
        min_votes=filters.min_votes,
        max_abstention_share=filters.max_abstention_share,
        guards=filters.guards,
        labelled=tuple(labelled),
        labelled_digest=labelled_digest,
    )


def krippendorff_alpha(votes: Sequence[Vote]) -> float | None:
    """Krippendorff's alpha (nominal) between voices, each order and sample a voice; None when it isn't defined."""
    import krippendorff

    code = {"first": 0.0, "second": 1.0, "tie": 2.0, "abstain": math.nan}
    voices = {k: i for i, k in enumerate(dict.fromkeys(_voice(v) for v in votes))}
    pairs = {k: i for i, k in enumerate(dict.fromkeys(v.ballot.pair_id for v in votes))}
    ratings = np.full((len(voices), len(pairs)), math.nan)  # [voices, pairs]
    for v in votes:
        ratings[voices[_voice(v)], pairs[v.ballot.pair_id]] = code[v.outcome]
    paired = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    # Without two ratings of one pair, or when all name one side, there is nothing to agree against.
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="nominal"))


def alpha_interval(votes: Sequence[Vote], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of Krippendorff's alpha (nominal): the pairs are drawn again, seeded; None where alpha isn't
    defined."""
    code = {"first": 0, "second": 1, "tie": 2}
    pairs = {k: i for i, k in enumerate(dict.fromkeys(v.ballot.pair_id for v in votes))}
    counts = np.zeros((len(pairs), len(code)))  # [pairs, outcomes]
    # A voice counts once a pair, as in alpha itself.
    for (pair, _), outcome in {(v.ballot.pair_id, _voice(v)): v.outcome for v in votes}.items():
        if outcome != "abstain":
            counts[pairs[pair], code[outcome]] += 1
    counts = counts[counts.sum(1) > 1]
    if np.count_nonzero(counts.sum(0)) < 2:
        return None
    ratings = counts.sum(1)  # [pairs]
    disagreeing = (ratings**2 - (counts**2).sum(1)) / (ratings - 1)  # [pairs]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), _RESAMPLES)  # [resamples, pairs]
    named = drawn @ counts  # [resamples, outcomes]
    total = named.sum(1)
    expected = (total**2 - (named**2).sum(1)) / (total - 1)
    defined = expected > 0  # not where a resample names one side only
    low, high = np.quantile(1 - (drawn @ disagreeing)[defined] / expected[defined], [0.025, 0.975])
    return float(low), float(high)


def _voice(vote: Vote) -> tuple[VoiceKey, str]:
    """Here each order is a voice of its own."""
    return vote.ballot.voice_key, vote.ballot.order


def _by_slice(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    out: dict[str, list[Judged]] = {}
    for j in judged:
        out.setdefault(j.row.slice, []).append(j)
    return out


def _threshold(judged: Sequence[Judged], alpha: float, delta: float, kind: ScoreKind, seed: int) -> Threshold:
    verdicts = [j.decision.verdict for j in judged]
    return calibrate_scores(
        verdicts, [j.eligible for j in judged], [not j.correct for j in judged], alpha, delta, kind, seed
    )


def _after_rules(judged: Sequence[Judged]) -> Iterator[AfterRule]:
    left = list(judged)
    for rule in ("identical", *RULES, "uncalibrated"):
        dropped = [j for j in left if rule in j.decision.reasons]
        if not dropped:
            continue
        left = [j for j in left if rule not in j.decision.reasons]
        yield AfterRule.model_validate(
            {
                "rule": rule,
                "dropped": len(dropped),
                "coverage": Share.count(len(left), len(judged)),
                "accuracy": Share.count(sum(j.correct for j in left), len(left)),
            }
        )


def _both_orders(votes: Sequence[Vote]) -> tuple[int, int]:
    """Voices on pairs that answered in both orders, and how many of them named one side in both."""
    named: dict[tuple[str, VoiceKey], dict[str, set[str]]] = {}
    for v in votes:
        b = v.ballot
        if b.order != "none" and v.outcome != "abstain":
            key = b.pair_id, b.voice_key
            named.setdefault(key, {}).setdefault(b.order, set()).add(v.outcome)
    both = [set().union(*orders.values()) for orders in named.values() if len(orders) == 2]
    return len(both), sum(outcomes in ({"first"}, {"second"}) for outcomes in both)


def _examples(votes: Sequence[Vote]) -> dict[AbstainReason, Abstained]:
    """The first vote of each reason to abstain, those that the server said something in before others."""
    out: dict[AbstainReason, Abstained] = {}
    for v in sorted(votes, key=lambda v: not (v.raw_reply or v.error)):
        if v.abstain_reason is not None and v.abstain_reason not in out:
            out[v.abstain_reason] = Abstained(
                pair_id=v.ballot.pair_id,
                order=v.ballot.order,
                reply=v.raw_reply or v.error or "",
                finish_reason=v.finish_reason,
            )
    return out


def _lengths(judged: Sequence[Judged], kept: Sequence[Judged]) -> Lengths:
    def names_longer(outcomes: Sequence[tuple[Outcome, Side | None]]) -> Share:
        named = [(outcome, longer) for outcome, longer in outcomes if longer and outcome in ("first", "second")]
        return Share.count(sum(outcome == longer for outcome, longer in named), len(named))

    return Lengths(
        longer_is_better=Share.count(sum(j.row.longer == j.row.label for j in judged), len(judged)),
        judge_names_longer=names_longer(
            [(v.outcome, j.row.longer) for j in judged for v in j.votes if not v.ballot.guard]
        ),
        judge_names_longer_kept=names_longer([(j.decision.verdict.outcome, j.row.longer) for j in kept]),
    )


def _cost(votes: Sequence[Vote], kept: int, settings: Judge | None) -> Cost:
    if not any(v.attempts or v.cached or v.latency_s or v.usage != Usage() for v in votes):
        return Cost(**dict.fromkeys(Cost.model_fields))
    asked = [v for v in votes if not v.cached]
    prompt, completion = sum(v.usage.prompt_tokens for v in asked), sum(v.usage.completion_tokens for v in asked)
    seconds = math.fsum(v.latency_s for v in votes)
    return Cost(
        calls=sum(v.attempts for v in asked),
        prompt_tokens=prompt,
        completion_tokens=completion,
        money=_money(votes, settings),
        seconds=round(seconds, 3),
        tokens_per_kept_pair=(prompt + completion) / kept if kept else None,
        seconds_per_kept_pair=seconds / kept if kept else None,
    )


def _money(votes: Sequence[Vote], settings: Judge | None) -> float | None:
    """What the votes cost; None unless each is of a juror of the job whose model has a price."""
    if settings is None or not settings.prices:
        return None
    priced = {
        name
        for name, j in zip(juror_names(settings.jurors), settings.jurors, strict=True)
        if j.model in settings.prices
    }
    return spent_on(votes, settings).money if all(v.ballot.judge in priced for v in votes) else None


def _risk(judged: Sequence[Judged]) -> Iterator[RiskPoint]:
    scored = []
    for j in judged:
        verdict = j.decision.verdict
        if j.eligible and verdict.outcome in ("first", "second"):
            scored.append((score_of(verdict, "agreement"), score_of(verdict, "margin"), not j.correct))
    scored.sort(key=lambda s: (-s[0], -s[1]))
    wrong = 0
    for n, (agreement, margin, error) in enumerate(scored, 1):
        wrong += error
        if n == len(scored) or scored[n][:2] != (agreement, margin):
            yield RiskPoint(score=agreement, coverage=n / len(judged), error=wrong / n)
