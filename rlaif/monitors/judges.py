"""Monitors of who judges. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from rlaif.config import (
    AbstainedMonitor,
    AnchorsMonitor,
    CalibrationShiftMonitor,
    CutOffWonMonitor,
    DriftMonitor,
    JurorMonitor,
)
from rlaif.intervals import wilson
from rlaif.monitors.charts import Counted, Direction, shift
from rlaif.monitors.history import Finding, History


def cut_off_won(settings: CutOffWonMonitor, history: History) -> Iterator[Finding]:
    """It likes answers without an end."""
    won, of = history.now.cut_off_won, history.now.one_cut_off
    if of and wilson(won, of)[0] > settings.limit:
        message = (
            f"the judge prefers answers that were cut off, in {won} of {of} pairs with one such answer; with "
            "filters.cut_off: keep they train"
        )
        yield Finding(message, won / of, settings.limit)


def abstained(settings: AbstainedMonitor, history: History) -> Iterator[Finding]:
    """It says nothing."""
    evaluated, most = history.evaluated, settings.limit
    if evaluated and evaluated.abstained > most * evaluated.answers:
        some = f"{evaluated.abstained} of {evaluated.answers}"
        message = f"the judge abstained on {some} held-out answers, over {most:.0%}"
        yield Finding(message, evaluated.abstained / evaluated.answers, most)
    counts = history.now.pair_counts
    if counts and wilson(counts.abstained, counts.pairs)[0] > most:
        message = f"{counts.abstained} of {counts.pairs} pairs have no valid vote, over {most:.0%}"
        yield Finding(message, counts.abstained / counts.pairs, most)


def agreement_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """Fewer pairs on which all valid votes name one side."""
    return _drift(settings, history, "pairs on which all votes name one side", "unanimous", "down")


def order_flip_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """More pairs that the order decides."""
    return _drift(settings, history, "pairs on which a voice answers otherwise in the other order", "flipped", "up")


def abstained_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """More pairs that get no vote."""
    return _drift(settings, history, "pairs without a valid vote", "abstained", "up")


def kept_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """The filters keep another share."""
    for direction in ("up", "down"):
        yield from _drift(settings, history, "pairs kept", "kept", direction)


_Counted = Literal["abstained", "unanimous", "flipped", "kept"]


def _drift(
    settings: DriftMonitor, history: History, what: str, counted: _Counted, direction: Direction
) -> Iterator[Finding]:
    """A chart of a share of the pairs. An iteration of before there were such counts says nothing."""
    under = [(m.iteration, m.pair_counts) for m in history.under_this_text if m.pair_counts]
    counts = [Counted(getattr(c, counted), c.pairs) for _, c in under]
    if history.now.pair_counts and (found := shift(counts, direction, settings.limit, settings.least)):
        since = under[found.since][0]
        message = (
            f"{what}: {found.now.share:.0%} since iteration {since + 1} ({found.now.of} pairs), "
            f"{found.before.share:.0%} before ({found.before.of} pairs), under the same text"
        )
        yield Finding(message, found.height, settings.limit, since)


def anchors(settings: AnchorsMonitor, history: History) -> Iterator[Finding]:
    """It doesn't say what it said, though nothing changed that the run knows of."""
    found = history.now.anchors
    if found and wilson(found.moved, found.pairs)[0] > settings.limit:
        message = (
            f"asked again, the judge gives another verdict on {found.moved} of {found.pairs} pairs under the same "
            "text: it may be another model now"
        )
        yield Finding(message, found.moved / found.pairs, settings.limit)


def calibration_shift(settings: CalibrationShiftMonitor, history: History) -> Iterator[Finding]:
    """In what the judged pairs are not like those that were calibrated: its promise is about pairs like those. Only
    what is more than chance in so few pairs is told."""
    now, calibrated = history.now.judged, history.calibrated
    if now is None or calibrated is None:
        return
    out: list[tuple[str, float, float]] = []
    counts = (
        ("pairs kept", settings.kept, (now.kept, now.pairs), (calibrated.kept, calibrated.pairs)),
        # A labelled answer of which nothing says how it ended was judged as one that ended by itself.
        ("answers cut off", settings.cut_off, (now.cut_off, now.answers), (calibrated.cut_off, 2 * calibrated.pairs)),
    )
    for what, limit, (some, of), (before, of_before) in counts:
        if of and of_before:
            share, was = some / of, before / of_before
            low, high = wilson(some, of)
            if abs(share - was) > limit and not low <= was <= high:
                out.append((f"{what}: {share:.0%}, {was:.0%} when calibrated", share, was))
    if now.mean_agreement is not None and calibrated.mean_agreement is not None:
        by = now.mean_agreement - calibrated.mean_agreement
        error = max(now.agreement_sd or 0.0, calibrated.agreement_sd or 0.0) / math.sqrt(now.pairs)
        if abs(by) > settings.agreement and abs(by) > 2 * error:
            was = calibrated.mean_agreement
            said = f"the votes' mean agreement: {now.mean_agreement:.2f}, {was:.2f} when calibrated"
            out.append((said, now.mean_agreement, was))
    longest, shortest = sorted((now.mean_words, calibrated.mean_words), reverse=True)
    if longest > settings.length_ratio * shortest:
        said = f"words an answer: {now.mean_words:.0f}, {calibrated.mean_words:.0f} when calibrated"
        out.append((said, now.mean_words, calibrated.mean_words))
    unlike = "judged pairs are unlike the calibrated ones, so its promise may not hold"
    yield from (Finding(f"{unlike}: {said}", found, was) for said, found, was in out)


def juror(settings: JurorMonitor, history: History) -> Iterator[Finding]:
    """Jurors whose votes weigh nothing although no label says so."""
    for name, weight in history.now.juror_weights.items() if not history.learned else ():
        agreement = history.now.juror_agreement.get(name)
        if weight == 0:
            often = "on no pair" if agreement is None else f"on {agreement:.0%} of the pairs"
            message = (
                f"juror {name} weighs nothing and agrees with the verdict {often}; either it or the others are wrong "
                "(`rlaif judge calibrate` learns weights from labels)"
            )
            yield Finding(message, agreement)
