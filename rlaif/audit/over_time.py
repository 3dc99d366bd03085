"""Several runs side by side: what held-out answers were like over the iterations, mean and spread over seeds.

In: run directories, in groups. Out: an `OverTime` of numbers, and which iterations a group needed to come as far as
another one did. Only metrics.json and plans are read, so it is quick however long the runs are.

To add a measure: a line in `MEASURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from rlaif.audit.curves import Curve, curve_of
from rlaif.errors import RlaifError, UserError
from rlaif.records import EvaluationMetrics, Record, digest
from rlaif.rundir.heads import read_heads
from rlaif.rundir.store import RunDir

Axis = Literal["start", "change"]
"""What iterations are counted from: the first one, or the newest change of text."""
EVEN = 0.5
"""Win rate of the base policy against itself."""


class Measure(NamedTuple):
    """A number about held-out answers."""

    says: str
    """In words, for a heading."""
    of: Callable[[EvaluationMetrics], float | None]
    depends: bool = False
    """On the text that the answers were held against: not to be compared across texts."""
    percent: bool = False


MEASURES: Mapping[str, Measure] = {
    "win_rate": Measure("win rate", lambda e: e.win_rate, depends=True),
    "equal_length": Measure("win rate at equal length", lambda e: e.length_controlled_win_rate, depends=True),
    "reference": Measure(
        "win rate by the reference judge", lambda e: e.referred.win_rate if e.referred else None, depends=True
    ),
    "deciding": Measure(
        "win rate by the deciding voices", lambda e: e.deciding.win_rate if e.deciding else None, depends=True
    ),
    "words": Measure("words", lambda e: e.mean_words),
    "lists": Measure("lists", lambda e: e.list_share, percent=True),
    "ended": Measure("ended", lambda e: e.ended_share, percent=True),
    "kl": Measure("KL/token", lambda e: None if e.kl_by_older_version else e.kl_per_token),
    "relevance": Measure("relevance", lambda e: e.relevance),
    "base_logp": Measure("base logp", lambda e: e.base_logprob_per_token),
    "retained": Measure("probes kept", lambda e: e.retention.kept_share if e.retention else None, percent=True),
    "perplexity": Measure("perplexity against base", lambda e: e.retention.perplexity_ratio if e.retention else None),
    "distinct_2": Measure("distinct-2", lambda e: e.distinct_2),
    "repeated": Measure("repeated lines", lambda e: e.repeated_line_share, percent=True),
}
"""Name, as options have it → measure. A text's checks are measures too: `check:ID`."""
_WIN_RATES = ("win_rate", "equal_length", "reference", "deciding")
CHECK = "check:"


def measure_of(name: str) -> Measure:
    """The measure of a name.

    Raises:
        UserError: there is none.
    """
    if name.startswith(CHECK) and (principle := name.removeprefix(CHECK)):
        return Measure(name, lambda e: e.checks.get(principle), percent=True)
    if name not in MEASURES:
        raise UserError(f"no measure `{name}`; there are {', '.join(MEASURES)}, and {CHECK}ID of a text's check")
    return MEASURES[name]


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
    head: str | None
    """The first head of the run's log that covers it; runs that went apart later have it in common. None in a run
    without heads, and until there is one."""
    values: dict[str, float]
    """By measure; without what wasn't measured or doesn't compare."""


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

    @property
    def changes(self) -> tuple[Change, ...]:
        """Of all its runs, each once."""
        return tuple(dict.fromkeys(change for run in self.runs for change in run.changes))


class Reached(Record):
    """How soon a group came so far."""

    group: str
    after: int | None
    """Iterations at the first evaluation where the group's mean is there; None: at none of them."""
    not_after: int | None
    """The evaluation before that one, which isn't there yet; None where the first one is."""
    runs: tuple[int | None, ...]
    """The same for each of its runs."""


class Reach(Record):
    """Where the groups are measured against one of them."""

    measure: str
    group: str
    """Whose end is the aim."""
    share: float
    """Of the way from that group's first value to its last."""
    start: float
    end: float
    aim: float
    reached: tuple[Reached, ...]


class OverTime(Record):
    """Groups of runs over their iterations."""

    axis: Axis
    measures: tuple[str, ...]
    groups: tuple[Group, ...]


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
        made.append(Group(name=name, runs=of_runs, points=_points(of_runs), shared=shared))
    return OverTime(axis=axis, measures=tuple(measures), groups=tuple(made))


