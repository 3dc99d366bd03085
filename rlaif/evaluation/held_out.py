"""Held-out answers against the base policy's, in numbers. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rlaif.constitutions.checks import count_words
from rlaif.constitutions.constitution import Constitution
from rlaif.evaluation.answers import answer_stats
from rlaif.evaluation.length_controlled import Judged, LengthControlled, length_controlled
from rlaif.intervals import ratio_interval, wilson
from rlaif.records import (
    AgainstBase,
    Completion,
    Decision,
    Divergence,
    EvaluationMetrics,
    Outcome,
    Pair,
    Quality,
    Referred,
    Retention,
    UnderText,
    WeightsGap,
)


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
    retention: Retention | None = None,
    second: Referred | None = None,
    by_deciding: AgainstBase | None = None,
) -> EvaluationMetrics:
    """An evaluation in numbers; `decisions` are None when nobody was asked: about the base policy itself, or under a
    text without a held-out contrast. `pairs` show the policy's answer first, the base policy's second; an answer equal
    to the base policy's has no pair and counts as tied. `base` holds the base policy's answers. `drift` is empty about
    the base policy, None where nobody measured it. `second` is what the reference judge says, `by_deciding` what the
    voices say that decide which pairs train."""
    won = _won(completions, pairs, decisions)
    controlled = LengthControlled()
    if won.by_prompt:
        controlled = length_controlled(_judged(completions, won.outcomes, pairs, base))
    n = len(completions)
    return EvaluationMetrics(
        **dict(answer_stats(completions)),
        updates=updates,
        constitution=constitution.ref,
        **won.fields(),
        length_controlled_win_rate=controlled.win_rate,
        length_controlled_interval=controlled.interval,
        length_controlled_unknown=controlled.unknown,
        **_drift(drift),
        relevance=fmean([q.relevance for q in quality if q.tokens] or [0.0]),  # an empty answer has neither
        base_logprob_per_token=fmean([q.logprob_per_token for q in quality if q.tokens] or [0.0]),
        checks={p.id: sum(p.check.passes(c.text) for c in completions) / n for p in constitution.principles if p.check},
        base_checks={
            p.id: sum(p.check.passes(c.text) for c in base) / len(base)
            for p in constitution.principles
            if p.check and base
        },
        deciding=by_deciding,
        referred=second,
        seconds=seconds,
        weights_gap=gap,
        retention=retention,
    )


def by_deciding(completions: list[Completion], pairs: list[Pair], decisions: list[Decision]) -> AgainstBase:
    """What held-out answers won by the voices that decide which pairs train; arguments as in `evaluation_metrics`."""
    return AgainstBase(**_won(completions, pairs, decisions).fields())


def referred(judge: str, completions: list[Completion], pairs: list[Pair], decisions: list[Decision]) -> Referred:
    """What the reference judge says of held-out answers; arguments as in `evaluation_metrics`."""
    return Referred(judge=judge, **_won(completions, pairs, decisions).fields())


def under_text(
    constitution: Constitution, completions: list[Completion], pairs: list[Pair], decisions: list[Decision]
) -> UnderText:
    """Held-out answers judged under another text than their evaluation's; arguments as in `evaluation_metrics`."""
    return UnderText(constitution=constitution.ref, **_won(completions, pairs, decisions).fields())


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


class _Won(NamedTuple):
    """What answers won against the base policy's."""

    outcomes: list[Outcome]
    """One an answer; empty when nobody was asked."""
    by_prompt: list[float]
    """The share that each prompt's answers won: answers to one prompt are no independent draws. An abstention is no
    verdict, so it counts for nothing. Empty where nobody was asked, or nobody knew."""
    asked: int
    """Answers that somebody was asked about."""

    def fields(self) -> dict[str, Any]:
        """As `EvaluationMetrics` and `UnderText` have it."""
        return {
            "win_rate": fmean(self.by_prompt) if self.by_prompt else None,
            "win_interval": wilson(sum(self.by_prompt), len(self.by_prompt)) if self.by_prompt else None,
            "wins": self.outcomes.count("first"),
            "losses": self.outcomes.count("second"),
            "undecided": self.outcomes.count("tie"),
            "abstained": self.outcomes.count("abstain"),
            "asked": self.asked,
        }


def _won(completions: list[Completion], pairs: list[Pair], decisions: list[Decision] | None) -> _Won:
    if decisions is None:
        return _Won([], [], 0)
    verdicts = {d.pair_id: d.verdict.outcome for d in decisions}
    asked = {p.first: verdicts[p.id] for p in pairs}
    outcomes: list[Outcome] = [asked.get(c.id, "tie") for c in completions]
    if asked and all(o == "abstain" for o in asked.values()):
        return _Won(outcomes, [], len(asked))
    won: dict[str, list[float]] = {}
    for completion, outcome in zip(completions, outcomes, strict=True):
        if outcome != "abstain":
            won.setdefault(completion.prompt_id, []).append(_WON[outcome])
    return _Won(outcomes, [fmean(of_prompt) for of_prompt in won.values()], len(asked))


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
