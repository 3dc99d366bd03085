"""The reference judge: it compares held-out answers, as the judge does that trains, and never trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlaif.constitutions.constitution import Constitution
from rlaif.judging.ballots import Role
from rlaif.judging.filters import decide_votes
from rlaif.judging.kinds import JudgeKind
from rlaif.judging.verdicts import by_pair
from rlaif.loop.asking import all_answered, cast_owed, sides_of
from rlaif.loop.running import Iteration, Referee, Running
from rlaif.records import Ballot, Decision, Vote


def _role(kind: JudgeKind[Any], constitution: Constitution) -> Role:
    """What it is asked: the held-out question, or where a text has none the one that decides, which didn't train it."""
    return "evaluate" if kind.evaluates(constitution) else "decide"


def referred(run: Running, it: Iteration) -> list[Decision]:
    """Its word on each pair of an evaluation."""
    assert run.referee is not None
    of_pair = by_pair(_votes(run, it, run.referee))
    texts = {c.id: c.text for c in it.completions}
    # Which filters a training pair passes is no matter here; how votes are added up is.
    filters = run.job.filters.model_copy(update={"aggregate": "mean", "calibration": None, "rules": ()})

    def produce(_: list[Decision]) -> Iterator[list[Decision]]:
        yield [decide_votes(p, of_pair[p.id], filters, texts, it.constitution.weights) for p in it.pairs]

    return it.rows("reference_decisions", produce)


def _votes(run: Running, it: Iteration, referee: Referee) -> Sequence[Vote]:
    kind, journal = referee.kind, it.dir.path / "reference_votes.asked"
    constitution = kind.as_read(it.constitution)
    role = _role(kind, constitution)
    names = kind.template_names(constitution, role, it.plan.templates)
    templates = [run.in_force.load_template(name, it.plan.templates[name]) for name in names]
    ballots: list[Ballot] = [
        b for b in kind.ballots(it.pairs, constitution, role, run.job.seed, referee.name, templates) if not b.guard
    ]

    def produce(done: list[Vote]) -> Iterator[list[Vote]]:
        how = {"pairs": it.pairs, "constitution": constitution} | kind.cast_with(templates, journal)
        sides = sides_of(it.pairs, it.completions, it.prompts)
        yield from cast_owed(run, it, referee.worker, "reference", ballots, done, sides, **how)

    votes = it.rows("reference_votes", produce)
    journal.unlink(missing_ok=True)
    return all_answered(ballots, votes, "the reference judge")
