"""Several runs side by side: what held-out answers were like over the iterations, mean and spread over seeds.

In: run directories, in groups. Out: an `OverTime` of numbers. Only metrics.json and plans are read, so it is quick
however long the runs are. How soon a group came as far as another one: `rlaif.audit.reach`.

To add a measure: a line in `MEASURES`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from rlaif.audit.curves import Curve, TextChange, at_change, curve_of
from rlaif.console import counted
from rlaif.errors import RlaifError, UserError
from rlaif.intervals import wilson
from rlaif.records import LENGTH_UNKNOWN, AgainstBase, EvaluationMetrics, LengthUnknown, Record, digest
from rlaif.rundir.heads import read_heads
from rlaif.rundir.store import RunDir

Axis = Literal["start", "change"]
"""What iterations are counted from: the first one, or the newest change of text."""
Interval = tuple[float, float]


def _no_error(e: EvaluationMetrics) -> float | None:
    return None


def _standard_error(interval: Interval) -> float:
    """What a 95 % interval says of it."""
    return (interval[1] - interval[0]) / (2 * 1.960)


def _by_interval(of: Callable[[EvaluationMetrics], Interval | None]) -> Callable[[EvaluationMetrics], float | None]:
    """The standard error that a 95 % interval says."""

    def error(e: EvaluationMetrics) -> float | None:
        interval = of(e)
        return _standard_error(interval) if interval else None

    return error


def _by_answers(of: Callable[[EvaluationMetrics], float | None]) -> Callable[[EvaluationMetrics], float | None]:
    """The standard error of a share of the answers; too small where a prompt has several."""

    def interval(e: EvaluationMetrics) -> Interval | None:
        share = of(e)
        return None if share is None else wilson(share * e.answers, e.answers)

    return _by_interval(interval)


class Measure(NamedTuple):
    """A number about held-out answers."""

    says: str
    """In words, for a heading."""
    of: Callable[[EvaluationMetrics], float | None]
    depends: bool = False
    """On the text that the answers were held against: not to be compared across texts."""
    percent: bool = False
    error: Callable[[EvaluationMetrics], float | None] = _no_error
    """Its standard error over the held-out prompts, which are the same for every seed; None where nothing says it."""
    unknown: Callable[[EvaluationMetrics], LengthUnknown | None] = lambda e: None
    """Why an evaluation can't tell it."""
    is_aim: bool = True
    """Whether moving it can be what training is for. Of the others less change is better, or none."""


def _win_rate(says: str, of: Callable[[EvaluationMetrics], AgainstBase | EvaluationMetrics | None]) -> Measure:
    """By somebody's word, who may not have been asked."""

    def won(e: EvaluationMetrics) -> float | None:
        found = of(e)
        return found.win_rate if found else None

    def interval(e: EvaluationMetrics) -> Interval | None:
        found = of(e)
        return found.win_interval if found else None

    return Measure(says, won, depends=True, error=_by_interval(interval))


MEASURES: Mapping[str, Measure] = {
    "win_rate": _win_rate("win rate", lambda e: e),
    "equal_length": Measure(
        "win rate at equal length",
        lambda e: e.length_controlled_win_rate,
        depends=True,
        error=_by_interval(lambda e: e.length_controlled_interval),
        unknown=lambda e: e.length_controlled_unknown,
    ),
    "reference": _win_rate("win rate by the reference judge", lambda e: e.referred),
    "deciding": _win_rate("win rate by the deciding voices", lambda e: e.deciding),
    "words": Measure("words", lambda e: e.mean_words),
    "lists": Measure("lists", lambda e: e.list_share, percent=True, error=_by_answers(lambda e: e.list_share)),
    "ended": Measure("ended", lambda e: e.ended_share, percent=True, error=_by_answers(lambda e: e.ended_share)),
    "kl": Measure(
        "KL/token",
        lambda e: None if e.kl_by_older_version else e.kl_per_token,
        error=_by_interval(lambda e: e.kl_interval),
        is_aim=False,
    ),
    "relevance": Measure("relevance", lambda e: e.relevance, is_aim=False),
    "base_logp": Measure("base logp", lambda e: e.base_logprob_per_token, is_aim=False),
    "retained": Measure(
        "probes kept",
        lambda e: e.retention.kept_share if e.retention else None,
        percent=True,
        error=_by_interval(lambda e: e.retention.kept_interval if e.retention else None),
        is_aim=False,
    ),
    "perplexity": Measure(
        "perplexity against base",
        lambda e: e.retention.perplexity_ratio if e.retention else None,
        error=_by_interval(lambda e: e.retention.perplexity_ratio_interval if e.retention else None),
        is_aim=False,
    ),
    "distinct_2": Measure("distinct-2 in 100", lambda e: e.distinct_2_in_100, is_aim=False),
    "repeated": Measure("repeated lines", lambda e: e.repeated_line_share, percent=True, is_aim=False),
}
"""Name, as options have it → measure. A text's checks are measures too: `check:ID`."""
CHECK = "check:"


