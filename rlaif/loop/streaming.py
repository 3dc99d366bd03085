"""A head start for the judge: it works on the prompts that are sampled already while the policy samples others.

Nothing is decided here. Completions, scores and votes are those that the stages would make, each durable in the file of
its stage before more of them is waited for; what is left when sampling ends, the stages themselves do. So an iteration
may stop anywhere and go on streamed or not. A judge that only waits (`JudgeKind.fed`) has one call open that is fed, so
that no ballot waits for others; any other is asked piece by piece (`judging.pieces`), as it is without a stream, since
its numbers depend on what is asked together.

One thread samples, with the sampler and, to compare weights, the learner; others, as many as there are judges, have
these to themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from rlaif.config import Job
from rlaif.judging.kinds import kind_of
from rlaif.loop.asking import Asking, pieces
from rlaif.loop.feeding import Feeding
from rlaif.loop.judging import Scoring, paired
from rlaif.loop.running import Interrupted, Iteration, Running
from rlaif.loop.sampling import Told, sample
from rlaif.records import Completion, Vote
from rlaif.workers.placement import Placed, apart

LAST_CHUNK_S = 5.0
"""How long a thread that is to stop may take for the chunk that it is at; then it is left to whoever closes it."""


def streams(job: Job, places: Mapping[str, Placed]) -> bool:
    """Whether an iteration of the job is streamed: as it says or, where it doesn't, where sampler and judge don't share
    a device."""
    if (said := streams_wherever(job)) is not None:
        return said
    judge = places["servers" if kind_of(job.judge).serve else "judge"]
    return apart(places["sampler"].gpus, judge.gpus)


def streams_wherever(job: Job) -> bool | None:
    """The same, whatever GPUs there are; None where it depends on them. What a cluster holds has a device of its own,
    and so do servers that somebody else started. Who takes turns (`device: shared`) never works at the same time."""
    if job.pipeline.stream is not None:
        return job.pipeline.stream
    kind = kind_of(job.judge)
    if (kind.fed and kind.serve is None) or (job.cluster and (job.cluster.sampler or job.cluster.judge)):
        return True
    if job.device is not None:
        return False
    return True if job.sampling.addresses else None


def sample_and_judge(run: Running, it: Iteration) -> None:
    """Samples an iteration's completions, and meanwhile asks the judge about those that are there."""
    if it.dir.is_complete("completions"):
        return
    asking = Asking(run, it)
    it.begin("completions")
    it.begin("scores")
    it.begin_votes(asking.rank)
    it.interrupted = Interrupted.found(it.dir.each("votes", Vote), asking.journal)
    (_feed if asking.kind.fed else _ask_in_pieces)(run, it, asking)


def _ask_in_pieces(run: Running, it: Iteration, asking: Asking) -> None:
    """Scores, pairs and asks about one piece after the other, as many at a time as there are judges, until sampling has
    ended."""
    scores, votes = it.begun["scores"], it.begun["votes"]
    groups, scoring = _Groups(it, run.job.sampling.completions_per_prompt), Scoring(run, it, scores.held)

    def ask(ids: Sequence[str]) -> None:
        if (completions := groups.wait_for(ids)) is None:
            return
        for scored in scoring.scores([completions]):
            scores.add(scored)
        pairs = paired(run, it, completions, scoring.of(completions))
        owed = asking.owed(pairs, votes.held)
        for chunk in run.judge.spread("cast", [asking.piece(owed, pairs, completions)]):
            votes.add(chunk)

    with _Sampling(run, it, groups.add, groups.end):
        judging = ThreadPoolExecutor(run.judge.width, thread_name_prefix="judging")
        try:
            for asked in [judging.submit(ask, ids) for ids in pieces(run, it)]:
                asked.result()
        finally:
            groups.end()  # whoever waits for completions waits no more
            judging.shutdown(wait=False, cancel_futures=True)


def _feed(run: Running, it: Iteration, asking: Asking) -> None:
    """Feeds the judge with each prompt's pairs as soon as its completions are there."""
    votes = it.begun["votes"]
    feeding = Feeding(run, it, asking, votes.held)
    sampled = threading.Event()

    def add(group: list[Completion]) -> None:
        feeding.add(paired(run, it, group, ()), group)

    def end() -> None:
        if it.dir.is_complete("completions"):
            feeding.end()
        else:
            feeding.give_up()
        if left := feeding.left():
            run.progress.stage(it.k, "judge", left, "votes", str(it.constitution.ref))
        sampled.set()

    with _Sampling(run, it, _Groups(it, run.job.sampling.completions_per_prompt, add).add, end):
        for chunk in feeding.votes():
            votes.add(chunk)
            if sampled.is_set():
                run.progress.advance(len(chunk))


class _Groups:
    """Completions by prompt, as they are sampled; each group once it is whole."""

    def __init__(self, it: Iteration, size: int, told: Told = lambda group: None):
        self._size, self._told = size, told
        self._groups: dict[str, list[Completion]] = {i: [] for i in it.plan.prompt_ids}
        self._ended = False
        self._news = threading.Condition()

    def add(self, completions: Iterable[Completion]) -> None:
        """They are durable; `told` hears of the groups that are whole now, by sample."""
        with self._news:
            for c in completions:
                group = self._groups[c.prompt_id]
                group.append(c)
                if len(group) == self._size:
                    group.sort(key=lambda c: c.index)
                    self._told(group)
            self._news.notify_all()

    def end(self) -> None:
        """No more will come."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, prompt_ids: Sequence[str]) -> list[Completion] | None:
        """These prompts' groups when all are whole; None when sampling has ended before."""
        with self._news:
            while not self._ended:
                groups = [self._groups[i] for i in prompt_ids]
                if all(len(group) == self._size for group in groups):
                    return [c for group in groups for c in group]
                self._news.wait()
        return None


class _Sampling:
    """Sampling in a thread of its own, while the block runs. What it fails with is raised at the block's end; where the
    block fails, it is stopped."""

    def __init__(self, run: Running, it: Iteration, told: Told, ended: Callable[[], None]):
        """`told` hears of completions once they are durable, `ended` when no more will come, however it ended."""
        self._run, self._it, self._told, self._ended = run, it, told, ended
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._sample, name="sampling", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._thread.join()
        finally:
            if self._thread.is_alive():
                self._it.stop()  # a thread that is late must not write beside whoever goes on
                self._thread.join(LAST_CHUNK_S)
        if error is None and self._error is not None:
            raise self._error

    def _sample(self) -> None:
        try:
            sample(self._run, self._it, self._told)
        except BaseException as e:  # raised where it is waited for
            self._error = e
        finally:
            self._ended()
