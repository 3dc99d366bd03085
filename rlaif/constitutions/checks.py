"""Mechanical checks of an answer: word counts, list items, patterns, reading ease.

In: a text and a principle's `check:`. Out: which conditions it meets. Pure. A check is shown beside the
judge's win rate in evaluation and watched by monitors; it is never a training label.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from rlaif.records import Record

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•+]|\(?\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_VOWELS = re.compile(r"[aeiouy]+")


class Check(Record):
    """The conditions of a `check:`; at least one, all of which an answer must meet."""

    max_words: int | None = Field(None, ge=0)
    """At most this many words."""
    min_words: int | None = Field(None, ge=0)
    """At least this many words."""
    max_list_items: int | None = Field(None, ge=0)
    """At most this many list items (lines that start with `-`, `*`, `•`, `+`, `1.` or `1)`)."""
    min_list_items: int | None = Field(None, ge=0)
    """At least this many list items."""
    matches: str | None = None
    """A regular expression (case doesn't count) found somewhere in the answer."""
    not_matches: str | None = None
    """A regular expression (case doesn't count) found nowhere in the answer."""
    min_reading_ease: float | None = None
    """Flesch reading ease, at least; 60 to 70 is plain English, more is easier."""

    @field_validator("matches", "not_matches")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as e:
                raise ValueError(f"not a regular expression: {e}") from e
        return pattern

    @model_validator(mode="after")
    def _not_empty(self) -> Check:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(f"a check needs at least one of {', '.join(type(self).model_fields)}")
        return self

    def results(self, text: str) -> dict[str, bool]:
        """Condition → met, for the conditions that this check states."""
        out: dict[str, bool] = {}
        words, items = count_words(text), count_list_items(text)
        if self.max_words is not None:
            out["max_words"] = words <= self.max_words
        if self.min_words is not None:
            out["min_words"] = words >= self.min_words
        if self.max_list_items is not None:
            out["max_list_items"] = items <= self.max_list_items
        if self.min_list_items is not None:
            out["min_list_items"] = items >= self.min_list_items
        if self.matches is not None:
            out["matches"] = re.search(self.matches, text, re.IGNORECASE) is not None
        if self.not_matches is not None:
            out["not_matches"] = re.search(self.not_matches, text, re.IGNORECASE) is None
        if self.min_reading_ease is not None:
            ease = reading_ease(text)
            out["min_reading_ease"] = ease is not None and ease >= self.min_reading_ease
        return out

    def passes(self, text: str) -> bool:
        """True when the text meets every stated condition."""
        return all(self.results(text).values())


def count_words(text: str) -> int:
    """Words: runs of letters and digits, joined by apostrophes or hyphens ("it's" is one)."""
    return len(_WORD.findall(text))


def words_of(text: str) -> tuple[str, ...]:
    """The words that `count_words` counts."""
    return tuple(_WORD.findall(text))


def count_list_items(text: str) -> int:
    """Lines that start as a bullet or a number of a list, and go on."""
    return len(_LIST_ITEM.findall(text))


def reading_ease(text: str) -> float | None:
    """Flesch reading ease of English text (Flesch 1948), syllables by a vowel-group rule; None without a word."""
    words = _WORD.findall(text)
    if not words:
        return None
    sentences = sum(1 for part in _SENTENCE_END.split(text) if _WORD.search(part))
    syllables = sum(_syllables(word) for word in words)
    return 206.835 - 1.015 * len(words) / max(sentences, 1) - 84.6 * syllables / len(words)


def _syllables(word: str) -> int:
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee")) and count > 1:
        count -= 1
    return max(count, 1)
