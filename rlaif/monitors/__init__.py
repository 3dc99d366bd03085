"""What a run says of itself: each iteration in numbers (`metrics`), and what to look at (`alarms`).

In: the rows of an iteration's stages. Out: the records of its `metrics.json`, and `Alarm`s. Pure. An evaluation's
numbers are made in `rlaif/evaluation/`.
"""

from rlaif.monitors.alarms import alarms
from rlaif.monitors.metrics import iteration_metrics, juror_agreement, learner_metrics

__all__ = ["alarms", "iteration_metrics", "juror_agreement", "learner_metrics"]
