"""The servers of one model: which one is asked next, what each of them allows, and which are left out for a while.

In: how requests went. Out: the server for the next one, which is the one with the fewest requests under way among those
that are in; of several, the one that was asked longest ago, so that each is asked however little there is to ask. A
server that fails is left out: for a second, then twice as long after every further failure, at most a minute, or as
long as it asks for. When that time is over, one request tries it again, and an answer takes it back in. With all of
them out, the one that is due first is asked: a single server is asked again and again. Whether a server can be asked,
and whether it is to be left out, others say (`transport`). Nothing here knows a network.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

MAX_RETRY_AFTER_S = 60.0
_MAX_LEFT_OUT_S = 60.0


class Pace:
    """So many a minute, evenly spaced: no burst can break the limit. `None` is no limit.

    Whoever waits should go on at once afterwards: those that queue behind it would go together.
    """

    def __init__(self, per_minute: int | None):
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
        self._held_until = 0.0

    async def wait(self, amount: float = 1.0) -> None:
        """Returns when `amount` more may be used."""
        while (held_s := self._held_until - time.monotonic()) > 0:
            await asyncio.sleep(held_s)
        if self._interval_s:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + amount * self._interval_s
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """More (or less) was used than announced."""
        self._free_at += amount * self._interval_s

    def hold(self, seconds: float) -> None:
        """Nothing more may be used before so many seconds have gone by."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)


def shown_url(url: str) -> str:
    """An address without a user, a password or a query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def server_name(url: str) -> str:
    """What votes call a server: host, port and path, and never a secret."""
    return shown_url(url).partition("://")[2].rstrip("/")


class Address:
    """One server, as all jurors and casts of a judge know it. Belongs to no event loop."""

    def __init__(self, url: str, requests: Pace, tokens: Pace):
        """`requests` and `tokens` are the server's limits."""
        self.url = url.rstrip("/")
        self.requests = requests
        self.tokens = tokens
        self.under_way = 0
        self.listed: dict[str, dict[str, Any]] = {}
        """By model: what the server's list said of it when it was last asked."""
        self._back_at: float | None = None
        """When it is to be tried again; None while it is in."""
        self._failures = 0
        """In a row, each of a request that was sent when the one before it was known."""
        self.spell = 0
        """How often it was left out. What comes of a request that was sent before is no news."""
        self._tried = False
        """A request is under way that tries it again."""
        self.asked_at = 0.0
        """When it was asked last."""

    @property
    def name(self) -> str:
        """What votes call it."""
        return server_name(self.url)

    @property
    def is_in(self) -> bool:
        """It isn't left out."""
        return self._back_at is None

    @property
    def is_due(self) -> bool:
        """It is left out, and may be tried again."""
        return self._back_at is not None and not self._tried and time.monotonic() >= self._back_at

    @property
    def turn(self) -> tuple[bool, float]:
        """Least for the one to ask first, all else equal: one that is in, then the one that is due first, and last one
        that is being tried again."""
        return self._tried, self._back_at or 0.0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Within it, one more request is under way."""
        self.under_way += 1
        self.asked_at = time.monotonic()
        try:
            yield
        finally:
            self.under_way -= 1

    @contextmanager
    def tried_again(self) -> Iterator[None]:
        """Within it, nobody else tries it again."""
        self._tried = True
        try:
            yield
        finally:
            self._tried = False

    def failed(self, spell: int, first_s: float, asked_s: float | None = None) -> bool:
        """A request that was sent in `spell` failed for the server's sake: it is left out, at first for `first_s`, or
        for as long as it asks.

        Returns:
            Whether it was in until now.
        """
        until = time.monotonic() + min(asked_s or 0.0, MAX_RETRY_AFTER_S)
        if spell != self.spell:
            if self._back_at is not None:
                self._back_at = max(self._back_at, until)
            return False
        was_in, self.spell = self.is_in, self.spell + 1
        if asked_s is None:  # one that says how long isn't getting worse
            until += min(first_s * 2**self._failures, _MAX_LEFT_OUT_S)
            self._failures += 1
        self._back_at = until
        return was_in

    def answered(self, spell: int) -> bool:
        """A request that was sent in `spell` was answered: it is in.

        Returns:
            Whether it was left out until now.
        """
        if spell != self.spell:
            return False
        was_out, self._back_at, self._failures = not self.is_in, None, 0
        return was_out


def to_be_tried(addresses: Sequence[Address], failed: Collection[Address]) -> Address | None:
    """The server that a request must be sent to although it was left out: one that is due, or, with none in, the one
    that is due first. None while one that is in can be chosen. `failed` are those that the request failed at.
    """
    left = [a for a in addresses if a not in failed]
    if due := [a for a in left if a.is_due]:
        return due[0]
    return None if any(a.is_in for a in left) else min(left, key=lambda a: a.turn)


def least_busy(addresses: Sequence[Address], failed: Collection[Address]) -> Address:
    """The server that the next request goes to: of those that are in, the one with the fewest under way, or of several
    such the one that was asked longest ago."""
    left = [a for a in addresses if a not in failed]
    return min(left, key=lambda a: (a.turn, a.under_way, a.asked_at))


def others_left(addresses: Sequence[Address], failed: Collection[Address]) -> bool:
    """Whether a request that failed can be sent elsewhere at once."""
    return any(a.is_in or a.is_due for a in addresses if a not in failed)
