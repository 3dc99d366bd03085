"""The one console for results: stdout, as wide as the terminal, or 160 columns when piped; and lists for both."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    Args:
        right: columns of numbers.
        whole: columns of ids, which are folded last.
    """

    def __init__(self, *columns: str, right: Sequence[str] = (), whole: Sequence[str] = (), title: str = ""):
        self.columns = columns
        self.title = title
        self._right, self._whole = right, whole
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

    def table(self, without: Sequence[str] = (), width: int = PIPED_COLUMNS) -> Table:
        """The list for a terminal, without some of its columns."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title) if self.title else None, title_justify="left")
        shown = [n for n, column in enumerate(self.columns) if column not in without]
        for n in shown:
            name = self.columns[n]
            table.add_column(
                Text(visible(name)),
                justify="right" if name in self._right else "left",
                # rich would put an ellipsis in place of what stands behind a column's width without a space before.
                overflow="fold",
                # rich crops what may not be folded when there is no room.
                no_wrap=name in self._whole and width >= _ROOM_FOR_IDS,
            )
        for n, row in enumerate(self.rows, 1):
            table.add_row(*(Text(visible(row[i])) for i in shown), end_section=n in self._ends)
        return table

    def print(self, console: Console) -> None:
        """Prints the list in the form that stdout asks for."""
        if piped():
            if self.title:
                print(self.title)
            print(*self.lines(), sep="\n")
        else:
            console.print(self.table(width=console.width))


_ROOM_FOR_IDS = 80


def _in_a_line(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
