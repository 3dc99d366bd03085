"""Monitors of the answers that the policy samples, whoever judges them. Pure.

They say nothing where it sampled none (`source`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from rlaif.config import (
    CollapseMonitor,
    CutOffMonitor,
    EqualAnswersMonitor,
    JumpMonitor,
    SelfPraiseMonitor,
    ShortAnswersMonitor,
)
from rlaif.intervals import SURE, students_t, wilson
from rlaif.monitors.counts import VOCABULARY_WORDS
from rlaif.monitors.history import Finding, History
from rlaif.records import IterationMetrics

_PROMPTS = 6
"""Of fewer, the spread of their means isn't known well enough."""


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
    sampled = [m.answer_counts for m in history.iterations if m.answer_counts and not m.given]
    if history.sampled is None or (now := history.sampled.answer_counts) is None:
        return
    what = f"different words in {VOCABULARY_WORDS} of the sampled answers' words"
    for counted, measured, least, said, digits in (
        ([c.vocabulary for c in sampled], now.vocabulary, settings.vocabulary, what, 0),
        (
            [c.nats_per_token for c in sampled],
            now.nats_per_token,
            settings.entropy,
            "nats a sampled token (its surprise)",
            2,
        ),
    ):
        before = next((value for value in counted if value is not None), None)
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
    beyond = _beyond_chance("mean_words_error", before, now)
    if beyond is not None and longer > settings.length_ratio * shorter and longer - shorter > beyond:
        message = (
            f"sampled answers have {now.sampled.mean_words:.0f} words on average, {before.sampled.mean_words:.0f} in "
            "the iteration before"
        )
        yield Finding(message, longer / max(shorter, 1e-9), settings.length_ratio)
    by = abs(now.sampled.ended_share - before.sampled.ended_share)
    beyond = _beyond_chance("ended_error", before, now)
    if beyond is not None and by > max(settings.ended, beyond):
        message = (
            f"{now.sampled.ended_share:.0%} of the sampled answers end by themselves, "
            f"{before.sampled.ended_share:.0%} in the iteration before"
        )
        yield Finding(message, by, settings.ended)


def _beyond_chance(error: Literal["mean_words_error", "ended_error"], *iterations: IterationMetrics) -> float | None:
    """What two iterations' means may differ by without a reason; None where it isn't known, or prompts are too few to
    say. Answers of one prompt are alike, so prompts are what counts."""
    counts = [m.answer_counts for m in iterations]
    errors = [e for c in counts if c and (e := getattr(c, error)) is not None]
    prompts = min((c.prompts for c in counts if c and c.prompts is not None), default=0)
    if len(errors) < len(counts) or prompts < _PROMPTS:
        return None
    return students_t(prompts - 1, SURE) * math.hypot(*errors)


def self_praise(settings: SelfPraiseMonitor, history: History) -> Iterator[Finding]:
    """What pleases a judge, in place of an answer."""
    counts, of = history.sampled and history.sampled.answer_counts, history.now.sampled.answers
    for some, doing in (
        ((counts.self_praise, "praise themselves"), (counts.to_judge, "speak to their judge")) if counts else ()
    ):
        if wilson(some, of, SURE)[0] > settings.limit:
            yield Finding(f"{some} of {of} sampled answers {doing}", some / of, settings.limit)
