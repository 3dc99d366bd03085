"""What a judge's answer says of a pair: a reply, or two scores → outcome and p(first). Pure.

The judges make their votes by these functions, and a replay reads recorded votes again by the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

from rlaif.config import LikelihoodSettings
from rlaif.constitutions.templates import Template
from rlaif.intervals import sigmoid
from rlaif.judging.parsing import Reply, label_mass, outcome, parse
from rlaif.records import AbstainReason, Order, Outcome


class Said(NamedTuple):
    """The fields of a vote that say what was answered."""

    outcome: Outcome
    abstain_reason: AbstainReason | None = None
    p_first: float | None = None
    mass_neither: float | None = None


def said_in_reply(
    reply: Reply,
    template: Template,
    order: Order,
    clamp: tuple[float, float] | None,
    recorded: float | None = None,
) -> Said:
    """What a reply to a question of this template says. A log keeps a reply without its tokens' probabilities:
    `recorded` is the p(first) that was read from them. `clamp` bounds it for templates that reason first."""
    parsed = parse(reply, template.verdict, template.pattern)
    if parsed.shown is None:
        return Said("abstain", parsed.abstain_reason)
    if parsed.shown == "tie":  # it has no side that the labels' masses could speak for
        return Said("tie")
    p_first, neither = recorded, None
    if (mass := label_mass(reply.tokens, parsed.shown)) is not None:
        p_first = 1 - mass.p_first_shown if order == "reversed" else mass.p_first_shown
        neither = mass.neither
    if p_first is not None and clamp is not None and template.verdict != "letter":
        p_first = min(max(p_first, clamp[0]), clamp[1])
    return Said(outcome(parsed.shown, order), None, p_first, neither)


def said_by_scores(difference: float, temperature: float) -> Said:
    """What a difference of scores (first - second, in nats) says."""
    return Said(_side(difference, 0.0), p_first=sigmoid(difference / temperature))


def said_by_guard(difference: float, tolerance: float) -> Said:
    """What a guard's difference of a measure says: a side where it is more than the tolerance."""
    return Said(_side(difference, tolerance))


def tolerances(settings: LikelihoodSettings) -> dict[str, float]:
    """A guard's measure → its tolerance, in nats."""
    return {"relevance": settings.relevance_tolerance, "fluency": settings.fluency_tolerance}


def _side(difference: float, tolerance: float) -> Outcome:
    return "first" if difference > tolerance else "second" if difference < -tolerance else "tie"
