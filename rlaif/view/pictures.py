"""A run's pictures as geometry: what `templates/picture.html` draws as SVG, on the page and in the report. Pure.

In: a run's numbers (`Facts`). Out: a `Picture` each. Colours are CSS classes, so that light and dark are the style
sheet's matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, get_args

from rlaif.audit.curves import Curve
from rlaif.audit.over_time import OverTime, measure_of, plain
from rlaif.audit.overview import IterationRow
from rlaif.intervals import share
from rlaif.records import AgainstBase, DropReason, EvaluationMetrics
from rlaif.view.facts import Facts

WIDTH, HEIGHT = 440, 214
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 22, 34
MOST_POINTS = 300
"""More steps than this are shown as means of equal stretches."""
MOST_LABELS = 4
"""More changes of text than this are marked without their names."""
STYLES = 6
"""Lines that can be told apart."""
BESIDE = 5
"""Between a mark and its label."""
LETTER = 6.5
"""Width of a label's letter, at most on average; a browser's font isn't known here."""
APART = 5
"""Between intervals of two series at one place."""

Format = Callable[[float], str]
Spot = tuple[float, float]
"""x and y in data units."""
Interval = tuple[float, float, float]
"""x, low, high."""

_OTHERS: Mapping[str, Callable[[EvaluationMetrics], AgainstBase | None]] = {
    "by the voices that train": lambda e: e.deciding,
    "by the reference judge": lambda e: e.referred,
}
"""Who else judges held-out answers, where a job asks them."""


def percent(value: float) -> str:
    """0.25 → 25 %."""
    return f"{value:.0%}".replace("%", " %")


def decimals(digits: int) -> Format:
    """A format with so many digits after the point."""
    return lambda value: f"{value:.{digits}f}"


@dataclass(frozen=True)
class Point:
    """A dot, and what it says when pointed at."""

    x: float
    y: float
    says: str


@dataclass(frozen=True)
class Line:
    """A series: dots in a colour and shape of its own, joined by a line."""

    name: str
    style: int
    points: tuple[Point, ...]
    bars: tuple[tuple[float, float, float], ...] = ()
    """Intervals: x, top, bottom."""
    dots: bool = True
    breaks: tuple[float, ...] = ()
    """Not joined across these x: the values on both sides don't compare."""

    @property
    def path(self) -> str:
        """The SVG path through the points."""
        starts = [i for i in range(len(self.points)) if i == 0 or self._broken(self.points[i - 1].x, self.points[i].x)]
        return " ".join(f"{'M' if i in starts else 'L'}{p.x:.1f} {p.y:.1f}" for i, p in enumerate(self.points))

    def _broken(self, before: float, after: float) -> bool:
        return any(before < x < after for x in self.breaks)


@dataclass(frozen=True)
class Bar:
    """One part of a stack."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    says: str


@dataclass(frozen=True)
class Mark:
    """A vertical line: another text is in force from here on."""

    x: float
    label: str
    says: str
    end: bool
    """The label stands left of the line, for want of room."""
    page: str = ""
    """Address of the page about that text, after `Site.base`."""


@dataclass
class Picture:
    """One picture in SVG units, from the top left; `latest` and `says` are its content in words."""

    key: str
    title: str
    x_label: str
    latest: str = ""
    says: str = ""
    """For those who don't see it."""
    empty: str = ""
    """Why there is nothing to draw."""
    note: str = ""
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    """What the parts of a stack are called."""
    marks: list[Mark] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    reference: float | None = None
    """Height of a line to compare with."""

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    beside = BESIDE


