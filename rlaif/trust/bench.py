"""A judge against labelled pairs: how often is it right, before and after the filter, and on how many?

In: labelled pairs, the votes on them (cast now, or recorded) and the job's filters. Out: one `Slice` for each judge
and slice, and one for all slices. A pair is judged exactly as in a run: votes are aggregated, the filter decides. A
verdict, or a vote, that names no side counts as wrong. Intervals are at 95 %: of pairs Wilson's, of votes a bootstrap
over pairs, since the votes on a pair are no independent draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from rlaif.config import Filters, Judge, Policy
from rlaif.constitutions.constitution import Constitution
from rlaif.data.labelled import Labelled
from rlaif.errors import UserError
from rlaif.intervals import wilson
from rlaif.judging.calibration import (
    EVERYTHING,
    Asked,
    Calibration,
    Panel,
    ScoreKind,
    Threshold,
    calibrate_scores,
    judged_stats,
    panels_of,
    passes,
    score_of,
)
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import CONSISTENCY, RULES, decide_votes
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import Ask
from rlaif.judging.verdicts import (
    JurorFit,
    by_pair,
    juror_verdicts,
    jurors_for,
    learn_jurors,
)
from rlaif.records import (
    AbstainReason,
    Decision,
    Message,
    Order,
    Outcome,
    Reason,
    Record,
    Side,
    Usage,
    VoiceKey,
    Vote,
)
from rlaif.thoughts import has_marks, without_thoughts

JURY = "jury"
_SIDES: tuple[Side, ...] = ("first", "second")
_RESAMPLES = 1000
_FEW_CLUSTERS = 10
"""Fewer than this many pairs are too few to draw from."""
_FOLDS = 5
"""Parts of the labelled pairs, each decided with the juror weights that the others teach."""
_NO_WEIGHT = 0.05
_SENTENCE_ENDS = tuple(".!?\"')”")


class Share(Record):
    """A share with its 95 % interval, Wilson's unless said otherwise; None and (0, 1) when nothing was counted."""

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

    @classmethod
    def clustered(cls, counted: Iterable[tuple[str, bool]], seed: int = 0) -> Share:
        """(pair, hit) for each vote; the interval is a bootstrap over pairs, seeded: what is said twice about one pair
        is not known twice as well. Of few pairs, or where all or none hit, Wilson's with each pair as one draw."""
        of_pair: dict[str, list[bool]] = {}
        for pair, hit in counted:
            of_pair.setdefault(pair, []).append(hit)
        hits = np.array([sum(mine) for mine in of_pair.values()], dtype=float)  # [pairs]
        of = np.array([len(mine) for mine in of_pair.values()], dtype=float)
        plain = cls.count(int(hits.sum()), int(of.sum()))
        if len(of) < _FEW_CLUSTERS or plain.share in (0.0, 1.0):
            low, high = wilson((plain.share or 0.0) * len(of), len(of))
        else:
            rng = np.random.default_rng(seed)
            drawn = rng.multinomial(len(of), np.full(len(of), 1 / len(of)), _RESAMPLES)  # [resamples, pairs]
            low, high = (float(q) for q in np.quantile(drawn @ hits / (drawn @ of), [0.025, 0.975]))
        return plain.model_copy(update={"low": low, "high": high})


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

    rule: Reason
    dropped: int
    """By this rule, of what was left."""
    coverage: Share
    accuracy: Share


class Lengths(Record):
    """The length column: does the label, or the judge, follow the longer answer (in characters)?"""

    longer_is_better: Share
    """Accuracy of "longer wins", lengths differing."""
    judge_names_longer: Share
    """Of votes that name a side, lengths differing, before the filter: a judge that goes by length in one order and
    by the slot in the other has a tie for a verdict."""
    judge_names_longer_kept: Share
    """Of kept pairs, lengths differing: the verdict does."""
    equal: int = 0
    """Pairs whose answers are equally long: in none of these shares."""


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
    order: Order
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
    reasons: dict[Reason, int] = Field(default_factory=dict)
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
    broken: Share
    """Of the splits, those whose rule has a larger error than alpha among all pairs that it keeps, of both halves: what
    delta bounds, these pairs taken for the population that a half is drawn from."""
    broken_other_half: Share
    """The same on the other half alone, whose own chance comes on top: a rule at alpha exceeds it there half of the
    time."""


class Promise(Record):
    """What a calibration promised, held against labelled pairs."""

    judge: str
    name: str
    alpha: float
    kept: int
    error: Share
    """Of the kept pairs, labelled otherwise."""

    @property
    def broken(self) -> bool:
        """The interval of the error excludes what was promised."""
        return self.error.low > self.alpha


