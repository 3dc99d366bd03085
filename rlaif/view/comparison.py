"""`rlaif compare --html`: groups of runs over their iterations in one self-contained HTML file.

In: an `OverTime` and how soon its groups came where one of them ended. Out: the file, with the page's own pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlaif.audit.over_time import CELLS, Group, GroupPoint, OverTime, measure_of, plain
from rlaif.audit.reach import Reach
from rlaif.errors import UserError
from rlaif.rundir.store import replacing
from rlaif.view.html import MISSING
from rlaif.view.pictures import STYLES, of_groups, percent


def write_comparison(found: OverTime, reached: Sequence[Reach], to: Path) -> Path:
    """Writes the file, whole or not at all.

    Raises:
        UserError: more groups than lines can be told apart, or there is no such folder.
    """
    from rlaif.view.html import render, style

    if len(found.groups) > STYLES:
        raise UserError(f"--html: {len(found.groups)} groups, and {STYLES} lines can be told apart; name fewer runs")
    if not to.parent.is_dir():
        raise UserError(f"--html {to}: there is no folder {to.parent}; make it first")
    html = render(
        "comparison.html",
        found=found,
        reached=reached,
        measures={name: measure_of(name) for name in found.measures},
        pictures=of_groups(found),
        cell=_cell,
        cells=CELLS,
        value=_value,
        style=style(),
    )
    with replacing(to) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))
    return to


def _value(value: float, name: str) -> str:
    return percent(value) if measure_of(name).percent else plain(value)


def _cell(group: Group, point: GroupPoint, name: str) -> str:
    return group.cell(point, name, lambda value: _value(value, name), MISSING)
