"""The reference judge: it compares held-out answers, as the judge does that trains, and never trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlaif.constitutions.constitution import Constitution
from rlaif.errors import RlaifError
from rlaif.judging.ballots import Role
from rlaif.judging.filters import decide_votes
from rlaif.judging.kinds import JudgeKind
from rlaif.judging.verdicts import by_pair
from rlaif.loop.asking import to_cast
from rlaif.loop.running import Iteration, Referee, Running, candidates
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
        have = {v.ballot.id for v in done}
        if owed := [b for b in ballots if b.id not in have]:
            run.progress.stage(it.k, "reference", len(owed), "votes", str(constitution.ref))
            wanted = {c for p in it.pairs for c in (p.first, p.second)}
            sides = candidates((c for c in it.completions if c.id in wanted), it.prompts)
            how = kind.cast_with(templates, journal)
            piece = to_cast(owed, pairs=it.pairs, candidates=sides, constitution=constitution, **how)
            yield from run.advancing(referee.worker.spread("cast", [piece]))

    votes = {v.ballot.id: v for v in it.rows("reference_votes", produce)}
    journal.unlink(missing_ok=True)
    if missing := [b.id for b in ballots if b.id not in votes]:
        raise RlaifError(f"the reference judge left {len(missing)} of {len(ballots)} ballots unanswered")
    return [votes[b.id] for b in ballots]