class JurorCheck(Record):
    """One juror's weight, held against the labels."""

    judge: str
    juror: str
    weight: float
    right: Share
    """Of the pairs on which its own votes name a side, those on which it is the labelled one."""
    agreement: Share
    """... those on which the verdict of all, where that names a side, names the same."""

    @property
    def contradicted(self) -> bool:
        """It has no weight and is right more often than not, or has one and is wrong more often than not."""
        return self.right.low > 0.5 if self.weight < _NO_WEIGHT else self.right.high < 0.5


def candidate(row: Labelled, side: Side, system_prompt: str | None = None) -> Candidate:
    """One of a row's answers, under the prompt that a run would show. Where the file doesn't say how it ended: one that
    ends as a sentence ended by itself; of another one nobody knows, and no missing end is held against it."""
    text = row.first if side == "first" else row.second
    finish = row.end(side)
    if finish is None and text.rstrip().endswith(_SENTENCE_ENDS):
        finish = "stop"
    messages = row.messages or (Message(role="user", content=row.prompt),)
    if system_prompt is not None and messages[0].role != "system":
        messages = (Message(role="system", content=system_prompt), *messages)
    return Candidate(
        completion_id=f"{row.id}-{side}",
        prompt_id=row.id,
        messages=messages,
        finish_reason=finish,
        text=text,
    )


def as_judged(rows: Sequence[Labelled], policy: Policy) -> list[Labelled]:
    """The rows with the answers that a judge would see in a run: without thoughts, where the policy's are stripped."""
    if policy.thinking != "strip":
        return list(rows)
    out = []
    for row in rows:
        texts: dict[str, Any] = {
            side: without_thoughts(text) for side in _SIDES if has_marks(text := getattr(row, side))
        }
        out.append(row.model_copy(update=texts) if texts else row)
    return out


def cast_votes(
    rows: Sequence[Labelled],
    ask: Ask,
    load: Callable[[str], Constitution],
    default: str | None = None,
    progress: Callable[[int], None] | None = None,
    system_prompt: str | None = None,
) -> list[Vote]:
    """A judge's votes on every row, under its constitution or the default one.

    `load` reads a constitution, `progress` gets numbers of new votes; `system_prompt` is the policy's, shown where a
    row has none of its own, as in a run.

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
        candidates = [candidate(r, side, system_prompt) for r in mine for side in ("first", "second")]
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
    asked: Asked | None = None,
) -> list[Judged]:
    """The rows that have votes, with the filter's decisions; `weights` gives a row's principle weights, `asked` says
    how they were asked about, but for how a row's answers ended."""
    of_pair = by_pair(votes)
    out = []
    for row in rows:
        if not (mine := of_pair.get(row.id)):
            continue
        cut = {i for i, end in row.ends.items() if end == "length"}
        how = asked and asked._replace(ends=(row.end("first"), row.end("second")))
        decision = decide_votes(
            row.pair, mine, filters, row.texts, weights(row), jurors, calibration, row.slice, cut, how
        )
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
    slots = [(j.row.id, hit) for j, v in zip(judged, verdicts, strict=True)
             for hit in [True] * v.slot_first + [False] * (v.slot_votes - v.slot_first)]  # fmt: skip
    return Slice(
        judge=judge,
        name=name,
        pairs=len(judged),
        vote_accuracy=Share.clustered((v.ballot.pair_id, v.outcome == label) for v, label in votes),
        verdict_accuracy=Share.count(sum(j.correct for j in judged), len(judged)),
        coverage=Share.count(len(kept), len(judged)),
        kept_accuracy=Share.count(sum(j.correct for j in kept), len(kept)),
        rules=tuple(_after_rules(judged)),
        reasons=dict(Counter(reason for j in judged for reason in j.decision.reasons)),
        order_consistency=Share.clustered(_both_orders([v for v, _ in votes])),
        position_bias=Share.clustered(slots),
        abstentions=dict(sum((Counter(v.abstentions) for v in verdicts), Counter())),
        examples=_examples([v for v, _ in votes]),
        alpha=krippendorff_alpha([v for v, _ in votes]),
        alpha_interval=alpha_interval([v for v, _ in votes]),
        lengths=_lengths(judged, kept),
        cost=_cost([v for j in judged for v in j.votes], len(kept), settings),
        risk=tuple(_risk(judged)),
    )


Redecide = Callable[[Sequence[Judged], JurorFit], list[Judged]]
"""The same pairs, decided with other juror weights."""


