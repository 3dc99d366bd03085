"""Confidence intervals of shares. Pure, standard library."""

from __future__ import annotations

import math

_Z = 1.959963984540054
"""A standard normal value lies within ± this with probability 0.95."""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of a share (Wilson 1927); (0, 1) when nothing was counted.

    `successes` may be fractional: a tie is half of one.
    """
    if n == 0:
        return 0.0, 1.0
    middle = (successes + _Z**2 / 2) / (n + _Z**2)
    half = _Z / (n + _Z**2) * math.sqrt(successes * (n - successes) / n + _Z**2 / 4)
    # Rounding must not leave a crumb beside the ends.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else min(middle + half, 1.0)
