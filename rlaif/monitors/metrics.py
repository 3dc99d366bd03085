"""Numbers about an iteration and an evaluation. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from rlaif.constitutions.checks import count_list_items, count_words
from rlaif.constitutions.constitution import Constitution
from rlaif.intervals import ratio_interval, share, wilson
from rlaif.judging.filters import cut_off_won
from rlaif.judging.verdicts import JurorFit, juror_verdicts, position_bias
from rlaif.monitors.length_controlled import Judged, LengthControlled, length_controlled
from rlaif.records import (
    AnswerStats,
    Completion,
    Decision,
    DecodingGap,
    Divergence,
    EvaluationMetrics,
    IterationMetrics,
    JudgedStats,
    OldPair,
    Outcome,
    Pair,
    Plan,
    Quality,
    TrainingRow,
    UpdateStep,
    Vote,
    WeightsGap,
)


def answer_stats(completions: list[Completion]) -> AnswerStats:
    """What can be counted about answers without a judge."""
    n = len(completions)
    return AnswerStats(
        answers=n,
        mean_words=fmean(count_words(c.text) for c in completions),
        mean_tokens=fmean(len(c.token_ids) for c in completions),
        list_share=sum(count_list_items(c.text) >= 2 for c in completions) / n,
        ended_share=sum(c.finish_reason == "stop" for c in completions) / n,
        distinct_share=len({(c.prompt_id, c.text) for c in completions}) / n,
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
    old_pairs: Sequence[OldPair] = (),
    rejudged: Sequence[Vote] = (),
) -> IterationMetrics:
    """An iteration in numbers; `ballots` are those that all votes would have answered, `seconds` go by stage,
    `rejudged` are votes on `old_pairs`."""
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
        sampled=answer_stats(completions),
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
        judge_calls=sum(v.attempts for v in (*votes, *rejudged)),
        judge_cached=sum(v.cached for v in (*votes, *rejudged)),
        judge_tokens=tokens + _tokens(rejudged),
        judge_tokens_per_kept_pair=share(tokens, kept),
        seconds=seconds,
        weights_gap=gap,
        decoding_gap=decoding,
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


def evaluation_metrics(
    updates: int,
    constitution: Constitution,
    completions: list[Completion],
    quality: list[Quality],
    pairs: list[Pair],
    decisions: list[Decision] | None,
    seconds: float,
    drift: list[Divergence] | None = None,
    gap: WeightsGap | None = None,
    base: Sequence[Completion] = (),
) -> EvaluationMetrics:
    """An evaluation in numbers; `decisions` are None when nobody was asked: about the base policy itself, or under a
    text without a held-out contrast. `pairs` show the policy's answer first, the base policy's second; an answer equal
    to the base policy's has no pair and counts as tied. `base` holds the base policy's answers. `drift` is empty about
    the base policy, None where nobody measured it."""
    outcomes: list[Outcome] = []
    by_prompt: list[float] = []
    controlled = LengthControlled()
    if decisions is not None:
        verdicts = {d.pair_id: d.verdict.outcome for d in decisions}
        asked = {p.first: verdicts[p.id] for p in pairs}
        outcomes = [asked.get(c.id, "tie") for c in completions]
        if not asked or any(o != "abstain" for o in asked.values()):
            by_prompt = _won_by_prompt(completions, outcomes)
            controlled = length_controlled(_judged(completions, outcomes, pairs, base))
    n = len(completions)
    return EvaluationMetrics(
        **dict(answer_stats(completions)),
        updates=updates,
        constitution=constitution.ref,
        win_rate=fmean(by_prompt) if by_prompt else None,
        win_interval=wilson(sum(by_prompt), len(by_prompt)) if by_prompt else None,
        length_controlled_win_rate=controlled.win_rate,
        length_controlled_interval=controlled.interval,
        length_controlled_unknown=controlled.unknown,
        wins=outcomes.count("first"),
        losses=outcomes.count("second"),
        undecided=outcomes.count("tie"),
        abstained=outcomes.count("abstain"),
        **_drift(drift),
        relevance=fmean([q.relevance for q in quality if q.tokens] or [0.0]),  # an empty answer has neither
        base_logprob_per_token=fmean([q.logprob_per_token for q in quality if q.tokens] or [0.0]),
        checks={p.id: sum(p.check.passes(c.text) for c in completions) / n for p in constitution.principles if p.check},
        seconds=seconds,
        weights_gap=gap,
    )


def _drift(divergences: list[Divergence] | None) -> dict[str, Any]:
    """The KL fields of an evaluation."""
    if divergences is None:
        return {"kl_per_token": None, "kl_answers": 0}
    if not divergences:  # of the base policy from itself
        none = {"kl_interval": (0.0, 0.0), "kl_per_completion": 0.0, "kl_per_completion_interval": (0.0, 0.0)}
        return {"kl_per_token": 0.0, "kl_answers": 0, **none}
    by_prompt: dict[str, list[Divergence]] = {}
    for d in divergences:
        by_prompt.setdefault(d.prompt_id, []).append(d)
    nats = [sum(d.kl for d in of_prompt) for of_prompt in by_prompt.values()]

    def over(wholes: list[float]) -> tuple[float, tuple[float, float] | None]:
        if len(nats) < 2:
            return sum(nats) / sum(wholes), None
        low, high = ratio_interval(nats, wholes)
        return sum(nats) / sum(wholes), (max(low, 0.0), high)  # KL is never negative

    per_token, interval = over([sum(d.tokens for d in of_prompt) for of_prompt in by_prompt.values()])
    per_completion, completion_interval = over([len(of_prompt) for of_prompt in by_prompt.values()])
    return {
        "kl_per_token": per_token,
        "kl_interval": interval,
        "kl_per_completion": per_completion,
        "kl_per_completion_interval": completion_interval,
        "kl_answers": len(divergences),
    }


_WON = {"first": 1.0, "tie": 0.5, "second": 0.0}


def _won_by_prompt(completions: list[Completion], outcomes: list[Outcome]) -> list[float]:
    """The share that each prompt's answers won: answers to one prompt are no independent draws. An abstention is no
    verdict, so it counts for nothing."""
    won: dict[str, list[float]] = {}
    for completion, outcome in zip(completions, outcomes, strict=True):
        if outcome != "abstain":
            won.setdefault(completion.prompt_id, []).append(_WON[outcome])
    return [fmean(of_prompt) for of_prompt in won.values()]


def _judged(
    completions: list[Completion], outcomes: list[Outcome], pairs: list[Pair], base: Sequence[Completion]
) -> list[Judged]:
    """The answers with a verdict, abstentions left out, and how many words longer than the base policy's they are."""
    words = {c.id: count_words(c.text) for c in (*completions, *base)}
    longer = {p.first: words[p.first] - words[p.second] for p in pairs}
    return [
        Judged(c.prompt_id, _WON[outcome], longer.get(c.id, 0), asked=c.id in longer)
        for c, outcome in zip(completions, outcomes, strict=True)
        if outcome != "abstain"
    ]
