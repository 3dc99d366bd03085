"""What the loop knows of a worker, and what every kind of worker does: build the object, say what went wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from rlaif.workers.feed import Feed

Piece = Callable[[Sequence[Any]], dict[str, Any] | None]
"""A part of some work, whole in itself: from those of its rows that are there, the arguments of the call that makes the
others; None when none is owed. It is asked once, and again only where whoever worked on it is gone."""


TOGETHER = 256
"""Rows that wait are handed over at once, up to so many: whoever takes them may sync a disk each time."""


class Worker(Protocol):
    """A long-lived object that is called by name, in whichever process it is; perhaps one of several that share a
    role (`replicas`), which whoever calls needn't know.

    Starting returns at once, so that several workers can load while the loop does something else. Not for use by
    several threads at once, but for the items of a feed.
    """

    name: str
    """For messages: `sampler`, `judge`, `learner`."""

    @property
    def width(self) -> int:
        """Pieces that it can work on at the same time, as things are."""
        return 1

    def poll(self, timeout_s: float) -> bool:
        """Whether `ready` has an answer, good or bad, after at most so many seconds."""

    def ready(self) -> None:
        """Waits until the object is built. Raises what building it raised."""

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method and waits for its result."""

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        """Calls a method that returns an iterator; its items arrive one by one. With a `feed` the method has an
        argument of this name, a feed that is given the items of this one, from whichever thread they come."""

    def close(self) -> None:
        """Ends the worker. Closing twice does nothing."""

    def kill(self) -> None:
        """Ends the worker at once, whatever it is at."""
        self.close()

    # Where a role is one worker, the rest follows.

    def tell(self, method: str, **kwargs: Any) -> None:
        """Calls a method that changes what the object holds; of several objects, that of each, and of one that takes
        another's place later."""
        self.call(method, **kwargs)

    def each(self, method: str, **kwargs: Any) -> list[Any]:
        """Calls a method of every object that has the role; their answers."""
        return [self.call(method, **kwargs)]

    def spread(self, method: str, pieces: Iterable[Piece]) -> Iterator[list[Any]]:
        """Calls a method that yields rows in chunks, for each piece; the chunks, as they come. The order of pieces is
        that in which they are begun, and decides nothing else."""
        for piece in pieces:
            if (asked := piece(())) is not None:
                yield from self.stream(method, **asked)


def built(factory: str, kwargs: dict[str, Any]) -> Any:
    """The object that a worker holds.

    Args:
        factory: `"module:callable"`.
        kwargs: what it is called with.
    """
    module, _, attribute = factory.partition(":")
    return getattr(importlib.import_module(module), attribute)(**kwargs)


def one_line(error: BaseException) -> str:
    """An exception's kind and message, cut to a line."""
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
