"""Slots that serve, replicas that fail: what a simulated run is put together from, in SimPy's time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlaif.simulation.cluster import Failures

if TYPE_CHECKING:
    import simpy


class Outages:
    """When a replica is down: from the first moment that lies ahead on, drawn as it is asked for."""

    def __init__(self, failures: Failures | None, random: np.random.Generator):
        self._failures, self._random = failures, random
        self._fails = self._back = 0.0 if failures else math.inf

    def after(self, now: float) -> tuple[float, float]:
        """The outage that is under way, or the next one: from when to when."""
        while self._failures and self._back <= now:
            self._fails = self._back + self._random.exponential(3600 * self._failures.hours_between)
            self._back = self._fails + self._failures.restart_s
        return self._fails, self._back


class Item(NamedTuple):
    """What a slot is busy with, for how long, and what happens then."""

    seconds: float
    pause_s: float
    """Until the next item may begin, where there is a limit a minute."""
    then: Callable[[], None]
    held: Callable[[Callable[[], None]], None]
    """What its slot waits for before it is free; calls what it is given when that is over."""


class Station:
    """Slots that each serve one item after another; who came first is served first."""

    def __init__(self, env: simpy.Environment, slots: int, replicas: Sequence[Outages]):
        self._env, self._replicas = env, replicas
        self._idle = deque(i % len(replicas) for i in range(slots))
        self._queue: deque[Item] = deque()
        self._begin_at = 0.0
        self.slots = slots
        self.busy_s = 0.0
        """Of all slots together, on what was finished."""
        self.paused_s = 0.0

    def submit(
        self,
        seconds: float,
        then: Callable[[], None],
        pause_s: float = 0.0,
        held: Callable[[Callable[[], None]], None] = lambda over: over(),
    ) -> None:
        """Serves an item, and calls `then`."""
        self._queue.append(Item(seconds, pause_s, then, held))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            self._serve(self._idle.popleft(), self._queue.popleft())

    def _serve(self, replica: int, item: Item) -> None:
        now = self._env.now
        fails, back = self._replicas[replica].after(now)
        start = max(now, self._begin_at)
        if start + item.seconds > fails:  # lost: another slot takes it, this one comes back later
            self._at(max(fails, now), lambda: self._again(item))
            self._at(back, lambda: self._free(replica))
            return
        self._begin_at = start + item.pause_s
        self.busy_s += item.seconds
        self.paused_s += item.pause_s
        self._at(start + item.seconds, lambda: self._finish(replica, item))

    def _again(self, item: Item) -> None:
        self._queue.appendleft(item)
        self._dispatch()

    def _finish(self, replica: int, item: Item) -> None:
        def over() -> None:
            item.then()
            self._free(replica)

        item.held(over)

    def _free(self, replica: int) -> None:
        self._idle.append(replica)
        self._dispatch()

    def _at(self, when: float, call: Callable[[], None]) -> None:
        event = self._env.timeout(when - self._env.now)
        event.callbacks.append(lambda _: call())


class Countdown:
    """Calls `then` when it was called so many times; at once if that is none."""

    def __init__(self, n: int, then: Callable[[], Any]):
        self._left, self._then = n, then
        if not n:
            then()

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            self._then()
