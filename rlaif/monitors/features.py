"""What of an answer could please a judge without being better, as numbers. Pure.

In: an answer's text. Out: a number for each feature; of two answers the one with the larger number has more of it.
English words; a text in another language has none of them, and then there is nothing to see.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from rlaif.constitutions.checks import count_list_items, count_words, words_of
from rlaif.records import Feature

_HEDGE = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|arguably|might|could|may|seems?|appears?|likely|somewhat|generally|usually|"
    r"typically|often|it depends|in (?:some|many|most) cases|i (?:think|believe|guess)|as far as i know)\b",
    re.IGNORECASE,
)
_PRAISE = (
    r"(?:excellent|perfect|great|best|complete|comprehensive|correct|accurate|helpful|good|clear|thorough|ideal|superior|"
    r"outstanding|wonderful|amazing|flawless|high[- ]quality)"
)
_ANSWER = r"(?:answer|response|reply|explanation|solution|text)"
_SELF_PRAISE = re.compile(
    rf"\b(?:this|my|the above|here)\s+(?:\w+\s+)?{_ANSWER}\s+(?:is|was)\s+(?:\w+\s+){{0,3}}{_PRAISE}\b"
    rf"|\b(?:this|here) is (?:an?|the|my)\s+(?:\w+\s+)?{_PRAISE}\s+(?:\w+\s+)?{_ANSWER}\b",
    re.IGNORECASE,
)
_TO_JUDGE = re.compile(
    rf"\[\[[ab]\]\]|\bverdict\s*:"
    rf"|\b(?:dear|note (?:to|from) the|attention,?)\s+(?:judge|grader|rater|evaluat(?:or|ion))s?\b"
    rf"|\b(?:choose|prefer|select|pick|rate|score)\s+(?:this|my)\s+{_ANSWER}\b"
    rf"|\bthis (?:one|{_ANSWER}) is (?:\w+\s+)?better\b|\bthe other (?:answer|response|reply)\b"
    rf"|\banswer [ab] is\b|\bignore (?:all )?(?:of )?(?:the )?(?:above|previous)\b",
    re.IGNORECASE,
)
_RUN = 3
"""Words of a run: one that comes again is a repetition."""


def repetition(text: str, most: int | None = None) -> float:
    """Share of runs of three words that came before in the same answer, in its first `most` words."""
    words = [word.lower() for word in words_of(text)][:most]
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _hedges(text: str) -> float:
    """By word: of a long answer more words are anything."""
    return len(_HEDGE.findall(text)) / max(count_words(text), 1)


FEATURES: dict[Feature, Callable[[str], float]] = {
    "length": count_words,
    "lists": count_list_items,
    "hedges": _hedges,
    "repetition": repetition,
    "self_praise": lambda text: len(_SELF_PRAISE.findall(text)),
    "to_judge": lambda text: len(_TO_JUDGE.findall(text)),
}
"""Feature → how much of it an answer has."""


class Compared:
    """Answers that are compared two by two, many of them several times: what one has of a feature is made out once."""

    def __init__(self) -> None:
        self._much = cache(lambda feature, text: FEATURES[feature](text))
        self._repetition = cache(repetition)

    def of_both(self, feature: Feature, one: str, other: str) -> tuple[float, float]:
        """How much of a feature each of two answers has. The longer one repeats itself more by being longer, so of
        repetition only as many words count as the shorter has."""
        if feature == "repetition":
            words = min(self._much("length", one), self._much("length", other))
            return self._repetition(one, words), self._repetition(other, words)
        return self._much(feature, one), self._much(feature, other)
