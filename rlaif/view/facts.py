"""What the pages and the report say about a run as a whole, from its index.

In: an index of a run, also of one that is being written. Out: plain numbers, and the pictures' series.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from rlaif.audit.index import Index
from rlaif.audit.overview import Overview, overview
from rlaif.records import digest
from rlaif.store import RunDir

Metrics = dict[str, Any]

_EVALUATION: Metrics = dict.fromkeys(
    ("answers", "win_rate", "win_interval", "wins", "losses", "undecided", "mean_words", "ended_share", "kl_per_token",
     "relevance", "base_logprob_per_token", "seconds")
) | {"checks": {}}  # fmt: skip
"""What an evaluation of another version may lack."""


@dataclass(frozen=True)
class Facts:
    """A run in numbers."""

    overview: Overview
    evaluations: list[Metrics]
    """metrics.json of every finished evaluation (docs/run-directory.md), in order."""
    parts: dict[int, dict[str, int]]
    """Iteration, from 0 → pairs that were `kept`, wait for `review`, or were dropped, by first reason."""
    losses: list[tuple[int, float]]
    """(iteration, loss) of every optimizer step, in order."""

    @property
    def last_judged(self) -> Metrics | None:
        """The newest evaluation that was judged against the base policy."""
        return next((e for e in reversed(self.evaluations) if e["win_rate"] is not None and e["win_interval"]), None)


def read_facts(index: Index, run: RunDir) -> Facts:
    """Asks the index; it should be fresh."""
    parts: dict[int, dict[str, int]] = {}
    for row in index.rows(
        "SELECT iteration, CASE WHEN status = 'dropped' THEN reasons[1] ELSE status END AS part, count(*) AS n "
        "FROM decisions WHERE iteration IS NOT NULL GROUP BY ALL ORDER BY iteration, part"
    ):
        parts.setdefault(row["iteration"], {})[row["part"] or "dropped"] = row["n"]
    evaluations = index.rows("SELECT metrics FROM evaluations WHERE metrics IS NOT NULL ORDER BY evaluation")
    losses = index.rows("SELECT iteration, loss FROM updates WHERE iteration IS NOT NULL ORDER BY iteration, step")
    return Facts(
        overview=overview(index, run),
        evaluations=[_EVALUATION | json.loads(row["metrics"]) for row in evaluations],
        parts=parts,
        losses=[(row["iteration"], row["loss"]) for row in losses if row["loss"] is not None],
    )


def version_of(run: RunDir) -> str:
    """Another one when there is something new to see: a stage, an iteration, an event, a label."""
    folders = [run.iteration(k).path for k in run.iterations()[-1:]]
    folders += [run.evaluation(k).path for k in run.evaluations()[-1:]]
    names = [[str(f), *sorted(p.name for p in f.iterdir())] for f in folders]
    files = ("events.jsonl", "run.json", "review/labels.jsonl")
    return digest([names, [os.stat(p).st_size if (p := run.path / f).exists() else 0 for f in files]])
