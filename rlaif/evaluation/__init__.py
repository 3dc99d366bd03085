"""What held-out answers, probes and fixed texts say about a policy: is it better, and what did it forget? No torch.

In: the rows of an evaluation's stages, the base policy's beside them. Out: the records of its `metrics.json`
(`evaluation_metrics`), its part on forgetting among them (`retention`). `probes` and `texts` also hold what is asked
and scored; a job's own probes are read there.

To add a measure: a function here from rows to numbers, a field with a default in `rlaif.records.EvaluationMetrics` or
`rlaif.records.Retention`, and, where it needs rows of its own, an optional stage in `rlaif.rundir.stages.EVALUATION`
that `rlaif/loop/evaluation.py` makes. To add a probe: a line in `probes.jsonl`, with a check that a person would find
fair.
"""

from rlaif.evaluation.answers import answer_stats
from rlaif.evaluation.held_out import by_deciding, evaluation_metrics, referred
from rlaif.evaluation.retention import retention

__all__ = ["answer_stats", "by_deciding", "evaluation_metrics", "referred", "retention"]
