"""What can be counted about answers without a judge: length, endings, lists, and how much they repeat. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from rlaif.constitutions.checks import count_list_items, count_words, words_of
from rlaif.intervals import share
from rlaif.records import AnswerStats, Completion

_LINE_END = re.compile(r"\n+|(?<=[.!?])\s+")


def answer_stats(completions: Sequence[Completion]) -> AnswerStats:
    """What can be counted about answers without a judge."""
    n = len(completions)
    texts = [c.text for c in completions]
    return AnswerStats(
        answers=n,
        mean_words=fmean(count_words(t) for t in texts),
        mean_tokens=fmean(len(c.token_ids) for c in completions),
        list_share=sum(count_list_items(t) >= 2 for t in texts) / n,
        ended_share=sum(c.finish_reason == "stop" for c in completions) / n,
        distinct_share=len({(c.prompt_id, c.text) for c in completions}) / n,
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        repeated_line_share=repeated_line_share(texts),
    )


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different runs of n words over all of them, letter case aside; None without one (Li et al. 2016,
    arXiv 1510.03055)."""
    different, every = set[tuple[str, ...]](), 0
    for text in texts:
        grams = list(_grams(words_of(text.lower()), n))
        different.update(grams)
        every += len(grams)
    return share(len(different), every)


def repeated_line_share(texts: Iterable[str]) -> float | None:
    """Lines and sentences that stood in their answer before, over all of them; None without one."""
    lines = repeated = 0
    for text in texts:
        mine = [line for part in _LINE_END.split(text.lower()) if (line := " ".join(words_of(part)))]
        lines += len(mine)
        repeated += len(mine) - len(set(mine))
    return share(repeated, lines)


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
