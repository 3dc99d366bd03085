"""Numbers about an iteration. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from rlaif.evaluation.answers import answer_stats
from rlaif.intervals import share
from rlaif.judging.filters import cut_off_won
from rlaif.judging.verdicts import JurorFit, juror_verdicts, position_bias
from rlaif.monitors.counts import answer_counts, leanings, pair_counts
from rlaif.records import (
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
    UpdateStep,
    Vote,
    WeightsGap,
)


def iteration_metrics(
    plan: Plan,
    completions: list[Completion],
    pairs: list[Pair],
    votes: list[Vote],
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
    wall_s: float | None = None,
    streamed_votes: int | None = None,
) -> IterationMetrics:
    """An iteration in numbers; `ballots` are those that all votes would have answered, `seconds` go by stage,
    `more_votes` are those on pairs of earlier iterations (`old_pairs`, anchors): they only cost."""
    kept = sum(d.status == "kept" for d in decisions)
    agreements = [d.verdict.agreement for d in decisions if d.verdict.agreement is not None]
    tokens = _tokens(votes)
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
        votes=len(votes),
        ballots_saved=ballots - len(votes),
        abstentions=Counter(v.abstain_reason for v in votes if v.abstain_reason),
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
        juror_agreement=juror_agreement(votes, decisions),
        judged=judged,
        judge_calls=sum(v.attempts for v in (*votes, *more_votes)),
        judge_cached=sum(v.cached for v in (*votes, *more_votes)),
        judge_tokens=tokens + _tokens(more_votes),
        pair_counts=pair_counts(decisions),
        answer_counts=answer_counts(completions),
        leanings=leanings(completions, pairs, decisions),
        anchors=anchors,
        judge_tokens_per_kept_pair=share(tokens, kept),
        seconds=seconds,
        wall_s=wall_s,
        streamed_votes=streamed_votes,
        weights_gap=gap,
        decoding_gap=decoding,
        stopped_at_kl=stopped_at_kl,
    )


def _tokens(votes: Iterable[Vote]) -> int:
    """That were paid for: a reply from the cache costs nothing."""
    return sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in votes if not v.cached)


def learner_metrics(steps: Sequence[UpdateStep]) -> dict[str, float]:
    """What only this kind of learner measures: the mean of each number over the steps that have it."""
    names = dict.fromkeys(name for step in steps for name in step.metrics)
    return {name: fmean(s.metrics[name] for s in steps if name in s.metrics) for name in names}


def juror_agreement(votes: list[Vote], decisions: list[Decision]) -> dict[str, float | None]:
    """Juror → share of the pairs on which its own votes name the verdict's side, of those on which both name one; empty
    for a single judge."""
    verdicts = {d.pair_id: d.verdict.outcome for d in decisions if d.verdict.outcome in ("first", "second")}
    if len({v.ballot.judge for v in votes if not v.ballot.guard}) < 2:
        return {}
    out = {}
    for juror, outcomes in juror_verdicts(votes).items():
        both = [o == verdicts[pair] for pair, o in outcomes.items() if o in ("first", "second") and pair in verdicts]
        out[juror] = share(sum(both), len(both))
    return out
