"""Servers of a judge that answer nothing, while others do their work. Pure.

In: how many votes each server answered in an iteration (`IterationMetrics.servers`). Out: a finding for each that
answered none where its turn must have come, and what is told when it answers again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rlaif.config import Monitors, SilentServerMonitor
from rlaif.monitors.history import Finding, History
from rlaif.records import IterationMetrics


def silent_server(settings: SilentServerMonitor, history: History) -> Iterator[Finding]:
    """One of its servers gives no answer, and the others do all of its work."""
    for server, votes in _silent(settings, history.now).items():
        message = (
            f"the judge's server {server} answered none of {votes} votes, others all of them; logs/judge.log says why"
        )
        yield Finding(message, 0)


def back_again(monitors: Monitors, history: History) -> list[str]:
    """What is to be told of servers that were silent when it could last be told, and answered in this iteration."""
    settings = monitors.silent_server
    if settings.action == "off":
        return []
    return [
        f"the judge's server {server} answers again, {votes} votes in this iteration"
        for server, votes in _answered(history.now).items()
        if votes and _was_silent(settings, history.iterations[:-1], server)
    ]


def _was_silent(settings: SilentServerMonitor, before: Sequence[IterationMetrics], server: str) -> bool:
    """Whether it was, in the last of some iterations that says anything about it."""
    for metrics in reversed(before):
        if (silent := server in _silent(settings, metrics)) or _answered(metrics)[server]:
            return silent
    return False


def _silent(settings: SilentServerMonitor, metrics: IterationMetrics) -> dict[str, int]:
    """Servers that answered nobody's ballot, and how many votes of their jurors others answered: of jurors with so many
    that their turn came."""
    answered, silent = _answered(metrics), Counter[str]()
    for of_juror in metrics.servers.values():
        votes = sum(of_juror.values())
        if votes >= settings.votes * len(of_juror):
            silent.update({server: votes for server in of_juror if not answered[server]})
    return silent


def _answered(metrics: IterationMetrics) -> Counter[str]:
    """How many votes each server answered, whichever juror it was asked for."""
    answered = Counter[str]()
    for of_juror in metrics.servers.values():
        answered.update(of_juror)
    return answered
