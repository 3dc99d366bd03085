"""The win rate as it would be if answers were as long as the base policy's. Pure.

In: held-out answers with their verdicts against the base policy's answers, and how much longer they are. Out: a win
rate with its 95 % interval, or why none can be told. After Dubois et al. 2024 (arXiv 2404.04475), AlpacaEval's
length-controlled win rate: a logistic model of the verdict with a term for length, evaluated at no difference.

    logit p(win) = theta + phi * tanh(difference / its standard deviation)

Three things differ from AlpacaEval's. Length is in words, as in our tables, not characters. There is no term for a
prompt's difficulty, which takes the verdicts on many models to fit. And phi has a normal prior instead of a penalty
found by cross-validation, for there are tens of prompts here, not 805.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlaif.intervals import students_t
from rlaif.records import LengthUnknown

MIN_PROMPTS = 10
"""With verdicts on fewer, two coefficients are mostly the prior's word."""
MIN_EACH_WAY = 5
"""Prompts with a longer answer than the base policy's, and as many with a shorter one. With fewer, next to nothing was
seen near no difference: theta is then what the prior leaves of the raw rate, and its interval, however wide, is around
the wrong place. A limit on the interval's width would be worse: it keeps the fits that are too sure."""
PRIOR_SD = 3.0
"""Standard deviation of phi's prior, log odds. It keeps the fit finite where length alone separates wins from losses.
With 1 a strong effect of length stays partly in the result, more than the interval says (a test has the coverage).
theta has no prior: without an effect of length, the result is the raw rate."""
_ROUNDS = 100
_CLOSE = 1e-10


class Judged(NamedTuple):
    """An answer that has a verdict against the base policy's."""

    prompt_id: str
    won: float
    """1, 0, or 0.5 where the verdict is tied."""
    more_words: int
    """Than the base policy's answer has."""
    asked: bool = True
    """False for an answer equal to the base policy's, which is tied and nobody is asked about."""


class LengthControlled(NamedTuple):
    """A length-controlled win rate, or why there is none."""

    win_rate: float | None = None
    interval: tuple[float, float] | None = None
    """95 %."""
    unknown: LengthUnknown | None = None


def length_controlled(answers: Sequence[Judged]) -> LengthControlled:
    """The win rate at no difference in length.

    A prompt counts once, however many answers it has, as in the raw rate. Answers equal to the base policy's stay half
    a win each and are no part of the fit: they are all at no difference, and would pull the model there towards a tie.
    The interval is of the posterior's normal approximation (delta method), on the scale of log odds, so that it stays
    between 0 and 1; the share of equal answers counts as drawn, too.
    """
    of_prompt = Counter(a.prompt_id for a in answers)
    asked = [a for a in answers if a.asked]
    if len({a.prompt_id for a in asked}) < MIN_PROMPTS:
        return LengthControlled(unknown="few_prompts")
    won = np.array([a.won for a in asked])
    if won.min() == won.max() != 0.5:
        return LengthControlled(unknown="one_sided")
    words = np.array([float(a.more_words) for a in asked])
    if words.min() == words.max():
        return LengthControlled(unknown="same_length")
    longer, shorter = ({a.prompt_id for a in asked if way * a.more_words > 0} for way in (1, -1))
    if min(len(longer), len(shorter)) < MIN_EACH_WAY:
        return LengthControlled(unknown="no_overlap")
    weights = np.array([1 / of_prompt[a.prompt_id] for a in asked])
    theta, variance = _fit(won, np.tanh(words / words.std(ddof=1)), weights)
    p = 1 / (1 + np.exp(-theta))
    share = weights.sum() / len(of_prompt)
    rate = share * p + (1 - share) / 2
    spread = (share * p * (1 - p)) ** 2 * variance + (p - 0.5) ** 2 * share * (1 - share) / len(of_prompt)
    middle, half = np.log(rate / (1 - rate)), students_t(len(of_prompt) - 2) * np.sqrt(spread) / (rate * (1 - rate))
    low, high = (float(1 / (1 + np.exp(-end))) for end in (middle - half, middle + half))
    return LengthControlled(float(rate), (low, high))


def _fit(won: np.ndarray, length: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """theta and its variance, at the mode of the posterior, by Newton's method. All arrays are [answers]."""
    terms = np.stack([np.ones_like(length), length])  # [2, answers]
    prior = np.diag([0.0, PRIOR_SD**-2])
    at = np.zeros(2)
    for _ in range(_ROUNDS):
        p = 1 / (1 + np.exp(-at @ terms))
        curvature = (terms * weights * p * (1 - p)) @ terms.T + prior
        step = np.linalg.solve(curvature, (terms * weights) @ (won - p) - prior @ at)
        at = at + step
        if np.abs(step).max() < _CLOSE:
            break
    return float(at[0]), float(np.linalg.inv(curvature)[0, 0])