def measure_of(name: str) -> Measure:
    """The measure of a name.

    Raises:
        UserError: there is none.
    """
    if name.startswith(CHECK) and (principle := name.removeprefix(CHECK)):

        def passed(e: EvaluationMetrics) -> float | None:
            return e.checks.get(principle)

        return Measure(name, passed, depends=True, percent=True, error=_by_answers(passed))
    if name not in MEASURES:
        raise UserError(f"no measure `{name}`; there are {', '.join(MEASURES)}, and {CHECK}ID of a text's check")
    return MEASURES[name]


CELLS = (
    "Mean ± standard deviation between runs (so many; what they share counts once; `2 of 3 runs`: the others have no "
    "such number then). Of a single one: its standard error (se) over the held-out prompts, which are the same for all"
)
"""What `Group.cell` says, for people."""


def plain(value: float) -> str:
    """A number with digits that say something."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


class Change(Record):
    """A text came into force."""

    after: int
    """So many iterations, on the axis of the comparison."""
    constitution: str


class Evaluated(Record):
    """One evaluation of one run."""

    after: int
    """So many iterations, on the axis of the comparison."""
    updates: int
    """So many iterations of the run."""
    constitution: str
    constitution_hash: str
    head: str | None
    """The first head of the run's log that covers it; runs that went apart later have it in common. None in a run
    without heads, and until there is one."""
    values: dict[str, float]
    """By measure; without what wasn't measured or doesn't compare."""
    errors: dict[str, float]
    """By measure, its standard error over the held-out prompts, where one is known."""
    unknown: dict[str, LengthUnknown]
    """By measure, why the evaluation can't tell it."""


class RunOverTime(Record):
    """One run's evaluations."""

    run: str
    seed: int | None
    changes: tuple[Change, ...]
    evaluations: tuple[Evaluated, ...]


class Spread(Record):
    """A number over a group's runs. An evaluation that several of them share counts once."""

    runs: int
    """That have it."""
    evaluations: int
    """That were made: fewer where runs share a past."""
    mean: float
    sd: float | None
    """Between these evaluations; None of a single one."""
    error: float | None
    """Standard error of the mean: over the held-out prompts, which the runs have in common, or between the evaluations,
    whichever is larger. None where nothing says either."""
    low: float
    high: float


class GroupPoint(Record):
    """A group after so many iterations."""

    after: int
    values: dict[str, Spread]


class SharedPast(Record):
    """Runs of a group that went apart after some iterations: branches of one run, or one and its branch."""

    runs: tuple[str, ...]
    iterations: int

    def in_words(self, group: str) -> str:
        """For people."""
        first = "first iteration" if self.iterations == 1 else f"first {self.iterations} iterations"
        return (
            f"{group}: {', '.join(self.runs)} share their {first}; an evaluation of these counts once, and what came "
            "after is less independent than runs with seeds of their own"
        )


