"""Which text was in force when, what each change did to old pairs, and when held-out answers followed.

In: a run directory. Out: a `TextLog`, one `TextInForce` for each stretch of iterations under one text. A change whose
texts or old pairs can't be read has None there, and `problems` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlaif.audit.curves import EVEN, at_change
from rlaif.config import Replay
from rlaif.constitutions.constitution import Change, Constitution, diff
from rlaif.constitutions.copies import constitution_copy
from rlaif.errors import RlaifError
from rlaif.learning.replay_set import UNDER_IT, members, standing_of
from rlaif.records import AgainstBase, EvaluationMetrics, OldPair, OnChange, Plan, Record
from rlaif.review.labels import labels_noted, read_labels
from rlaif.rundir.store import RunDir, read_record


class OldPairs(Record):
    """What a change of text did to the kept pairs of earlier iterations: as its first iteration found them, and, where
    pairs waited to be judged again, as the later ones did."""

    expired: int
    """Can't be replayed any more: they were judged under another text, by questions that this one doesn't ask."""
    unknown: int = 0
    """Were judged under another text, and no iteration has looked at what this one makes of them: the run replays none,
    or is from before iterations did."""
    valid_again: int
    """Were judged under this text when it was in force before, and may be replayed again."""
    max_age: int
    """`replay.max_age`: pairs of older iterations are in no count, with or without a change."""
    share: float
    """`replay.share`; with 0 the run replays nothing, so a change costs it nothing."""
    on_change: OnChange | None = None
    """`replay.on_change` of the run; None where no iteration looked, and the counts below are 0."""
    kept: int = 0
    """May be replayed as they were: all that was asked about them is asked again, or was judged again to the same
    end."""
    turned: int = 0
    """May be replayed with the other side chosen."""
    dropped: int = 0
    """The filters keep them no longer."""
    stale: int = 0
    """May be replayed as they were judged, drawn more rarely (`on_change: keep`)."""
    waiting: int = 0
    """Are still to be judged again (`replay.rejudge`)."""
    rejudged: int = 0
    """Of these, those that the judge was asked about again ..."""
    ballots: int = 0
    """... and the ballots that were cast for them."""


class Measured(Record):
    """A held-out evaluation of the policy under a text."""

    iterations: int
    """That ended under the text before it."""
    win_rate: float
    win_interval: tuple[float, float]
    """95 %."""


class Behaviour(Record):
    """What the held-out answers of an evaluation under a text are like, whoever wins."""

    iterations: int
    """That ended under the text before it."""
    mean_words: float
    checks: dict[str, float]
    """Principle of the text → share of the answers that pass its check."""


class Followed(Record):
    """Whether and when held-out answers followed a text.

    They do at the first evaluation under it whose win rate against the base policy has its 95 % interval above one
    half. Nobody is asked between evaluations, so the answer lies between two of them.
    """

    at_change: Measured | None = None
    """The policy that the text found, under it: where following begins. It says nothing of having followed. None for
    the first text, and where it wasn't measured."""

    evaluations: int
    """Under this text, from its first iteration on, with a win rate."""
    first: Measured | None
    """The one that shows it; None: not yet, or never measured."""
    not_after: int | None
    """Iterations behind the evaluation before `first`, which doesn't show it yet. None where `first` is the first: the
    policy may have answered so before the change."""
    newest: Measured | None
    """The last of them: what was followed once may be lost again."""
    behaviour: tuple[Behaviour, ...] = ()
    """At the first evaluation under it, whoever judged, and at the last. A win rate is against the base policy, which
    may have answered so by itself; this shows where the policy moves."""


class TextInForce(Record):
    """A text over consecutive iterations."""

    since: int
    """Its first iteration, from 0."""
    until: int
    """Its last one that was begun, from 0."""
    names: tuple[str, ...]
    """name@version; several where the same content was in force under several names."""
    hash: str
    changes: tuple[Change, ...] | None
    """From the text before it; None for the first."""
    old_pairs: OldPairs | None
    """None for the first."""
    followed: Followed


class TextLog(Record):
    """The texts of a run, in the order in which they were in force."""

    run: str
    texts: tuple[TextInForce, ...]
    problems: tuple[str, ...]


