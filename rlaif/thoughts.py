"""A policy's thoughts: where they stand in what it said. Pure.

Models that think aloud before they answer put marks around it, and each family has its own. In: an answer, and what its
prompt ends with. Out: the answer without the thoughts.
"""

from __future__ import annotations

import re

_TAG = r"(?:[\w-]+[:_])?think(?:ing)?|thoughts?"
_BLOCKS = (
    (rf"<(?:{_TAG})>", rf"</(?:{_TAG})>"),  # Qwen, DeepSeek and most others
    (r"\[think(?:ing)?\]", r"\[/think(?:ing)?\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"<\|(?:begin_of_|start_of_)?(?:think(?:ing)?|thought)\|>", r"<\|(?:end_of_|/)(?:think(?:ing)?|thought)\|>"),
    (r"<\|start_thinking\|>", r"<\|end_thinking\|>"),  # Command A
    (r"<unused94>", r"<unused95>"),  # MedGemma
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma
    # gpt-oss: channels, of which `final` is the answer's
    (
        r"<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>",
        r"<\|end\|>\s*(?:<\|start\|>assistant)?(?:<\|channel\|>final[^<]*<\|message\|>)?",
    ),
)
_OPEN = re.compile("|".join(f"(?P<o{n}>{opening})" for n, (opening, _) in enumerate(_BLOCKS)), re.IGNORECASE)
_CLOSE = [re.compile(closing, re.IGNORECASE) for _, closing in _BLOCKS]
_ANY_CLOSE = re.compile("|".join(closing for _, closing in _BLOCKS[:-1]), re.IGNORECASE)
_ANSWER = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>final[^<]*<\|message\|>")


def opening(prompt: str) -> str:
    """The mark that a rendered prompt ends with, where its template begins the answer with a thought; else ""."""
    tail = prompt.rstrip()[-64:]
    return next((found[0] for found in _OPEN.finditer(tail) if found.end() == len(tail)), "")


def has_marks(text: str) -> bool:
    """Whether a text holds any mark of a thought."""
    return any(pattern.search(text) for pattern in (_OPEN, _ANY_CLOSE, _ANSWER))


def without_thoughts(text: str) -> str:
    """An answer without its thoughts; one that isn't finished reaches to the end.

    Args:
        text: as the policy said it, special tokens included, after what its prompt ends with (`opening`).
    """
    opened, closed = _OPEN.search(text), _ANY_CLOSE.search(text)
    if closed and (opened is None or closed.start() < opened.start()):
        text = text[closed.end() :]  # the mark that opened it isn't in the answer
    out = ""
    while opened := _OPEN.search(text):
        out += text[: opened.start()]
        closed = _CLOSE[int((opened.lastgroup or "o0")[1:])].search(text, opened.end())
        text = text[closed.end() :] if closed else ""
    return _ANSWER.sub("", out + text, count=1).lstrip()
