"""What a judge said: a reply → a verdict on the answers as they were shown, or an abstention with its reason. Pure.

A reply is matched as a whole or in one place that the template fixes, and the match is validated after it is made:
a verdict that doesn't hold never falls back to an earlier letter, and whatever is not clear is an abstention. The
form may vary (docs/judges.md has the table), the meaning may not.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

from rlaif.judging.templates import VerdictKind
from rlaif.records import AbstainReason, Outcome, Record, Usage

Shown = Literal["A", "B", "tie"]

Ending = Literal["finished", "unsaid", "cut_off", "refused", "failed"]
"""How a reply came to its end, by its finish reason. `unsaid`: the server gives none, so it may have been cut off."""

_WORDS: dict[str, Shown] = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}

# How a reply ended, in the words of many servers; in small letters, other characters as `_`. What is in none of them is
# a failure: no verdict stands on an unknown word.
_FINISHED = re.compile(
    r"(?:natural_)?(?:stop(?:ped)?|end|eos|finish(?:ed)?|completed?|done|success|normal)"
    r"(?:_?(?:turn|token|str|string|sequence|word|of_(?:sequence|text|turn)|stop|id|found))*"
)
_CUT_OFF = re.compile(r"length|max_?(?:\w+_)?tokens?\b|token_limit|context_window|truncat|incomplete|output_limit")
_REFUSED = re.compile(
    r"content_?filter|safety|refus|recitation|blocklist|blocked|prohibited|spii|moderat|guardrail|sensitive|policy"
)

# A thought's mark: its name between the brackets that models use.
_THOUGHT = (
    r"(?:(?!end[_-])[a-z]+[:_-]|ant)?(?P<{0}>think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|analysis|scratch_?pad"
    r"|cot|chain[_ -]of[_ -]thought|(?:inner|internal)[_ -]monologue|deliberation)(?:[_-]\w+)?"
)
_OPENED = re.compile(
    rf"(?P<mark>[<\[◁])[|｜]?\s?(?:(?:start|begin)[_▁](?:of[_▁])?)?{_THOUGHT.format('name')}(?:\s[^<>\[\]\n]*)?[|｜]?[>\]▷]",
    re.I,
)
_CLOSED = re.compile(
    rf"(?P<mark>[<\[◁])[|｜]?\s?(?:/\s?|end[_▁](?:of[_▁])?){_THOUGHT.format('name')}\s?[|｜]?[>\]▷]", re.I
)
# Marks of other shapes: how a thought begins, where it ends, and how a verdict's part begins after it.
_OTHER_THOUGHTS = tuple(
    (re.compile(opened, re.I), re.compile(closed, re.I | re.DOTALL))
    for opened, closed in (
        (r"\s*<unused94>", r"<unused95>"),
        (r"\s*<\|channel>\s*(?:thought|analysis)", r"<channel\|>"),
        (
            r"\s*(?:<\|start\|>assistant)?<\|channel\|>",
            r".*<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
        ),
        (r"\s*analysis(?-i:(?=[A-Z\"“]))", r".*assistant\s*final"),  # the same, its marks decoded away
        (r"\s*thinking\.\.\.\s", r"\.\.\.done thinking\."),
        (r"\s*here(?: is|['’]s) my thought process:?", r"here(?: is|['’]s) my response:?"),
    )
)  # fmt: skip

# Not seen by a reader: zero-width characters, a BOM, a soft hyphen.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_COLONS = str.maketrans(dict.fromkeys("：﹕∶꞉", ":"))
_STRAIGHT = _COLONS | str.maketrans(dict.fromkeys("“”„", '"') | {"，": ","})
# What a template ends a turn with, when a server leaves it in the text; the end of a thought is none.
_STOP_TOKENS = re.compile(
    r"(?:\s*(?:<[|｜](?![^<>]*(?:thin|thought|reason|reflect|analysis|channel))[^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:eos|eot|end_of_turn|turn\||pad)>|\[(?:EOS|/INST|/?s)\]))+\s*$",
    re.I,
)
_SPECIAL_START = re.compile(r"\s*(?:<[|｜][^<>|｜\s]{1,40}[|｜]>\s*)+")
_TAGS = re.compile(
    r"</?(?:(?:final[_-]?)?(?:answer|verdict|response|output|solution|result)|b|strong|i|em|u|code|p|span)>|<br\s*/?>",
    re.I,
)
_LATEX = re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|mathbb|mathsf)\s*(?=\{)")
_DECORATION = re.compile(r"[*_`\"'\[\](){}$“”„«»]|\\[()\[\]]")
_LEADING = re.compile(r"(?:[#>•\-–—]+\s+|[#>]+|\d{1,2}[.)]\s+)+")
_BARE_LINE = re.compile(r"[\s*_`~=#\-–—]*")

_ANSWER = r"(?:(?:answer|option|response)\s+)?"
_IS = r"\s*(?:is\s*:|is\b|:|=>|->|→|=|-|–|—)\s*"
_END = "[.!。]?"
_LETTER = re.compile(
    rf"(?:(?:(?:the|my)\s+)?(?:final\s+|better\s+)?(?:verdict|answer|choice|response){_IS}|(?:verdict|answer)\s+)?"
    rf"{_ANSWER}(?P<verdict>[abc]|tie){_END}",
    re.IGNORECASE,
)
_VERDICT_LINE = re.compile(
    rf"(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:final\s+|overall\s+)?verdict{_IS}{_ANSWER}"
    rf"(?P<verdict>\w+){_END}",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\$*\\(?:boxed|fbox)\s*\{.*\}\$*\.?|\[\[\w+\]\]\.?")
_BOXED_WORD = re.compile(r"(?P<verdict>[abc]|tie)\.?", re.IGNORECASE)
_FENCE = re.compile(r"```(?:\w+)?\s*(?P<body>.*?)\s*```", re.DOTALL | re.IGNORECASE)
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', re.DOTALL)
_ANOTHER_VERDICT = re.compile(r"verdict\W{0,4}(?:is\b|[:=])", re.IGNORECASE)
_QUOTED_KEY = re.compile(r"['\"]verdict['\"]\s*:", re.IGNORECASE)
_OBJECTS_AT_MOST = 50
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
    system_fingerprint: str | None = None
    """What the server calls the state of its model, where it does."""

    @property
    def ending(self) -> Ending:
        """How it came to its end."""
        return ending(self.finish_reason)


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


_PLAIN = {label: Parsed(shown=_WORDS[label.lower()]) for label in _LABELS}


@lru_cache(maxsize=256)
def ending(finish_reason: str | None) -> Ending:
    """What a finish reason means; an unknown one is a failure."""
    word = re.sub(r"\W+", "_", (finish_reason or "none").strip().lower()).strip("_")
    word = re.sub(r"^finish_?reason_", "", word.removeprefix("finishreason_"))
    if word in ("none", "null"):
        return "unsaid"
    if _FINISHED.fullmatch(word):
        return "finished"
    if _REFUSED.search(word):
        return "refused"
    return "cut_off" if _CUT_OFF.search(word) else "failed"


def parse(reply: Reply, kind: VerdictKind, pattern: str | None = None) -> Parsed:
    """The verdict of a reply; `pattern` replaces the form of the last line (`FrontMatter.pattern`)."""
    how = reply.ending
    if reply.refusal or how == "refused":
        return Parsed(abstain_reason="refused")
    if how == "failed":  # no reply: it was stored, or logged, before that was known
        return Parsed(abstain_reason="infra_error")
    whole = how == "finished"
    if whole and kind == "letter" and reply.content in _LABELS:  # the plain form, without the rest's time
        return _PLAIN[reply.content]
    text, thinking = _without_thoughts(_seen(reply.content or ""), kind)
    # A letter or a whole JSON object is complete; a last line that was cut off may have gone on ("Verdict: B|oth").
    if thinking or (not whole and kind == "last_line" and text):
        return Parsed(abstain_reason="truncated")
    shown = _verdict(text, kind, pattern, whole) if text else None
    if shown is None and (orphan := list(_CLOSED.finditer(text))):
        # Some chat templates open the block themselves, so a reply holds its end only. Only what is no verdict as a
        # whole is read so: a JSON reason may quote an answer that holds the mark.
        text = text[orphan[-1].end() :].strip()
        shown = _verdict(text, kind, pattern, whole) if text else None
    if shown is not None:
        return Parsed(shown=shown)
    if how == "cut_off":
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


def _seen(content: str) -> str:
    """A reply without what no reader sees: zero-width characters, and the marks that end or begin a turn."""
    text = content if content.isascii() else _UNSEEN.sub("", content)
    return _STOP_TOKENS.sub("", text) if text.endswith((">", "]")) or text[-1:].isspace() else text


def _without_thoughts(content: str, kind: VerdictKind) -> tuple[str, bool]:
    """The reply without its thoughts, and whether it ends inside one.

    A mark that opens a thought begins the reply, or a line. Marks within a line are text: a judge may quote them from
    an answer. So are all of them within a JSON object.
    """
    text = content
    while True:
        for opened, closed in _OTHER_THOUGHTS:
            if opened.match(text):
                if (end := closed.search(text)) is None:
                    return "", True
                text = text[end.end() :]
                break
        else:
            at = 0 if kind == "json" and text.lstrip().startswith("{") else None
            found = _opened(text) if at is None else None
            if found is None:
                break
            end = next((c for c in _CLOSED.finditer(text, found.end()) if _one_thought(found, c)), None)
            if end is None:
                return "", True
            text = f"{text[: found.start()]}{text[end.end() :]}"
    return _SPECIAL_START.sub("", text, count=1).strip() if text.lstrip().startswith("<") else text.strip(), False


def _opened(text: str) -> re.Match[str] | None:
    """The first mark that opens a thought."""
    if not any(mark in text for mark in "<[◁"):
        return None
    for match in _OPENED.finditer(text):
        if match["mark"] == "[" and match["name"][:3].lower() != "thi" and not match["name"].isupper():
            continue  # [Analysis] is a heading
        if not text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip():
            return match
    return None


def _one_thought(opened: re.Match[str], closed: re.Match[str]) -> bool:
    """Whether two marks are of one kind; `<think>` may end as `</thinking>`."""
    names = [m["name"].lower()[:3].replace("tho", "thi") for m in (opened, closed)]
    return opened["mark"] == closed["mark"] and names[0] == names[1]


def _verdict(text: str, kind: VerdictKind, pattern: str | None, whole: bool) -> Shown | None:
    """The verdict in a text; `whole`: nothing of it can be missing at its end."""
    if kind == "json":
        return _json_verdict(text, whole)
    if kind == "letter":
        return _read(_LETTER, text)
    lines = text.splitlines()
    while lines and _BARE_LINE.fullmatch(lines[-1]):  # the end of a fence, a rule
        lines.pop()
    if not lines:
        return None
    last = _STOP_TOKENS.sub("", lines[-1]).strip()
    if pattern:
        match = re.search(f"(?:{pattern})\\s*$", last)
        return _WORDS.get((match["verdict"] or "").lower()) if match else None
    if _BOXED.fullmatch(last) and (boxed := _read(_BOXED_WORD, last)):
        return boxed
    return _read(_VERDICT_LINE, last)


def _read(form: re.Pattern[str], text: str) -> Shown | None:
    match = form.fullmatch(_plain(text))
    return _WORDS.get(match["verdict"].lower()) if match else None


def _json_verdict(text: str, whole: bool) -> Shown | None:
    """The verdict of the one object that has one. Prose may stand around it, unless it names another verdict after
    it, or something may be missing at the end."""
    fenced = _FENCE.fullmatch(text)
    body = fenced["body"] if fenced else text
    found = list(_objects(body))
    verdicts = [v for _, _, mine in found for v in mine]
    if not verdicts and (straight := body.translate(_STRAIGHT)) != body:
        return _json_verdict(straight, whole)
    if not verdicts and (old := _python_object(body)) is not None:
        return old
    if len(verdicts) != 1 or not isinstance(verdicts[0], str):
        return None
    start, end = next((start, end) for start, end, mine in found if mine)
    around = body[:start].strip(" \t\r\n["), body[end:].strip(" \t\r\n]")
    if not whole and any(around):
        return None
    closed = [m for m in _CLOSED.finditer(body) if not any(s <= m.start() < e for s, e, _ in found)]
    if closed and closed[-1].start() >= end:  # it stands in a thought
        return None
    if _ANOTHER_VERDICT.search(around[1]):
        return None
    return _WORDS.get(verdicts[0].strip().lower()) or _read(_LETTER, verdicts[0])


def _objects(text: str) -> Iterator[tuple[int, int, list[object]]]:
    """The JSON objects in a text, outermost ones: where each begins and ends, and the values of all keys `verdict` in
    it. Line breaks in strings and commas before a bracket are let pass."""
    at = text.find("{")
    for _ in range(_OBJECTS_AT_MOST):
        if at < 0:
            return
        here, end = text[at:], 0
        for tidied in (False, True):
            verdicts: list[object] = []
            try:
                tree = _TRAILING_COMMA.sub(lambda m: m[1] or " ", here) if tidied else here
                _, end = _decoder(verdicts).raw_decode(tree)
            except (ValueError, RecursionError):
                continue
            yield at, at + end, verdicts
            break
        at = text.find("{", at + max(end, 1))
    yield len(text), len(text), [None, None]  # nobody counts further: more than one


def _decoder(verdicts: list[object]) -> json.JSONDecoder:
    def keep(items: list[tuple[str, object]]) -> None:
        # json keeps the last of two equal keys: which one the judge meant is not ours to say.
        verdicts.extend(value for key, value in items if key.strip().lower() == "verdict")

    return json.JSONDecoder(strict=False, object_pairs_hook=keep)


def _python_object(text: str) -> Shown | None:
    """The verdict of `{'verdict': 'A'}`, as Python writes an object."""
    if not text.startswith("{'") or len(_QUOTED_KEY.findall(text)) != 1 or len(text) > 20_000:
        return None
    try:
        tree = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    verdict = tree.get("verdict") if isinstance(tree, dict) else None
    return _WORDS.get(verdict.strip().lower()) if isinstance(verdict, str) else None


def _plain(text: str) -> str:
    """Without the decoration that models put around a verdict: headings, emphasis, brackets, quotes, LaTeX."""
    bare = _DECORATION.sub("", _LATEX.sub("", _TAGS.sub("", text.strip().translate(_COLONS)))).strip()
    return _LEADING.sub("", bare, count=1).strip() if bare[:1] in "#>•-–—0123456789" else bare
