"""Control charts of shares: has a share of the pairs moved, by more than chance does? Pure.

In: for each iteration, of how many pairs how many are so. Out: where a shift began and how large it is, or nothing. It
is a self-starting CUSUM: nobody knows the share beforehand, so each iteration is compared with the pairs before it
(Hawkins 1987; for counts Quesenberry 1991), by the exact distribution of such a count (hypergeometric), and the
surprises are summed (Page 1954). So many small steps in one direction tell as much as one large one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

from rlaif.intervals import log_choose

Direction = Literal["up", "down"]

SLACK = 0.5
"""Taken from each iteration's surprise before it is summed, in standard deviations: half of the shift that is found
fastest, as usual."""
_NORMAL = NormalDist()
_CERTAIN = 1e-12


class Counted(NamedTuple):
    """Of so many pairs, how many are so."""

    some: int
    of: int

    @property
    def share(self) -> float:
        """The share of those that are so."""
        return self.some / self.of


class Shift(NamedTuple):
    """A share that moved."""

    since: int
    """Index of the first iteration after it."""
    before: Counted
    now: Counted
    """Pairs since then."""
    height: float
    """The sum, in standard deviations."""


@functools.lru_cache(4096)  # a chart is drawn anew after each iteration, mostly from the same counts
def surprise(now: Counted, before: Counted) -> float:
    """How far a share is from that of the pairs before: standard normal where nothing moved, 0 without pairs.

    The count's probability to be smaller, given how many of all pairs are so, as a normal score; half of its own
    probability counts as smaller (mid-p), so that counts of few pairs lean to neither side.
    """
    every = total((now, before))
    if not now.of or not before.of:
        return 0.0
    least, most = max(0, every.some - before.of), min(now.of, every.some)
    ways = log_choose(every.of, every.some)

    def probability(some: int) -> float:
        log = log_choose(now.of, some) + log_choose(before.of, every.some - some) - ways
        return math.exp(log)

    below = math.fsum(map(probability, range(least, now.some))) + probability(now.some) / 2
    if below <= 0.5:
        return _NORMAL.inv_cdf(max(below, _CERTAIN))
    # Not from 1 - below: where that is close to 1, little of the difference is left.
    above = math.fsum(map(probability, range(now.some + 1, most + 1))) + probability(now.some) / 2
    return -_NORMAL.inv_cdf(min(max(above, _CERTAIN), 0.5))


def shift(counts: Sequence[Counted], direction: Direction, limit: float, least: float) -> Shift | None:
    """The shift that the last iteration makes certain; None where it makes none so.

    Args:
        counts: iteration by iteration; those without pairs say nothing.
        limit: the sum at which a shift is told, in standard deviations.
        least: smallest difference of the shares that is worth telling.
    """
    made = list(_shifts(counts, direction, limit, least))
    return made[-1] if made else None


def _shifts(counts: Sequence[Counted], direction: Direction, limit: float, least: float) -> Iterator[Shift | None]:
    """What each iteration makes certain. Told, the chart starts again where the shift began: what comes after is held
    against the new level."""
    sign = 1.0 if direction == "up" else -1.0
    start, height = 0, 0.0
    for index, count in enumerate(counts):
        before = total(counts[start:index])
        if not count.of or not before.of:
            yield None
            continue
        # All pairs so far, also those since a shift may have begun: so one iteration's surprise says nothing about the
        # next one's, and few pairs at the beginning, by chance unlike all others, don't add up to a shift.
        height = max(0.0, height + sign * surprise(count, before) - SLACK)
        found = _likeliest(counts, start, index + 1, sign, height) if height >= limit else None
        if found and sign * (found.now.share - found.before.share) >= least:
            start, height = found.since, 0.0
            yield found
        else:
            yield None


def _likeliest(counts: Sequence[Counted], start: int, end: int, sign: float, height: float) -> Shift:
    """The shift where it began most likely: the sum may have risen by chance before. By the likelihood ratio of two
    shares to one, which has no largest value as a `surprise` has."""
    splits = [Shift(i, total(counts[start:i]), total(counts[i:end]), height) for i in range(start + 1, end)]
    splits = [split for split in splits if split.before.of and split.now.of]

    def likelihood_ratio(split: Shift) -> float:
        two = _log_likelihood(split.before) + _log_likelihood(split.now)
        by = max(two - _log_likelihood(total((split.before, split.now))), 0.0)
        return math.copysign(by, sign * (split.now.share - split.before.share))

    return max(splits, key=likelihood_ratio)


def _log_likelihood(count: Counted) -> float:
    """Of a count, at the share that fits it best; up to a constant."""
    return sum(n * math.log(n / count.of) for n in (count.some, count.of - count.some) if n)


def total(counts: Sequence[Counted]) -> Counted:
    """Several counts as one."""
    return Counted(sum(c.some for c in counts), sum(c.of for c in counts))