def split_trials(
    judge: str,
    judged: Sequence[Judged],
    splits: int,
    alpha: float,
    delta: float,
    kind: ScoreKind = "agreement",
    seed: int = 0,
    sliced: bool = False,
    redecide: Redecide | None = None,
) -> list[SplitTrial]:
    """Calibrates on a random half (seeded), measures on the other, `splits` times: the rule that `calibrate` would fit
    to that half, with a threshold for each slice iff `sliced`, and for a jury (`redecide`) weights of its own."""
    rng = np.random.default_rng(seed)
    half = len(judged) // 2
    tried: dict[str, list[_Tried]] = {name: [] for name in (_by_slice(judged) if sliced else (EVERYTHING,))}
    for n in range(splits):
        order = rng.permutation(len(judged))
        rule = _fit([judged[i] for i in order[:half]], alpha, delta, kind, seed + n, sliced, redecide)
        others = [judged[i] for i in order[half:]]
        if redecide is not None and rule.jurors is not None:
            others = redecide(others, rule.jurors)
        for name, mine in tried.items():
            mine.append(_try(rule, name if sliced else None, others, kind))
    return [_trial(judge, name, mine, alpha) for name, mine in tried.items()]


class _Rule(NamedTuple):
    """What is fitted to labelled pairs."""

    thresholds: dict[str, Threshold]
    jurors: JurorFit | None
    judged: list[Judged]
    """All of the pairs, decided with those weights."""


class _Tried(NamedTuple):
    accepted: bool
    other: int
    """Pairs of the other half ..."""
    kept: int
    wrong: int
    """... kept of them, and of these wrong ones."""
    kept_of_all: int
    wrong_of_all: int


def _fit(
    judged: Sequence[Judged],
    alpha: float,
    delta: float,
    kind: ScoreKind,
    seed: int,
    sliced: bool,
    redecide: Redecide | None,
) -> _Rule:
    """The rule of a calibration. A jury's weights are learned from the labels. What taught them would look better than
    what comes after, so the thresholds are tested with weights of other pairs: five parts (seeded), each decided with
    what the four others teach."""
    tests, jurors, mine = list(judged), None, list(judged)
    if redecide is not None:
        jurors = _learn(judged)
        mine = redecide(judged, jurors)
        order = np.random.default_rng(seed).permutation(len(judged))
        tests = []
        for fold in range(_FOLDS):
            part = [judged[i] for i in order[fold::_FOLDS]]
            others = [judged[i] for n, i in enumerate(order) if n % _FOLDS != fold]
            tests += redecide(part, _learn(others)) if part else []
    groups = _by_slice(tests) if sliced else {EVERYTHING: tests}
    thresholds = {name: _threshold(some, alpha, delta, kind, seed) for name, some in groups.items()}
    return _Rule(thresholds, jurors, mine)


def _learn(judged: Sequence[Judged]) -> JurorFit:
    return learn_jurors([v for j in judged for v in j.votes], {j.row.id: j.row.label for j in judged})


def _try(rule: _Rule, slice_name: str | None, others: Sequence[Judged], kind: ScoreKind) -> _Tried:
    """A rule on the pairs of one slice, or of all: those that it was fitted to, and others."""
    threshold = rule.thresholds.get(slice_name or EVERYTHING)

    def counted(judged: Sequence[Judged]) -> tuple[int, int, int]:
        mine = [j for j in judged if slice_name in (None, j.row.slice)]
        kept = [j for j in mine if threshold and j.eligible and passes(j.decision.verdict, threshold, kind)]
        return len(mine), len(kept), sum(not j.correct for j in kept)

    other, kept, wrong = counted(others)
    _, kept_before, wrong_before = counted(rule.judged)
    return _Tried(
        accepted=threshold is not None and threshold.accepted,
        other=other,
        kept=kept,
        wrong=wrong,
        kept_of_all=kept + kept_before,
        wrong_of_all=wrong + wrong_before,
    )


