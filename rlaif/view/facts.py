"""What the pages and the report say about a run as a whole, from its index.

In: an index of a run, also of one that is being written. Out: plain numbers, and the pictures' series.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from rlaif.audit.index import Index
from rlaif.audit.overview import Overview, overview
from rlaif.records import EvaluationMetrics, IterationMetrics, Record, digest
from rlaif.store import RunDir, first_problem

R = TypeVar("R", bound=Record)


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
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage, of finished iterations; `evaluations` too."""

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
    return Facts(
        overview=found.model_copy(update={"problems": (*found.problems, *problems)}),
        evaluations=evaluations,
        parts=parts,
        losses=[(row["iteration"], row["loss"]) for row in losses if row["loss"] is not None],
        seconds={stage: round(took, 1) for stage, took in seconds.items()},
    )


def _metrics(index: Index, kind: str, record: type[R], problems: list[str]) -> Iterator[R]:
    """The metrics.json files of iterations or evaluations; what is none is left out, and said."""
    for row in index.rows(f"SELECT {kind} AS n, metrics FROM {kind}s WHERE metrics IS NOT NULL ORDER BY n"):
        try:
            yield record.model_validate_json(row["metrics"])
        except ValidationError as e:
            problems.append(f"{kind}s/{row['n']:04d}/metrics.json: not {record.__name__} ({first_problem(e)})")


def version_of(run: RunDir) -> str:
    """Another one when there is something new to see: a stage, an iteration, an event, a label."""
    folders = [run.iteration(k).path for k in run.iterations()[-1:]]
    folders += [run.evaluation(k).path for k in run.evaluations()[-1:]]
    names = [[str(f), *sorted(p.name for p in f.iterdir())] for f in folders]
    files = ("events.jsonl", "run.json", "review/labels.jsonl")
    return digest([names, [os.stat(p).st_size if (p := run.path / f).exists() else 0 for f in files]])
