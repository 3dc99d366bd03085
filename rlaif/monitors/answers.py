"""Monitors of the answers that the policy samples, whoever judges them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rlaif.config import CutOffMonitor, EqualAnswersMonitor, ShortAnswersMonitor
from rlaif.monitors.history import Finding, History


def short_answers(settings: ShortAnswersMonitor, history: History) -> Iterator[Finding]:
    """Few words an answer."""
    words, least = history.now.sampled.mean_words, settings.limit
    if words < least:
        yield Finding(f"sampled answers have {words:.1f} words on average, under {least:g}", words, least)


def equal_answers(settings: EqualAnswersMonitor, history: History) -> Iterator[Finding]:
    """The same answer again and again."""
    share = history.now.sampled.distinct_share
    if share < settings.limit:
        yield Finding(f"only {share:.0%} of the sampled answers are distinct", share, settings.limit)


def cut_off(settings: CutOffMonitor, history: History) -> Iterator[Finding]:
    """Answers that don't end."""
    cut, most = 1 - history.now.sampled.ended_share, settings.limit
    if cut > most:
        message = (
            f"the length limit cut off {cut:.0%} of the sampled answers, over {most:.0%}: raise "
            "sampling.max_tokens, or ask for shorter answers"
        )
        yield Finding(message, cut, most)
