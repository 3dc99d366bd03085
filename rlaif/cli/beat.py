"""Signs of life on stderr: a heartbeat for logs, and a count of what a judge has answered."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HEARTBEAT_S = 20.0
"""A log that is silent for longer gets a line that says how far the work is."""


@contextmanager
def heartbeat(beat: Callable[[], None], every_s: float) -> Iterator[None]:
    """Calls `beat` every so many seconds from a thread, as long as the block lasts."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(every_s):
            beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class VoteCount:
    """How many votes have come: a number that moves on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int | None = None):
        """`total`: how many are to come, where that is known."""
        self.total = total
        self._votes, self._started = 0, time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, new: int) -> None:
        self._votes += new
        if self._terminal:
            print(self._line(), end="\r", file=sys.stderr, flush=True)

    @contextmanager
    def told(self, every_s: float = HEARTBEAT_S) -> Iterator[None]:
        """Tells how it goes as long as the block lasts, and how it ended."""
        if self._terminal:
            yield
            return

        def tell() -> None:
            print(self._line(), file=sys.stderr, flush=True)

        with heartbeat(tell, every_s):
            yield
        tell()

    def _line(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        return f"{self._votes}{of} votes, {time.monotonic() - self._started:.0f} s"
