"""How soon groups of runs came as far as one of them ended up.

In: an `OverTime`. Out: a `Reach`: the aim with its standard error, and from which evaluation on each group is there.
Evaluations are noisy, so a group is there where it stays: that one of many lies past the aim is often luck (of eight
over 48 prompts that are flat at .70 with an aim of .74, nine times in ten).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from rlaif.audit.curves import EVEN
from rlaif.audit.over_time import CHECK, Group, OverTime, RunOverTime, Spread, measure_of, plain, points_of
from rlaif.errors import UserError
from rlaif.records import Record

_WIN_RATES = ("win_rate", "equal_length", "reference", "deciding")
_SURE = 1.960
_ENDS = 2
"""The aim is taken from so many last evaluations: one alone is noise, and by more the group was still on its way."""


class Came(Record):
    """How soon something came so far."""

    after: int | None
    """Iterations at the evaluation from which on it is there, to its last one; None: it isn't there at its last."""
    not_after: int | None
    """The last evaluation at which it isn't there; None where it is at all of them."""
    there: int
    """So many evaluations, up to the last, are there. One alone may be luck."""
    evaluations: int
    """So many were held against the aim: those that have the measure, under the aim's text if it depends on it."""

    @property
    def in_words(self) -> str:
        """When it was there, for people."""
        if not self.evaluations:
            return "nothing to compare"
        return "never" if self.after is None else str(self.after)


class Reached(Came):
    """How soon a group's mean came so far."""

    group: str
    runs: tuple[Came, ...]
    """The same for each of its runs."""


class Reach(Record):
    """Where the groups are measured against one of them."""

    measure: str
    group: str
    """Whose end is the aim."""
    share: float
    """Of the way from `start` to `end`."""
    start: float
    """A win rate begins at one half and a check at 0. Other measures begin where the other groups stand at the change
    of text that iterations are counted from, or else at the group's own first value."""
    end: float
    """The mean of its last evaluations."""
    ends: tuple[int, ...]
    """Iterations at these: the last two under the text of the last one, or this one alone."""
    constitution: str | None
    """The text that all evaluations here were held against; None for a measure that depends on none."""
    way_error: float | None
    """Standard error of the way's length; None where nothing says it."""
    aim: float
    aim_error: float | None
    """Its standard error; None where nothing says it."""
    reached: tuple[Reached, ...]

    @property
    def weaknesses(self) -> list[str]:
        """Why being there may say little, for people."""
        out = []
        if self.way_error is not None and abs(self.end - self.start) < _SURE * self.way_error:
            out.append("the way is no longer than chance makes one, so being there may say nothing")
        if any(r.group == self.group and r.evaluations and r.not_after is None for r in self.reached):
            out.append(f"`{self.group}` is there at each of its evaluations, so it needn't have learned that")
        return out

    def in_words(self, number: Callable[[float], str]) -> str:
        """What the aim is, for people; `number` writes a value of the measure."""
        under = f" under {self.constitution}" if self.constitution else ""
        after = " and ".join(map(str, self.ends))
        error = "standard error not known" if self.aim_error is None else f"standard error {number(self.aim_error)}"
        return (
            f"{self.share:.0%} of the way of `{self.group}`, from {number(self.start)} to {number(self.end)} (its mean "
            f"after {after}{under}), is {number(self.aim)} ({error})"
        )