def reach(found: OverTime, group: str, measure: str, share: float) -> Reach:
    """Which evaluations of each group are the first to be as far as `share` of the way that one group went: from its
    first value (of a win rate: one half) to its last.

    What was before the axis begins is no part of it: a policy may have been there under another text. Nor is a group's
    mean over some of its runs, as of seeds that haven't gone as far as others.

    Raises:
        UserError: no such group, or it has no such way.
    """
    named = {g.name: g for g in found.groups}
    if group not in named:
        raise UserError(f"no group `{group}`; there are {', '.join(named)}")
    way = _means(named[group], measure)
    if not way:
        raise UserError(f"group `{group}`: no evaluation at which all of its runs have a {measure}")
    start = EVEN if measure in _WIN_RATES else way[0][1]
    if way[-1][1] == start:
        raise UserError(f"group `{group}`: its {measure} didn't move, so nothing can be held against it")
    end = way[-1][1]
    aim = start + share * (end - start)

    def there(value: float) -> bool:
        return value >= aim if end > start else value <= aim

    reached = []
    for g in found.groups:
        means = _means(g, measure)
        first = _first(means, there)
        before = [after for after, _ in means if first is not None and after < first]
        each = tuple(
            _first([(e.after, e.values[measure]) for e in run.evaluations if _is_on(e, measure)], there)
            for run in g.runs
        )
        reached.append(Reached(group=g.name, after=first, not_after=before[-1] if before else None, runs=each))
    return Reach(measure=measure, group=group, share=share, start=start, end=end, aim=aim, reached=tuple(reached))


def _means(group: Group, measure: str) -> list[tuple[int, float]]:
    """What a group's runs have on average from where the axis begins, after so many iterations."""
    points = [(p.after, p.values[measure]) for p in group.points if _is_on(p, measure)]
    return [(after, spread.mean) for after, spread in points if spread.runs == len(group.runs)]


def _is_on(point: GroupPoint | Evaluated, measure: str) -> bool:
    return point.after >= 0 and measure in point.values


def _first(values: Sequence[tuple[int, float]], there: Callable[[float], bool]) -> int | None:
    return next((after for after, value in values if there(value)), None)


class _Covered(NamedTuple):
    """What a run's heads cover."""

    iterations: dict[str, int]
    """Head → how many iterations were done."""
    evaluations: dict[str, str]
    """File of an evaluation's metrics → the first head that covers it."""


def _covered(run: RunDir) -> _Covered:
    heads = [head for head in read_heads(run.path) if head is not None]
    return _Covered(
        {head.head: head.iteration + 1 for head in heads},
        {name: head.head for head in heads for name in head.files if name.startswith("evaluations/")},
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
        values = {name: m.of(e) for name, m in measures.items() if not (m.depends and other)}
        made.append(
            Evaluated(
                after=e.updates - zero,
                updates=e.updates,
                constitution=str(e.constitution),
                head=covered.evaluations.get(f"evaluations/{e.updates:04d}/metrics.json"),
                values={name: value for name, value in values.items() if value is not None},
            )
        )
    return RunOverTime(
        run=str(run.path),
        seed=run.header["job"].get("seed"),
        changes=tuple(Change(after=c.iteration - zero, constitution=c.constitution) for c in changed),
        evaluations=tuple(sorted(made, key=lambda e: e.after)),
    )


def _points(runs: Sequence[RunOverTime]) -> tuple[GroupPoint, ...]:
    at: dict[int, dict[str, list[tuple[str, float]]]] = {}
    for run in runs:
        for e in run.evaluations:
            made = f"{e.head}/{e.updates}" if e.head else run.run
            for name, value in e.values.items():
                at.setdefault(e.after, {}).setdefault(name, []).append((made, value))
    return tuple(
        GroupPoint(after=after, values={name: _spread(values) for name, values in at[after].items()})
        for after in sorted(at)
    )


def _spread(found: Sequence[tuple[str, float]]) -> Spread:
    """Of what each run has: which evaluation it is, and the number."""
    values = [*dict(found).values()]
    return Spread(
        runs=len(found),
        evaluations=len(values),
        mean=fmean(values),
        sd=stdev(values) if len(values) > 1 else None,
        low=min(values),
        high=max(values),
    )
