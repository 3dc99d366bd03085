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
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

from rlaif import thoughts
from rlaif.constitutions.templates import VerdictKind
from rlaif.records import AbstainReason, Order, Outcome, Record, Usage

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

# Not seen by a reader: zero-width characters, a BOM, a soft hyphen.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_COLONS = str.maketrans(dict.fromkeys("：﹕∶꞉", ":"))
_STRAIGHT = _COLONS | str.maketrans(dict.fromkeys("“”„", '"') | {"，": ","})
# What a template ends a turn with, when a server leaves it in the text; the end of a thought is none.
_STOP_TOKEN = re.compile(
    r"(?:<[|｜](?![^<>]*(?:thin|thought|reason|reflect|analysis|channel))[^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:eos|eot|end_of_turn|turn\||pad)>|\[(?:EOS|/INST|/?s)\])\Z",
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
_FENCE_BEGINS = re.compile(r"```\w*")
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*"|\\.)|,(?=\s*[}\]])', re.DOTALL)
_BRACES_AND_QUOTES = re.compile(r"\\.|[{}\"']", re.DOTALL)
_A_KEY_MAY_FOLLOW = re.compile(r"\{\s*[\w\"'“„]")
_A_KEY_FOLLOWS = re.compile(r"\{\s*[\"'“„][^\"'“”„\n{}]{1,40}[\"'“”]\s*[:：]")
_ANOTHER_VERDICT = re.compile(r"verdict\W{0,4}(?:is\b|[:=])", re.IGNORECASE)
_KEY = re.compile(r"(?:(?:final|overall|corrected|revised|my)[\s_-]?)?verdict", re.I)
_PYTHON_AT_MOST = 20_000

# What is said after an object: a verdict in words ("My final answer: A", "Correction: A", "I meant A", "A is better.",
# a letter alone), that it isn't one ("not B"), or that the object doesn't count.
_SAID = (
    r"(?:(?:the\s)?(?:answer|option|response|choice|candidate|output)\s)?(?:an?\s)?"
    r"(?P<{}>(?-i:[ABC])|[abc](?=[^\w\n]*(?:\n|\Z))|tie|draw|neither|both)\b(?=[^\w\n]*(?:\n|\Z)|\s?[.,;:!?)—–-]"
    r"|\s(?:{})\b)"
)
_AND_WHY = "because|since|as|over|instead|rather|not|should|due|for|after|given|here|then|now"
_REALLY = r"(?:(?:now|actually|really|clearly|therefore|thus|still|in\sfact)\s)?"
_CLAIMS = re.compile(
    # My final answer is A. The winner: A. It should be A. That's A.
    r"(?:\b(?:verdict|answer|choice|decision|judge?ment|pick|preference|vote|winner|correction|corrected|conclusion"
    r"|result|edit|update|revision|selection|option|response|ruling|one|final|it|that|this)\s?"
    rf"{_REALLY}(?:should\s(?:be|have\sbeen)|(?:would|must|has\sto)\sbe|changes\sto|becomes|is|was|:|=>|=|->|→|–|—|-|,)"
    rf"[\s:]{{0,2}}{_REALLY}|\b(?:its|thats)\s{_REALLY}"
    # I choose A. I meant A. I change my verdict to A.
    r"|(?<!not\s)(?<!nt\s)(?<!never\s)\b(?:choose|chose|pick(?:ed)?|prefer(?:red)?|select(?:ed)?|go(?:ing)?\swith"
    r"|went\swith|vote\sfor|meant?|say|believe|think|conclude|decide\s(?:on|for)|in\sfavou?r\sof|(?:change|revise|switch|correct|update)\w*\s(?:\w+\s){0,3}to|make\s(?:it|that)"
    rf"|opt\sfor|favou?r|settle\son|should\s(?:be|have\sbeen))\s){_SAID.format('said', f'is|was|{_AND_WHY}')}"
    # Actually, A. No wait, A.
    r"|\b(?:correction|actually|no|nope|wait|sorry|oops|rather|instead|hmm|i\smean|scratch\sthat"
    r"|on\s(?:second|further)\sthoughts?|on\sreflection|in\sfact|finally|so|thus|therefore|hence|better)\b"
    rf"[\s,:;.!–—-]{{0,4}}{_SAID.format('after_all', _AND_WHY)}"
    # A is better. A wins.
    r"|\b(?P<better>(?-i:[AB]))\s(?:wins\b|(?:is|was|would\sbe)\s"
    rf"{_REALLY}(?:the\s)?(?:better|best|winner|superior|stronger|preferable|preferred|correct|right)"
    r"(?:\s(?:one|answer|option|response|choice))?\s?(?=[.!,;\n]|\Z))"
    # A > B.
    r"|\b(?P<over>(?-i:[AB]))\s?(?:>{1,3}|beats|over)\s?(?-i:[AB])\b"
    # Let me reconsider: A.
    r"|[:,;>–—-]\s{0,2}(?P<last>(?-i:[ABC])|tie)\b(?=\s?[.!]?\s?(?:\n|\Z))"
    # A letter alone on its line.
    r"|^[^\w\n]*(?:(?:answer|option|response)\s)?(?P<alone>[abc]|tie)[^\w\n]*$"
    r"|\bnot\s(?:(?:answer|option|response)\s)?(?P<isnt>(?-i:[AB]))\b(?=[^\w\n]*(?:\n|\Z)|\s?[.,;!])"
    r"|\b(?:disregard|ignore|scratch|retract)\s(?:that|this|it|the\sabove|my)\b",
    re.I | re.M,
)
_CLAIMED = ("said", "after_all", "better", "over", "last", "alone")
_RUN_OF_SPACE = re.compile(r"\s+")
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
    if shown is None and (orphan := thoughts.closings(text)):
        # Some chat templates open the block themselves, so a reply holds its end only. Only what is no verdict as a
        # whole is read so: a JSON reason may quote an answer that holds the mark.
        text = text[orphan[-1][1] :].strip()
        shown = _verdict(text, kind, pattern, whole) if text else None
    if shown is not None:
        return Parsed(shown=shown)
    if how == "cut_off":
        return Parsed(abstain_reason="truncated")
    if not text:
        return Parsed(abstain_reason="empty")
    return Parsed(abstain_reason="refused" if _REFUSAL.match(text.lstrip("*_\"' ")) else "unparsed")


def outcome(shown: Shown, order: Order) -> Outcome:
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
    return _without_stop_tokens(text)


def _without_stop_tokens(text: str) -> str:
    while (text := text.rstrip()).endswith((">", "]")) and (found := _STOP_TOKEN.search(text, max(len(text) - 64, 0))):
        text = text[: found.start()]
    return text


def _without_thoughts(content: str, kind: VerdictKind) -> tuple[str, bool]:
    """The reply without its thoughts, and whether it ends inside one. A JSON object may quote marks in its strings."""

    def objects() -> thoughts.Spans:
        return [(start, end) for start, end, _ in _objects(content)] if kind == "json" else []

    text, thinking = thoughts.split(content, objects)
    return _SPECIAL_START.sub("", text, count=1).strip() if text.lstrip().startswith("<") else text.strip(), thinking


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
    last = _without_stop_tokens(lines[-1]).strip()
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
    """The verdict of the one object that has one. Prose may stand around it, unless it contradicts it afterwards, or
    something may be missing at the end."""
    body = text
    if (fence := _FENCE_BEGINS.match(text)) and text.endswith("```") and len(text) >= fence.end() + 3:
        body = text[fence.end() : -3].strip()
    found = list(_objects(body))
    verdicts = [v for _, _, mine in found for v in mine]
    if len(verdicts) != 1 or not isinstance(verdicts[0], str):
        return None
    start, end = next((start, end) for start, end, mine in found if mine)
    around = body[:start].strip(" \t\r\n["), body[end:].strip(" \t\r\n]")
    if not whole and any(around):
        return None
    closed = [at for at, _ in thoughts.closings(body) if not any(s <= at < e for s, e, _ in found)]
    if closed and closed[-1] >= end:  # it stands in a thought
        return None
    shown = _WORDS.get(verdicts[0].strip().lower()) or _read(_LETTER, verdicts[0])
    return None if around[1] and _contradicts(around[1], shown) else shown


def _contradicts(text: str, shown: Shown | None) -> bool:
    """Whether what is said after a verdict takes it back, or says another one."""
    text = _RUN_OF_SPACE.sub(lambda m: "\n" if "\n" in m[0] else " ", _undecorated(text).replace("’", ""))

    def agrees(claim: re.Match[str]) -> str:
        said = next(filter(None, (claim[name] for name in _CLAIMED)), None)
        same = _WORDS.get(said.lower()) == shown if said else claim["isnt"] not in (None, shown)
        return "" if same else "verdict: another"

    return _ANOTHER_VERDICT.search(_CLAIMS.sub(agrees, text)) is not None


def _objects(text: str) -> Iterator[tuple[int, int, list[object]]]:
    """The objects in a text, outermost ones: where each begins and ends, and the values of all keys `verdict` in it.

    They are JSON, with line breaks in strings and commas before a bracket let pass, or what Python writes. Of one that
    can't be read nothing within is: it may be a quote.
    """
    at = text.find("{")
    for _ in range(_OBJECTS_AT_MOST):
        if at < 0:
            return
        verdicts: list[object] = []
        end = _json_object(text, at, verdicts)
        if not end and _A_KEY_MAY_FOLLOW.match(text, at):
            end = _loose_object(text, at, verdicts)
        if end:
            yield at, end, verdicts
        elif _A_KEY_FOLLOWS.match(text, at):
            end = _closing_brace(text, at)
            if not end:
                yield len(text), len(text), [None]  # cut off, whatever else is in it
                return
        at = text.find("{", max(end, at + 1))
    yield len(text), len(text), [None, None]  # nobody counts further: more than one


def _json_object(text: str, at: int, verdicts: list[object]) -> int:
    """Where the JSON object at a place ends, 0 if there is none; its verdicts are added."""
    found: list[object] = []
    try:
        _, end = _decoder(found).raw_decode(text, at)
    except (ValueError, RecursionError):
        return 0
    verdicts += found
    return end


def _loose_object(text: str, at: int, verdicts: list[object]) -> int:
    """The same for an object that is nearly JSON."""
    if end := _closing_brace(text, at):
        tidied = _TRAILING_COMMA.sub(lambda m: m[1] or " ", text[at:end])
        if _json_object(tidied, 0, verdicts) or _json_object(tidied.translate(_STRAIGHT), 0, verdicts):
            return end
    if end := _closing_brace(text, at, "\"'"):
        found = _python_verdicts(text[at:end])
        if found is not None:
            verdicts += found
            return end
    return 0


def _closing_brace(text: str, at: int, quotes: str = '"') -> int:
    """Where what an opening brace begins ends, braces in strings aside; 0 if it doesn't."""
    depth, quote = 0, ""
    for found in _BRACES_AND_QUOTES.finditer(text, at):
        sign = found[0]
        if quote:
            quote = "" if sign == quote else quote
        elif sign in quotes:
            quote = sign
        elif sign in "{}":
            depth += 1 if sign == "{" else -1
            if not depth:
                return found.end()
    return 0


def _decoder(verdicts: list[object]) -> json.JSONDecoder:
    def keep(items: list[tuple[str, object]]) -> None:
        # json keeps the last of two equal keys: which one the judge meant is not ours to say.
        verdicts.extend(value for key, value in items if _KEY.fullmatch(key.strip()))

    return json.JSONDecoder(strict=False, object_pairs_hook=keep)


def _python_verdicts(text: str) -> list[object] | None:
    """The verdicts in `{'verdict': 'A'}` or `{verdict: 'A'}`; None when it is nothing that Python could read."""
    if len(text) > _PYTHON_AT_MOST:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of a backslash in a text
            tree = ast.parse(" ".join(text.splitlines()), mode="eval")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    found: list[object] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) or (isinstance(node, ast.Constant) and node.value is ...):
            return []  # a form to fill in: {"reason": ..., "verdict": "A" | "B"}
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            name = key.value if isinstance(key, ast.Constant) else key.id if isinstance(key, ast.Name) else None
            if isinstance(name, str) and _KEY.fullmatch(name.strip()):
                found.append(value.value if isinstance(value, ast.Constant) else None)
    return found


def _plain(text: str) -> str:
    """Without the decoration that models put around a verdict: headings, emphasis, brackets, quotes, LaTeX."""
    bare = _undecorated(text.strip()).strip()
    return _LEADING.sub("", bare, count=1).strip() if bare[:1] in "#>•-–—0123456789" else bare


def _undecorated(text: str) -> str:
    return _DECORATION.sub("", _LATEX.sub("", _TAGS.sub("", text.translate(_COLONS))))
