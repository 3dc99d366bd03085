"""Recorded votes as this rlaif reads them: the reply parsed, or the scores compared, again. Pure."""

from __future__ import annotations

from rlaif.config import Judge
from rlaif.constitutions.templates import Template
from rlaif.judging.outcomes import Said, said_by_guard, said_by_scores, said_in_reply, tolerances
from rlaif.judging.parsing import Reply
from rlaif.records import Vote

_SCORES_ARE_ROUNDED = 1.1e-4
"""Of a difference of two recorded scores, in nats: each has four decimals."""


def read_again(vote: Vote, template: Template | None, settings: Judge) -> Vote:
    """The vote as it is read today, itself where nothing is different. `template` is the run's copy of what was asked
    with; None for a judge that was shown none."""
    if vote.abstain_reason == "infra_error":
        return vote
    return _reread(vote, template, settings) if template else _rescored(vote, settings)


def _reread(vote: Vote, template: Template, settings: Judge) -> Vote:
    reply = Reply(content=vote.raw_reply, finish_reason=vote.finish_reason, model=vote.model)
    said = said_in_reply(reply, template, vote.ballot.order, settings.clamp, vote.p_first)
    if said.outcome == "abstain" and vote.abstain_reason == "refused":
        # A server that says by itself that it refused leaves no word of that in the reply's text.
        said = said._replace(abstain_reason="refused")
    return _updated(vote, said._replace(mass_neither=vote.mass_neither))


def _rescored(vote: Vote, settings: Judge) -> Vote:
    """A likelihood judge's vote made again from its scores; what their rounding can't tell stays as it was."""
    if vote.score_first is None or vote.score_second is None:
        return vote
    difference = vote.score_first - vote.score_second
    if vote.p_first is not None:
        said = said_by_scores(difference, settings.score_temperature)
        rounding = _SCORES_ARE_ROUNDED / settings.score_temperature
        near = said.p_first is not None and abs(said.p_first - vote.p_first) <= rounding
        return vote if near else _updated(vote, said)
    tolerance = tolerances(settings).get(vote.ballot.voice.rpartition("/")[2])
    if tolerance is None or abs(abs(difference) - tolerance) <= _SCORES_ARE_ROUNDED:
        return vote
    return _updated(vote, said_by_guard(difference, tolerance))


def _updated(vote: Vote, said: Said) -> Vote:
    """The vote itself unless something is different."""
    different = {name: value for name, value in said._asdict().items() if getattr(vote, name) != value}
    return vote.model_copy(update=different) if different else vote
