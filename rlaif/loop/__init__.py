"""The loop: iterations of durable stages, from prompts to the next policy.

In: a resolved job, a run directory, the workers. Out: the run directory, further on. Online DPO follows OAIF (arXiv
2402.04792) with an update per batch of fresh pairs (arXiv 2506.21495).

Each stage is a function of the run and the iteration: `sampling`, `judging` (score, pair, judge, decide), `training`
(mix, update), `evaluation`. `asking` says what a judge is asked, and `feeding` keeps one busy that waits for others.
Ballots are made when they are wanted and votes stay on the disk: there may be millions of both. `streaming` lets the
judge begin while the policy samples, `ahead` lets later iterations be sampled and judged while an earlier one trains.
`hand_over` knows which policy sampler and learner hold, `gaps` how far apart they are, and `deep_check` takes a model
through both before there is a run. To add a stage: a line in `rlaif/rundir/stages.py`, a function here, a line in
`Loop.iterate`.
"""

from rlaif.loop.loop import Loop, alarms_owed
from rlaif.loop.running import Iteration, Progress, Running

__all__ = ["Iteration", "Loop", "Progress", "Running", "alarms_owed"]
