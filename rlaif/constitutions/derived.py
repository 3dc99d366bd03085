"""Contrasts that are derived from a rule, where a principle has none of its own for a use. Pure.

In: a principle's rule. Out: the two sides of each contrast, as instructions. The likelihood judge compares what an
answer is worth under either side, and a rule alone names one; the wordings here say the rule and its opposite around
it. They quote the rule whole, so any phrasing will do ("Prefer the answer that …", "The answer should …", "Never …",
"Be polite."). Only "Prefer the answer that X" is also said as "an answer that X".

A set of wordings is data with an id and a hash. A run keeps a copy of the set that it asked with, and goes on with it;
so a new set gets a new id (`derived.2`), and is measured first: `python -m benchmarks.derived`.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from rlaif.records import Record, digest

Use = Literal["select", "decide", "evaluate"]

FILE = "derived.json"
"""What a run's copy of a set is called, in `constitutions/<hash>/`."""

_PLACE = re.compile(r"\{(rule|answer|one)\}")
_PREFER = re.compile(
    r"(?:please\s+)?(?:always\s+)?(?:prefer|choose|favou?r|pick|select)\s+(?:the|an|a)\s+(?:answer|reply|response)\s+"
    r"(?P<which>(?:that|which|whose|with|without)\s.+)",
    re.IGNORECASE,
)
_NEW_SENTENCE = re.compile(r"[.!?:;]\s")


class Sides(Record):
    """One contrast. `{rule}` is the rule as a sentence, `{answer}` "an answer that …", `{one}` "one that …"."""

    prefer: str = Field(min_length=1)
    avoid: str = Field(min_length=1)


class Wordings(Record):
    """A set of wordings: for each use others, so that what measures a policy has not trained it."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_.]*$")
    select: tuple[Sides, ...] = Field(min_length=1)
    decide: tuple[Sides, ...] = Field(min_length=1)
    evaluate: tuple[Sides, ...] = Field(min_length=1)

    @property
    def hash(self) -> str:
        """Digest of all wordings: what a plan records."""
        return digest(self.model_dump(mode="json"))

    def contrasts(self, rule: str, use: Use) -> list[tuple[str, str, str]]:
        """(label, prefer, avoid) of each contrast of a rule for one use; the label says by what it is derived."""
        sides: tuple[Sides, ...] = getattr(self, use)
        return [
            (f"{self.id}-{use}{n}", _fill(s.prefer, rule), _fill(s.avoid, rule)) for n, s in enumerate(sides, start=1)
        ]


def _fill(wording: str, rule: str) -> str:
    """One pass, so that a rule which holds `{answer}` stays as it is."""
    sentence = " ".join(rule.split())
    bare = sentence.rstrip(".")
    named = _PREFER.fullmatch(bare)
    # "Prefer answers that are short" and what goes on after a full stop are quoted, not taken apart.
    which = (
        named["which"]
        if named is not None and _NEW_SENTENCE.search(named["which"]) is None
        else f'that keeps to the rule "{bare}"'
    )
    values = {
        "rule": sentence if sentence.endswith((".", "!", "?")) else f"{sentence}.",
        "answer": f"an answer {which}",
        "one": f"one {which}",
    }
    return _PLACE.sub(lambda place: values[place[1]], wording)


WORDINGS: tuple[Wordings, ...] = (
    Wordings(
        id="derived.1",
        select=(
            Sides(
                prefer="Keep to this rule in all that you write: {rule}",
                avoid="Write the opposite of what this rule says: {rule}",
            ),
        ),
        decide=(
            Sides(prefer="Give {answer}.", avoid="Do not give {answer}. Do the opposite."),
            Sides(prefer="Follow this rule: {rule}", avoid="Break this rule: {rule}"),
            Sides(prefer="A good answer is {one}.", avoid="A bad answer is wanted: not {one}."),
        ),
        evaluate=(
            Sides(prefer="People want this from you: {rule}", avoid="People want the reverse of this from you: {rule}"),
            Sides(
                prefer="You are an assistant whose answer is always {one}.",
                avoid="You are an assistant whose answer is never {one}.",
            ),
        ),
    ),
)
"""All sets that were ever in force, the newest last."""

NEWEST = WORDINGS[-1]
