"""Shares, their confidence intervals, and what else turns counts and scores into numbers. Pure, standard library."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959963984540054
"""A standard normal value lies within ± this with probability 0.95."""
SURE = 3.5
"""Standard deviations within which chance stays where it is asked again and again: a standard normal value is above
this once in 4,300 times."""


def share(part: float | None, whole: float | None) -> float | None:
    """Part of a whole; None where nothing was counted."""
    return float(part or 0) / float(whole) if whole else None


def sigmoid(x: float) -> float:
    """The logistic function; 0 where it would overflow."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_choose(n: int, k: int) -> float:
    """Logarithm of the number of ways to draw k of n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def wilson(successes: float, n: int, z: float = _Z) -> tuple[float, float]:
    """Wilson interval of a share (Wilson 1927), 95 % or as wide as `z` standard deviations each way say;
    (0, 1) when nothing was counted.

    `successes` may be fractional: a tie is half of one.
    """
    if n == 0:
        return 0.0, 1.0
    middle = (successes + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    # Rounding must not leave a crumb beside the ends.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else min(middle + half, 1.0)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """95 % interval of sum(parts) / sum(wholes) over units that were drawn independently, each with its part and its
    whole (nats and tokens of a prompt's answers). Linearised, with Student's t; infinite with fewer than two units.

    A unit is what was drawn: answers to one prompt belong together. Cochran, Sampling Techniques, chapter 6.
    """
    n, whole = len(parts), math.fsum(wholes)
    if n < 2 or whole == 0:
        return -math.inf, math.inf
    ratio = math.fsum(parts) / whole
    squares = math.fsum((p - ratio * w) ** 2 for p, w in zip(parts, wholes, strict=True))
    half = students_t(n - 1) * math.sqrt(n / (n - 1) * squares) / whole
    return ratio - half, ratio + half


def students_t(degrees: int, z: float = _Z) -> float:
    """Student's t: a value lies within ± this as probably as a standard normal one within ± z, 95 % by default
    (Cornish-Fisher; at 95 % exact for one and two degrees; at `SURE` within 1 % from five on, and too small below)."""
    if z == _Z and degrees in (1, 2):
        return (12.706204736, 4.302652730)[degrees - 1]
    v = float(degrees)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))
