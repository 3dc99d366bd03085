"""From a judge's numbers to what they mean. Pure."""

from __future__ import annotations

import math

from rlaif.records import Outcome


def side_of(difference: float, tolerance: float) -> Outcome:
    """The side that a difference of scores (first - second) names, when it is more than the tolerance."""
    return "first" if difference > tolerance else "second" if difference < -tolerance else "tie"


def sigmoid(x: float) -> float:
    """The logistic function; 0 where it would overflow."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
