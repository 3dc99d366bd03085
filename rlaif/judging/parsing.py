"""What a judge said: a reply → a verdict on the answers as they were shown, or an abstention with its reason. Pure.

A reply is matched as a whole or in one place that the template fixes, and the match is validated after it is made:
a verdict that doesn't hold never falls back to an earlier letter, and whatever is not clear is an abstention.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Literal

from rlaif.judging.templates import VerdictKind
from rlaif.records import AbstainReason, Outcome, Record, Usage

Shown = Literal["A", "B", "tie"]

_WORDS: dict[str, Shown] = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}
_THINK_OPEN = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?(?:verdict|answer)\s*(?:is\s*)?:?\s*)?(?:answer\s+)?(?P<verdict>[abc]|tie)\.?",
    re.IGNORECASE,
)
_VERDICT_LINE = re.compile(r"(?:final\s+)?verdict\s*:\s*(?:answer\s+)?(?P<verdict>\w+)\.?", re.IGNORECASE)
_FENCE = re.compile(r"```(?:json)?\s*(?P<body>.*?)\s*```", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:i(?:['’]m| am)\s+(?:really\s+|very\s+|so\s+)?sorry|sorry,|i\s+(?:can(?:['’]t|not| not)|won['’]t|will not)\b"
    r"|i(?:['’]m| am)\s+(?:unable|not able)\b|as an ai\b)",
    re.IGNORECASE,
)
_LABELS = ("A", "B")
# After the verdict's own token: the same word goes on, or another letter stands alone.
_NOT_THE_VERDICT = re.compile(r"\w|.*\b[ab]\b", re.DOTALL | re.IGNORECASE)


class TopToken(Record):
    """A token that could have stood at one place of a reply."""

    token: str
    logprob: float


class ReplyToken(Record):
    """A token of a reply, with the likeliest ones at its place."""

    token: str
    top: tuple[TopToken, ...]


class Reply(Record):
    """What a server answered: the raw reply, as it is cached."""

    content: str | None
    refusal: str | None = None
    finish_reason: str | None = None
    tokens: tuple[ReplyToken, ...] = ()
    """With log-probabilities, where they were asked for and given."""
    usage: Usage = Usage()
    model: str
    """As the server names it."""


class Parsed(Record):
    """A verdict on the answers as shown, or why there is none; exactly one of the two."""

    shown: Shown | None = None
    abstain_reason: AbstainReason | None = None


class LabelMass(Record):
    """Where the probability of the verdict token lay."""

    p_first_shown: float
    """p(A) / (p(A) + p(B))."""
    neither: float
    """1 - p(A) - p(B)."""


def parse(reply: Reply, kind: VerdictKind, pattern: str | None = None) -> Parsed:
    """The verdict of a reply; `pattern` replaces the form of the last line (`FrontMatter.pattern`)."""
    if reply.refusal or reply.finish_reason == "content_filter":
        return Parsed(abstain_reason="refused")
    text, thinking = _without_thoughts(reply.content or "")
    # A letter or a whole JSON object is complete; a last line that was cut off may have gone on ("Verdict: B|oth").
    if thinking or (reply.finish_reason == "length" and kind == "last_line"):
        return Parsed(abstain_reason="truncated")
    shown = _verdict(text, kind, pattern) if text else None
    if shown is None:
        # Some chat templates open the block themselves, so a reply holds its end only. Only what is no verdict as a
        # whole is read so: a JSON reason may quote an answer that holds the mark.
        text = _THINK_CLOSE.split(text)[-1].strip()
        shown = _verdict(text, kind, pattern) if text else None
    if shown is not None:
        return Parsed(shown=shown)
    if reply.finish_reason == "length":
        return Parsed(abstain_reason="truncated")
    if not text:
        return Parsed(abstain_reason="empty")
    return Parsed(abstain_reason="refused" if _REFUSAL.match(text.lstrip("*_\"' ")) else "unparsed")


def outcome(shown: Shown, order: Literal["forward", "reversed", "none"]) -> Outcome:
    """The verdict on the pair: in `reversed` order its second completion was shown as A."""
    if shown == "tie":
        return "tie"
    return "first" if (shown == "A") == (order != "reversed") else "second"


def label_mass(tokens: Sequence[ReplyToken], verdict: Shown) -> LabelMass | None:
    """The labels' probabilities at the token that is the parsed verdict: the last that is a label.

    Tokens count without the space around them (`A` and ` A` are one label). None when that token isn't the verdict's
    (a server's tokenizer may merge it with what stands before it, as in `:A`), or has no probabilities.
    """
    last = next((n for n in reversed(range(len(tokens))) if tokens[n].token.strip() in _LABELS), None)
    if last is None or tokens[last].token.strip() != verdict:
        return None
    if _NOT_THE_VERDICT.match("".join(t.token for t in tokens[last + 1 :])):
        return None
    at = tokens[last]
    mass = dict.fromkeys(_LABELS, 0.0)
    for top in {t.token: t for t in at.top}.values():
        if (label := top.token.strip()) in mass and not math.isnan(top.logprob):
            mass[label] += math.exp(min(top.logprob, 0.0))
    a, b = mass.values()
    if a + b <= 0:
        return None
    return LabelMass(p_first_shown=a / (a + b), neither=min(max(1 - a - b, 0.0), 1.0))


def _without_thoughts(content: str) -> tuple[str, bool]:
    """The reply after the `<think>` blocks that it begins with, and whether it ends inside one.

    Marks further on are text: a judge may quote them from an answer.
    """
    text = content
    while opened := _THINK_OPEN.match(text):
        if (closed := _THINK_CLOSE.search(text, opened.end())) is None:
            return "", True
        text = text[closed.end() :]
    return text.strip(), False


def _verdict(text: str, kind: VerdictKind, pattern: str | None) -> Shown | None:
    if kind == "letter":
        match = _LETTER.fullmatch(_plain(text))
    elif kind == "json":
        return _json_verdict(text)
    else:
        last = text.splitlines()[-1]
        match = re.search(f"(?:{pattern})\\s*$", last) if pattern else _VERDICT_LINE.fullmatch(_plain(last))
    return _WORDS.get((match["verdict"] or "").lower()) if match else None


def _json_verdict(text: str) -> Shown | None:
    fenced = _FENCE.fullmatch(text)
    try:
        tree = json.loads(fenced["body"] if fenced else text, object_pairs_hook=_refuse_two_verdicts)
    except (ValueError, RecursionError):
        return None
    verdict = tree.get("verdict") if isinstance(tree, dict) else None
    return _WORDS.get(verdict.strip().lower()) if isinstance(verdict, str) else None


def _refuse_two_verdicts(items: list[tuple[str, object]]) -> dict[str, object]:
    # json keeps the last of two equal keys: which one the judge meant is not ours to say.
    if len({key for key, _ in items}) < len(items):
        raise ValueError("a key is given twice")
    return dict(items)


def _plain(text: str) -> str:
    """Without the decoration that models put around a verdict: emphasis, brackets, quotes."""
    return re.sub(r"[*_`\"'\[\]()]", "", text).strip()