def _trial(judge: str, name: str, tried: Sequence[_Tried], alpha: float) -> SplitTrial:
    accepted, kept = sum(t.accepted for t in tried), sum(t.kept for t in tried)
    shares = [t.kept / max(t.other, 1) for t in tried]
    return SplitTrial(
        judge=judge,
        name=name,
        splits=len(tried),
        accepted=Share.count(accepted, len(tried)),
        coverage=float(np.mean(shares)),
        coverage_when_accepted=sum(shares) / accepted if accepted else None,
        error=sum(t.wrong for t in tried) / kept if kept else None,
        broken=Share.count(sum(t.wrong_of_all > alpha * t.kept_of_all for t in tried), len(tried)),
        broken_other_half=Share.count(sum(t.wrong > alpha * t.kept for t in tried), len(tried)),
    )


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
    seed: int = 0,
    redecide: Redecide | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Calibration:
    """The calibration of a judge on its labelled pairs; `sliced` gives each slice a threshold of its own, `redecide` is
    for a jury with weights, `facts` are `asked_as` of the job.

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
    rule = _fit(judged, alpha, delta, kind, seed, sliced, redecide)
    panels: tuple[Panel, ...] = panels_of({j.row.id: j.votes for j in judged}, facts)
    found = Calibration(
        made=made,
        alpha=alpha,
        delta=delta,
        score=kind,
        slices={
            name: rule.thresholds[name].model_copy(
                update={"panels": tuple(p.hash for p in panels_of({j.row.id: j.votes for j in mine}, facts))}
            )
            for name, mine in groups.items()
        },
        judge_kind=judge_kind,
        models=tuple(sorted({v.model for j in judged for v in j.votes if v.outcome != "abstain"})),
        panels=panels,
        aggregate=filters.aggregate,
        jurors=rule.jurors,
        min_votes=filters.min_votes,
        max_abstention_share=filters.max_abstention_share,
        guards=filters.guards,
        cut_off=filters.cut_off,
        labelled=tuple(labelled),
        labelled_digest=labelled_digest,
    )
    stats = judged_stats(
        [(j.row.pair, j.decision) for j in rule.judged],
        {i: text for j in judged for i, text in j.row.texts.items()},
        {i: end for j in judged for i, end in j.row.ends.items()},
        kept=sum(keeps(j, found) for j in rule.judged),
    )
    return found.model_copy(update={"judged": stats})


def keeps(judged: Judged, calibration: Calibration) -> bool:
    """A filter with this calibration keeps the pair, if its votes are those that were calibrated."""
    return judged.eligible and calibration.keeps(judged.decision.verdict, judged.row.slice)


def promises(
    judge: str, judged: Sequence[Judged], calibration: Calibration, kept: Callable[[Judged], bool]
) -> list[Promise]:
    """The calibration's promise held against labelled pairs, on all of them and on each slice that keeps some: a
    promise about a mix needn't hold on its parts."""
    groups = _by_slice(judged)
    if set(calibration.slices) == {EVERYTHING}:
        groups = {EVERYTHING: list(judged), **(groups if len(groups) > 1 else {})}
    out = []
    for name, mine in groups.items():
        left = [j for j in mine if kept(j)]
        if left:
            error = Share.count(sum(not j.correct for j in left), len(left))
            out.append(Promise(judge=judge, name=name, alpha=calibration.alpha, kept=len(left), error=error))
    return out


def check_jurors(judge: str, judged: Sequence[Judged], jurors: JurorFit) -> list[JurorCheck]:
    """The weights of a jury held against the labels of the pairs that it voted on."""
    rows = {j.row.id: j for j in judged}
    out = []
    for juror, outcomes in juror_verdicts([v for j in judged for v in j.votes]).items():
        named = [(rows[pair], outcome) for pair, outcome in outcomes.items() if outcome in ("first", "second")]
        both = [(j, o) for j, o in named if j.decision.verdict.outcome in ("first", "second")]
        out.append(
            JurorCheck(
                judge=judge,
                juror=juror,
                weight=jurors.weights.get(juror, 1.0),
                right=Share.count(sum(o == j.row.label for j, o in named), len(named)),
                agreement=Share.count(sum(o == j.decision.verdict.outcome for j, o in both), len(both)),
            )
        )
    return out


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
    own = dict.fromkeys(rule for j in judged for rule in j.decision.said)
    for rule in ("identical", *RULES, *own, "uncalibrated"):
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


def _both_orders(votes: Sequence[Vote]) -> list[tuple[str, bool]]:
    """(pair, named one side in both) for each voice on a pair that answered in both orders."""
    named: dict[tuple[str, VoiceKey], dict[str, set[str]]] = {}
    for v in votes:
        b = v.ballot
        if b.order != "none" and v.outcome != "abstain":
            key = b.pair_id, b.voice_key
            named.setdefault(key, {}).setdefault(b.order, set()).add(v.outcome)
    both = [(pair, set().union(*orders.values())) for (pair, _), orders in named.items() if len(orders) == 2]
    return [(pair, outcomes in ({"first"}, {"second"})) for pair, outcomes in both]


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
    def names_longer(outcomes: Sequence[tuple[Outcome, Labelled]]) -> Share:
        named = [(r.id, outcome == r.longer) for outcome, r in outcomes if r.longer and outcome in ("first", "second")]
        return Share.clustered(named)

    unequal = [j.row for j in judged if j.row.longer is not None]
    return Lengths(
        longer_is_better=Share.count(sum(row.longer == row.label for row in unequal), len(unequal)),
        judge_names_longer=names_longer([(v.outcome, j.row) for j in judged for v in j.votes if not v.ballot.guard]),
        judge_names_longer_kept=names_longer([(j.decision.verdict.outcome, j.row) for j in kept]),
        equal=len(judged) - len(unequal),
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
    kind = kind_of(settings) if settings else None
    if kind is None or not any((priced := kind.priced()).values()):
        return None
    return kind.money(votes) if all(priced.get(v.ballot.judge) for v in votes) else None


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
