"""What the cells of a column of labels, or of recorded winners, mean: one reading of a column, settled at once. Pure.

In: the column's cells, the user's own names for the sides where there are any, and the names of the answers' columns,
which a cell may repeat. Out: `Sides`, which says a cell's outcome. Numbers that different projects count differently
(0 and 1; 0, 1 and 2; 1 and -1) are never guessed at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rlaif.errors import UserError
from rlaif.records import Outcome, Record

NAME_KEYS: dict[str, Outcome] = {"first_is": "first", "second_is": "second", "tie_is": "tie", "none_is": "abstain"}
"""Keys of a column map that say what a column calls the sides, a tie, and naming no side; several words by `|`."""
_FIRST = ("1", "first", "a", "[[a]]", "a>b", "a>>b", "model_a", "model_1", "output_1", "response1", "response_1",
          "output_a", "output (a)")  # fmt: skip
_SECOND = ("2", "second", "b", "[[b]]", "b>a", "b>>a", "model_b", "model_2", "output_2", "response2", "response_2",
           "output_b", "output (b)")  # fmt: skip
_TIE = ("0", "tie", "tie (bothbad)", "tie (inconsistent)", "both", "bothbad", "equal", "draw", "neither", "c", "[[c]]",
        "a=b")  # fmt: skip
_NAMES: dict[str, Outcome] = {
    **dict.fromkeys(_FIRST, "first"),
    **dict.fromkeys(_SECOND, "second"),
    **dict.fromkeys(_TIE, "tie"),
}
_LISTED = 5
_CODE = re.compile(
    r"-?\d+(\.\d+)?|\[{0,2}[a-z]\]{0,2}|[a-z][<>=]{1,2}[a-z]|"
    r"(model|output|response|answer|candidate|option|assistant)[ _-]?\(?[a-z0-9]\)?"
)
"""A cell of the form in which columns name sides."""


class Cell(Record):
    """How a value was read, and how often it was met."""

    value: str
    outcome: Outcome
    """`abstain` for a recorded vote that names no side."""
    count: int


class Sides(NamedTuple):
    """How one table's columns name the sides."""

    names: Mapping[str, Outcome]

    def outcome(self, cell: Any) -> Outcome | None:
        """None for a cell that means nothing."""
        return None if cell is None else self.names.get(_said(cell))

    def is_stray(self, cell: Any) -> bool:
        """The cell has the form of a name, of no side that is known: reading it as nothing would be a guess."""
        said = "" if cell is None else _said(cell)
        return said not in self.names and _CODE.fullmatch(said) is not None

    @classmethod
    def of(
        cls,
        cells: Iterable[Any],
        named: Mapping[str, str],
        where: str,
        option: str,
        zero_is_tie: bool = False,
        answers: tuple[str, str] | None = None,
    ) -> Sides:
        """The reading of these cells; `named` holds the map's `first_is`, `second_is`, `tie_is`.

        `where` and `option` are for errors. `zero_is_tie`: the format says that beside 1 and 2 a 0 is a tie.
        `answers` are the columns of the two answers.

        Raises:
            UserError: one side is named without the other, or numbers that need names have none.
        """
        words = [(_said(word), outcome) for key, outcome in NAME_KEYS.items() if key in named
                 for word in named[key].split("|")]  # fmt: skip
        given = dict(words)
        if ("first_is" in named) != ("second_is" in named) or len(given) < len(words):
            raise UserError(f"{option}: name both sides, each by its own word: first_is=NAME,second_is=NAME")
        if "first_is" in named:
            return cls({**dict.fromkeys(_TIE, "tie"), **given})
        numbers = {_said(c) for c in cells if c is not None} & {"0", "1", "2", "-1"}
        known = numbers - set(given) <= {"1", "2"} or numbers == {"0"}
        known = known or (zero_is_tie and "2" in numbers and "-1" not in numbers)
        if not known:
            listed = " and ".join(sorted(numbers, key=int))
            raise UserError(f"{where} are {listed}; say which is which, for example {option} {_suggested(numbers)}")
        columns: dict[str, Outcome] = {_said(answers[0]): "first", _said(answers[1]): "second"} if answers else {}
        return cls({**_NAMES, **columns, **given})


def count_cells(read: Iterable[tuple[Any, Outcome]]) -> tuple[Cell, ...]:
    """How often each value was read as what, the most frequent first."""
    counts = Counter(("" if value is None else str(value).strip(), outcome) for value, outcome in read)
    return tuple(Cell(value=v[:80], outcome=o, count=n) for (v, o), n in counts.most_common())


def cell_lines(cells: Iterable[Cell], what: str) -> list[str]:
    """`labels: 1→first 31, 2→second 29`, and what was read as nothing."""
    some = list(cells)
    read = [f"{c.value}→{c.outcome} {c.count}" for c in some if c.outcome != "abstain"]
    lines = [f"{what} as read: {', '.join(read[: 2 * _LISTED])}" + (", …" if len(read) > 2 * _LISTED else "")]
    unread = [c for c in some if c.outcome == "abstain"]
    if unread:
        listed = ", ".join(f"{c.value!r} {c.count}" if c.value else f"empty {c.count}" for c in unread[:_LISTED])
        more = f", and {len(unread) - _LISTED} other values" if len(unread) > _LISTED else ""
        lines.append(f"{what} that name no side, counted as abstentions: {listed}{more}")
    return lines if read else lines[1:]


def _said(cell: Any) -> str:
    # 1.0 is how a table writes 1 when a cell of the column is empty.
    return str(cell).strip().lower().removesuffix(".0")


def _suggested(numbers: set[str]) -> str:
    if {"-1", "1", "2"} <= numbers:
        return "first_is=1,second_is=2,none_is=-1" + (",tie_is=0" if "0" in numbers else "")
    if "-1" in numbers:
        return "first_is=1,second_is=-1" + (",tie_is=0" if "0" in numbers else "")
    return "first_is=0,second_is=1" + (",tie_is=2" if "2" in numbers else "")
