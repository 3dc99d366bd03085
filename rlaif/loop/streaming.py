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
from rlaif.judging.ballots import rounds, settled
from rlaif.judging.candidates import MoreBallots
from rlaif.judging.kinds import kind_of
from rlaif.loop.judging import Asking, Scoring, paired, pieces
from rlaif.loop.running import Interrupted, Iteration, Running, candidates
from rlaif.loop.sampling import Told, sample
from rlaif.records import Ballot, Completion, Pair, Vote
from rlaif.workers.feed import Feed
from rlaif.workers.placement import Placed, apart

LAST_CHUNK_S = 5.0
"""How long a thread that is to stop may take for the chunk that it is at; then it is left to whoever closes it."""


def streams(job: Job, places: Mapping[str, Placed]) -> bool:
    """Whether an iteration of the job is streamed: as it says or, where it doesn't, where the two don't share a
    device."""
    if job.pipeline.stream is not None:
        return job.pipeline.stream
    kind = kind_of(job.judge)
    elsewhere = kind.fed and kind.serve is None
    return elsewhere or apart(places, "sampler", "servers" if kind.serve else "judge")


def sample_and_judge(run: Running, it: Iteration) -> None:
    """Samples an iteration's completions, and meanwhile asks the judge about those that are there."""
    if it.dir.is_complete("completions"):
        return
    asking = Asking(run, it)
    for stage in ("completions", "scores", "votes"):
        it.begin(stage)
    it.interrupted = Interrupted.found(it.begun["votes"].rows, asking.journal)
    (_feed if asking.kind.fed else _ask_in_pieces)(run, it, asking)


def _ask_in_pieces(run: Running, it: Iteration, asking: Asking) -> None:
    """Scores, pairs and asks about one piece after the other, as many at a time as there are judges, until sampling has
    ended."""
    scores, votes = it.begun["scores"], it.begun["votes"]
    groups, scoring = _Groups(it, run.job.sampling.completions_per_prompt), Scoring(run, it, scores.rows)
    have = {v.ballot.id for v in votes.rows}

    def ask(ids: Sequence[str]) -> None:
        if (completions := groups.wait_for(ids)) is None:
            return
        for scored in scoring.scores([completions]):
            scores.add(scored)
        pairs = paired(run, it, completions, scoring.of(completions))
        owed = [b for b in asking.ballots(pairs) if b.id not in have]
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
    """Feeds one call with the ballots about each prompt as soon as its completions are there."""
    feed, votes = Feed(), it.begun["votes"]
    open_pairs = _OpenPairs(run, it, asking, feed, votes.rows)
    groups = _Groups(it, run.job.sampling.completions_per_prompt, open_pairs.add)
    with _Sampling(run, it, groups.add, open_pairs.end):
        for chunk in run.judge.stream("cast", feed=feed, ballots=(), pairs=(), candidates=(), **asking.how):
            votes.add(chunk)
            open_pairs.answered(chunk)


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


class _OpenPairs:
    """What a fed judge is asked about each pair, round by round where it stops early."""

    def __init__(self, run: Running, it: Iteration, asking: Asking, feed: Feed, votes: Iterable[Vote]):
        """`votes` are those of an earlier attempt."""
        self._run, self._it, self._asking, self._feed = run, it, asking, feed
        self._votes = {v.ballot.id: v for v in votes}
        self._rounds: dict[str, list[list[Ballot]]] = {}
        self._under_way: dict[str, int] = {}
        """Pair → its ballots that are fed and not answered."""
        self._lock = threading.Lock()  # groups come from the thread that samples, votes from the judge's
        self._left = 0
        self._sampled = False

    def add(self, group: list[Completion]) -> None:
        """A prompt's completions are there."""
        pairs = paired(self._run, self._it, group, ())
        by_pair: dict[str, list[Ballot]] = {p.id: [] for p in pairs}
        for ballot in self._asking.ballots(pairs):
            by_pair[ballot.pair_id].append(ballot)
        with self._lock:
            for pair_id, ballots in by_pair.items():
                self._rounds[pair_id] = rounds(ballots) if self._asking.early_stop else [ballots]
            self._ask(by_pair, pairs, group)

    def answered(self, votes: Iterable[Vote]) -> None:
        """Votes came: pairs whose round is done go on with the next."""
        with self._lock:
            chunk = list(votes)
            self._votes |= {v.ballot.id: v for v in chunk}
            for vote in chunk:
                self._under_way[vote.ballot.pair_id] -= 1
            self._left -= len(chunk)
            if self._sampled:
                self._run.progress.advance(len(chunk))
            self._ask(p for p in {v.ballot.pair_id for v in chunk} if not self._under_way[p])

    def end(self) -> None:
        """Sampling has ended: what isn't fed yet is for the stage that judges, which asks about all pairs together."""
        with self._lock:
            self._sampled = True
            self._feed.end()
            if self._left:
                self._run.progress.stage(self._it.k, "judge", self._left, "votes", str(self._it.constitution.ref))

    def _ask(self, pair_ids: Iterable[str], pairs: Sequence[Pair] = (), sides: Sequence[Completion] = ()) -> None:
        if self._sampled:
            return
        owed: list[Ballot] = []
        for pair_id in pair_ids:
            mine = self._owed(self._rounds[pair_id])
            self._under_way[pair_id] = len(mine)
            owed += mine
        self._left += len(owed)
        if owed or pairs:
            self._feed.put(MoreBallots(owed, pairs, candidates(sides, self._it.prompts)))

    def _owed(self, in_rounds: Sequence[Sequence[Ballot]]) -> list[Ballot]:
        """What a pair is asked next: what is owed of its first round that isn't done, unless nothing could change."""
        filters, weights = self._run.job.filters, self._it.constitution.weights
        so_far: list[Vote] = []
        for number, ballots in enumerate(in_rounds):
            left = [b for later in in_rounds[number:] for b in later]
            if number and settled(so_far, left, filters, weights):
                return []
            if owed := [b for b in ballots if b.id not in self._votes]:
                return owed
            so_far += [self._votes[b.id] for b in ballots]
        return []


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
