"""The one console for results: stdout, as wide as the terminal, or 160 columns when piped; and lists for both."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_COLUMNS = 160
_ACTIVE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def piped() -> bool:
    """Whether results go to a program or a file: no terminal whose width and height matter."""
    return not sys.stdout.isatty()


def stdout_console() -> Console:
    """A console on stdout that never colours numbers by itself."""
    from rich.console import Console

    return Console(highlight=False, width=PIPED_COLUMNS if piped() else None)


def visible(text: str) -> str:
    """A model's or a user's text as a terminal may show it: what would steer the terminal is replaced."""
    return _ACTIVE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def inert(text: str) -> str:
    """`visible`, for a rich console: no markup either."""
    from rich.markup import escape

    return escape(visible(text))


def counted(n: int, one: str, several: str = "") -> str:
    """A number with what is counted: `1 pair`, `2 pairs`; `several` where it isn't `one` with an s."""
    return f"{n} {one if n == 1 else several or one + 's'}"


class Listing:
    """Rows of text under headings: a table on a terminal, lines with tabs when piped. No character is left out.

    On a terminal words stay whole where there is room for each column's longest. Where there isn't, `spare` columns go.

    Args:
        right: columns of numbers.
        spare: columns that a narrow terminal is shown without; the first goes first.
        one_line: they go until each row has room in one line, and so have the headings.
    """

    def __init__(
        self,
        *columns: str,
        right: Sequence[str] = (),
        spare: Sequence[str] = (),
        title: str = "",
        one_line: bool = False,
    ):
        self.columns = columns
        self.title = title
        self._right, self._spare, self._one_line = right, spare, one_line
        self.rows: list[tuple[str, ...]] = []
        self._ends: set[int] = set()

    def add(self, *cells: str) -> None:
        """Adds a row; its cells may be anyone's text."""
        self.rows.append(cells)

    def end_section(self) -> None:
        """Draws a line after the last row, on a terminal."""
        self._ends.add(len(self.rows))

    def lines(self) -> list[str]:
        """The list for programs: a line a row after a line of headings, and a tab between two fields."""
        return ["\t".join(map(_in_a_line, row)) for row in (self.columns, *self.rows)]

    def table(self, width: int = PIPED_COLUMNS) -> Table:
        """The list for a terminal, without the spare columns for which it is too narrow."""
        from rich.table import Table
        from rich.text import Text

        cells = [[row[n] for row in self.rows] for n in range(len(self.columns))]
        columns = [_Column.of(name, mine, self._one_line) for name, mine in zip(self.columns, cells, strict=True)]
        shown = [n for n in range(len(columns)) if self.columns[n] or any(row[n] for row in self.rows)]
        for spare in self._spare:
            if _width(columns[n] for n in shown) <= width:
                break
            shown = [n for n in shown if self.columns[n] != spare]
        fits = _width(columns[n] for n in shown) <= width
        widths = _shared_out([columns[n] for n in shown], width) if fits else [None for _ in shown]
        table = Table(title=Text(self.title) if self.title else None, title_justify="left")
        for n, wide in zip(shown, widths, strict=True):
            table.add_column(
                Text(visible(self.columns[n])),
                justify="right" if self.columns[n] in self._right else "left",
                # rich would put an ellipsis in place of what stands behind a column's width without a space before.
                overflow="fold",
                width=wide,
            )
        for number, row in enumerate(self.rows, 1):
            table.add_row(*(Text(visible(row[n])) for n in shown), end_section=number in self._ends)
        return table

    def print(self, console: Console) -> None:
        """Prints the list in the form that stdout asks for."""
        if piped():
            if self.title:
                print(self.title)
            print(*self.lines(), sep="\n")
        else:
            console.print(self.table(console.width))


_LONGEST = 24
"""A word of so many columns, as a path or a sentence without spaces, may be cut."""


class _Column(NamedTuple):
    """How much room a column wants, in a terminal's columns."""

    least: int
    """So that no word is cut."""
    most: int
    """So that nothing is wrapped."""

    @classmethod
    def of(cls, name: str, cells: Sequence[str], one_line: bool) -> _Column:
        from rich.cells import cell_len

        def longest(text: str) -> int:
            return max(map(cell_len, text.split()), default=0)

        most = max(cell_len(line) for cell in (name, *cells) for line in cell.split("\n"))
        if one_line or max(map(cell_len, cells), default=0) <= _SHORT:
            return cls(most if one_line else max(longest(name), *map(cell_len, cells), 1), most)
        widest = max(len(cell) - len(cell.lstrip()) + longest(cell) for cell in cells)
        return cls(max(longest(name), min(widest, _LONGEST)), most)


_SHORT = 10
"""Cells of so many columns, as `12 of 12`, stay on one line."""


def _width(columns: Iterable[_Column]) -> int:
    """Of a table whose columns get the least that they want: lines and blanks are three columns each, and one more."""
    return 1 + sum(column.least + 3 for column in columns)


def _shared_out(columns: Sequence[_Column], width: int) -> list[int]:
    """The least for each, and what is left for those that want more: all get the same share of it, about."""
    widths = [column.least for column in columns]
    for _ in range(width - _width(columns)):
        wanting = [n for n, column in enumerate(columns) if widths[n] < column.most]
        if not wanting:
            break
        widths[min(wanting, key=lambda n: widths[n] / columns[n].most)] += 1
    return widths


def _in_a_line(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
