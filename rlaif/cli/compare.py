"""`rlaif compare RUN...`: several runs over their iterations, in groups of seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlaif.audit.over_time import Axis, Group, OverTime
    from rlaif.audit.reach import Reach
    from rlaif.rundir.store import RunDir

_SHOWN = ("win_rate", "words", "kl")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories, or a folder of them; NAME=RUN or NAME='runs/brief-*' makes a group.",
        ),
    ],
    from_: Annotated[
        str, typer.Option("--from", metavar="start|change", help="What iterations are counted from.")
    ] = "start",
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A number to show, several times for several; win_rate, words and kl if absent."
        ),
    ] = None,
    reach: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Say from when on each group is as far as this one ends up.")
    ] = None,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="How far of its way, with --reach.")] = 0.8,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="Draw it, too.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a report of it: one file, pictures in it.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Hold runs against each other: held-out answers over the iterations, mean and spread over seeds.

    Runs whose jobs differ in the seed and the name alone are one group. `--from change` lays the newest change of text
    of every run at 0, and the start of a run without one: so a run that goes on is held against one that begins anew.
    """
    from rlaif.audit import over_time

    if from_ not in ("start", "change"):
        raise UserError(f"--from {from_}: expected start or change")
    axis: Axis = "change" if from_ == "change" else "start"
    measures = [*dict.fromkeys(measure or _SHOWN)]
    for name in measures:
        over_time.measure_of(name)
    found = over_time.over_time(_groups(runs), axis, measures)
    for group in found.groups:
        for shared in group.shared:
            typer.echo(f"rlaif: {shared.in_words(group.name)}", err=True)
        if len({run.seed for run in group.runs}) < len(group.runs):
            same = f"rlaif: {group.name}: several of its runs have one seed, so the spread is too small"
            typer.echo(f"{same}; name groups as NAME=RUN", err=True)
    reached = _reached(found, reach, measures, share) if reach else []
    if picture is not None:
        from rlaif.audit.picture import draw_over_time

        draw_over_time(found, picture)
    if html is not None:
        from rlaif.view.comparison import write_comparison

        write_comparison(found, reached, html)
    for written in (picture, html):
        if written is not None:
            typer.echo(f"written: {written}", err=True)
    if json_:
        import json

        whole = found.model_dump(mode="json") | {"reach": [r.model_dump(mode="json") for r in reached]}
        typer.echo(json.dumps(whole, ensure_ascii=False))
        return
    _print(found, reached)
    for name in measures:
        if not any(name in point.values for group in found.groups for point in group.points):
            typer.echo(f"rlaif: {name}: not measured in any of these runs", err=True)


def _reached(found: OverTime, group: str, measures: Sequence[str], share: float) -> list[Reach]:
    """By each measure that can be an aim and that the group went a way by. Of the other aims it is said why not, unless
    there is none."""
    from rlaif.audit.over_time import measure_of
    from rlaif.audit.reach import reach

    reached, refused = [], []
    aims = [name for name in measures if measure_of(name).is_aim]
    for name in aims or measures:
        try:
            reached.append(reach(found, group, name, share))
        except UserError as e:
            refused.append(e)
    if not reached:
        raise refused[0]
    for why in refused:
        typer.echo(f"rlaif: --reach: {why}", err=True)
    return reached


def _groups(arguments: Sequence[str]) -> dict[str, list[RunDir]]:
    """Groups as they were named, then the runs without a name by their jobs."""
    from rlaif.audit.over_time import grouped

    named: dict[str, list[RunDir]] = {}
    others: list[RunDir] = []
    for argument in arguments:
        name, is_named, pattern = argument.partition("=")
        if is_named and not Path(argument).exists():
            named.setdefault(name, []).extend(_opened(pattern))
        else:
            others += _opened(argument)
    without = [run for run in others if not _evaluated(run)]
    if len(without) < len(others):  # of a folder, runs that have just begun
        for run in without:
            typer.echo(f"rlaif: {run.path}: no evaluation in it yet; it is left out", err=True)
        others = [run for run in others if run not in without]
    rest = grouped(others)
    if twice := sorted(named.keys() & rest.keys()):
        raise UserError(f"two groups are called `{twice[0]}`; give one of them another name, as NAME=RUN")
    return named | rest


def _evaluated(run: RunDir) -> bool:
    return any((run.evaluation(k).path / "metrics.json").exists() for k in run.evaluations())


def _opened(pattern: str) -> Iterable[RunDir]:
    """The runs at a path, in a folder, or where a pattern leads."""
    import glob

    from rlaif.rundir.store import RunDir

    places = [Path(pattern)]
    if not places[0].exists() and not (places := [Path(p) for p in sorted(glob.glob(pattern))]):
        raise UserError(f"{pattern}: no such run; `rlaif compare runs/` takes all of a folder")
    out = []
    for place in places:
        inside = sorted(p.parent for p in place.glob("*/run.json")) if not (place / "run.json").exists() else []
        out += [RunDir.open(p) for p in (inside or [place])]
    return out


def _print(found: OverTime, reached: Sequence[Reach]) -> None:
    from rlaif.audit.over_time import CELLS, measure_of
    from rlaif.console import Listing, stdout_console

    console = stdout_console()
    says = {name: measure_of(name).says for name in found.measures}
    numbers = {name: partial(_number, percent=measure_of(name).percent) for name in found.measures}
    table = Listing("group", "after", "text", *says.values(), right=("after", *says.values()))
    for group in found.groups:
        for n, point in enumerate(group.points):
            cells = [group.cell(point, name, numbers[name], "-") for name in found.measures]
            table.add(_named(group) if n == 0 else "", str(point.after), ", ".join(group.texts_at(point.after)), *cells)
        table.end_section()
    table.print(console)
    console.print(CELLS)
    what = "the newest change of text, or the start of a run without one" if found.axis == "change" else "the start"
    console.print(f"after: iterations since {what}")
    for line in found.unknown:
        console.print(line)
    for r in reached:
        _print_reach(r)


def _print_reach(found: Reach) -> None:
    from rlaif.audit.over_time import measure_of
    from rlaif.console import Listing, inert, stdout_console

    measure, console = measure_of(found.measure), stdout_console()
    console.print(inert(f"{measure.says}: {found.in_words(lambda value: _number(value, measure.percent))}"))
    columns = ("there after", "not yet after", "evaluations there")
    table = Listing("group", *columns, "its runs", right=columns)
    for r in found.reached:
        each = ", ".join(run.in_words for run in r.runs)
        table.add(r.group, r.in_words, _or_dash(r.not_after), f"{r.there} of {r.evaluations}", each)
    table.print(console)
    console.print("there: from this evaluation on to the last; one evaluation alone may be luck")
    for line in found.weaknesses:
        console.print(inert(f"note: {line}"))


def _named(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} runs)"


def _number(value: float, percent: bool) -> str:
    from rlaif.audit.over_time import plain

    return f"{value:.0%}" if percent else plain(value)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
