"""The processes that one learner is, seen from one of them: what is its share of a work, and what the others found.

In: the process group that this process belongs to, if any (`ranks` makes it). Out: `Peers`. Each process is called
alike with the same rows, computes its share of them, and has all results afterwards: whatever is decided by them, each
decides alike. A process that fails alone leaves the others waiting; whoever called them ends them
(`rlaif.workers.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Peers:
    """One of `count` processes, by number."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def here() -> Peers:
        """This process among those of its group; one alone where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Peers()
        return Peers(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files and whose answers count."""
        return self.rank == 0

    def share(self, items: Sequence[T], rank: int | None = None) -> list[T]:
        """The items that fall to this process, or to another one."""
        return list(items[self.rank if rank is None else rank :: self.count])

    def gathered(self, value: T) -> list[T]:
        """What each process gives here, by number."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def shared(self, items: Sequence[T], do: Callable[[T], R]) -> list[R]:
        """What `do` gives for each item, in order; each process does its share. All do equally many, some perhaps one
        that doesn't count: where a model lies in shards, a forward pass is a work of all."""
        if not items:
            return []
        mine, rounds = self.share(items), -(-len(items) // self.count)
        found = self.gathered([do(item) for item in mine + [items[0]] * (rounds - len(mine))])
        return [found[n % self.count][n // self.count] for n in range(len(items))]

    def values(self, values: torch.Tensor | None) -> torch.Tensor:
        """The values that all have, [n]; a process that has none that count gives None."""
        found = self.gathered(None if values is None else values.cpu().reshape(-1))
        return torch.cat([of_one for of_one in found if of_one is not None])


ALONE = Peers()