class _Scale:
    """Data units → SVG units."""

    def __init__(self, x: Spot, y: Spot) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def nice(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low to high, at most about `most` of them; the first and last enclose both ends."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def pictures(facts: Facts) -> list[Picture]:
    """All pictures of a run."""
    iterations, evaluations = facts.overview.iterations, facts.evaluations
    # The first text is no change.
    changes = [_Change(c.iteration + 0.5, c.constitution, page=f"/constitutions/{c.hash}")
               for c in facts.overview.changes[1:]]  # fmt: skip
    ends = [*(r.iteration + 1 for r in iterations), *(e.updates for e in evaluations), 1]
    time = _Time("iteration", 0, max(ends), changes)
    over_time = _OverTime(iterations, evaluations, time)
    return [
        _kept(facts.parts, time),
        *over_time.of_the_judge(),
        *over_time.of_the_answers(),
        _loss(facts.losses, changes),
    ]


def side_by_side(curves: Sequence[Curve]) -> list[Picture]:
    """Several runs over the same axes: how their held-out answers moved, and where each one's text changed."""
    turns: dict[float, dict[str, list[str]]] = {}
    for curve in curves:
        for change in curve.changes[1:]:
            turns.setdefault(change.iteration + 0.5, {}).setdefault(change.constitution, []).append(curve.run)
    changes = [
        _Change(at, " / ".join(names), who="; ".join(f"{name} in {', '.join(of)}" for name, of in names.items()))
        for at, names in sorted(turns.items())
    ]
    time = _Time("iteration", 0, max([1, *(e.updates for c in curves for e in c.evaluations)]), changes)

    def series(get: Callable[[EvaluationMetrics], float | None]) -> dict[str, list[Spot]]:
        return {c.run: _held_out(c.evaluations, get) for c in curves}

    def intervals(get: Callable[[EvaluationMetrics], Spot | None]) -> dict[str, list[Interval]]:
        return {c.run: _intervals(c.evaluations, get) for c in curves}

    made = [
        _line_picture(
            "win-rate",
            "Win rate against base",
            series(lambda e: e.win_rate),
            time,
            intervals=intervals(lambda e: e.win_interval),
            write=percent,
            y_range=(0, 1),
            reference=0.5,
            breaks={c.run: [change.iteration + 0.5 for change in c.changes[1:]] for c in curves},
            note="held-out answers, 95 % interval; each judged under its run’s text in force",
            empty="nothing was judged against the base policy yet",
        ),
        _line_picture(
            "length",
            "Mean length of a held-out answer, words",
            series(lambda e: e.mean_words),
            time,
            write=decimals(1),
            empty="no evaluation yet",
        ),
        _line_picture(
            "kl",
            "KL from base, a token",
            series(lambda e: None if e.kl_by_older_version else e.kl_per_token),
            time,
            intervals=intervals(lambda e: e.kl_interval),
            write=decimals(3),
            note="nats; 95 % interval",
            empty="not measured (eval.kl_prompts: 0)",
        ),
    ]
    if any(e.retention for c in curves for e in c.evaluations):
        made.append(
            _line_picture(
                "retention",
                "Probes kept, of those that the base policy passed",
                series(lambda e: e.retention.kept_share if e.retention else None),
                time,
                intervals=intervals(lambda e: e.retention.kept_interval if e.retention else None),
                write=percent,
                y_range=(0, 1),
                note="95 % interval; no judge",
                empty="not measured (eval.retention)",
            )
        )
    return made


def of_groups(found: OverTime) -> list[Picture]:
    """Groups of runs over the same axes, a picture for each measure: means, and bars from the lowest run to the
    highest."""
    turns: dict[int, dict[str, list[str]]] = {}
    for group in found.groups:
        for change in group.changes:
            turns.setdefault(change.after, {}).setdefault(change.constitution, []).append(group.name)
    changes = [
        _Change(at, " / ".join(names), who="; ".join(f"{name} in {', '.join(of)}" for name, of in names.items()))
        for at, names in sorted(turns.items())
    ]
    after = [e.after for group in found.groups for run in group.runs for e in run.evaluations]
    label = "iterations since the change" if found.axis == "change" else "iteration"
    time = _Time(label, min(after), max(max(after), min(after) + 1), changes)
    made = []
    for name in found.measures:
        measure = measure_of(name)
        spread = {g.name: [(p.after, p.values[name]) for p in g.points if name in p.values] for g in found.groups}
        made.append(
            _line_picture(
                name.replace(":", "-"),
                measure.says,
                {group: [(x, s.mean) for x, s in points] for group, points in spread.items()},
                time,
                # Between runs: a single one has no such interval.
                intervals={g: [(x, s.low, s.high) for x, s in of if s.evaluations > 1] for g, of in spread.items()},
                # A number that depends on the text isn't joined across a change of it.
                breaks={g.name: [c.after + 0.5 for c in g.changes] for g in found.groups} if measure.depends else None,
                write=percent if measure.percent else plain,
                empty="not measured",
            )
        )
    return made


def _held_out(evaluations: Sequence[EvaluationMetrics], get: Callable[[EvaluationMetrics], float | None]) -> list[Spot]:
    return [(e.updates, value) for e in evaluations if (value := get(e)) is not None]


def _intervals(
    evaluations: Sequence[EvaluationMetrics], get: Callable[[EvaluationMetrics], Spot | None]
) -> list[Interval]:
    return [(e.updates, *ends) for e in evaluations if (ends := get(e)) is not None]


def _probes_kept(e: EvaluationMetrics, kind: str) -> float | None:
    """Share of a kind's probes that the base policy passed and this one, too."""
    counts = e.retention.by_kind.get(kind) if e.retention else None
    return share(counts.kept, counts.base_passed) if counts else None


@dataclass(frozen=True)
class _OverTime:
    """The lines over iterations: what each shows, and what it says where there is nothing to show."""

    iterations: Sequence[IterationRow]
    evaluations: Sequence[EvaluationMetrics]
    time: _Time

    def of_the_judge(self) -> Iterator[Picture]:
        """What the judge says, and how far it agrees with itself."""
        rates = {"held-out answers": self._held_out(lambda e: e.win_rate)}
        intervals = {"held-out answers": _intervals(self.evaluations, lambda e: e.win_interval)}
        for name, by in _OTHERS.items():
            if said := [(e.updates, other) for e in self.evaluations if (other := by(e))]:
                rates[name] = [(at, other.win_rate) for at, other in said if other.win_rate is not None]
                intervals[name] = [(at, *other.win_interval) for at, other in said if other.win_interval is not None]
        yield _line_picture(
            "win-rate",
            "Win rate against base",
            rates,
            self.time,
            intervals=intervals,
            write=percent,
            y_range=(0, 1),
            reference=0.5,
            breaks={name: [change.at for change in self.time.changes] for name in rates},
            note="95 % interval; judged under the text in force",
            empty="nothing was judged against the base policy yet",
        )
        yield self._line(
            "agreement",
            "Agreement of the judge’s voices",
            {"mean over pairs": self._each(lambda r: r.agreement)},
            write=percent,
            y_range=(0, 1),
            note="agreement is not correctness",
            empty="no verdict yet",
        )
        yield self._line(
            "position-bias",
            "Position bias",
            {"votes for the slot shown first": self._each(lambda r: r.position_bias)},
            write=percent,
            y_range=(0, 1),
            reference=0.5,
            note="50 % is none",
            empty="not measured: no voice was asked in both orders",
        )

    def of_the_answers(self) -> Iterator[Picture]:
        """What is measured without a judge."""
        yield self._line(
            "length",
            "Mean length of an answer, words",
            {
                # Sampled by the policy that the iteration started from.
                "sampled for training": self._each(lambda r: r.mean_words, shift=0),
                "held out": self._held_out(lambda e: e.mean_words),
            },
            write=decimals(1),
            empty="no answer yet",
        )
        yield self._line(
            "kl",
            "KL from base, a token",
            {
                "answers at temperature 1": self._held_out(lambda e: None if e.kl_by_older_version else e.kl_per_token),
                "estimate of an older version": self._held_out(
                    lambda e: e.kl_per_token if e.kl_by_older_version else None
                ),
            },
            intervals=_intervals(self.evaluations, lambda e: e.kl_interval),
            write=decimals(3),
            note=_about_kl(self.evaluations),
            empty="not measured (eval.kl_prompts: 0)" if self.evaluations else "no evaluation yet",
        )
        yield self._line(
            "sanity",
            "Sanity, nats a token",
            {
                "relevance to the prompt": self._held_out(lambda e: e.relevance),
                "−log p under the base policy": self._held_out(lambda e: -e.base_logprob_per_token),
            },
            write=decimals(2),
            empty="no evaluation yet",
        )
        kinds = sorted({kind for e in self.evaluations if e.retention for kind in e.retention.by_kind})
        if kinds:
            yield self._line(
                "retention",
                "Probes kept, of those that the base policy passed",
                {
                    "all": self._held_out(lambda e: e.retention.kept_share if e.retention else None),
                    **{kind: self._held_out(lambda e, kind=kind: _probes_kept(e, kind)) for kind in kinds},  # type: ignore[misc]
                },
                intervals=_intervals(self.evaluations, lambda e: e.retention.kept_interval if e.retention else None),
                write=percent,
                y_range=(0, 1),
                note="95 % interval of all; no judge",
                empty="no evaluation yet",
            )
        checks = sorted({name for e in self.evaluations for name in e.checks})
        yield self._line(
            "checks",
            "Checks that held-out answers pass",
            {name: self._held_out(lambda e, name=name: e.checks.get(name)) for name in checks},  # type: ignore[misc]
            write=percent,
            y_range=(0, 1),
            note="mechanical, never a training label",
            empty="no principle has a check" if self.evaluations else "no evaluation yet",
        )

    def _line(
        self, key: str, title: str, series: dict[str, list[Spot]], intervals: Sequence[Interval] = (), **more: Any
    ) -> Picture:
        """`intervals` are the first series' own."""
        return _line_picture(key, title, series, self.time, intervals=dict.fromkeys([*series][:1], intervals), **more)

    def _each(self, get: Callable[[IterationRow], float | None], shift: int = 1) -> list[Spot]:
        return [(r.iteration + shift, value) for r in self.iterations if (value := get(r)) is not None]

    def _held_out(self, get: Callable[[EvaluationMetrics], float | None]) -> list[Spot]:
        return _held_out(self.evaluations, get)


def _about_kl(evaluations: Sequence[EvaluationMetrics]) -> str:
    if any(e.kl_by_older_version for e in evaluations):
        return "older estimates are off by temperature and top-p, even in their sign"
    last = evaluations[-1] if evaluations else None
    if last is None or last.kl_per_completion is None or not last.kl_answers:
        return "nats; 95 % interval"
    return f"nats; 95 % interval; {last.kl_per_completion:.1f} an answer in the last evaluation"


@dataclass(frozen=True)
class _Change:
    """A text comes into force."""

    at: float
    """Where on the axis."""
    name: str
    who: str = ""
    """Of several runs, which text in which."""
    page: str = ""


@dataclass(frozen=True)
class _Time:
    """The axis that all pictures of a kind share, with its changes of text."""

    label: str
    low: float
    high: float
    changes: list[_Change]

    def ticks(self) -> list[float]:
        whole = [t for t in nice(self.low, self.high, 8) if t == int(t)]
        return [t for t in whole if self.low <= t <= self.high]

    def marks(self, scale: _Scale) -> Iterator[Mark]:
        named = len(self.changes) <= MOST_LABELS
        for change in self.changes:
            x = scale.x(change.at)
            says = f"in force from here on: {change.who or change.name}"
            end = x > LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
            room = (x if end else WIDTH - x) - BESIDE
            yield Mark(x, _within(change.name, room) if named else "", says, end, change.page)


def _within(name: str, room: float) -> str:
    """A label that is no wider than `room`; what a mark says when pointed at has all of it."""
    most = int(room / LETTER)
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def _line_picture(
    key: str,
    title: str,
    series: dict[str, list[Spot]],
    time: _Time,
    *,
    write: Format,
    empty: str,
    y_range: Spot | None = None,
    intervals: Mapping[str, Sequence[Interval]] | None = None,
    reference: float | None = None,
    note: str = "",
    dots: bool = True,
    breaks: Mapping[str, Sequence[float]] | None = None,
) -> Picture:
    """Lines over time; `intervals` and `breaks`, where a line isn't joined, are by series."""
    styles = {name: n % STYLES for n, name in enumerate(series)}  # one without a value here keeps its own elsewhere
    series = {name: [s for s in spots if math.isfinite(s[1])] for name, spots in series.items()}
    series = {name: spots for name, spots in series.items() if spots}
    if not series:
        return Picture(key, title, time.label, empty=empty)
    intervals = {name: bars for name, bars in (intervals or {}).items() if name in series and bars}
    breaks = breaks or {}
    values = [y for spots in series.values() for _, y in spots]
    values += [y for bars in intervals.values() for _, *ends in bars for y in ends]
    heights = nice(*(y_range or (min(0, *values, 0), max(values))))
    scale = _Scale((time.low, time.high), (heights[0], heights[-1]))
    lines = []
    for n, (name, spots) in enumerate(series.items()):
        mine = {x: (low, high) for x, low, high in intervals.get(name, ()) if low < high}
        # Intervals of several series at the same place stand side by side.
        apart = APART * (n - (len(series) - 1) / 2) if len(intervals) > 1 else 0
        places = {x: scale.x(x) + (apart if x in mine else 0) for x, _ in spots}
        lines.append(
            Line(
                name,
                styles[name],
                tuple(Point(places[x], scale.y(y), f"{name}, {time.label} {x:g}: {write(y)}") for x, y in spots),
                tuple((places[x], scale.y(high), scale.y(low)) for x, (low, high) in mine.items() if x in places),
                dots,
                tuple(scale.x(x) for x in breaks.get(name, ())),
            )
        )
    last = {name: write(spots[-1][1]) for name, spots in series.items()}
    # Of several series none is the one to name.
    latest = list(last.values())[-1] if len(last) == 1 else ""
    if intervals and latest:
        _, low, high = next(iter(intervals.values()))[-1]
        latest += f" ({write(low).removesuffix(' %')}–{write(high)})"
    says = "; ".join(
        f"{name}: {write(spots[0][1])} at {time.label} {spots[0][0]:g}, {last[name]} at {spots[-1][0]:g}"
        for name, spots in series.items()
    )
    return Picture(
        key,
        title,
        time.label,
        latest=latest,
        says=f"{title}. {says}.",
        note=note,
        lines=lines,
        marks=list(time.marks(scale)),
        x_ticks=[(scale.x(t), f"{t:g}") for t in time.ticks()],
        y_ticks=[(scale.y(t), _tick(t, heights, write)) for t in heights],
        reference=None if reference is None else scale.y(reference),
    )


def _tick(value: float, ticks: list[float], write: Format) -> str:
    return write(value) if write is percent and ticks[-1] <= 1 else f"{value:g}"


def _kept(parts: Mapping[int, Mapping[str, int]], time: _Time) -> Picture:
    """Shares, so that iterations of different sizes compare; the counts are said."""
    title, key = "Kept and dropped pairs", "kept"
    if not parts:
        return Picture(key, title, time.label, empty="no pair was decided on yet")
    order = ("kept", "review", *get_args(DropReason))
    found = {kind for counts in parts.values() for kind in counts}
    kinds = sorted(found, key=lambda kind: order.index(kind) if kind in order else len(order))
    scale = _Scale((time.low, time.high), (0, 1))
    slot = (WIDTH - LEFT - RIGHT) / (time.high - time.low)
    bars = []
    for k, counts in sorted(parts.items()):
        total, base = sum(counts.values()), 0
        for kind in kinds:
            if n := counts.get(kind, 0):
                top, bottom = scale.y((base + n) / total), scale.y(base / total)
                says = f"iteration {k + 1}: {kind.replace('_', ' ')} {n} of {total} ({percent(n / total)})"
                # Bar k lies between k - 1 and k: it leads from one policy to the next.
                bars.append(Bar(scale.x(k) + 0.08 * slot, top, 0.84 * slot, bottom - top, kind, says))
                base += n
    kept = sum(counts.get("kept", 0) for counts in parts.values())
    pairs = sum(sum(counts.values()) for counts in parts.values())
    last = parts[max(parts)]
    bar_time = replace(time, changes=[replace(change, at=change.at - 0.5) for change in time.changes])
    return Picture(
        key,
        title,
        time.label,
        latest=f"{percent(last.get('kept', 0) / sum(last.values()))} kept",
        says=f"{title}. Kept {kept} of {pairs} pairs over {len(parts)} iterations.",
        bars=bars,
        kinds=kinds,
        marks=list(bar_time.marks(scale)),
        x_ticks=[(scale.x(t) - slot / 2, f"{t:g}") for t in time.ticks() if t >= 1],
        y_ticks=[(scale.y(t), percent(t)) for t in (0, 0.25, 0.5, 0.75, 1)],
    )


def _loss(steps: Sequence[tuple[int, float]], changes: list[_Change]) -> Picture:
    title = "Training loss by optimizer step"
    if not steps:
        return Picture("loss", title, "step", empty="no update yet")
    starts = [
        replace(change, at=next((i for i, (k, _) in enumerate(steps) if k >= change.at - 0.5), len(steps)) + 0.5)
        for change in changes
    ]
    size = math.ceil(len(steps) / MOST_POINTS)
    stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
    spots = [(1 + i * size + (len(part) - 1) / 2, fmean(loss for _, loss in part)) for i, part in enumerate(stretches)]
    time = _Time("step", 0, max(len(steps), 2), starts)
    series: dict[str, list[Spot]] = {("loss" if size == 1 else f"loss, mean of {size} steps"): spots}
    if len(spots) >= 20:
        width = max(len(spots) // 15, 3)
        smooth = [fmean(y for _, y in spots[max(0, i - width + 1) : i + 1]) for i in range(len(spots))]
        series[f"mean of the last {width * size} steps"] = [(x, y) for (x, _), y in zip(spots, smooth, strict=True)]
    return _line_picture("loss", title, series, time, write=decimals(3), empty="", dots=len(spots) < 20)
