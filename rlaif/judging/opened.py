"""The job's judge, opened in this process: for commands that ask it outside of a run.

In: a job and the constitutions that will be asked about. Out: an `Ask`, which makes the ballots that a run would make
and casts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template, load_template
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import kind_of
from rlaif.own_code import of_rule
from rlaif.records import Ballot, Pair, Vote

Ask = Callable[[Sequence[Pair], Sequence[Candidate], Constitution], Iterator[list[Vote]]]
"""Votes on pairs under a constitution, in chunks."""


def _nothing() -> None:
    """Nothing was started."""


class Opened(NamedTuple):
    """A judge that can be asked, and what it would be asked: whose id a vote has, that vote needn't be cast again."""

    ask: Ask
    ballots: Callable[[Sequence[Pair], Constitution], list[Ballot]]
    close: Callable[[], None] = _nothing
    """Ends what was started for it; else that ends with this process."""


def open_with_ballots(
    job: Job, constitutions: Iterable[Constitution], base_dir: Path, note: Callable[[str], None]
) -> Opened:
    """Opens the job's judge; `constitutions` are those that it will be asked about, `note` is told what takes time.

    Raises:
        UserError: the judge can't be asked (a model, a template or a key is missing), a text doesn't serve it, or a
            rule of the user's own that is to decide can't be used.
    """
    for name in job.filters.rules:  # before anything is asked that they are to decide
        of_rule(name, anew=True)
    kind = kind_of(job.judge)
    constitutions = [kind.as_read(c) for c in constitutions]
    names = dict.fromkeys(name for c in constitutions for name in kind.template_names(c, "decide"))
    templates = {name: load_template(base_dir / kind.templates_dir, name) for name in names}
    judge, called = kind.open(note)

    def mine(constitution: Constitution) -> list[Template]:
        return [templates[name] for name in kind.template_names(constitution, "decide")]

    def ballots(pairs: Sequence[Pair], constitution: Constitution) -> list[Ballot]:
        return kind.ballots(pairs, kind.as_read(constitution), seed=job.seed, name=called, templates=mine(constitution))

    def ask(pairs: Sequence[Pair], candidates: Sequence[Candidate], constitution: Constitution) -> Iterator[list[Vote]]:
        yield from judge.cast(
            ballots(pairs, constitution),
            pairs,
            candidates,
            kind.as_read(constitution),
            **kind.cast_with(mine(constitution)),
        )

    return Opened(ask, ballots, getattr(judge, "close", _nothing))
