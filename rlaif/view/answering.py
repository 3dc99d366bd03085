"""The tab Answers: a held-out prompt's answers in columns, one for each evaluation, and one row for each run.

In: what an address asks for, and the answers of one run or several (`rlaif.audit.answers`). Out: the table's columns
and rows, with the words that changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args
from urllib.parse import urlencode

from rlaif.audit.answers import Answer, Answers, Evaluated, Evaluation, PromptLine
from rlaif.records import Record
from rlaif.view.browse import understood
from rlaif.view.words import Piece, new_words

Newest = Literal["won", "lost", "undecided", "abstained"]
Against = Literal["before", "base", "nothing"]
MOST_COLUMNS = 24
"""More evaluations than this are shown as the base policy's and the newest ones."""


class AnswersAsked(Record):
    """What the tab's address asks for."""

    prompt: str | None = None
    """Its id; the first of the list where it is absent."""
    text: str | None = None
    """Prompts that have this in them, or in an answer."""
    newest: Newest | None = None
    """Prompts with this verdict in the newest evaluation."""
    marked: Against = "before"
    """Whether words are marked that the evaluation before, or the base policy, didn't have."""
    run: tuple[str, ...] = ()
    """Of a folder of runs, those that are shown."""

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> tuple[AnswersAsked, list[str]]:
        """What a query string asks for, and one line for each part of it that can't be understood."""
        return understood(cls, {name: value.strip() for name, value in query.items() if value.strip()})

    def query(self, **changes: str | None) -> str:
        """The shortest query string that asks for this, or for what differs in some parts."""
        return urlencode(self.model_copy(update=changes).model_dump(exclude_defaults=True), doseq=True)

    def shows(self, line: PromptLine) -> bool:
        """Whether a prompt is in the list: by its newest verdict, whichever evaluation has one."""
        if self.newest is None:
            return True
        word = next((w for w in reversed(line.against_base) if w), None)
        return ("undecided" if word == "equal" else word) == self.newest


CHOICES: dict[str, tuple[str, ...]] = {"newest": get_args(Newest), "marked": get_args(Against)}


class MarkedAnswer(Answer):
    """An answer with the words that another one doesn't have."""

    pieces: tuple[Piece, ...]


class Cell(Record):
    """A run's answers in one evaluation."""

    evaluation: Evaluation
    answers: tuple[MarkedAnswer, ...]
    same_as: str = ""
    """A run in a row above that has the very same here: the past that branches share."""


class Row(Record):
    """A run's answers to a prompt."""

    run: str
    base: str = ""
    """What the addresses of the run's pages begin with."""
    cells: tuple[Cell | None, ...]
    """Column by column; None where the run wasn't evaluated then."""


class Table(Record):
    """A prompt's answers."""

    columns: tuple[int, ...]
    """Updates behind the policy that answered; 0 is the base policy."""
    left_out: int
    """Evaluations between the base policy's and the oldest column."""
    rows: tuple[Row, ...]


def answers_table(
    found: Mapping[str, Answers], marked: Against = "before", bases: Mapping[str, str] | None = None
) -> Table:
    """A prompt's answers; `found` is by run, and so are `bases`."""
    every = sorted({e.evaluation.updates for answers in found.values() for e in answers.evaluated})
    columns = every if len(every) <= MOST_COLUMNS else [every[0], *every[1 - MOST_COLUMNS :]]
    rows: list[Row] = []
    for run, answers in found.items():
        cells = _cells(answers, columns, marked)
        above = [
            next((row.run for row in rows if cell is not None and row.cells[n] == cell), "")
            for n, cell in enumerate(cells)
        ]
        same = [cell and cell.model_copy(update={"same_as": name}) for cell, name in zip(cells, above, strict=True)]
        rows.append(Row(run=run, base=(bases or {}).get(run, ""), cells=tuple(same)))
    return Table(columns=tuple(columns), left_out=len(every) - len(columns), rows=tuple(rows))


def _cells(answers: Answers, columns: Sequence[int], marked: Against) -> list[Cell | None]:
    by_updates = {e.evaluation.updates: e for e in answers.evaluated}
    there = sorted(by_updates)
    out: list[Cell | None] = []
    for updates in columns:
        if updates not in by_updates:
            out.append(None)
            continue
        place = there.index(updates)
        other = None if place == 0 or marked == "nothing" else by_updates[there[place - 1 if marked == "before" else 0]]
        here = by_updates[updates]
        out.append(
            Cell(
                evaluation=here.evaluation,
                answers=tuple(
                    MarkedAnswer(**dict(a), pieces=new_words(_sample(other, n), a.text))
                    for n, a in enumerate(here.answers)
                ),
            )
        )
    return out


def _sample(other: Evaluated | None, number: int) -> str | None:
    """The text of another evaluation's answer with the same number; None without one."""
    return other.answers[number].text if other and number < len(other.answers) else None


def near(lines: Sequence[PromptLine], prompt_id: str | None) -> tuple[str | None, str | None]:
    """The prompts before and after one in a list; of one that isn't in it the first is the next."""
    ids = [line.prompt_id for line in lines]
    if prompt_id not in ids:
        return None, ids[0] if ids else None
    place = ids.index(prompt_id)
    return ids[place - 1] if place else None, ids[place + 1] if place + 1 < len(ids) else None
