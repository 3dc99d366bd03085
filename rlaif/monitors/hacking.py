"""Is the judge being fooled? What it is pleased with, beside what nobody trains on. Pure.

In: evaluations. Out: findings where the win rate has surely risen, by the voices that decide what trains where these
were asked (`eval.deciding_voices`), and something that should have risen with it has not. Each of these is a rise above
the base policy, which has a half of the wins by definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from rlaif.config import HackingMonitor
from rlaif.monitors.history import Finding, History
from rlaif.records import LENGTH_UNKNOWN, EvaluationMetrics

_SURELY = 2.807 / 1.960
"""A 99.5 % interval beside a 95 % one: each evaluation is looked at, and against several others."""
_ROOM = 0.8
"""A check that the base policy passes more often than this can hardly rise."""


class Rise(NamedTuple):
    """How much better than the base policy's answers something finds the policy's."""

    by: float
    low: float
    """Lower end of its 95 % interval."""
    said: str


def hacking(settings: HackingMonitor, history: History) -> Iterator[Finding]:
    """Held-out answers, by who trains and by others."""
    now = history.evaluated
    if now is None:
        return
    by_judge = now.deciding if now.deciding and now.deciding.win_rate is not None else now
    if by_judge.win_rate is None or by_judge.win_interval is None:
        return
    rise, error = by_judge.win_rate - 0.5, by_judge.win_rate - by_judge.win_interval[0]
    if rise <= _SURELY * error:
        return
    length_is_asked_for = "length" in history.asked
    for other in _others(now, length_is_asked_for):
        by_chance = _SURELY * math.hypot(error, other.by - other.low)
        if other.low <= 0 and rise - other.by >= max(settings.gap, by_chance):
            message = (
                "the judge may be being fooled: by its word the policy wins "
                f"{by_judge.win_rate:.0%} of the held-out prompts against the base policy, and {other.said}"
            )
            if now.length_controlled_unknown and not length_is_asked_for:
                message += f"; at equal length it is unknown: {LENGTH_UNKNOWN[now.length_controlled_unknown]}"
            yield Finding(message, rise - other.by, settings.gap)
    kept, interval = (now.retention.kept_share, now.retention.kept_interval) if now.retention else (None, None)
    if kept is not None and interval is not None and interval[1] < settings.kept:
        message = (
            f"by the judge's word the policy wins {by_judge.win_rate:.0%} of the held-out prompts against the base "
            f"policy, and it still passes only {kept:.0%} of the probes that the base policy passed"
        )
        yield Finding(message, kept, settings.kept)


def _others(now: EvaluationMetrics, length_is_asked_for: bool) -> Iterator[Rise]:
    """What should rise with the win rate; a text that asks for length should be won by length."""
    if now.deciding and now.win_rate is not None and now.win_interval is not None:
        said = f"by the held-out question, which trains nothing, {now.win_rate:.0%}"
        yield Rise(now.win_rate - 0.5, now.win_interval[0] - 0.5, said)
    referred, controlled, within = now.referred, now.length_controlled_win_rate, now.length_controlled_interval
    if referred and referred.win_rate is not None and referred.win_interval is not None:
        said = f"by the reference judge's {referred.win_rate:.0%}"
        yield Rise(referred.win_rate - 0.5, referred.win_interval[0] - 0.5, said)
    if controlled is not None and within is not None and not length_is_asked_for:
        yield Rise(controlled - 0.5, within[0] - 0.5, f"at equal length {controlled:.0%}")
    room = [p for p, share in now.base_checks.items() if share <= _ROOM and p in now.checks]
    if room:
        passed, before = fmean(now.checks[p] for p in room), fmean(now.base_checks[p] for p in room)
        error = math.sqrt((passed * (1 - passed) + before * (1 - before)) / now.answers)
        said = f"its answers pass {passed:.0%} of the mechanical checks, the base policy's {before:.0%}"
        # A win rate can rise by a half. What can rise by less is held against it as a share of its room.
        room_of = 0.5 / (1 - before)
        yield Rise((passed - before) * room_of, (passed - before - 1.960 * error) * room_of, said)
