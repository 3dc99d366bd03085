"""What a run says of itself: each iteration and evaluation in numbers (`metrics`), and what to look at (`alarms`).

In: the rows of an iteration's or an evaluation's stages. Out: the records of `metrics.json`, and `Alarm`s. Pure. To add
a kind of monitor: `rlaif.monitors.alarms`.
"""

from rlaif.monitors.alarms import alarms
from rlaif.monitors.history import History
from rlaif.monitors.leaning import asked_for
from rlaif.monitors.metrics import (
    answer_stats,
    evaluation_metrics,
    iteration_metrics,
    juror_agreement,
    learner_metrics,
    referred,
)

__all__ = [
    "History",
    "alarms",
    "answer_stats",
    "asked_for",
    "evaluation_metrics",
    "iteration_metrics",
    "juror_agreement",
    "learner_metrics",
    "referred",
]
