"""Which words of a text are new against an older one, for people to see what changed. Pure."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

MOST_WORDS = 3000
"""In a text; longer ones aren't compared, since that would take seconds."""

# Chinese and Japanese are written without spaces: there each character is a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PART = re.compile(rf"\s+|\d+(?:[.,:]\d+)+|[{_CJK}]|[^\W_{_CJK}]+(?:['’\-][^\W_{_CJK}]+)*|[^\s]")


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    new: bool


def new_words(before: str | None, after: str) -> tuple[Piece, ...]:
    """A text in pieces, what the older one doesn't have at that place marked; space between new words is new too.

    A single old word amid new ones is taken for chance, and is new. Nothing is marked where there is no older text, or
    one of them is longer than `MOST_WORDS`.
    """
    parts = _PART.findall(after)
    places = [n for n, part in enumerate(parts) if not part.isspace()]
    old = [part for part in _PART.findall(before or "") if not part.isspace()]
    if before is None or max(len(old), len(places)) > MOST_WORDS:
        return (Piece(after, False),) if after else ()
    words = [parts[n] for n in places]
    new = [False] * len(parts)
    for kind, _, _, start, end in SequenceMatcher(None, old, words).get_opcodes():
        by_chance = kind == "equal" and end - start == 1 and start > 0 and end < len(words)
        if kind in ("insert", "replace") or by_chance:
            for n in places[start:end]:
                new[n] = True
    for n in range(1, len(parts) - 1):
        new[n] |= parts[n].isspace() and new[n - 1] and new[n + 1]
    return tuple(
        Piece("".join(part for part, _ in of_kind), is_new)
        for is_new, of_kind in groupby(zip(parts, new, strict=True), lambda pair: pair[1])
    )
