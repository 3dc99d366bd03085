"""Where a model thinks aloud: the marks of thoughts, in one table for policies and judges. Pure.

Models that think before they answer put marks around it, and each family has its own. A policy's answer is what
follows the thought that it begins with; marks further on are text, for a policy may write about them. A judge's
reply is read more strictly: a thought may stand anywhere in it, and one without an end leaves nothing to be read.
Both pass over a mark that is quoted.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Spans = Sequence[tuple[int, int]]

# A name between the brackets that models use: <think>, [THINK], ◁think▷, <|START_THINKING|>, <|end_of_thought|>.
_TAG = (
    r"(?P<{0}bracket><|＜|&lt;|\[|◁)[|｜]?\s?{1}(?:(?!end[_-])[a-z]+[:_-]|ant)?"
    r"(?P<{0}name>think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|analysis|scratch_?pad|cot"
    r"|chain[_ -]of[_ -]thought|(?:inner|internal)[_ -]monologue|deliberation)"
    r"(?:[_-](?:process|steps?|trace|content|text|block|section|\d+))?{2}\s?[|｜]?\\?(?:>|＞|&gt;|\]|▷)"
)
_OPEN_TAG = _TAG.format(
    "o", r"(?:(?:start|begin)[_▁](?:of[_▁])?)?", r"(?:[_-](?:start|begin))?(?:\s[\w:-]+=[^<>\[\]\n]*)?"
)
_CLOSE_TAG = _TAG.format("c", r"(?P<cends>/\s?|end[_▁](?:of[_▁])?)?", r"(?(cends)|[_-](?:end|close))")
# Where an answer begins, after a thought or without one, and where it ends.
_ANSWER = (
    r"(?:<\|start\|>assistant\s?)?<\|channel\|>\s?final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"  # gpt-oss
    r"|<\|start\|>assistant(?!\s?<\|channel\|>)(?:<\|message\|>)?"
    r"|<\|(?:start|begin)_(?:of_)?(?:response|answer|solution|output)\|>|<\|im_start\|>answer\b"
)
_ANSWER_ENDS = re.compile(r"<\|end_(?:of_)?(?:response|answer|solution|output)\|>\s*\Z", re.I)
# Marks of other shapes: how a thought begins, and where it ends.
_SHAPES = (
    (r"<unused94>(?:thought\b)?", r"<unused95>"),  # MedGemma
    (r"<\|channel>\s?(?:thought|analysis)\b", r"<channel\|>"),  # Gemma
    (r"<\|im_start\|>think\b", r"(?=<\|im_start\|>answer\b)"),  # s1
    (r"<details\b[^<>]{0,80}\breasoning\b[^<>]*>", r"</details>"),  # Open WebUI
    # gpt-oss: channels, of which `final` is the answer's
    (
        r"(?:<\|start\|>assistant\s?)?<\|channel\|>(?!\s?final\b)[^<]*(?:<\|constrain\|>[^<]*)?(?:<\|message\|>)?",
        r"<\|end\|>|(?=(?:<\|start\|>assistant\s?)?<\|channel\|>)",
    ),
)
# What plain words say: marks that were decoded away, or programs and models that write none. Only at a beginning.
_PHRASES = (
    (r"analysis(?-i:(?=[A-Z\"“]))", r"(?-i:assistantfinal|(?<! )assistant\s{1,9}final(?![a-z]))"),  # gpt-oss
    (r"(?-i:thought|thinking|think)[ \t]{0,9}\n", r"(?!)"),  # Gemma, s1
    (r"thinking\.\.\.\s", r"\.\.\.done thinking\."),  # Ollama
    (r"here(?: is|['’]s) (?:my|a|the) (?:thought|thinking) process\b", r"here(?: is|['’]s) my response:?"),  # Granite
    (r"(?:thinking|thought) process\b[*_]{0,3}:", r"(?!)"),  # Qwen
)
# The last of them as a line of its own, which may come later.
_HEADING = re.compile(r"^[ \t*_#>-]*(?:thinking|thought) process\b[*_]{0,3}:?[*_]{0,3}[ \t]*$", re.I | re.M)

_OPEN = re.compile("|".join([_OPEN_TAG, *(f"(?P<s{n}>{opened})" for n, (opened, _) in enumerate(_SHAPES))]), re.I)
# A mark is looked for at these alone: most replies have none.
_BRACKET = re.compile(r"[<＜\[◁]|&lt;")
_PHRASE = re.compile(
    r"[ \t*_#>-]*(?:" + "|".join(f"(?P<p{n}>{opened})" for n, (opened, _) in enumerate(_PHRASES)) + ")", re.I
)
_ANSWER_BEGINS = re.compile(_ANSWER, re.I)
_CLOSED_TAG = re.compile(_CLOSE_TAG, re.I)
_CLOSED_SHAPES = [re.compile(closed, re.I) for _, closed in _SHAPES]
# What ends a thought that plain words begin.
_CLOSED_PHRASES = [re.compile(f"{closed}|{_CLOSE_TAG}|<unused95>|<channel\\|>", re.I) for _, closed in _PHRASES]
# What ends a thought whose beginning isn't there.
_CLOSED = re.compile(f"{_CLOSE_TAG}|<unused95>|<channel\\|>|</details>|(?:<\\|end\\|>\\s?)?(?:{_ANSWER})", re.I)
_SPACE = re.compile(r"\s*")

# A mark that is spoken of: between quotes, or a word of its sentence ("opens with <think>, which", "a <think> tag").
_LINE = 400
_QUOTES = {'"': '"', "`": "`", "“": "”", "„": "“", "«": "»", "‘": "’", "'": "'"}
_ENDS_A_QUOTE = re.compile(r"[\s,.;:!?)\]}…—–-]|\Z")
_BEFORE_A_QUOTE = " \t([{:,—–-"
_WORD_BEFORE = re.compile(r"\w[*_]{0,2}\s{1,2}\Z")
_GOES_ON = re.compile(r"[,;)]|[.?!](?=\s|\Z)")
_SPEAKS_OF_IT = re.compile(
    r"(?:\b(?:an?|the|its|this|that|no|with|of|in|by|like|as|from|between|before|after|mentions?|quotes?|contains?|uses?"
    r"|includes?|says?|said|writes?|wrote|shows?|prints?|leaves?|leaks?|puts?|adds?|has|had|tags?|marks?|markers?|tokens?|literal|raw|stray|unclosed|empty))\s{1,2}\Z",
    re.I,
)
_A_WORD_FOLLOWS = re.compile(r"\s[a-z]")


class _Opened(NamedTuple):
    """A mark that opens a thought."""

    start: int
    end: int
    closed: re.Pattern[str]
    tag: tuple[str, str] | None
    """Of a name in brackets: the bracket, and what kind of name."""
    is_words: bool
    """Plain text may begin so, too."""


def opening(begun: str) -> str:
    """The mark of the thought that a template begins the answer with; else "".

    Args:
        begun: what the template writes before the answer (`Renderer.begun`).
    """
    at = 0
    while (found := next(_opened(begun, at), None)) is not None:
        end = _end(begun, found)
        if end is None:
            return begun[found.start : found.end]
        at = end
    return ""


def has_marks(text: str) -> bool:
    """Whether an answer begins with a thought, or with a mark that an answer begins with."""
    return without_thoughts(text) != text


def without_thoughts(text: str) -> str:
    """A policy's answer without the thoughts that it begins with; one that isn't finished reaches to the end.

    Args:
        text: as the policy said it, special tokens included, after the mark that its prompt ends with (`opening`).
    """
    at = 0
    while (found := _at(text, at)) is not None:
        end = _end(text, found)
        if end is None:
            if found.is_words:
                break
            return ""
        at = end
    at = _past_answer_mark(text, at)
    return _ANSWER_ENDS.sub("", text[at:]).lstrip() if at else text


def split(text: str, strings: Callable[[], Spans] = lambda: ()) -> tuple[str, bool]:
    """A judge's reply without its thoughts, and whether it ends inside one.

    Args:
        strings: where nothing is a mark (objects in the reply, whose strings may quote one), in order; asked for only
            where there are marks.
    """
    at, said = 0, False
    out: list[str] = []
    inert: Spans | None = None
    marks = _opened(text, 0, or_headed=True)
    while True:
        found = None if said else _at(text, at)
        if found is None:
            for found in marks:
                if found.start < at:
                    continue
                inert = strings() if inert is None else inert
                if not (_within(found.start, inert) or _quoted(text, found.start, found.end)):
                    break
            else:
                rest = text[_past_answer_mark(text, at) :]
                return "".join([*out, rest]) if out else rest, False
        inert = strings() if inert is None else inert
        before = text[at : found.start]
        out.append(before)
        if (end := _end(text, found, inert)) is None:
            return "".join(out), True
        if before.strip():
            said = True
            out.append("\n")  # what stands behind a thought is no part of what stands before it
        at = end


def closings(text: str) -> list[tuple[int, int]]:
    """Where marks that end a thought stand, with what an answer begins with after them."""
    return [
        (m.start(), _past_answer_mark(text, m.end()))
        for m in _at_brackets(_CLOSED, text)
        if not _quoted(text, m.start(), m.end(), closes=True)
    ]


def _at(text: str, at: int) -> _Opened | None:
    """The mark of a thought that a text goes on with, white space aside."""
    start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    match = _OPEN.match(text, start) or _PHRASE.match(text, start)
    return None if match is None else _as_opened(match)


def _opened(text: str, at: int, or_headed: bool = False) -> Iterator[_Opened]:
    """The marks that open a thought, from a place on; with `or_headed`, also where a line alone says so."""
    marks = (found for match in _at_brackets(_OPEN, text, at) if (found := _as_opened(match)) is not None)
    if not or_headed or "rocess" not in text:
        return marks
    headings = (_Opened(m.start(), m.end(), _CLOSED_PHRASES[-1], None, True) for m in _HEADING.finditer(text, at))
    return heapq.merge(marks, headings, key=lambda found: found.start)


def _at_brackets(form: re.Pattern[str], text: str, at: int = 0) -> Iterator[re.Match[str]]:
    for bracket in _BRACKET.finditer(text, at):
        if bracket.start() >= at and (match := form.match(text, bracket.start())) is not None:
            at = match.end()
            yield match


def _as_opened(match: re.Match[str]) -> _Opened | None:
    which = match.groupdict()
    if (bracket := which.get("obracket")) is not None:
        name = which["oname"] or ""
        if bracket == "[" and (match.string[match.end() : match.end() + 1] in ("(", ":") or
                               (_kind(name) != "thi" and not name.isupper())):  # fmt: skip
            return None  # a link; [Analysis] is a heading
        return _Opened(match.start(), match.end(), _CLOSED_TAG, (bracket, _kind(name)), False)
    for prefix, patterns in (("s", _CLOSED_SHAPES), ("p", _CLOSED_PHRASES)):
        for n, closed in enumerate(patterns):
            if which.get(f"{prefix}{n}") is not None:
                return _Opened(match.start(), match.end(), closed, None, prefix == "p")
    return None


def _kind(name: str) -> str:
    """What two marks of one thought share: `<think>` may end as `</thinking>`, or `</thought>`."""
    return name.lower()[:3].replace("tho", "thi")


def _end(text: str, opened: _Opened, inert: Spans = ()) -> int | None:
    """Where what follows a thought begins."""
    for match in opened.closed.finditer(text, opened.end):
        if opened.tag is not None and opened.tag != (match["cbracket"], _kind(match["cname"])):
            continue
        if _within(match.start(), inert) or (match[0] and _quoted(text, match.start(), match.end(), closes=True)):
            continue
        return _past_answer_mark(text, match.end())
    return None


def _past_answer_mark(text: str, at: int) -> int:
    start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    match = _ANSWER_BEGINS.match(text, start)
    return at if match is None else match.end()


def _within(at: int, spans: Spans) -> bool:
    n = bisect_right(spans, at, key=lambda span: span[0]) - 1
    return n >= 0 and at < spans[n][1]


def _quoted(text: str, start: int, end: int, closes: bool = False) -> bool:
    """Whether a mark is spoken of, and opens or closes nothing."""
    before = text[max(start - _LINE, 0) : start].rpartition("\n")[2]
    after = text[end : end + _LINE].partition("\n")[0]
    for opens, shuts in _QUOTES.items():
        ending = after.find(shuts)
        if ending < 0 or not _ENDS_A_QUOTE.match(after, ending + 1):
            continue
        begun = before.rfind(opens)
        if begun < 0 or (begun and before[begun - 1] not in _BEFORE_A_QUOTE):
            continue
        if opens == "'" and begun != len(before) - 1:  # an apostrophe elsewhere
            continue
        if opens == shuts or before.rfind(shuts) < begun:
            return True
    if not _WORD_BEFORE.search(before[-5:]):
        return False
    if not closes and _GOES_ON.match(after):
        return True
    return bool(_A_WORD_FOLLOWS.match(after) and _SPEAKS_OF_IT.search(before[-24:]))
