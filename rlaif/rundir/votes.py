"""The votes of an iteration or an evaluation: on the disk, found by pair. There may be millions.

Of a vote in the file only its place is held: where its line begins, which vote on its pair was there before it, and its
rank. Whoever wants votes reads them, a pair's at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from rlaif.records import Vote, stored

Rank = Callable[[Vote], int | None]
"""A vote's place among those on its pair; None for one that doesn't count. Of two with one rank the later counts."""


class VotesByPair:
    """Where each vote of a stage is in its file.

    Args:
        file: Says which file it is now; one that is being written changes its name when it is whole.
        rank: None: all votes count, in the order of the file.
    """

    def __init__(self, file: Callable[[], Path], rank: Rank | None = None) -> None:
        self._file, self._rank = file, rank
        self._at, self._ranks, self._before = array("q"), array("i"), array("i")
        self._last: dict[str, int] = {}
        """Pair → its last vote's number in these; `_before` has the number of the one before, or -1."""

    def note(self, vote: Vote, at: int) -> None:
        """One more vote, whose line begins at this byte."""
        number = len(self._at)
        rank = number if self._rank is None else self._rank(vote)
        if rank is None:
            return
        pair_id = vote.ballot.pair_id
        self._before.append(self._last.get(pair_id, -1))
        self._ranks.append(rank)
        self._at.append(at)
        self._last[pair_id] = number

    def __len__(self) -> int:
        """How many count, those that a later one takes the place of among them."""
        return len(self._at)

    def ranks(self, pair_id: str) -> set[int]:
        """Those that a pair's votes have."""
        return set(self._by_rank(pair_id))

    def of(self, pair_id: str) -> list[Vote]:
        """A pair's votes, by rank."""
        if pair_id not in self._last:
            return []
        with self._file().open("rb") as f:
            return self._read(pair_id, f)

    def of_each(self, pair_ids: Iterable[str]) -> Iterator[list[Vote]]:
        """The votes of one pair after the other."""
        if not self._last:
            yield from ([] for _ in pair_ids)
            return
        with self._file().open("rb") as f:
            for pair_id in pair_ids:
                yield self._read(pair_id, f)

    def _by_rank(self, pair_id: str) -> dict[int, int]:
        """Rank → where the vote is."""
        found: dict[int, int] = {}
        number = self._last.get(pair_id, -1)
        while number >= 0:
            found.setdefault(self._ranks[number], self._at[number])
            number = self._before[number]
        return found

    def _read(self, pair_id: str, f: BinaryIO) -> list[Vote]:
        votes = []
        for _, at in sorted(self._by_rank(pair_id).items()):
            f.seek(at)
            votes.append(stored(Vote, f.readline()))
        return votes


class Votes(Iterable[Vote]):
    """The votes on some pairs, in the pairs' order; read anew each time that they are gone through."""

    def __init__(self, held: VotesByPair | None = None, pair_ids: Sequence[str] = ()) -> None:
        self._held, self._pair_ids = held, pair_ids

    def __len__(self) -> int:
        return sum(len(self._held.ranks(i)) for i in self._pair_ids) if self._held else 0

    def __iter__(self) -> Iterator[Vote]:
        for votes in self.of_each(self._pair_ids):
            yield from votes

    def of_each(self, pair_ids: Iterable[str]) -> Iterator[list[Vote]]:
        """The votes of one pair after the other, in the order of their ballots; none of a pair that nobody voted on."""
        return self._held.of_each(pair_ids) if self._held else ([] for _ in pair_ids)
