"""What a run contributes to a look at several: its held-out evaluations, its changes of text, and its settings.

In: run directories. Out: a `Curve` for each, from small files alone (plans, metrics), and the settings that differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlaif.config import changed_keys
from rlaif.errors import RlaifError
from rlaif.records import EvaluationMetrics, Plan, Record, UnderText
from rlaif.rundir.store import RunDir, read_record

R = TypeVar("R", bound=Record)
EVEN = 0.5
"""Win rate of the base policy against itself."""


class TextChange(Record):
    """A text came into force."""

    iteration: int
    """The first one under it, from 0."""
    constitution: str
    hash: str


class Curve(Record):
    """A run over its iterations."""

    run: str
    """Name of its folder."""
    changes: tuple[TextChange, ...]
    """The text that it began with, and every other that came into force."""
    evaluations: tuple[EvaluationMetrics, ...]
    """Those that are done, in order."""
    problems: tuple[str, ...]
    """Damaged files, which are left out."""


def curve_of(run: RunDir) -> Curve:
    """A run over its iterations, as far as it is written."""
    problems: list[str] = []
    changes: list[TextChange] = []
    for k in run.iterations():
        plan = _found(run.iteration(k).path / "plan.json", Plan, problems)
        text = plan.in_force.constitution if plan else None  # not what a source's pairs were judged under
        if text and (not changes or changes[-1].hash != text.hash):
            changes.append(TextChange(iteration=k, constitution=str(text), hash=text.hash))
    metrics = [_found(run.evaluation(k).path / "metrics.json", EvaluationMetrics, problems) for k in run.evaluations()]
    return Curve(
        run=run.path.name,
        changes=tuple(changes),
        evaluations=tuple(m for m in metrics if m is not None),
        problems=tuple(problems),
    )


def at_change(run: RunDir, iteration: int) -> UnderText | None:
    """What the first iteration under a text measured before it began; None while that isn't done."""
    return next((metrics.at_change for metrics in run.iterations_measured([iteration])), None)


def settings_that_differ(headers: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Settings of the jobs that aren't the same in all of these run.json, by key: each run's value."""
    first, *others = [header["job"] for header in headers]
    found = [changed_keys(first, job) for job in others]
    keys = sorted({key for changed in found for key in changed} - {"name"})
    own = {key: value for changed in found for key, (value, _) in changed.items()}
    return {key: (own[key], *(c[key][1] if key in c else own[key] for c in found)) for key in keys}


def _found(path: Path, record: type[R], problems: list[str]) -> R | None:
    """A small file; None where it isn't there yet, or, said in `problems`, is damaged."""
    try:
        return read_record(path, record)
    except FileNotFoundError:
        return None
    except RlaifError as e:
        problems.append(str(e))
        return None