def reach(found: OverTime, group: str, measure: str, share: float) -> Reach:
    """From which evaluation on each group is as far as `share` of the way to where one group ends: the mean of its last
    two evaluations under the text of the last one. `Reach.start` says where the way begins.

    What was before the axis begins is no part of it: a policy may have been there under another text. Nor is a group's
    mean over some of its runs, as of seeds that haven't gone as far as others. A measure that depends on the text is
    held against the aim under the aim's text alone.

    Raises:
        UserError: no such group, or it has no such way.
    """
    if not measure_of(measure).is_aim:
        raise UserError(
            f"{measure} is no aim: how soon others are as far says nothing; take a win rate, words or a check"
        )
    named = {g.name: g for g in found.groups}
    if group not in named:
        raise UserError(f"no group `{group}`; there are {', '.join(named)}")
    aimed = named[group]
    whole = _way(aimed.runs, measure)
    if not whole:
        raise UserError(f"group `{group}`: no evaluation at which all of its runs have a {measure}")
    texts = _texts_at(aimed, whole[-1][0])
    text = None
    if measure_of(measure).depends:
        if len(texts) > 1:
            raise UserError(
                f"group `{group}`: its runs end under {' and '.join(sorted(texts.values()))}, and a {measure} "
                "under one text says nothing about another; make a group of each, as NAME=RUN"
            )
        (text,) = texts
    way = _way(aimed.runs, measure, text)
    known = EVEN if measure in _WIN_RATES else 0.0 if measure.startswith(CHECK) else None
    at_change = None if known is not None else _at_change(found, aimed, measure)
    start = None if known is not None else at_change or way[0][1]
    later = [(after, spread) for after, spread in way if after > 0 and spread is not start]
    ends = [(after, spread) for after, spread in later if _texts_at(aimed, after) == texts][-_ENDS:]
    origin = start.mean if start else known or 0.0
    end = fmean(spread.mean for _, spread in ends) if ends else None
    if end is None or end == origin:
        raise UserError(f"group `{group}`: its {measure} didn't move, so nothing can be held against it")
    if measure in _WIN_RATES and end < EVEN:
        raise UserError(
            f"group `{group}`: its {measure} ends at {plain(end)}, below one half: by it the policy became worse than "
            "the base policy, and being there would be being as bad; take another group or measure"
        )
    aim = origin + share * (end - origin)

    def there(value: float) -> bool:
        return value >= aim if end > origin else value <= aim

    def came(runs: Sequence[RunOverTime]) -> Came:
        return when_there([(after, spread.mean) for after, spread in _way(runs, measure, text)], there)

    return Reach(
        measure=measure,
        group=group,
        share=share,
        start=origin,
        end=end,
        ends=tuple(after for after, _ in ends),
        constitution=None if text is None else texts[text],
        aim=aim,
        way_error=_error(start, [spread for _, spread in ends], 1.0, 1.0),
        aim_error=_error(start, [spread for _, spread in ends], 1.0 - share, share),
        reached=tuple(
            Reached(group=g.name, **dict(came(g.runs)), runs=tuple(came([run]) for run in g.runs)) for g in found.groups
        ),
    )


def _at_change(found: OverTime, aimed: Group, measure: str) -> Spread | None:
    """Where the other groups stand at the change of text that iterations are counted from; None without one."""
    others = [run for group in found.groups if group.name != aimed.name for run in group.runs]
    changed = [run for run in others if any(change.after == 0 for change in run.changes)]
    if found.axis != "change" or not changed:
        return None
    return next((spread for after, spread in _way(changed, measure) if after == 0), None)


def _way(runs: Sequence[RunOverTime], measure: str, text: str | None = None) -> list[tuple[int, Spread]]:
    """What runs have together from where the axis begins, after so many iterations; under one text, where it is named.
    What some of them don't have is no part of it."""
    held = [
        run.model_copy(
            update={
                "evaluations": tuple(e for e in run.evaluations if e.after >= 0 and text in (None, e.constitution_hash))
            }
        )
        for run in runs
    ]
    points = [(p.after, p.values[measure]) for p in points_of(held) if measure in p.values]
    return [(after, spread) for after, spread in points if spread.runs == len(runs)]


def _texts_at(group: Group, after: int) -> dict[str, str]:
    """The texts under which its answers of then were judged: hash → name."""
    return {e.constitution_hash: e.constitution for run in group.runs for e in run.evaluations if e.after == after}


def when_there(way: Sequence[tuple[int, float]], there: Callable[[float], bool]) -> Came:
    """From which evaluation on values are there. `way`: iterations and value of each, in order."""
    away = [after for after, value in way if not there(value)]
    stays = [after for after, _ in way if not away or after > away[-1]]
    return Came(
        after=stays[0] if stays else None,
        not_after=away[-1] if away else None,
        there=len(stays),
        evaluations=len(way),
    )


def _error(start: Spread | None, ends: Sequence[Spread], of_start: float, of_ends: float) -> float | None:
    """Of so much of a start (None: one that is known exactly) and so much of the mean of some ends. The ends are about
    the same prompts by the same runs, so their errors are taken for one."""
    errors = [spread.error for spread in ends if spread.error is not None]
    start_error = 0.0 if start is None else start.error
    if start_error is None or len(errors) < len(ends):
        return None
    return math.hypot(of_start * start_error, of_ends * fmean(errors))
