"""A judge that is fed (`JudgeKind.fed`): it only waits, so it gets a new ballot as soon as it has answered another.

Some pairs are open, that is, their ballots are made and with the judge; the others wait as they are. So a million
ballots cost no more memory than a thousand. With early stop a pair's next ballots go out when its votes so far are
there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlaif.errors import RlaifError
from rlaif.judging.ballots import rounds, settled
from rlaif.judging.candidates import MoreBallots
from rlaif.loop.asking import Asking
from rlaif.loop.running import Iteration, Running, candidates
from rlaif.records import Ballot, Completion, Pair, Vote
from rlaif.rundir.votes import VotesByPair
from rlaif.workers.feed import Feed

_TOGETHER = 32
"""Pairs that are opened at once, where so many wait."""


class _Waiting(NamedTuple):
    """A pair that isn't open yet."""

    pair: Pair
    sides: tuple[Completion, Completion]


class _Open:
    """A pair that the judge is asked about."""

    def __init__(self, waited: _Waiting, in_rounds: Sequence[Sequence[Ballot]], votes: Iterable[Vote]):
        self.pair, self.sides = waited
        self.rounds = in_rounds
        self.votes = {v.ballot.id: v for v in votes}
        self.under_way = 0
        """Ballots without an answer."""


class Feeding:
    """An iteration's pairs on their way through the judge. They may come from another thread than the one that takes
    the votes."""

    def __init__(self, run: Running, it: Iteration, asking: Asking, cast: VotesByPair):
        """`cast` holds the durable votes: those of an earlier attempt, and what `votes` gives before it gives more."""
        self._run, self._it, self._asking, self._cast = run, it, asking, cast
        self._waiting: deque[_Waiting] = deque()
        self._open: dict[str, _Open] = {}
        self._feed = Feed()
        """Where ballots go: to the call that is under way or, when that will be fed no more, to the next one."""
        self._fed: set[str] = set()
        """Completions that went there, each once."""
        self._called: Feed | None = None
        """What the call that is under way is fed."""
        self._all_added = False
        self._lock = threading.Lock()

    def add(self, pairs: Sequence[Pair], completions: Iterable[Completion]) -> None:
        """Pairs to be asked about; `completions` are at least their sides."""
        texts = {c.id: c for c in completions}
        with self._lock:
            open_pairs = (p for p in pairs if self._asking.left(p, self._cast))
            self._waiting.extend(_Waiting(p, (texts[p.first], texts[p.second])) for p in open_pairs)
            self._ask_on()

    def end(self) -> None:
        """No more pairs will come."""
        with self._lock:
            self._all_added = True
            self._ask_on()

    def give_up(self) -> None:
        """What the judge hasn't been asked yet is left to another attempt."""
        with self._lock:
            self._waiting.clear()
            for pair in self._open.values():
                pair.rounds = ()
            self._all_added = True
            self._ask_on()

    def left(self) -> int:
        """Ballots about the pairs so far that have no vote; with early stop some will need none."""
        with self._lock:
            pairs = [*(w.pair for w in self._waiting), *(o.pair for o in self._open.values())]
            return sum(self._asking.left(p, self._cast) for p in pairs)

    def votes(self) -> Iterator[list[Vote]]:
        """The votes in chunks, each to be durable before the next is asked for.

        Raises:
            RlaifError: the judge ended before it was told that there are no more ballots.
        """
        while (feed := self._next_call()) is not None:
            nothing: dict[str, Any] = {"ballots": (), "pairs": (), "candidates": ()}
            for chunk in self._run.judge.stream("cast", feed=feed, **nothing, **self._asking.how):
                yield chunk
                self._answered(chunk)
            if feed is self._feed:
                raise RlaifError(f"the judge ended with {self.left()} ballots unanswered")

    # ---- under the lock

    def _next_call(self) -> Feed | None:
        """What to feed another call with; None when there is nothing more to be asked."""
        with self._lock:
            if self._all_added and not self._waiting and not self._fed:
                return None
            self._called = feed = self._feed
            self._end_call()
            return feed

    def _end_call(self) -> None:
        """Tells the call that is under way when it will be fed no more. Next rounds are for another one: this one may
        hold votes back until it ends."""
        if self._all_added and not self._waiting and self._called is self._feed:
            self._feed.end()
            self._feed, self._fed = Feed(), set()

    def _answered(self, votes: Sequence[Vote]) -> None:
        with self._lock:
            for vote in votes:
                pair = self._open[vote.ballot.pair_id]
                pair.votes[vote.ballot.id] = vote
                pair.under_way -= 1
            done = {v.ballot.pair_id for v in votes}
            self._ask([self._open[i] for i in sorted(done) if not self._open[i].under_way])
            self._ask_on()

    def _ask_on(self) -> None:
        """Opens pairs that wait, as far as there is room."""
        most = self._asking.kind.open_pairs
        while (some := min(_TOGETHER, most, len(self._waiting))) and most - len(self._open) >= some:
            waiting = [self._waiting.popleft() for _ in range(some)]
            asked = self._asking.by_pair([w.pair for w in waiting])
            for waited, (pair, ballots) in zip(waiting, asked, strict=True):
                in_rounds = rounds(ballots) if self._asking.early_stop else [ballots]
                self._open[pair.id] = _Open(waited, in_rounds, self._cast.of(pair.id))
            self._ask([self._open[w.pair.id] for w in waiting])
        self._end_call()

    def _ask(self, open_pairs: Sequence[_Open]) -> None:
        """Feeds what these are to be asked next; those about which that is nothing are done."""
        owed: list[Ballot] = []
        new: dict[str, Completion] = {}
        for open_pair in open_pairs:
            mine = self._owed(open_pair)
            open_pair.under_way = len(mine)
            owed += mine
            new |= {c.id: c for c in open_pair.sides if mine and c.id not in self._fed}
            if not mine:
                del self._open[open_pair.pair.id]
        if owed:
            self._fed.update(new)
            pairs = [o.pair for o in open_pairs]
            self._feed.put(MoreBallots(owed, pairs, candidates(new.values(), self._it.prompts)))

    def _owed(self, pair: _Open) -> list[Ballot]:
        """What is owed of its first round that isn't done, unless nothing could change."""
        filters, weights = self._run.job.filters, self._it.constitution.weights
        so_far: list[Vote] = []
        for number, ballots in enumerate(pair.rounds):
            left = [b for later in pair.rounds[number:] for b in later]
            if number and settled(so_far, left, filters, weights):
                return []
            if owed := [b for b in ballots if b.id not in pair.votes]:
                return owed
            so_far += [pair.votes[b.id] for b in ballots]
        return []