def text_log(run: RunDir) -> TextLog:
    """Which text was in force when, and what each change did.

    Raises:
        RlaifError: a plan or an evaluation's metrics are damaged.
    """
    evaluations = [p for k in run.evaluations() if (p := run.evaluation(k).path / "metrics.json").exists()]
    measured = [read_record(p, EvaluationMetrics) for p in evaluations]
    replay = run.job().replay
    problems: list[str] = []
    texts: list[TextInForce] = []
    for plans in _stretches(_plans(run)):
        since, until, text = plans[0].iteration, plans[-1].iteration, plans[0].constitution.hash
        changes, old = None, None
        if texts:
            try:
                changes = tuple(diff(_text(run, texts[-1].hash), _text(run, text)))
            except RlaifError as e:
                problems.append(f"{e}; what changed in iteration {since + 1} isn't known")
            try:
                old = _old_pairs(run, plans, replay, text)
            except (RlaifError, OSError) as e:
                problems.append(f"{e}; what the change in iteration {since + 1} did to old pairs isn't known")
        texts.append(
            TextInForce(
                since=since,
                until=until,
                names=tuple(dict.fromkeys(str(p.constitution) for p in plans)),
                hash=text,
                changes=changes,
                old_pairs=old,
                followed=followed(since, until, text, measured, at_change(run, since)),
            )
        )
    return TextLog(run=str(run.path), texts=tuple(texts), problems=tuple(dict.fromkeys(problems)))


def followed(
    since: int,
    until: int,
    text: str,
    evaluations: Sequence[EvaluationMetrics],
    found_by_it: AgainstBase | None = None,
) -> Followed:
    """When held-out answers followed a text (its hash) that was in force in the iterations `since` to `until`, from 0.

    The evaluation at the change is none of them: it is of the policy before it, under the text before it. What its
    answers win under the new one is `found_by_it`.
    """
    mine = [
        e
        for e in sorted(evaluations, key=lambda e: e.updates)
        if since < e.updates <= until + 1 and e.constitution.hash == text
    ]
    under = [found for e in mine if (found := _measured(e.updates - since, e)) is not None]
    at = next((n for n, m in enumerate(under) if m.win_interval[0] > EVEN), None)
    return Followed(
        at_change=_measured(0, found_by_it) if found_by_it else None,
        evaluations=len(under),
        first=None if at is None else under[at],
        not_after=under[at - 1].iterations if at else None,
        newest=under[-1] if under else None,
        behaviour=tuple(
            Behaviour(iterations=e.updates - since, mean_words=e.mean_words, checks=e.checks)
            for e in (*mine[:1], *mine[1:][-1:])
        ),
    )


def _measured(iterations: int, found: AgainstBase | EvaluationMetrics) -> Measured | None:
    """None without a win rate."""
    if found.win_rate is None or found.win_interval is None:
        return None
    return Measured(iterations=iterations, win_rate=found.win_rate, win_interval=found.win_interval)


def _plans(run: RunDir) -> list[Plan]:
    """Of all iterations that were begun; the newest may not have its plan yet."""
    begun = run.iterations()
    if begun and not (run.iteration(begun[-1]).path / "plan.json").exists():
        begun.pop()
    return [run.plan(k).in_force for k in begun]


def _stretches(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Consecutive plans under one content, as the loop tells a change: by hash."""
    out: list[list[Plan]] = []
    for plan in plans:
        if out and out[-1][-1].constitution.hash == plan.constitution.hash:
            out[-1].append(plan)
        else:
            out.append([plan])
    return out


def _text(run: RunDir, digest: str) -> Constitution:
    """The run's copy of a text.

    Raises:
        RlaifError: it is gone or damaged.
    """
    try:
        return constitution_copy(run, digest)
    except FileNotFoundError as e:
        raise RlaifError(f"{e.filename}: the run's copy of a text is gone") from e


def _old_pairs(run: RunDir, plans: Sequence[Plan], replay: Replay, now: str) -> OldPairs:
    """What the iterations under a text made of older pairs; with the labels that the first of them had."""
    k = plans[0].iteration
    here = run.iteration(k)
    size = labels_noted(here).get("size", 0) if here.is_complete("preferences") else None
    found = members(run, k, now, replay.max_age, read_labels(run, size))
    old = [m for m in found.values() if not m.relabelled]
    logged: dict[str, OldPair] = {}
    ballots: dict[str, int] = {}
    for plan in plans:
        made = run.iteration(plan.iteration)
        for row in made.read("old_pairs", OldPair) if made.is_complete("old_pairs") else ():
            logged[row.pair_id] = row
            ballots[row.pair_id] = ballots.get(row.pair_id, 0) + row.asked
    standing = Counter(standing_of(m.row, logged.get(m.row.pair_id, m.about), now) for m in old)
    del standing[UNDER_IT]
    return OldPairs(
        expired=standing.pop("expired", 0),
        valid_again=sum(m.row.constitution == now for m in old),
        max_age=replay.max_age,
        share=replay.share,
        on_change=replay.on_change if logged else None,
        rejudged=sum(n > 0 for n in ballots.values()),
        ballots=sum(ballots.values()),
        **standing,
    )
