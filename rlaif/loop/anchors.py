"""Anchors: pairs that the judge is asked about again. Nothing that trains follows from them.

The first pairs under the text in force, and the very ballots that were cast on them then. What was asked under another
text, with other templates or other code isn't the same question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlaif.config import Job
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.loop.asking import cast_owed, templates_for
from rlaif.loop.running import Iteration, Running, candidates
from rlaif.records import AnchorCounts, Completion, Pair, Plan, Vote


class _Anchors(NamedTuple):
    """Pairs of earlier iterations, as they were judged then."""

    pairs: list[Pair]
    completions: list[Completion]
    votes: list[Vote]


def is_due(job: Job, k: int) -> bool:
    """Whether iteration k is one to ask in."""
    settings = job.monitors.anchors
    return settings.action != "off" and not kind_of(job.judge).frozen and (k + 1) % settings.every == 0


def ask_again(run: Running, it: Iteration) -> AnchorCounts | None:
    """The iteration's anchors, where it is one to ask in; None where nothing is to be asked."""
    settings, kind = run.job.monitors.anchors, kind_of(run.job.judge)
    asked_before = it.dir.is_complete("anchor_votes")  # it counts, whatever the settings are now
    if it.plan.labels_as_stored or not (asked_before or is_due(run.job, it.k)):
        return None
    anchors = _first_pairs(run, it, settings.pairs)
    if not anchors.votes:
        return None
    journal = it.dir.path / "anchor_votes.asked"

    def produce(done: list[Vote]) -> Iterator[list[Vote]]:
        how = {"pairs": anchors.pairs, "constitution": it.constitution}
        how |= kind.cast_with(templates_for(run, it, "decide"), journal) | kind.afresh()
        sides = candidates(anchors.completions, it.prompts)
        yield from cast_owed(run, it, run.judge, "anchors", [v.ballot for v in anchors.votes], done, sides, **how)

    again = by_pair(it.rows("anchor_votes", produce))
    journal.unlink(missing_ok=True)
    weights, method = it.constitution.weights, run.job.filters.aggregate
    compared = moved = 0
    for pair_id, before in by_pair(anchors.votes).items():
        if pair_id not in again:  # asked before a kill, by other settings
            continue
        outcomes = {aggregate(votes, weights, method).outcome for votes in (before, again[pair_id])}
        if "abstain" not in outcomes:  # a server that is down moves no verdict
            compared, moved = compared + 1, moved + len(outcomes) - 1
    return AnchorCounts(pairs=compared, moved=moved)


def _first_pairs(run: Running, it: Iteration, most: int) -> _Anchors:
    """The first pairs that were asked about as this iteration's are."""
    found = _Anchors([], [], [])
    for k in range(it.k):
        plan = run.dir.plan(k)
        if plan.labels_as_stored or _asked_as(plan) != _asked_as(it.plan):
            continue
        here = run.dir.iteration(k)
        pairs = here.read("pairs", Pair)[: most - len(found.pairs)]
        ids, sides = {p.id for p in pairs}, {c for p in pairs for c in (p.first, p.second)}
        found.pairs.extend(pairs)
        found.completions.extend(c for c in here.read("completions", Completion) if c.id in sides)
        found.votes.extend(v for v in here.read("votes", Vote) if v.ballot.pair_id in ids)
        if len(found.pairs) == most:
            break
    return found


def _asked_as(plan: Plan) -> tuple[object, ...]:
    return plan.constitution.hash, plan.templates, plan.derived, plan.code
