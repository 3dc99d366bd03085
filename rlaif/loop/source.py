"""Pairs that exist in place of fresh ones (`source`): the same iterations, filters, evaluation and log, offline.

In: the job's `source`. Out: for each iteration what its plan notes of the source, and its completions, pairs and votes,
or labels, under ids of this run. Nothing is sampled, and with labels as stored nobody is asked. A source that isn't any
more what a plan noted is a user's mistake, and told before anything is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from rlaif.config import Job
from rlaif.loop.judging import judge
from rlaif.loop.running import Iteration, PairSource, Running, in_order
from rlaif.loop.source_data import LabelledPairs
from rlaif.loop.source_run import StoredPairs
from rlaif.rundir.store import RunDir


def open_source(
    job: Job, base_dir: Path, run: RunDir | None = None, note: Callable[[str], None] = lambda message: None
) -> PairSource | None:
    """The job's source; None where its policy samples. `run` is the run that takes it, where there is one; `note` is
    told what a reader of the data should know.

    Raises:
        UserError: it can't be used, or isn't any more what the run's last plan noted.
    """
    if job.source is None:
        return None
    begun = run.iterations() if run else []
    plans = [run.plan(k) for k in begun if run and (run.iteration(k).path / "plan.json").exists()]
    noted = [plan.source for plan in plans if plan.source]
    source: PairSource
    if job.source.run is not None:
        source = StoredPairs(job.source, base_dir, noted)
    else:
        source = LabelledPairs(job.source, job, base_dir, note)
    if run and noted and not (run.iteration(plans[-1].iteration).path / "metrics.json").exists():
        source.check(noted[-1])
    return source


def take_over(run: Running, it: Iteration, source: PairSource) -> None:
    """An iteration's completions, scores, pairs and votes: as they are stored, or with the votes that the judge casts
    now. What a data set labelled has labels in place of votes."""
    taken = functools.cache(lambda: source.take(it, run.sampler))  # only where a stage isn't complete
    it.completions = in_order(it.rows("completions", lambda _: [taken().completions]), it.plan.prompt_ids)
    it.scores = it.rows("scores", lambda done: [taken().scores[len(done) :]])
    it.pairs = it.rows("pairs", lambda _: [taken().pairs])
    if not it.labels_as_stored:
        it.votes = judge(run, it)
        return
    it.labels = source.labels(it)
    it.votes = it.cast(
        None,
        lambda cast: [taken().votes[len(cast) :]],
        before_commit=lambda: {"ballots": len(taken().votes)},
    )
