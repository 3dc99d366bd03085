"""What the votes on an old pair still say when the text has changed. Pure.

In: the ballots that a pair would get today, and all votes that it ever got. Out: the votes that answer one of these
ballots, those that answer none, and the ballots that nobody has answered.

A vote answers a ballot about another text when the question is the same one: judge, voice, order, sample, seed,
template and parameters are equal, and so is what the judge is shown of the text (`JudgeKind.shows`). A weight is no
part of a question; it says what the answer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlaif.records import Ballot, Vote

Shows = Callable[[Ballot], str]
"""What a ballot shows of its text, as a digest."""


class Carried(NamedTuple):
    """A pair's votes, held against the ballots that it would get today."""

    votes: tuple[Vote, ...]
    """As answers to these ballots, in their order: each has the ballot of today."""
    lost: tuple[Vote, ...]
    """They answer none of these ballots."""
    owed: tuple[Ballot, ...]
    """Not answered by any vote."""


def carry(ballots: Sequence[Ballot], votes: Sequence[Vote], shows: Shows) -> Carried:
    """Which votes on a pair answer its ballots of today; of several answers to one question the last."""
    answers = {_question(vote.ballot, shows): vote for vote in votes}
    asked = {_question(ballot, shows): ballot for ballot in ballots}
    return Carried(
        votes=tuple(answers[q].model_copy(update={"ballot": b}) for q, b in asked.items() if q in answers),
        lost=tuple(vote for vote in votes if _question(vote.ballot, shows) not in asked),
        owed=tuple(b for q, b in asked.items() if q not in answers),
    )


def _question(ballot: Ballot, shows: Shows) -> tuple[object, ...]:
    """All of a ballot but its id and its text's hash, and what it shows of the text."""
    b = ballot
    return b.pair_id, b.voice_key, b.guard, b.order, b.seed, b.template, b.parameters, shows(b)
