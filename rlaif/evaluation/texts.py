"""Texts whose perplexity is measured: what a policy thinks of ordinary writing, whatever it was trained to answer.

In: `texts.jsonl` beside this module, written for it: reports, stories, code, letters, lists and others. Out:
`FixedText`s.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from rlaif.records import Record


class FixedText(Record):
    """A text to be scored."""

    id: str
    kind: str
    text: str


@cache
def shipped() -> tuple[FixedText, ...]:
    """The texts that come with rlaif."""
    lines = resources.files("rlaif.evaluation").joinpath("texts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(FixedText.model_validate_json(line) for line in lines)
