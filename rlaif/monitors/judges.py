"""Monitors of who judges. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlaif.config import AbstainedMonitor, CalibrationShiftMonitor, CutOffWonMonitor, JurorMonitor
from rlaif.intervals import wilson
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
