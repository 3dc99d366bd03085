"""What an iteration of a job is made of, in counts. A simulation knows nothing else of the job."""

from __future__ import annotations

from pathlib import Path

from rlaif.config import ChatSettings, Job
from rlaif.errors import UserError
from rlaif.loop.cost import counts_of
from rlaif.loop.streaming import streams_wherever
from rlaif.records import Record


class Work(Record):
    """What is to be done, at most. The mean over the iterations where a text is longer than another."""

    iterations: int
    prompts: int
    """Of an iteration, as the other counts."""
    answers: int
    """Of a prompt."""
    scores: float
    """Of single answers by single voices."""
    ballots: float
    pairs: float
    epochs: int
    held_out: int
    """Answers of an evaluation."""
    held_out_ballots: float
    """Of an evaluation; that of the base policy has none."""
    anchors: tuple[int, ...] = ()
    """Ballots that are cast again after the update, by iteration."""
    evaluated: tuple[int, ...]
    """After how many iterations there is an evaluation; there also is one before the first."""
    max_tokens: int
    """Of an answer."""
    stream: bool | None = None
    """As in `pipeline`, like the next; None where it depends on whether sampler and judge have devices of their own."""
    staleness: int = 0
    in_turns: bool = False
    """Roles never work at the same time (`device: shared`)."""
    batch: int = 1
    """Pairs of a step, which the learner's processes share evenly."""
    judges_at_once: int | None = None
    """Ballots under way, at most, however many judges there are (`judge.concurrency`); None without a server."""
    requests_per_minute: int | None = None
    """Of all judges together."""
    prompt_price: float = 0.0
    """A million tokens of ballots, ..."""
    completion_price: float = 0.0
    """... and of replies."""


def work_of(job: Job, base_dir: Path) -> Work:
    """A job's counts; of a jury the first judge's prices.

    Raises:
        UserError: what the job names can't be read, or the job samples nothing.
    """
    if job.source is not None:
        raise UserError("--cluster: a job with a `source` samples nothing, and isn't simulated; leave --cluster out")
    counts = counts_of(job, base_dir)
    n = job.iterations
    chat = job.judge if isinstance(job.judge, ChatSettings) else None
    price = chat.prices.get(chat.model) if chat else None
    return Work(
        iterations=n,
        prompts=job.prompts.per_iteration,
        answers=job.sampling.completions_per_prompt,
        scores=counts.scores / n,
        ballots=(counts.ballots + counts.rejudged_ballots) / n,
        pairs=counts.pairs / n,
        epochs=job.learner.epochs,
        held_out=counts.held_out_answers // counts.evaluations,
        held_out_ballots=counts.evaluation_ballots / (counts.evaluations - 1),
        anchors=counts.anchors,
        evaluated=counts.evaluated,
        max_tokens=job.sampling.max_tokens,
        stream=streams_wherever(job),
        staleness=job.pipeline.staleness,
        in_turns=job.device == "shared",
        batch=job.learner.batch_size,
        judges_at_once=chat.concurrency if chat else None,
        requests_per_minute=chat.requests_per_minute if chat else None,
        prompt_price=price.prompt if price else 0.0,
        completion_price=price.completion if price else 0.0,
    )
