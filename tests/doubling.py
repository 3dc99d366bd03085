"""A worker that answers what it is fed; a module of its own, so that a process is soon there."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from rlaif.workers.feed import Feed


class Doubling:
    """Twice what it is given."""

    def run(self, first: list[int], feed: Feed) -> Iterator[int]:
        items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        feed.pour(items.put)
        for item in first:
            yield 2 * item
        while (item := items.get()) is not None:
            if item < 0:
                raise ValueError(f"{item} is none")
            yield 2 * item

    def add(self, a: int, b: int) -> int:
        return a + b
