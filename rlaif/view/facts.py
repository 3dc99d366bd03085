"""What the pages and the report say about a run as a whole, from its index.

In: an index of a run, also of one that is being written. Out: plain numbers, and the pictures' series.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rlaif.audit.index import Index
from rlaif.audit.overview import Overview, overview
from rlaif.errors import first_problem
from rlaif.records import EvaluationMetrics, IterationMetrics, Record, digest, stored
from rlaif.rundir.store import RunDir

R = TypeVar("R", bound=Record)


class PrincipleRow(Record):
    """A principle on held-out answers, by the judge."""

    principle: str
    pairs: int
    """On which some vote was about this principle alone."""
    win_rate: float | None
    """Mean over those pairs, a vote for neither side as half; None without such a vote."""


@dataclass(frozen=True)
class Facts:
    """A run in numbers."""

    overview: Overview
    evaluations: list[EvaluationMetrics]
    """Every finished evaluation, in order."""
    parts: dict[int, dict[str, int]]
    """Iteration, from 0 → pairs that were `kept`, wait for `review`, or were dropped, by first reason."""
    losses: list[tuple[int, float]]
    """(iteration, loss) of every optimizer step, in order."""
    principles: tuple[PrincipleRow, ...] = ()
    """Of `last_judged`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage, of finished iterations; `evaluations` too. Stages of streams ran at the same time."""

    @property
    def trained(self) -> int:
        """Preferences that a policy saw: not those of a skipped update, or of one that is owed."""
        return sum(r.trained_pairs for r in self.overview.iterations if r.skipped is False)

    @property
    def last_judged(self) -> EvaluationMetrics | None:
        """The newest evaluation that was judged against the base policy."""
        return next((e for e in reversed(self.evaluations) if e.win_rate is not None), None)


def read_facts(index: Index, run: RunDir) -> Facts:
    """Asks the index; it should be fresh."""
    parts: dict[int, dict[str, int]] = {}
    for row in index.rows(
        "SELECT iteration, CASE WHEN status = 'dropped' THEN reasons[1] ELSE status END AS part, count(*) AS n "
        "FROM decisions WHERE iteration IS NOT NULL GROUP BY ALL ORDER BY iteration, part"
    ):
        parts.setdefault(row["iteration"], {})[row["part"] or "dropped"] = row["n"]
    problems: list[str] = []
    evaluations = list(_metrics(index, "evaluation", EvaluationMetrics, problems))
    seconds: dict[str, float] = {}
    for metrics in _metrics(index, "iteration", IterationMetrics, problems):
        for stage, took in metrics.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took
    seconds["evaluations"] = sum(e.seconds for e in evaluations)
    found = overview(index, run)
    losses = index.rows("SELECT iteration, loss FROM updates WHERE iteration IS NOT NULL ORDER BY iteration, step")
    judged = [e.updates for e in evaluations if e.win_rate is not None]
    return Facts(
        overview=found.model_copy(update={"problems": (*found.problems, *problems)}),
        evaluations=evaluations,
        parts=parts,
        losses=[(row["iteration"], row["loss"]) for row in losses if row["loss"] is not None],
        principles=_principles(index, judged[-1]) if judged else (),
        seconds={stage: round(took, 1) for stage, took in seconds.items()},
    )


def _principles(index: Index, updates: int) -> tuple[PrincipleRow, ...]:
    """What moved, principle by principle; a held-out pair shows the policy's answer first, the base policy's second."""
    rows = index.rows(
        """WITH alone AS (
            SELECT principles[1] AS principle, pair_id,
                avg(CASE outcome WHEN 'first' THEN 1.0 WHEN 'second' THEN 0.0 ELSE 0.5 END) AS won
            FROM votes WHERE evaluation = ? AND NOT guard AND len(principles) = 1 AND outcome <> 'abstain'
            GROUP BY ALL
        ), asked AS (SELECT DISTINCT unnest(principles) AS principle FROM votes WHERE evaluation = ? AND NOT guard)
        SELECT principle, count(pair_id) AS pairs, avg(won) AS win_rate FROM asked LEFT JOIN alone USING (principle)
        GROUP BY principle ORDER BY principle""",
        [updates, updates],
    )
    return tuple(PrincipleRow.model_validate(r) for r in rows)


def _metrics(index: Index, kind: str, record: type[R], problems: list[str]) -> Iterator[R]:
    """The metrics.json files of iterations or evaluations; what is none is left out, and said."""
    for row in index.rows(f"SELECT {kind} AS n, metrics FROM {kind}s WHERE metrics IS NOT NULL ORDER BY n"):
        try:
            yield stored(record, row["metrics"])
        except ValidationError as e:
            problems.append(f"{kind}s/{row['n']:04d}/metrics.json: not {record.__name__} ({first_problem(e)})")


def _grown(path: Path) -> int:
    """The size of a file that is being written; 0 of any other, whose name says enough."""
    if not path.name.endswith(".partial"):
        return 0
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it was finished since
        return 0


def version_of(run: RunDir) -> str:
    """Another one when there is something new to see: a stage, more of it, an iteration, an event, a label."""
    done = set(run.done()[:-1])  # several may be under way at once
    folders = [run.iteration(k).path for k in run.iterations() if k not in done]
    folders += [run.evaluation(k).path for k in run.evaluations()[-1:]]
    # A stage grows under its .partial name: a long one is news while it is written.
    names = [[str(f), *sorted((p.name, _grown(p)) for p in f.iterdir())] for f in folders]
    files = ("events.jsonl", "run.json", "review/labels.jsonl")
    return digest([names, [os.stat(p).st_size if (p := run.path / f).exists() else 0 for f in files]])