class Group(Record):
    """Runs that are one thing tried several times."""

    name: str
    runs: tuple[RunOverTime, ...]
    points: tuple[GroupPoint, ...]
    shared: tuple[SharedPast, ...]
    """Its runs that aren't independent of each other."""

    def texts_at(self, after: int) -> list[str]:
        """The texts under which its answers of then were judged."""
        return [*dict.fromkeys(e.constitution for run in self.runs for e in run.evaluations if e.after == after)]

    def cell(self, point: GroupPoint, name: str, number: Callable[[float], str], missing: str) -> str:
        """A measure of it, for people (`CELLS`); `number` writes a value."""
        spread = point.values.get(name)
        if spread is None:
            return "unknown" if self.is_unknown(name, point.after) else missing
        mean = number(spread.mean)
        if spread.sd is None:
            mean += "" if spread.error is None else f" (se {number(spread.error)})"
        else:
            mean += f" ± {number(spread.sd)}"
        if spread.runs < len(self.runs):
            return f"{mean} ({spread.runs} of {len(self.runs)} runs)"
        return mean if spread.sd is None else f"{mean} ({spread.evaluations})"

    def is_unknown(self, measure: str, after: int) -> bool:
        """None of its runs could tell it then, and one says why."""
        return any(measure in e.unknown for run in self.runs for e in run.evaluations if e.after == after)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Of all its runs, each once."""
        return tuple(dict.fromkeys(change for run in self.runs for change in run.changes))


class OverTime(Record):
    """Groups of runs over their iterations."""

    axis: Axis
    measures: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def unknown(self) -> list[str]:
        """What some evaluations couldn't tell, and why, for people."""
        made = [e for group in self.groups for run in group.runs for e in run.evaluations]
        why = {name: Counter(e.unknown[name] for e in made if name in e.unknown) for name in self.measures}
        return [
            f"{measure_of(name).says} is unknown in {counted(reasons.total(), 'evaluation')}: "
            + "; ".join(f"{LENGTH_UNKNOWN[reason]} ({n})" for reason, n in reasons.most_common())
            for name, reasons in why.items()
            if reasons
        ]


def grouped(runs: Iterable[RunDir]) -> dict[str, list[RunDir]]:
    """Runs whose jobs differ in the seed and the name alone, together; a group is called by its first run."""
    groups: dict[str, list[RunDir]] = {}
    for run in runs:
        job = {key: value for key, value in run.header["job"].items() if key not in ("seed", "name")}
        groups.setdefault(digest(job), []).append(run)
    out: dict[str, list[RunDir]] = {}
    for members in groups.values():
        name = members[0].path.name
        out[name if name not in out else str(members[0].path)] = members
    return out


def over_time(groups: Mapping[str, Sequence[RunDir]], axis: Axis, measures: Sequence[str]) -> OverTime:
    """Groups of runs over their iterations.

    Counted from the newest change of text, a run without a change counts from its start: a policy that was trained
    under that text from the beginning is what others are held against. A win rate or a check is then taken under the
    newest text alone.

    Raises:
        UserError: a run without an evaluation, or no such measure.
        RlaifError: a plan or an evaluation's metrics are damaged.
    """
    chosen = {name: measure_of(name) for name in measures}
    curves = {name: [_curve(run) for run in runs] for name, runs in groups.items()}
    _refuse_unknown_checks(measures, [curve for some in curves.values() for curve in some])
    made = []
    for name, runs in groups.items():
        covered = [_covered(run) for run in runs]
        of_runs = tuple(
            _of_run(run, curve, by, axis, chosen) for run, curve, by in zip(runs, curves[name], covered, strict=True)
        )
        shared = _shared([run.path.name for run in runs], covered)
        made.append(Group(name=name, runs=of_runs, points=points_of(of_runs), shared=shared))
    return OverTime(axis=axis, measures=tuple(measures), groups=tuple(made))


class _Covered(NamedTuple):
    """What a run's heads cover."""

    iterations: dict[str, int]
    """Head → how many iterations were done."""
    metrics: dict[str, str]
    """File of an iteration's or evaluation's metrics → the first head that covers it."""


def _covered(run: RunDir) -> _Covered:
    heads = [head for head in read_heads(run.path) if head is not None]
    return _Covered(
        {head.head: head.iteration + 1 for head in heads},
        {name: head.head for head in heads for name in head.files if name.endswith("/metrics.json")},
    )


def _shared(names: Sequence[str], covered: Sequence[_Covered]) -> tuple[SharedPast, ...]:
    """Which runs have a past in common, and how far: their newest common head."""
    sharing: dict[tuple[str, ...], int] = {}
    for head, iterations in (item for one in covered for item in one.iterations.items()):
        runs = tuple(name for name, one in zip(names, covered, strict=True) if head in one.iterations)
        if len(runs) > 1:
            sharing[runs] = max(iterations, sharing.get(runs, 0))
    return tuple(SharedPast(runs=runs, iterations=iterations) for runs, iterations in sharing.items())


