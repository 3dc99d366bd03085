"""Alarms: what somebody should look at, as records that follow from the numbers. Pure, no torch.

In: the limits of the job's `monitors`, metrics of an iteration and of an evaluation. Out: `Alarm`s, in a fixed order.
To add one: a kind in `rlaif.records.AlarmKind`, a limit in `rlaif.config.Monitors`, a line here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from rlaif.config import Monitors
from rlaif.intervals import wilson
from rlaif.records import Alarm, AlarmKind, EvaluationMetrics, IterationMetrics, JudgedStats


class Finding(NamedTuple):
    """An alarm without its iteration and what the run does about it."""

    kind: AlarmKind
    message: str
    measured: float | None = None
    limit: float | None = None


def alarms(
    limits: Monitors,
    metrics: IterationMetrics,
    evaluation: EvaluationMetrics | None,
    calibrated: JudgedStats | None = None,
    learned: bool = False,
) -> list[Alarm]:
    """What somebody should look at. `calibrated` are the labelled pairs of the calibration that is in force; the juror
    weights are `learned` from labels, or fitted without any."""
    found = [
        *_sampled(limits, metrics),
        *_hand_over(limits, metrics, evaluation),
        *_judged(limits, metrics, evaluation),
    ]
    if calibrated is not None and metrics.judged is not None:
        found += shifted(limits, metrics.judged, calibrated)
    if not learned:
        found += doubtful_jurors(metrics)
    action = "stop" if limits.stop_on_alarm else "warn"
    return [Alarm(iteration=metrics.iteration, action=action, **f._asdict()) for f in found]


def _sampled(limits: Monitors, metrics: IterationMetrics) -> Iterator[Finding]:
    """About the answers alone."""
    sampled = metrics.sampled
    if sampled.mean_words < (least := limits.min_mean_words):
        message = f"sampled answers have {sampled.mean_words:.1f} words on average, under {least:g}"
        yield Finding("short_answers", message, sampled.mean_words, least)
    if sampled.distinct_share < limits.min_distinct_share:
        message = f"only {sampled.distinct_share:.0%} of the sampled answers are distinct"
        yield Finding("equal_answers", message, sampled.distinct_share, limits.min_distinct_share)
    if (cut := 1 - sampled.ended_share) > (most := limits.max_cut_off_share):
        message = (
            f"the length limit cut off {cut:.0%} of the sampled answers, over {most:.0%}: raise "
            "sampling.max_tokens, or ask for shorter answers"
        )
        yield Finding("cut_off", message, cut, most)


def _hand_over(limits: Monitors, metrics: IterationMetrics, evaluation: EvaluationMetrics | None) -> Iterator[Finding]:
    """About whether one policy is trained, sampled and evaluated, and how far it went."""
    limit = limits.max_weights_gap
    for gap, of in ((metrics.weights_gap, "sampled"), (evaluation.weights_gap if evaluation else None, "evaluated")):
        if gap is not None and not gap.within(limit):
            message = (
                f"the policy that was {of} is {gap.mean:.3f} nats a token from the one that is trained "
                f"({gap.sampler}; typically {gap.typical:.3f}, at worst {gap.worst:.2f}), over "
                f"monitors.max_weights_gap={limit:g}"
            )
            yield Finding("weights_gap", message, gap.mean, limit)
    decoding = metrics.decoding_gap
    if decoding is not None and not decoding.within(limit):
        message = (
            f"answers as they were sampled are {decoding.mean:.3f} nats a token from what the policy that is trained "
            f"says of them ({decoding.answers} answers; typically {decoding.typical:.3f}, at worst "
            f"{decoding.worst:.2f}), over monitors.max_weights_gap={limit:g}"
        )
        yield Finding("decoding_gap", message, decoding.mean, limit)
    kl = evaluation.kl_per_token if evaluation else None
    if kl is not None and limits.max_kl is not None and kl > limits.max_kl:
        message = f"KL from the base policy is {kl:.2f} nats a token, over {limits.max_kl:g}"
        yield Finding("kl", message, kl, limits.max_kl)


def _judged(limits: Monitors, metrics: IterationMetrics, evaluation: EvaluationMetrics | None) -> Iterator[Finding]:
    """About the judge."""
    won, of = metrics.cut_off_won, metrics.one_cut_off
    if of and wilson(won, of)[0] > limits.max_cut_off_won:
        message = (
            f"the judge prefers answers that were cut off, in {won} of {of} pairs with one such answer; with "
            "filters.cut_off: keep they train"
        )
        yield Finding("cut_off_won", message, won / of, limits.max_cut_off_won)
    if evaluation and evaluation.abstained > limits.max_abstained_share * evaluation.answers:
        some, most = f"{evaluation.abstained} of {evaluation.answers}", limits.max_abstained_share
        message = f"the judge abstained on {some} held-out answers, over {most:.0%}"
        yield Finding("abstained", message, evaluation.abstained / evaluation.answers, most)


def shifted(limits: Monitors, now: JudgedStats, calibrated: JudgedStats) -> list[Finding]:
    """In what the judged pairs are not like those that were calibrated: its promise is about pairs like those. Only
    what is more than chance in so few pairs is told."""
    out: list[tuple[str, float, float]] = []
    counts = (
        ("pairs kept", limits.max_kept_shift, (now.kept, now.pairs), (calibrated.kept, calibrated.pairs)),
        # A labelled answer of which nothing says how it ended was judged as one that ended by itself.
        (
            "answers cut off",
            limits.max_cut_off_shift,
            (now.cut_off, now.answers),
            (calibrated.cut_off, 2 * calibrated.pairs),
        ),
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
        if abs(by) > limits.max_agreement_shift and abs(by) > 2 * error:
            was = calibrated.mean_agreement
            said = f"the votes' mean agreement: {now.mean_agreement:.2f}, {was:.2f} when calibrated"
            out.append((said, now.mean_agreement, was))
    longest, shortest = sorted((now.mean_words, calibrated.mean_words), reverse=True)
    if longest > limits.max_length_ratio * shortest:
        said = f"words an answer: {now.mean_words:.0f}, {calibrated.mean_words:.0f} when calibrated"
        out.append((said, now.mean_words, calibrated.mean_words))
    unlike = "judged pairs are unlike the calibrated ones, so its promise may not hold"
    return [Finding("calibration_shift", f"{unlike}: {said}", found, was) for said, found, was in out]


def doubtful_jurors(metrics: IterationMetrics) -> list[Finding]:
    """Jurors whose votes weigh nothing although no label says so."""
    out = []
    for juror, weight in metrics.juror_weights.items():
        agreement = metrics.juror_agreement.get(juror)
        if weight == 0:
            often = "on no pair" if agreement is None else f"on {agreement:.0%} of the pairs"
            message = (
                f"juror {juror} weighs nothing and agrees with the verdict {often}; either it or the others are wrong "
                "(`rlaif judge calibrate` learns weights from labels)"
            )
            out.append(Finding("juror", message, agreement))
    return out
