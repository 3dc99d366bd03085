"""What can be counted about answers without a judge: length, endings, lists, and how much they repeat. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from rlaif.constitutions.checks import count_list_items, count_words, words_of
from rlaif.intervals import log_choose, share
from rlaif.records import AnswerStats, Completion

DRAWS = 100
"""Of words, and of pairs of neighbouring words. So many are in a dozen answers of ten words, the least that an
evaluation of a brief writer has; a larger number would see rarer repetitions, and leave such writers without one. The
names of the fields hold it, so another number would be another field."""
_ABBREVIATIONS = ("dr", "mr", "mrs", "ms", "prof", "sr", "jr", "st", "vs", "cf", "approx", "[a-hj-z]", r"\d", r"\d\d")
"""What a full stop may follow within a sentence, as patterns: titles and such, initials and `e.g.`, and numbers of
lists (up to 99; years end sentences)."""
_LINE_END = re.compile(r"\n+|(?<=[.!?])" + "".join(rf"(?<!\b{short}\.)" for short in _ABBREVIATIONS) + r"\s+")
_LIST_NUMBER = re.compile(r"^[ \t]*\(?\d{1,3}[.)][ \t]+", re.MULTILINE)


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
        distinct_1_in_100=distinct_in(texts, 1),
        distinct_2_in_100=distinct_in(texts, 2),
        repeated_line_share=repeated_line_share(texts),
    )


def distinct_in(texts: Iterable[str], n: int, draws: int = DRAWS) -> float | None:
    """Different runs of n words that so many of them, drawn at random, hold on average, over the draws; letter case
    aside. None where there are fewer.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) divides what is different by all there is, so it falls as answers grow
    longer, of the same writer. This is its expectation at a fixed size, known as rarefaction (Hurlbert 1971): a run of
    words that stands there c times in N is missing from the draw with probability C(N - c, draws) / C(N, draws).
    """
    counts = Counter(gram for text in texts for gram in _grams(words_of(text.lower()), n))
    total = counts.total()
    if total < draws:
        return None
    every = log_choose(total, draws)
    missing = (math.exp(log_choose(total - c, draws) - every) for c in counts.values() if total - c >= draws)
    return (len(counts) - math.fsum(missing)) / draws


def repeated_line_share(texts: Iterable[str]) -> float | None:
    """Lines and sentences that stood in their answer before, over all of them; None without one. The number of a list
    item is no part of its line, and a number alone is no line."""
    lines = repeated = 0
    for text in texts:
        parts = [words_of(part) for part in _LINE_END.split(_LIST_NUMBER.sub("", text.lower()))]
        mine = [words for words in parts if not all(word.isdecimal() for word in words)]
        lines += len(mine)
        repeated += len(mine) - len(set(mine))
    return share(repeated, lines)


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
