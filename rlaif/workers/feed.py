"""What a call is given while it is under way: items from any thread, in their order, until there are no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Sink = Callable[[Any], object]


class Feed:
    """Items on their way to whoever takes them. What comes before somebody takes it waits here, in memory: it is as
    much as a call would else be given at once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[Any] = []
        self._sink: Sink | None = None
        self._ended = False

    def put(self, item: Any) -> None:
        """One more item; dropped once the feed is ended."""
        with self._lock:
            if self._ended:
                return
            if self._sink is None:
                self._waiting.append(item)
            else:
                self._sink(item)

    def end(self) -> None:
        """There are no more. Ending twice does nothing."""
        self.put(None)
        with self._lock:
            self._ended = True

    def pour(self, sink: Sink) -> None:
        """From now on `sink` is called with every item, in the thread that puts it, and last with None; at once with
        what is here already."""
        with self._lock:
            self._sink = sink
            for item in self._waiting:
                sink(item)
            self._waiting.clear()

    def stop(self) -> None:
        """Nobody takes any more: what is put from now on is dropped."""
        with self._lock:
            self._ended, self._sink = True, None
            self._waiting.clear()
