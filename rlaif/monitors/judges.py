"""Monitors of who judges. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rlaif.config import (
    AbstainedMonitor,
    AnchorsMonitor,
    CalibrationShiftMonitor,
    CutOffWonMonitor,
    DriftMonitor,
    JurorMonitor,
)
from rlaif.intervals import SURE, wilson
from rlaif.monitors.charts import Counted, Direction, shift, surprise, total
from rlaif.monitors.history import Finding, History
from rlaif.records import JudgedStats, PairCounts

TOGETHER = 4
"""Iterations under one text whose pairs are counted together where they are held against a number that was there before
the run: a single iteration's are few."""
_FEW = 16
"""Pairs below which a mean length says nothing."""
_LOOKS_AT_ANCHORS = 2.8
"""Standard deviations: anchors are asked every few iterations only."""
ANCHORS = 8
"""Fewer that got a verdict both times say nothing."""
_MOST = 3
"""Of `TOGETHER` iterations: a fit without labels on one iteration's pairs finds a good juror worthless now and then."""


def cut_off_won(settings: CutOffWonMonitor, history: History) -> Iterator[Finding]:
    """It likes answers without an end."""
    under = [Counted(m.cut_off_won, m.one_cut_off) for m in history.under_this_text[-TOGETHER:]]
    if found := _surely_over(settings.limit, under):
        message = (
            f"the judge prefers answers that were cut off, in {found.some} of {found.of} pairs with one such answer; "
            "with filters.cut_off: keep they train"
        )
        yield Finding(message, found.share, settings.limit)


def _surely_over(limit: float, counts: Sequence[Counted]) -> Counted | None:
    """The last count, or all of them together, where that is over the limit by more than chance does."""
    if not counts or not counts[-1].of:
        return None
    return next((c for c in (counts[-1], total(counts)) if wilson(c.some, c.of, SURE)[0] > limit), None)


def abstained(settings: AbstainedMonitor, history: History) -> Iterator[Finding]:
    """It says nothing."""
    evaluated, most = history.evaluated, settings.limit
    for whose, held_out in (("the judge", evaluated), ("the reference judge", evaluated and evaluated.referred)):
        if evaluated and held_out:
            # Nobody is asked about an answer that is the base policy's.
            asked = Counted(held_out.abstained, evaluated.answers if held_out.asked is None else held_out.asked)
            nothing = held_out.win_rate is None and asked.of  # measured, whatever chance does
            if (nothing and asked.share > most) or _surely_over(most, [asked]):
                message = f"{whose} abstained on {asked.some} of {asked.of} held-out answers, over {most:.0%}"
                yield Finding(message, asked.share, most)
    under = [m.pair_counts for m in history.under_this_text[-TOGETHER:]]
    if under[-1] and (found := _surely_over(most, [Counted(c.abstained, c.pairs) for c in under if c])):
        message = f"{found.some} of {found.of} pairs have no valid vote, over {most:.0%}"
        yield Finding(message, found.share, most)


def agreement_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """Fewer pairs on which all valid votes name one side."""
    what = "pairs on which all votes name one side"
    return _drift(settings, history, what, lambda c: Counted(c.unanimous, _voted(c)), "down")


def order_flip_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """More pairs that the order decides."""
    what = "pairs on which a voice answers otherwise in the other order"
    return _drift(settings, history, what, lambda c: Counted(c.flipped, _voted(c)), "up")


def position_bias_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """On the pairs that the order decides, another slot wins."""
    what = "the slot shown first, preferred where the order decides"
    for direction in ("up", "down"):
        yield from _drift(settings, history, what, leaning_pairs, direction)


def abstained_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """More pairs that get no vote."""
    return _drift(settings, history, "pairs without a valid vote", lambda c: Counted(c.abstained, c.pairs), "up")


def kept_drift(settings: DriftMonitor, history: History) -> Iterator[Finding]:
    """The filters keep another share."""
    for direction in ("up", "down"):
        yield from _drift(settings, history, "pairs kept", lambda c: Counted(c.kept, _voted(c)), direction)


def _voted(counts: PairCounts) -> int:
    """Pairs with a valid vote: an outage is no other judge."""
    return counts.pairs - counts.abstained


def leaning_pairs(counts: PairCounts) -> Counted:
    """Pairs on which the slot shown first is preferred, among those on which either is."""
    return Counted(counts.leans_first, counts.leans_first + counts.leans_second)


