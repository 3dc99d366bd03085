"""What a run's log holds about pairs of earlier iterations, held against a text: as the loop decides them, and an audit
decides them again.

In: rows of earlier iterations, the ballots that a text asks. Out: the pairs with all votes that they ever got, and
which of these answer. No judge is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import constitution_copy
from rlaif.constitutions.templates import Template
from rlaif.judging.carried import Carried, Shows, carry
from rlaif.judging.kinds import JudgeKind
from rlaif.judging.verdicts import by_pair
from rlaif.records import Ballot, Completion, Decision, OldPair, Pair, Preference, Side, Standing, Vote
from rlaif.rundir.store import RunDir


class PairLog:
    """What a run's log holds about some pairs."""

    def __init__(self, run: RunDir, k: int, rows: Iterable[Preference | OldPair]):
        """`rows` name pairs of iterations before k, as that one found them.

        Raises:
            RlaifError: a file is gone or damaged.
        """
        sampled_in: dict[int, set[str]] = {}
        for row in rows:
            sampled_in.setdefault(row.iteration, set()).add(row.pair_id)
        self.pairs: dict[str, Pair] = {}
        self.completions: dict[str, Completion] = {}
        votes: list[Vote] = []
        for i, ids in sorted(sampled_in.items()):
            here = run.iteration(i)
            mine = [p for p in here.read("pairs", Pair) if p.id in ids]
            sides = {c for p in mine for c in (p.first, p.second)}
            self.pairs |= {p.id: p for p in mine}
            self.completions |= {c.id: c for c in here.read("completions", Completion) if c.id in sides}
            votes += [v for v in here.read("votes", Vote) if v.ballot.pair_id in ids]
        for i in range(min(sampled_in, default=k), k):
            votes += self.rejudged(run, i)
        self.votes = by_pair(votes)
        """By pair, all that it ever got, in the order in which they were cast."""

    def rejudged(self, run: RunDir, i: int) -> list[Vote]:
        """Votes that iteration i had cast on these pairs."""
        here = run.iteration(i)
        cast = here.read("rejudged_votes", Vote) if here.is_complete("rejudged_votes") else []
        return [v for v in cast if v.ballot.pair_id in self.pairs]


def held_against(
    pairs: Sequence[Pair], ballots: Iterable[Ballot], votes: Mapping[str, Sequence[Vote]], shows: Shows
) -> list[tuple[list[Ballot], Carried]]:
    """Of each pair its ballots of today, and what its votes say to them."""
    asked: dict[str, list[Ballot]] = {p.id: [] for p in pairs}
    for ballot in ballots:
        asked[ballot.pair_id].append(ballot)
    return [(asked[p.id], carry(asked[p.id], votes.get(p.id, []), shows)) for p in pairs]


def shows_of(run: RunDir, kind: JudgeKind[Any], constitution: Constitution, templates: Sequence[Template]) -> Shows:
    """What ballots show of their texts, `constitution` or one that the run has a copy of; each text is read, and each
    question rendered, once. `templates` are those in force."""
    texts = {constitution.hash: constitution}
    known: dict[tuple[str, str, str], str] = {}

    def shows(ballot: Ballot) -> str:
        key = ballot.constitution, ballot.template, ballot.voice
        if key not in known:
            if ballot.constitution not in texts:
                texts[ballot.constitution] = constitution_copy(run, ballot.constitution)
            known[key] = kind.shows(ballot, texts[ballot.constitution], templates)
        return known[key]

    return shows


def standing_by(decision: Decision, was: Side) -> Standing:
    """How a pair stands that had `was` as its winner, and was decided anew."""
    return "kept" if decision.winner == was else "turned" if decision.winner else "dropped"
