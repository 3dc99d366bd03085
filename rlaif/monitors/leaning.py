"""What winners have more of than losers, beside merit. Pure.

In: for each feature of an answer, of the kept pairs in which one side has more of it, those whose winner does. Out: a
finding where it is nearly all of them. That is a sign test: pairs in which neither side has more say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from rlaif.config import LeaningMonitor
from rlaif.constitutions.constitution import Constitution
from rlaif.intervals import wilson
from rlaif.monitors.history import Finding, History
from rlaif.records import Feature, Leaning

Way = Literal["more", "less"]

_SURELY = 2.4
"""Standard deviations. Eight iterations are looked at together, so in a hundred there are some twenty looks."""

RECENT = 8
"""Iterations that are added up: one has few pairs that differ in what is rare, and a judge that begins to lean must not
hide behind a hundred before."""

_SAID: Mapping[Feature, str] = {
    "length": "words",
    "lists": "list items",
    "hedges": "hedging words by word",
    "repetition": "repetition",
    "self_praise": "praise of itself",
    "to_judge": "words to the judge",
}
_NEITHER_IS_A_MERIT: tuple[Feature, ...] = ("length", "lists", "hedges")
"""Features of which less can be liked for no reason as well."""


def asked_for(constitution: Constitution) -> dict[Feature, Way]:
    """What the checks of a text ask for, as far as these features go."""
    out: dict[Feature, set[Way]] = {}
    for check in (p.check for p in constitution.principles if p.check):
        bounds: tuple[tuple[Feature, Way, int | None], ...] = (
            ("length", "less", check.max_words),
            ("length", "more", check.min_words),
            ("lists", "less", check.max_list_items),
            ("lists", "more", check.min_list_items),
        )
        for feature, way, bound in bounds:
            if bound is not None:
                out.setdefault(feature, set()).add(way)
    # Both: a length in between, which neither longer nor shorter answers are nearer to as such.
    return {feature: way for feature, ways in out.items() if len(ways) == 1 for way in ways}


def leaning(settings: LeaningMonitor, history: History) -> Iterator[Finding]:
    """Over the kept pairs of the last iterations, since the text came into force."""
    under = history.under_this_text[-RECENT:]
    for feature, said in _SAID.items():
        limit = getattr(settings, feature)
        if limit is None:
            continue
        of = [found for m in under if (found := m.leanings.get(feature))]
        newest = history.now.leanings.get(feature)
        if newest is None or not newest.pairs:  # told before, if at all
            continue
        total = Leaning(more=sum(o.more for o in of), pairs=sum(o.pairs for o in of))
        ways: tuple[tuple[Way, int], ...] = (("more", total.more), ("less", total.pairs - total.more))
        for way, some in ways if feature in _NEITHER_IS_A_MERIT else ways[:1]:
            if history.asked.get(feature) != way and wilson(some, total.pairs, _SURELY)[0] > limit:
                message = (
                    f"the winner has {way} {said} than the loser in {some} of {total.pairs} kept pairs since iteration "
                    f"{under[0].iteration + 1}"
                )
                yield Finding(message, some / total.pairs, limit)
