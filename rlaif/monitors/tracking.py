"""What trackers (`learner.args.report_to`) get of the pipeline: metrics as numbers by name. Pure.

In: metrics.json of an iteration or an evaluation, as records, and what stands beside it (votes, events). Out:
name → number, or text for a mark. A number's name is its field's, so a new field reaches trackers by itself;
docs/view.md has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from rlaif.config import Judge
from rlaif.judging.kinds import kind_of
from rlaif.records import AbstainReason, ConstitutionRef, DropReason, EvaluationMetrics, Event, IterationMetrics, Vote

_PIPELINE = "pipeline"
_HELD_OUT = f"{_PIPELINE}/held_out"
_GAPS = ("weights_gap", "decoding_gap")
"""Fields with names of their own: of the hand-over, not of iteration or evaluation."""
_NO_NUMBERS = frozenset({"iteration", "updates", "policy", "given", "constitution", "learner_metrics", *_GAPS})
"""Fields that say what was measured, and those with names of their own."""


def of_iteration(
    metrics: IterationMetrics, votes: Iterable[Vote], judge: Judge, text_number: int, events: Sequence[Event]
) -> dict[str, float | str]:
    """An iteration in numbers, and its text and its alarms as marks.

    Args:
        votes: those of the iteration; gone through only where they have a price.
        text_number: the text in force, counted through the run's different texts from 1: of two texts both may be
            version 1, and a tracker that takes numbers only must show the change.
        events: the run's, so far.
    """
    alarms = [e for e in events if e.kind == "alarm"]
    mine = [e.message for e in alarms if e.iteration == metrics.iteration]
    return {
        # Before the others: a learner's own number never takes the name of one of the pipeline's.
        **dict(_numbers(_PIPELINE, metrics.learner_metrics)),
        **_marks(metrics.iteration + 1, metrics.constitution, text_number),
        **_fields(_PIPELINE, metrics),
        **_money(_PIPELINE, votes, judge),
        f"{_PIPELINE}/alarms": len(mine),
        f"{_PIPELINE}/alarms_so_far": len(alarms),
        **({f"{_PIPELINE}/alarm": "\n".join(mine)} if mine else {}),
    }


def of_evaluation(
    metrics: EvaluationMetrics, votes: Sequence[Vote], judge: Judge, text_number: int
) -> dict[str, float | str]:
    """An evaluation in numbers; arguments as in `of_iteration`. After iteration k it has that iteration's number, and
    the base policy's has 0."""
    return {
        **_marks(metrics.updates, metrics.constitution, text_number),
        **_fields(_HELD_OUT, metrics),
        **_calls(_HELD_OUT, votes),
        **_money(_HELD_OUT, votes, judge),
    }


def _marks(iteration: int, constitution: ConstitutionRef, text_number: int) -> dict[str, float | str]:
    """What a point belongs to. Iterations count from 1, as in tables."""
    return {
        f"{_PIPELINE}/iteration": iteration,
        f"{_PIPELINE}/constitution": f"{constitution} ({constitution.hash})",
        f"{_PIPELINE}/constitution_number": text_number,
    }


def _fields(name: str, metrics: IterationMetrics | EvaluationMetrics) -> dict[str, float | str]:
    out: dict[str, float | str] = {}
    for field, value in metrics:
        if field not in _NO_NUMBERS:
            out.update(_numbers(f"{name}/{field}", _all_reasons(field, value)))
    for field in _GAPS:
        if gap := getattr(metrics, field, None):
            out |= {f"{field}/{name}": getattr(gap, name) for name in ("mean", "typical", "worst")}
    return out


def _all_reasons(field: str, value: Any) -> Any:
    """Reasons that nothing had as 0: a curve through the other points alone would never come down."""
    known = {"dropped_by_first_reason": DropReason, "abstentions": AbstainReason}.get(field)
    return value if known is None else dict.fromkeys(get_args(known), 0) | value


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a field. What wasn't measured (None) has no point."""
    if isinstance(value, ConstitutionRef):  # says what was measured
        return
    if isinstance(value, BaseModel):
        value = dict(value)
    elif isinstance(value, tuple):  # an interval
        value = dict(zip(("low", "high"), value, strict=True))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # A juror's name has slashes, an @ and more, which stores of metrics refuse.
            yield from _numbers(f"{name}/{re.sub(r'[^A-Za-z0-9_-]+', '_', str(key))}", inner)
    elif isinstance(value, int | float):
        yield name, value


def _calls(name: str, votes: Iterable[Vote]) -> dict[str, float | str]:
    """Requests and tokens, counted as the metrics.json of an iteration has them."""
    return {
        f"{name}/judge_calls": sum(v.attempts for v in votes),
        f"{name}/judge_tokens": sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in votes if not v.cached),
    }


def _money(name: str, votes: Iterable[Vote], judge: Judge) -> dict[str, float | str]:
    """What votes cost, only where every juror has a price."""
    kind = kind_of(judge)
    if (priced := kind.priced()) and all(priced.values()):
        return {f"{name}/judge_money": kind.money(votes)}
    return {}