def _drift(
    settings: DriftMonitor,
    history: History,
    what: str,
    counted: Callable[[PairCounts], Counted],
    direction: Direction,
) -> Iterator[Finding]:
    """A chart of a share of the pairs. An iteration of before there were such counts says nothing."""
    under = [(m.iteration, m.pair_counts) for m in history.under_this_text if m.pair_counts]
    counts = [counted(c) for _, c in under]
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
    if found and found.pairs >= ANCHORS and wilson(found.moved, found.pairs, _LOOKS_AT_ANCHORS)[0] > settings.limit:
        message = (
            f"asked again, the judge gives another verdict on {found.moved} of {found.pairs} pairs under the same "
            "text: it may be another model now"
        )
        yield Finding(message, found.moved / found.pairs, settings.limit)


def calibration_shift(settings: CalibrationShiftMonitor, history: History) -> Iterator[Finding]:
    """In what the judged pairs are not like those that were calibrated: its promise is about pairs like those. Only
    what is more than chance in so few pairs is told."""
    calibrated = history.calibrated
    if history.now.judged is None or calibrated is None:
        return
    now = _together([m.judged for m in history.under_this_text[-TOGETHER:] if m.judged])
    out: list[tuple[str, float, float]] = []
    counts = (
        ("pairs kept", settings.kept, Counted(now.kept, now.pairs), Counted(calibrated.kept, calibrated.pairs)),
        # A labelled answer of which nothing says how it ended was judged as one that ended by itself.
        (
            "answers cut off",
            settings.cut_off,
            Counted(now.cut_off, now.answers),
            Counted(calibrated.cut_off, 2 * calibrated.pairs),
        ),
    )
    for what, limit, found, before in counts:
        if abs(surprise(found, before)) > SURE and abs(found.share - before.share) > limit:
            said = f"{what}: {found.share:.0%}, {before.share:.0%} when calibrated"
            out.append((said, found.share, before.share))
    if now.mean_agreement is not None and calibrated.mean_agreement is not None:
        by = now.mean_agreement - calibrated.mean_agreement
        agreeing = now.pairs if now.agreeing is None else now.agreeing
        error = max(now.agreement_sd or 0.0, calibrated.agreement_sd or 0.0) / math.sqrt(agreeing)
        if abs(by) > settings.agreement and abs(by) > SURE * error:
            was = calibrated.mean_agreement
            said = f"the votes' mean agreement: {now.mean_agreement:.2f}, {was:.2f} when calibrated"
            out.append((said, now.mean_agreement, was))
    longest, shortest = sorted((now.mean_words, calibrated.mean_words), reverse=True)
    if now.pairs >= _FEW and longest > settings.length_ratio * shortest:
        said = f"words an answer: {now.mean_words:.0f}, {calibrated.mean_words:.0f} when calibrated"
        out.append((said, now.mean_words, calibrated.mean_words))
    unlike = "judged pairs are unlike the calibrated ones, so its promise may not hold"
    yield from (Finding(f"{unlike}: {said}", found, was) for said, found, was in out)


def _together(stats: Sequence[JudgedStats]) -> JudgedStats:
    """The pairs of several iterations as those of one; at least one."""
    pairs, answers = sum(s.pairs for s in stats), sum(s.answers for s in stats)
    agreeing = [
        (s.mean_agreement, s.agreement_sd or 0.0, s.pairs if s.agreeing is None else s.agreeing)
        for s in stats
        if s.mean_agreement is not None
    ]
    of = sum(n for *_, n in agreeing)
    mean = sum(mean * n for mean, _, n in agreeing) / of if of else None
    return JudgedStats(
        pairs=pairs,
        kept=sum(s.kept for s in stats),
        mean_agreement=mean,
        agreement_sd=max((sd for _, sd, _ in agreeing), default=None),
        agreeing=of,
        mean_words=sum(s.mean_words * s.pairs for s in stats) / pairs if pairs else 0.0,
        answers=answers,
        cut_off=sum(s.cut_off for s in stats),
        one_cut_off=sum(s.one_cut_off for s in stats),
    )


def juror(settings: JurorMonitor, history: History) -> Iterator[Finding]:
    """Jurors whose votes weigh nothing, most of the time, although no label says so."""
    recent = history.under_this_text[-TOGETHER:]
    for name, weight in history.now.juror_weights.items() if not history.learned else ():
        without = sum(m.juror_weights.get(name) == 0 for m in recent)
        if weight == 0 and without >= _MOST:
            agreement = history.now.juror_agreement.get(name)
            often = "on no pair" if agreement is None else f"on {agreement:.0%} of the pairs"
            message = (
                f"juror {name} weighed nothing in {without} of the last {len(recent)} iterations, and agrees with the "
                f"verdict {often}; either it or the others are wrong (`rlaif judge calibrate` learns weights from "
                "labels)"
            )
            yield Finding(message, agreement)


def may_tell_of_jurors(history: History) -> bool:
    """Whether enough iterations had weights: before, no silence says anything."""
    return sum(bool(m.juror_weights) for m in history.under_this_text[-TOGETHER:]) >= _MOST
