"""Contrasts that are derived from a rule, where a principle has none of its own for a use. Pure.

In: a principle's rule, and its opposite (its own, or the rule turned around by `opposites`). Out: the two sides of each
contrast. The likelihood judge compares what an answer is worth behind either side, and a rule alone names one; the
wordings here say the rule and its opposite in the same frame. Any phrasing of a rule will do ("Prefer the answer that
…", "The answer should …", "Never …", "Be polite."). Only "Prefer the answer that X" is also said as "an answer that X".

A set of wordings is data with an id and a hash. A run keeps a copy of the set that it asked with, opposites included,
and goes on with it; so a new set gets a new id (`derived.3`), and is measured first: `python -m benchmarks.derived`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from rlaif.constitutions.opposites import PREFER_THE, turned
from rlaif.records import Record, digest

Use = Literal["select", "decide", "evaluate"]

FILE = "derived.json"
"""What a run's copy of a set is called, in `constitutions/<hash>/`."""

_PLACE = re.compile(r"\{(opposite_|)(rule|answer|one)\}")
_PREFER = re.compile(
    rf"{PREFER_THE}(?:answer|reply|response) (?P<which>(?:that|which|whose|with|without) .+)", re.IGNORECASE
)
_NEW_SENTENCE = re.compile(r"[.!?:;]\s")


class Sides(Record):
    """One contrast: an instruction on either side, or with replies a turn of the chat.

    `{rule}` is the rule as a sentence, `{answer}` "an answer that …", `{one}` "one that …"; with `opposite_` before it,
    the same of the opposite.
    """

    prefer: str = Field(min_length=1)
    avoid: str = Field(min_length=1)
    replies: tuple[str, str] | None = None
    """What the assistant says to `prefer` and to `avoid`, which then are the user's."""

    @property
    def turns_around(self) -> bool:
        """Whether a side says the opposite."""
        return any("{opposite_" in said for said in (self.prefer, self.avoid, *(self.replies or ())))


def frame(said: str, reply: str | None = None) -> Sides:
    """The same words around the rule and around its opposite."""

    def turn(words: str) -> str:
        return _PLACE.sub(r"{opposite_\2}", words)

    return Sides(prefer=said, avoid=turn(said), replies=None if reply is None else (reply, turn(reply)))


class Wordings(Record):
    """A set of wordings: for each use others, so that what measures a policy has not trained it."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_.]*$")
    select: tuple[Sides, ...] = Field(min_length=1)
    decide: tuple[Sides, ...] = Field(min_length=1)
    evaluate: tuple[Sides, ...] = Field(min_length=1)
    opposites: dict[str, str] = Field(default_factory=dict)
    """Rule → the rule turned around, of the text that asks: what a later version would turn otherwise stays."""

    @property
    def hash(self) -> str:
        """Digest of all wordings: what a plan records."""
        return digest(self.model_dump(mode="json", exclude_defaults=True))

    def of_rules(self, rules: Iterable[str]) -> Wordings:
        """This set with the opposites of these rules, those that it knows as they are; as it is if it says none."""
        if not any(s.turns_around for s in (*self.select, *self.decide, *self.evaluate)):
            return self
        return self.model_copy(update={"opposites": {r: self.opposites.get(r) or turned(r).rule for r in rules}})

    def contrasts(self, rule: str, use: Use, opposite: str | None = None) -> list[tuple[str, Side, Side]]:
        """(label, wanted side, opposite side) of each contrast of a rule for one use; the label says by what it is
        derived. `opposite` is the principle's own."""
        other = opposite or self.opposites.get(rule) or turned(rule).rule
        sides: tuple[Sides, ...] = getattr(self, use)
        return [
            (
                f"{self.id}-{use}{n}",
                tuple(_fill(words, rule, other) for words in (s.prefer, *(s.replies or ())[:1])),
                tuple(_fill(words, rule, other) for words in (s.avoid, *(s.replies or ())[1:])),
            )
            for n, s in enumerate(sides, start=1)
        ]


Side = tuple[str, ...]
"""An instruction; or what the user says, and the assistant."""


def _fill(wording: str, rule: str, opposite: str) -> str:
    """One pass, so that a rule which holds `{answer}` stays as it is."""
    values = {"": _said(rule), "opposite_": _said(opposite)}
    return _PLACE.sub(lambda place: values[place[1]][place[2]], wording)


def _said(rule: str) -> dict[str, str]:
    sentence = " ".join(rule.split())
    bare = sentence.rstrip(".")
    named = _PREFER.fullmatch(bare)
    # "Prefer answers that are short" and what goes on after a full stop are quoted, not taken apart.
    which = (
        named["which"]
        if named is not None and _NEW_SENTENCE.search(named["which"]) is None
        else f'that keeps to the rule "{bare}"'
    )
    return {
        "rule": sentence if sentence.endswith((".", "!", "?")) else f"{sentence}.",
        "answer": f"an answer {which}",
        "one": f"one {which}",
    }


WORDINGS: tuple[Wordings, ...] = (
    Wordings(
        id="derived.2",
        select=(frame("I want {answer}.", "I will give you {answer}."),),
        decide=(
            frame("You are a helpful assistant. {rule}"),
            frame("{rule}", "Okay, I will."),
            frame("Give {answer}."),
        ),
        evaluate=(
            frame("You are an assistant whose answer is always {one}."),
            frame("What is a good answer?", "A good answer is {one}."),
        ),
    ),
)
"""All sets that are asked with, the newest last. A run has its own copy of the one that it began with."""

NEWEST = WORDINGS[-1]
