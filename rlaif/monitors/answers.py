"""Monitors of the answers that the policy samples, whoever judges them. Pure.

They say nothing where it sampled none (`source`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlaif.config import (
    CollapseMonitor,
    CutOffMonitor,
    EqualAnswersMonitor,
    JumpMonitor,
    SelfPraiseMonitor,
    ShortAnswersMonitor,
)
from rlaif.intervals import wilson
from rlaif.monitors.charts import Counted, surprise
from rlaif.monitors.counts import VOCABULARY_WORDS
from rlaif.monitors.history import Finding, History
from rlaif.records import IterationMetrics

_BEYOND_CHANCE = 3.5
"""Standard errors. Each iteration is looked at: two errors are nothing in a hundred of them."""


def short_answers(settings: ShortAnswersMonitor, history: History) -> Iterator[Finding]:
    """Few words an answer."""
    if (now := history.sampled) and (words := now.sampled.mean_words) < (least := settings.limit):
        yield Finding(f"sampled answers have {words:.1f} words on average, under {least:g}", words, least)


def equal_answers(settings: EqualAnswersMonitor, history: History) -> Iterator[Finding]:
    """The same answer again and again."""
    if (now := history.sampled) and (share := now.sampled.distinct_share) < settings.limit:
        yield Finding(f"only {share:.0%} of the sampled answers are distinct", share, settings.limit)


def cut_off(settings: CutOffMonitor, history: History) -> Iterator[Finding]:
    """Answers that don't end."""
    most = settings.limit
    if (now := history.sampled) and (cut := 1 - now.sampled.ended_share) > most:
        message = (
            f"the length limit cut off {cut:.0%} of the sampled answers, over {most:.0%}: raise "
            "sampling.max_tokens, or ask for shorter answers"
        )
        yield Finding(message, cut, most)


def collapse(settings: CollapseMonitor, history: History) -> Iterator[Finding]:
    """Few different words, or no doubt about any. Held against the run's first iteration that sampled, whatever the
    text: one text may ask for other words than another, none for so few."""
    sampled = [m.answer_counts for m in history.iterations if not m.given]
    if history.sampled is None or (first := sampled[0]) is None or (now := sampled[-1]) is None:
        return
    what = f"different words in {VOCABULARY_WORDS} of the sampled answers' words"
    for before, measured, least, said, digits in (
        (first.vocabulary, now.vocabulary, settings.vocabulary, what, 0),
        (first.nats_per_token, now.nats_per_token, settings.entropy, "nats a sampled token (its surprise)", 2),
    ):
        if before and measured is not None and measured < least * before:
            message = (
                f"the policy has collapsed: {measured:.{digits}f} {said}, {before:.{digits}f} in the first iteration, "
                f"under {least:g} times that"
            )
            yield Finding(message, measured / before, least)


def jump(settings: JumpMonitor, history: History) -> Iterator[Finding]:
    """From one iteration to the next: what training does in many is no jump."""
    if len(under := history.under_this_text) < 2 or under[-2].given or under[-1].given:
        return
    before, now = under[-2], under[-1]
    longer, shorter = sorted((now.sampled.mean_words, before.sampled.mean_words), reverse=True)
    error = _length_error(before, now)
    if error is not None and longer > settings.length_ratio * shorter and longer - shorter > _BEYOND_CHANCE * error:
        message = (
            f"sampled answers have {now.sampled.mean_words:.0f} words on average, {before.sampled.mean_words:.0f} in "
            "the iteration before"
        )
        yield Finding(message, longer / max(shorter, 1e-9), settings.length_ratio)
    ended = [Counted(round(m.sampled.ended_share * m.sampled.answers), m.sampled.answers) for m in (before, now)]
    by = abs(ended[1].share - ended[0].share)
    if by > settings.ended and abs(surprise(ended[1], ended[0])) > _BEYOND_CHANCE:
        message = (
            f"{ended[1].share:.0%} of the sampled answers end by themselves, "
            f"{ended[0].share:.0%} in the iteration before"
        )
        yield Finding(message, by, settings.ended)


def _length_error(*iterations: IterationMetrics) -> float | None:
    """Standard error of the difference of two iterations' mean words; None where it isn't known."""
    errors = [m.answer_counts.mean_words_error if m.answer_counts else None for m in iterations]
    known = [e for e in errors if e is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def self_praise(settings: SelfPraiseMonitor, history: History) -> Iterator[Finding]:
    """What pleases a judge, in place of an answer."""
    counts, of = history.sampled and history.sampled.answer_counts, history.now.sampled.answers
    for some, doing in (
        ((counts.self_praise, "praise themselves"), (counts.to_judge, "speak to their judge")) if counts else ()
    ):
        if wilson(some, of)[0] > settings.limit:
            yield Finding(f"{some} of {of} sampled answers {doing}", some / of, settings.limit)
