"""Alarms: what somebody should look at, as records that follow from a run's records. Pure, no torch.

In: the job's `monitors` and a run's `History`. Out: `Alarm`s, in a fixed order. To add a kind: its settings in
`rlaif.config.Monitors`, its name in `rlaif.records.AlarmKind`, a function, and a line in `KINDS`; where it looks at
what not every iteration has, another in `_SOMETIMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rlaif.config import Monitors
from rlaif.monitors import answers, hacking, judges, leaning, policies, servers
from rlaif.monitors.history import Finding, History
from rlaif.records import Alarm, AlarmKind

KINDS: dict[AlarmKind, Callable[[Any, History], Iterable[Finding]]] = {
    "short_answers": answers.short_answers,
    "equal_answers": answers.equal_answers,
    "cut_off": answers.cut_off,
    "weights_gap": policies.weights_gap,
    "decoding_gap": policies.decoding_gap,
    "kl": policies.kl,
    "cut_off_won": judges.cut_off_won,
    "abstained": judges.abstained,
    "calibration_shift": judges.calibration_shift,
    "juror": judges.juror,
    "collapse": answers.collapse,
    "jump": answers.jump,
    "self_praise": answers.self_praise,
    "agreement_drift": judges.agreement_drift,
    "order_flip_drift": judges.order_flip_drift,
    "position_bias_drift": judges.position_bias_drift,
    "abstained_drift": judges.abstained_drift,
    "kept_drift": judges.kept_drift,
    "anchors": judges.anchors,
    "silent_server": servers.silent_server,
    "leaning": leaning.leaning,
    "hacking": hacking.hacking,
}
"""Kind → what it finds, from its settings and a run so far."""


_SOMETIMES: dict[AlarmKind, Callable[[History], object]] = {
    "weights_gap": lambda run: run.now.weights_gap or (run.evaluated and run.evaluated.weights_gap),
    "decoding_gap": lambda run: run.now.decoding_gap,
    "kl": lambda run: run.evaluated and run.evaluated.kl_per_token is not None,
    "cut_off_won": lambda run: run.now.one_cut_off,
    "abstained": lambda run: run.now.pair_counts and run.now.pair_counts.pairs,
    "calibration_shift": lambda run: run.calibrated and run.now.judged,
    "juror": judges.may_tell_of_jurors,
    "position_bias_drift": lambda run: run.now.pair_counts and judges.leaning_pairs(run.now.pair_counts).of,
    "anchors": lambda run: run.now.anchors and run.now.anchors.pairs >= judges.ANCHORS,
    "silent_server": lambda run: run.now.servers,
    "leaning": lambda run: any(leaning.pairs for leaning in run.now.leanings.values()),
    "hacking": lambda run: run.evaluated and run.evaluated.win_rate is not None,
    **dict.fromkeys(
        ("agreement_drift", "order_flip_drift", "abstained_drift", "kept_drift"),
        lambda run: run.now.pair_counts and run.now.pair_counts.pairs,
    ),
}
"""Kind → whether there was something to look at, for those that look at what not every iteration has."""


def silent(monitors: Monitors, kind: AlarmKind, history: History) -> bool:
    """Whether a kind had something to look at after the iteration that `history` ends with, and found nothing: who
    didn't look can't say that all was well."""
    looked = _SOMETIMES[kind](history) if kind in _SOMETIMES else history.sampled
    return bool(looked) and not any(KINDS[kind](getattr(monitors, kind), history))


def alarms(monitors: Monitors, history: History) -> list[Alarm]:
    """What somebody should look at after the iteration that `history` ends with."""
    out = []
    for kind, find in KINDS.items():
        settings = getattr(monitors, kind)
        if settings.action != "off":
            found = find(settings, history)
            k = history.now.iteration
            out += [Alarm(kind=kind, iteration=k, action=settings.action, **f._asdict()) for f in found]
    return out