def _curve(run: RunDir) -> Curve:
    curve = curve_of(run)
    if curve.problems:  # a mean without one of its runs would be another number
        raise RlaifError(curve.problems[0])
    if not curve.evaluations:
        raise UserError(f"{run.path}: no evaluation in it yet; the first one is made before the first update")
    return curve


def _refuse_unknown_checks(measures: Iterable[str], curves: Sequence[Curve]) -> None:
    known = sorted({f"{CHECK}{principle}" for curve in curves for e in curve.evaluations for principle in e.checks})
    if unknown := [name for name in measures if name.startswith(CHECK) and name not in known]:
        there = f"there are {', '.join(known)}" if known else "none of their texts has a check"
        raise UserError(f"--measure {unknown[0]}: no run has a check of this name; {there}")


def _of_run(run: RunDir, curve: Curve, covered: _Covered, axis: Axis, measures: Mapping[str, Measure]) -> RunOverTime:
    changed = curve.changes[1:]
    zero = changed[-1].iteration if changed and axis == "change" else 0
    newest = changed[-1].hash if changed else None
    made = []
    for e in curve.evaluations:
        # The evaluation at a change is of the policy before it, held against the text before it.
        other = axis == "change" and newest is not None and e.constitution.hash != newest
        compared = {name: m for name, m in measures.items() if not (m.depends and other)}
        made.append(
            Evaluated(
                after=e.updates - zero,
                updates=e.updates,
                constitution=str(e.constitution),
                head=covered.metrics.get(f"evaluations/{e.updates:04d}/metrics.json"),
                constitution_hash=e.constitution.hash,
                values={name: value for name, m in compared.items() if (value := m.of(e)) is not None},
                errors={name: error for name, m in compared.items() if (error := m.error(e)) is not None},
                unknown={name: reason for name, m in compared.items() if (reason := m.unknown(e)) is not None},
            )
        )
    if axis == "change" and changed and (found := _at_change(run, changed[-1], covered, measures)) is not None:
        made.append(found)
    return RunOverTime(
        run=str(run.path),
        seed=run.header["job"].get("seed"),
        changes=tuple(Change(after=c.iteration - zero, constitution=c.constitution) for c in changed),
        evaluations=tuple(sorted(made, key=lambda e: e.after)),
    )


def _at_change(run: RunDir, change: TextChange, covered: _Covered, measures: Mapping[str, Measure]) -> Evaluated | None:
    """What the policy that a text found wins under it, beside the evaluation of the same answers under the text before;
    None where that isn't measured, or nobody asks for it."""
    found = at_change(run, change.iteration)
    if found is None or found.win_rate is None or "win_rate" not in measures:
        return None
    return Evaluated(
        after=0,
        updates=change.iteration,
        constitution=str(found.constitution),
        constitution_hash=found.constitution.hash,
        head=covered.metrics.get(f"iterations/{change.iteration:04d}/metrics.json"),
        unknown={},
        values={"win_rate": found.win_rate},
        errors={} if found.win_interval is None else {"win_rate": _standard_error(found.win_interval)},
    )


def points_of(runs: Sequence[RunOverTime]) -> tuple[GroupPoint, ...]:
    """What runs have together after so many iterations."""
    at: dict[int, dict[str, dict[str, list[Evaluated]]]] = {}
    for run in runs:
        for e in run.evaluations:
            made, here = f"{e.head}/{e.updates}" if e.head else run.run, at.setdefault(e.after, {})
            for name in e.values:
                here.setdefault(name, {}).setdefault(made, []).append(e)
    return tuple(
        GroupPoint(after=after, values={name: _spread(name, [*found.values()]) for name, found in at[after].items()})
        for after in sorted(at)
    )


def _spread(measure: str, found: Sequence[Sequence[Evaluated]]) -> Spread:
    """Of evaluations, each as often as runs share it."""
    each = [same[0] for same in found]
    values = [e.values[measure] for e in each]
    sd = stdev(values) if len(values) > 1 else None
    over_prompts = [e.errors[measure] for e in each if measure in e.errors]
    # Each run is asked about the same prompts, so their luck with these is one: its error is no smaller in a mean.
    errors = [fmean(over_prompts)] if over_prompts else []
    errors += [] if sd is None else [sd / math.sqrt(len(values))]
    return Spread(
        runs=sum(map(len, found)),
        evaluations=len(values),
        mean=fmean(values),
        sd=sd,
        error=max(errors, default=None),
        low=min(values),
        high=max(values),
    )
