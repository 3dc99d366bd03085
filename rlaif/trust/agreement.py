"""How far the judge and people say the same about the pairs that people labelled.

In: a run directory. Out: accuracy (Wilson, 95 %) and Cohen's kappa (Cohen 1960) over the pairs on which both name a
side, for all labels and by slice. Where either names none, the pair is counted apart. Reviewed pairs are those that
the filter doubted: the judge's accuracy on them says little about the pairs that it was sure of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rlaif.intervals import wilson
from rlaif.records import Decision, HumanLabel, Record
from rlaif.review.labels import in_force, read_labels
from rlaif.review.queue import readable
from rlaif.rundir.store import RunDir

BANDS = ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0))
"""Of agreement; the upper bound isn't in the band, and 1 is a band of its own."""


class Reviewed(Record):
    """A pair with its label in force and the judge's decision beside it."""

    label: HumanLabel
    decision: Decision
    constitution: str
    """name@version of the text that it was judged under."""


class Agreement(Record):
    """Judge against human on some pairs."""

    slice: str
    """What the pairs have in common: `all`, or a dimension."""
    value: str
    labels: int
    human_ties: int
    judge_undecided: int
    """The person named a side, the judge a tie or nothing."""
    decided: int
    """Both named a side; accuracy and kappa are over these."""
    same: int
    accuracy: float | None
    interval: tuple[float, float]
    kappa: float | None
    """None where it isn't defined: no pair, or one side alone was ever named."""


SLICES: dict[str, Callable[[Reviewed], Sequence[str]]] = {
    "iteration": lambda x: [f"{x.label.iteration + 1:04d}"],
    "constitution": lambda x: [x.constitution],
    "agreement": lambda x: [band(x.decision.verdict.agreement)],
    "sent by": lambda x: [x.decision.review_rule or "unknown"],
    "reason": lambda x: x.decision.reasons or ["none: would have been kept"],
    "author": lambda x: [x.label.author],
}
"""Dimension → the slices that a pair is in. A pair with two reasons is in both."""


def labelled_pairs(run: RunDir) -> tuple[list[Reviewed], tuple[str, ...]]:
    """The pairs with a label in force, in the order of their iterations; and what couldn't be used, a line each."""
    log = read_labels(run)
    # A label that was given under a later text (`replay.on_change: rejudge`) says nothing of the judge's word before.
    wanted = {pair: label for pair, label in in_force(log.labels).items() if label.constitution is None}
    out: list[Reviewed] = []
    problems = list(log.problems)
    for k in run.iterations():
        mine = {pair: label for pair, label in wanted.items() if label.iteration == k}
        if not mine or not run.iteration(k).is_complete("decisions"):
            continue
        sent, plan, damaged = readable(run, k)
        problems += damaged
        if plan is not None:
            text = str(plan.constitution)
            out += [Reviewed(label=mine[d.pair_id], decision=d, constitution=text) for d in sent if d.pair_id in mine]
    lost = sorted(wanted.keys() - {x.label.pair_id for x in out})
    unknown = [f"{run.path}: no pair {pair} was sent to review; its label is left out" for pair in lost]
    return out, (*problems, *unknown)


def agreement(pairs: Sequence[Reviewed]) -> list[Agreement]:
    """All labels first, then slice by slice."""
    out = [measure(pairs, "all", "all")]
    for name, slices_of in SLICES.items():
        values = sorted({value for x in pairs for value in slices_of(x)})
        out += [measure([x for x in pairs if value in slices_of(x)], name, value) for value in values]
    return out


def measure(pairs: Sequence[Reviewed], slice_name: str, value: str) -> Agreement:
    """Accuracy and kappa of some pairs."""
    sided = [x for x in pairs if x.label.outcome in ("first", "second")]
    decided = [x for x in sided if x.decision.verdict.outcome in ("first", "second")]
    human, judge = [x.label.outcome for x in decided], [x.decision.verdict.outcome for x in decided]
    same = sum(a == b for a, b in zip(human, judge, strict=True))
    return Agreement(
        slice=slice_name,
        value=value,
        labels=len(pairs),
        human_ties=sum(x.label.outcome == "tie" for x in pairs),
        judge_undecided=len(sided) - len(decided),
        decided=len(decided),
        same=same,
        accuracy=same / len(decided) if decided else None,
        interval=wilson(same, len(decided)),
        kappa=cohens_kappa(human, judge),
    )


def cohens_kappa(a: Sequence[Any], b: Sequence[Any]) -> float | None:
    """Cohen's kappa of two raters; None where chance alone would give full agreement, and without a pair."""
    if len({*a, *b}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = float(cohen_kappa_score(a, b))
    return kappa if kappa == kappa else None


def band(agreement: float | None) -> str:
    """The band of agreement in words, sortable."""
    if agreement is None:
        return "none"
    return next((f"{low:g} to {high:g}" for low, high in BANDS if low <= agreement < high - 1e-9), "1")
