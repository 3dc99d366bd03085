"""Held-out answers before others than the held-out question: the reference judge, which never trains, and the voices
that decide which pairs train. What pleases these alone is what a policy learned to please them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template
from rlaif.judging.ballots import Role
from rlaif.judging.filters import decide_votes
from rlaif.judging.kinds import JudgeKind, kind_of
from rlaif.judging.verdicts import Method, by_pair, jurors_for
from rlaif.loop.asking import all_answered, ballots_for, cast_owed, sides_of, templates_for
from rlaif.loop.running import Iteration, Running
from rlaif.records import Ballot, Decision, Vote
from rlaif.workers.worker import Worker


class _Question(NamedTuple):
    """Who is asked what about an evaluation's pairs."""

    stages: str
    """How the names of its stages begin."""
    said: str
    """Who it is, in words."""
    kind: JudgeKind[Any]
    worker: Worker
    constitution: Constitution
    """As this judge reads it."""
    ballots: list[Ballot]
    """Guards among them are left out: they veto what trains, and compare nothing."""
    templates: Sequence[Template]
    aggregate: Method = "mean"
    """How votes are added up."""


def referred(run: Running, it: Iteration) -> list[Decision]:
    """The reference judge's word on each pair of an evaluation."""
    assert run.referee is not None
    kind = run.referee.kind
    constitution = kind.as_read(it.constitution)
    role = _role(kind, constitution)
    names = kind.template_names(constitution, role, it.plan.templates)
    templates = [run.in_force.load_template(name, it.plan.templates[name]) for name in names]
    ballots = kind.ballots(it.pairs, constitution, role, run.job.seed, run.referee.name, templates)
    who = "the reference judge"
    return _decided(run, it, _Question("reference", who, kind, run.referee.worker, constitution, ballots, templates))


def deciding(run: Running, it: Iteration) -> list[Decision]:
    """The word on each pair of an evaluation of the voices that decide which pairs train."""
    kind = kind_of(run.job.judge)
    ballots, templates = ballots_for(run, it, "decide", it.pairs), templates_for(run, it, "decide")
    question = _Question("deciding", "the judge", kind, run.judge, it.constitution, ballots, templates)
    return _decided(run, it, question._replace(aggregate=run.job.filters.aggregate))


def _role(kind: JudgeKind[Any], constitution: Constitution) -> Role:
    """What the reference is asked: the held-out question, or where a text has none the one that decides, which didn't
    train it."""
    return "evaluate" if kind.evaluates(constitution) else "decide"


def _decided(run: Running, it: Iteration, question: _Question) -> list[Decision]:
    of_pair = by_pair(_votes(run, it, question))
    texts = {c.id: c.text for c in it.completions}
    # Which filters a training pair passes is no matter here; how votes are added up is.
    method = question.aggregate
    filters = run.job.filters.model_copy(update={"aggregate": method, "calibration": None, "rules": ()})
    calibrated = run.calibration.jurors if run.calibration else None

    def produce(_: list[Decision]) -> Iterator[list[Decision]]:
        jurors = jurors_for(method, [v for p in it.pairs for v in of_pair[p.id]], calibrated)
        yield [decide_votes(p, of_pair[p.id], filters, texts, it.constitution.weights, jurors) for p in it.pairs]

    return it.rows(f"{question.stages}_decisions", produce)


def _votes(run: Running, it: Iteration, question: _Question) -> Sequence[Vote]:
    stage = f"{question.stages}_votes"
    journal = it.dir.path / f"{stage}.asked"
    ballots = [b for b in question.ballots if not b.guard]

    def produce(done: list[Vote]) -> Iterator[list[Vote]]:
        how = {"pairs": it.pairs, "constitution": question.constitution}
        how |= question.kind.cast_with(question.templates, journal)
        sides = sides_of(it.pairs, it.completions, it.prompts)
        yield from cast_owed(run, it, question.worker, question.stages, ballots, done, sides, **how)

    votes = it.rows(stage, produce)
    journal.unlink(missing_ok=True)
    return all_answered(ballots, votes, question.said)
