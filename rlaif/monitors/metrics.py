"""Numbers about an iteration. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from rlaif.evaluation.answers import answer_stats
from rlaif.intervals import share
from rlaif.judging.filters import cut_off_won
from rlaif.judging.verdicts import JurorFit, aggregate, by_juror, position_bias
from rlaif.monitors.counts import answer_counts, leanings, pair_counts
from rlaif.records import (
    AbstainReason,
    AnchorCounts,
    Completion,
    Decision,
    DecodingGap,
    IterationMetrics,
    JudgedStats,
    OldPair,
    Pair,
    Plan,
    TrainingRow,
    UnderText,
    UpdateStep,
    Vote,
    WeightsGap,
)


def iteration_metrics(
    plan: Plan,
    completions: list[Completion],
    pairs: list[Pair],
    votes: Iterable[Vote],
    decisions: list[Decision],
    training: Sequence[TrainingRow],
    steps: list[UpdateStep],
    ballots: int,
    seconds: dict[str, float],
    jurors: JurorFit | None = None,
    judged: JudgedStats | None = None,
    gap: WeightsGap | None = None,
    decoding: DecodingGap | None = None,
    stopped_at_kl: float | None = None,
    old_pairs: Sequence[OldPair] = (),
    more_votes: Sequence[Vote] = (),
    anchors: AnchorCounts | None = None,
    at_change: UnderText | None = None,
    wall_s: float | None = None,
    streamed_votes: int | None = None,
    servers: Mapping[str, Sequence[str]] = {},
) -> IterationMetrics:
    """An iteration in numbers; `votes` come pair by pair, and are gone through once or, of a jury, twice; `ballots` are
    those that all of them would have answered, `seconds` go by stage, `more_votes` are those on pairs of earlier
    iterations (`old_pairs`, anchors): they only cost; `servers` are those that share a juror's ballots."""
    kept = sum(d.status == "kept" for d in decisions)
    agreements = [d.verdict.agreement for d in decisions if d.verdict.agreement is not None]
    cast, more = _Counts.of(votes), _Counts.of(more_votes)
    sides = {p.id: p for p in pairs}
    cut = {c.id for c in completions if c.cut_off}
    won = [w for d in decisions if (w := cut_off_won(d.verdict, sides[d.pair_id], cut)) is not None]
    trained = training if steps else []  # a skipped update leaves its rows where they are
    return IterationMetrics(
        iteration=plan.iteration,
        constitution=plan.constitution,
        policy=plan.policy,
        staleness=plan.staleness,
        sampled=answer_stats(completions),
        given=plan.source is not None,
        pairs=len(pairs),
        votes=cast.votes,
        ballots_saved=ballots - cast.votes,
        abstentions=cast.abstentions,
        kept=kept,
        kept_share=share(kept, len(decisions)),
        review=sum(d.status == "review" for d in decisions),
        dropped_by_first_reason=Counter(d.reasons[0] for d in decisions if d.status == "dropped"),
        mean_agreement=fmean(agreements) if agreements else None,
        trained_pairs=len(trained),
        human_pairs=sum(p.source == "human" for p in trained),
        replayed_pairs=sum(p.source == "replay" for p in trained),
        old_pairs=Counter(row.standing for row in old_pairs),
        steps=len(steps),
        loss=fmean(s.loss for s in steps) if steps else None,
        grad_norm=fmean(s.grad_norm for s in steps) if steps else None,
        learner_metrics=learner_metrics(steps),
        order_flips=sum(d.verdict.order_flip for d in decisions),
        position_bias=position_bias(
            sum(d.verdict.slot_first for d in decisions), sum(d.verdict.slot_votes for d in decisions)
        ),
        one_cut_off=len(won),
        cut_off_won=sum(won),
        juror_weights=jurors.weights if jurors else {},
        juror_agreement=juror_agreement(votes, decisions) if len(cast.jurors) > 1 else {},
        judged=judged,
        servers={
            juror: {server: cast.answered[juror, server] + more.answered[juror, server] for server in listed}
            for juror, listed in servers.items()
        },
        judge_calls=cast.calls + more.calls,
        judge_cached=cast.cached + more.cached,
        judge_tokens=cast.tokens + more.tokens,
        pair_counts=pair_counts(decisions),
        answer_counts=answer_counts(completions),
        leanings=leanings(completions, pairs, decisions),
        anchors=anchors,
        at_change=at_change,
        judge_tokens_per_kept_pair=share(cast.tokens, kept),
        seconds=seconds,
        wall_s=wall_s,
        streamed_votes=streamed_votes,
        weights_gap=gap,
        decoding_gap=decoding,
        stopped_at_kl=stopped_at_kl,
    )


class _Counts(NamedTuple):
    """What is counted of votes."""

    votes: int
    calls: int
    cached: int
    tokens: int
    """That were paid for: a reply from the cache costs nothing."""
    abstentions: Counter[AbstainReason]
    jurors: set[str]
    """Who cast more than guards' votes."""
    answered: Counter[tuple[str, str | None]]
    """By juror and server: votes that were asked anew. From the cache, a vote says nothing about a server."""

    @classmethod
    def of(cls, votes: Iterable[Vote]) -> _Counts:
        """Counts them in one pass."""
        number = calls = cached = tokens = 0
        abstentions, jurors = Counter[AbstainReason](), set[str]()
        answered = Counter[tuple[str, str | None]]()
        for v in votes:
            number += 1
            calls += v.attempts
            if v.cached:
                cached += 1
            else:
                tokens += v.usage.prompt_tokens + v.usage.completion_tokens
                answered[v.ballot.judge, v.server] += 1
            if v.abstain_reason:
                abstentions[v.abstain_reason] += 1
            if not v.ballot.guard:
                jurors.add(v.ballot.judge)
        return cls(number, calls, cached, tokens, abstentions, jurors, answered)


def learner_metrics(steps: Sequence[UpdateStep]) -> dict[str, float]:
    """What only this kind of learner measures: the mean of each number over the steps that have it."""
    names = dict.fromkeys(name for step in steps for name in step.metrics)
    return {name: fmean(s.metrics[name] for s in steps if name in s.metrics) for name in names}


def juror_agreement(votes: Iterable[Vote], decisions: list[Decision]) -> dict[str, float | None]:
    """Juror → share of the pairs on which its own votes name the verdict's side, of those on which both name one; empty
    for a single judge. Votes come pair by pair."""
    verdicts = {d.pair_id: d.verdict.outcome for d in decisions if d.verdict.outcome in ("first", "second")}
    found: dict[str, list[bool]] = {}
    for pair_id, on_pair in groupby(votes, key=lambda v: v.ballot.pair_id):
        for juror, mine in by_juror(on_pair).items():
            agrees, outcome = found.setdefault(juror, []), aggregate(mine).outcome
            if outcome in ("first", "second") and pair_id in verdicts:
                agrees.append(outcome == verdicts[pair_id])
    return {juror: share(sum(agrees), len(agrees)) for juror, agrees in found.items()} if len(found) > 1 else {}
