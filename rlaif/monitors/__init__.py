"""What a run says of itself: each iteration in numbers (`metrics`), and what to look at (`alarms`).

In: the rows of an iteration's stages, and the records of all so far. Out: the records of its `metrics.json`, and
`Alarm`s. Pure. An evaluation's numbers are made in `rlaif/evaluation/`. To add a kind of monitor:
`rlaif.monitors.alarms`.
"""

from rlaif.monitors.alarms import alarms, silent
from rlaif.monitors.history import History
from rlaif.monitors.leaning import asked_for
from rlaif.monitors.metrics import iteration_metrics, juror_agreement, learner_metrics
from rlaif.monitors.servers import back_again

__all__ = [
    "History",
    "alarms",
    "asked_for",
    "back_again",
    "iteration_metrics",
    "juror_agreement",
    "learner_metrics",
    "silent",
]
