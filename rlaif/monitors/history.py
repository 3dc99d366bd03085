"""What a monitor looks at, and what it says. Pure.

In: a run's records so far. Out: `Finding`s; `rlaif.monitors.alarms` makes alarms of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rlaif.records import EvaluationMetrics, Feature, IterationMetrics, JudgedStats


class Finding(NamedTuple):
    """What a monitor found, in one sentence and with its numbers."""

    message: str
    measured: float | None = None
    limit: float | None = None
    since: int | None = None
    """The iteration from which on it is so, where several tell it; None: the one that is looked at."""


@dataclass(frozen=True)
class History:
    """A run up to the end of an iteration."""

    iterations: Sequence[IterationMetrics]
    """In order; the last one is looked at."""
    evaluations: Sequence[EvaluationMetrics] = ()
    """In order, none later than that iteration's."""
    calibrated: JudgedStats | None = None
    """The labelled pairs of the calibration that is in force."""
    learned: bool = False
    """Whether the jurors' weights are learned from labels, or fitted without any."""
    asked: Mapping[Feature, Literal["more", "less"]] = field(default_factory=dict)
    """What the checks of the text in force ask for."""

    @property
    def now(self) -> IterationMetrics:
        """The iteration that is looked at."""
        return self.iterations[-1]

    @property
    def sampled(self) -> IterationMetrics | None:
        """The iteration that is looked at, where the policy sampled its answers: those of a `source` say nothing about
        it."""
        return None if self.now.given else self.now

    @property
    def evaluated(self) -> EvaluationMetrics | None:
        """The evaluation of what that iteration made, where there is one."""
        newest = self.evaluations[-1] if self.evaluations else None
        return newest if newest and newest.updates == self.now.iteration + 1 else None

    @property
    def under_this_text(self) -> list[IterationMetrics]:
        """The iterations since the text in force became so, the last one included. What was before says nothing about
        them: a shift that a new text asks for is no drift."""
        out: list[IterationMetrics] = []
        for metrics in reversed(self.iterations):
            if metrics.constitution.hash != self.now.constitution.hash:
                break
            out.insert(0, metrics)
        return out
