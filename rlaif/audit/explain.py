"""A decision in words: rule by rule, what was found and what was asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rlaif.config import Filters, Job
from rlaif.judging import filters as rules
from rlaif.judging.calibration import EVERYTHING, Asked, Calibration, score_of
from rlaif.records import (
    Completion,
    Decision,
    Reason,
    Record,
    Verdict,
    Vote,
)


class RuleLine(Record):
    """One rule's word on a pair."""

    name: Reason
    value: str
    threshold: str
    passed: bool
    sentence: str


def rule_lines(
    decision: Decision,
    votes: Sequence[Vote],
    settings: Filters,
    calibration: Calibration | None = None,
    first: Completion | None = None,
    second: Completion | None = None,
    category: str | None = None,
    job: Job | None = None,
) -> tuple[RuleLine, ...]:
    """Rule by rule: what was found, what was asked for, and whether the decision names it as a reason.

    `category` is the prompt's: the slice of a calibration. `job` is the run's: how its judge was asked.
    """
    verdict = decision.verdict
    lines = [_line("identical", _same(first, second), "two different texts", decision)]
    if decision.source == "data":  # nobody voted
        return tuple(lines)
    names: list[Reason] = [*rules.VALIDITY] if calibration else [*rules.RULES]
    # A rule that spoke, by a run whose calibration isn't here any more, is still shown.
    names += [r for r in decision.reasons if r not in names and r not in ("identical", "uncalibrated")]
    for name in names:
        value, threshold = rule_in_words(name, verdict, settings)
        if name in decision.said:
            value, threshold = decision.said[name], "nothing to say against it"
        lines.append(_line(name, value, threshold, decision))
    if calibration or "uncalibrated" in decision.reasons:
        ends = (first.finish_reason if first else None, second.finish_reason if second else None)
        asked = Asked.by(job, ends) if job else None
        value, threshold = _calibrated(calibration, verdict, votes, settings, category or EVERYTHING, asked)
        lines.append(_line("uncalibrated", value, threshold, decision))
    if settings.cut_off == "drop" or "cut_off" in decision.reasons:
        lines.append(
            _line("cut_off", _cut(first, second), "a winner that ended by itself, or two that didn't", decision)
        )
    return tuple(lines)


def _cut(first: Completion | None, second: Completion | None) -> str:
    if first is None or second is None:
        return "whether an answer was cut off is not in the log"
    names = [name for name, c in (("first", first), ("second", second)) if c.cut_off]
    return f"cut off by the length limit: {' and '.join(names) or 'none'}"


def _line(name: Reason, value: str, threshold: str, decision: Decision) -> RuleLine:
    passed = name not in decision.reasons
    sentence = f"{value}; asked for: {threshold}" if passed else f"{value}, but asked for: {threshold}"
    return RuleLine(name=name, value=value, threshold=threshold, passed=passed, sentence=sentence)


def _same(first: Completion | None, second: Completion | None) -> str:
    if first is None or second is None:
        return "the texts are not in the log"
    return "the texts are equal" if first.text.strip() == second.text.strip() else "the texts differ"


def rule_in_words(name: str, verdict: Verdict, settings: Filters) -> tuple[str, str]:
    """A rule's value and threshold, in words."""
    lost, all_votes = verdict.abstained_of
    p = verdict.p_first
    against = {"first": verdict.guard_second, "second": verdict.guard_first}.get(verdict.outcome, 0)
    texts: dict[str, tuple[str, str]] = {
        "too_few_votes": (f"{verdict.valid_votes} valid votes", f"at least {max(settings.min_votes, 1)}"),
        "abstained": (
            f"{lost} of {all_votes} votes abstained"
            + (f", {verdict.guard_missing} guards have no valid vote" if verdict.guard_missing else ""),
            f"at most {settings.max_abstention_share:.0%} of the votes",
        ),
        "tie": (f"the verdict is {verdict.outcome}", "a winner"),
        "guard": (
            f"{against} guard votes against the winner",
            "none" if settings.guards else "nothing (filters.guards is off)",
        ),
        "order_flip": (
            "a voice gave another answer when the order changed" if verdict.order_flip else "no voice flipped",
            "the same answer in both orders",
        ),
        "low_agreement": (
            "no agreement without a vote" if verdict.agreement is None else f"agreement {verdict.agreement:.3f}",
            f"at least {settings.min_agreement:g}",
        ),
        "low_margin": (
            "no p(first) without a vote" if p is None else f"|p(first) - 0.5| = {abs(p - 0.5):.3f}",
            f"at least {settings.min_margin:g}",
        ),
    }
    return texts.get(name, ("", ""))


def _calibrated(
    calibration: Calibration | None,
    verdict: Verdict,
    votes: Sequence[Vote],
    settings: Filters,
    slice_name: str,
    asked: Asked | None,
) -> tuple[str, str]:
    if calibration is None:
        return "the run's calibration is not in the log", "a calibrated judge"
    if votes and (difference := calibration.mismatch(votes, settings, asked=asked)):
        return difference, "the votes that were calibrated"
    threshold = calibration.threshold_for(slice_name)
    if threshold is None:
        return f"the prompt is of slice {slice_name}", f"a calibrated slice ({', '.join(calibration.slices)})"
    value = score_of(verdict, calibration.score, threshold.map)
    least = "nothing passes" if threshold.threshold is None else f"at least {threshold.threshold:g}"
    of_slice = "" if EVERYTHING in calibration.slices else f" in slice {slice_name}"
    return f"{calibration.score} {value:.3f}", f"{least}{of_slice}"
