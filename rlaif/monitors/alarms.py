"""Alarms: what somebody should look at, as records that follow from a run's records. Pure, no torch.

In: the job's `monitors` and a run's `History`. Out: `Alarm`s, in a fixed order. To add a kind: its settings in
`rlaif.config.Monitors`, its name in `rlaif.records.AlarmKind`, a function, and a line in `KINDS`.
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
    "abstained_drift": judges.abstained_drift,
    "kept_drift": judges.kept_drift,
    "anchors": judges.anchors,
    "silent_server": servers.silent_server,
    "leaning": leaning.leaning,
    "hacking": hacking.hacking,
}
"""Kind → what it finds, from its settings and a run so far."""


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
