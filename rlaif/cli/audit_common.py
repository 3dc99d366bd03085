"""What the `rlaif audit` commands share: options, the run and its index, numbers as people read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.audit.index import Index
    from rlaif.records import Record
    from rlaif.rundir.store import RunDir

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Limit = Annotated[int, typer.Option(min=1, help="Most rows to print.")]
Iteration = Annotated[int | None, typer.Option(help="Iteration, counted from 1 as in tables.")]
TextName = Annotated[str | None, typer.Option(help="name@version, or a hash (its beginning).")]
Offset = Annotated[int, typer.Option(min=0, help="Rows to leave out first.")]


def run_of(ctx: typer.Context) -> RunDir:
    """The run that a subcommand is about."""
    run: RunDir = ctx.obj
    return run


@contextmanager
def opened(ctx: typer.Context, run: RunDir | None = None) -> Iterator[Index]:
    """The index of the run (or of another one), up to date; building it shows on stderr, and so do damaged lines."""
    from rlaif.audit.index import Index

    with Building() as building, Index.open(run or run_of(ctx), building.told) as index:
        building.close()
        for problem in index.problems:
            typer.echo(f"rlaif: {problem}", err=True)
        yield index


class Building:
    """Shows how far the index is: a line that moves on a terminal, few lines elsewhere, nothing when it is quick."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False

    def __enter__(self) -> Building:
        import time

        self._clock = time.monotonic
        self._quiet_until = self._clock() + (0.5 if self._terminal else 2.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def told(self, what: str, share: float) -> None:
        """A step of the index."""
        now = self._clock()
        if now < self._quiet_until:
            return
        if self._terminal:
            sys.stderr.write(f"\r\x1b[Kindexing {share:4.0%}  {what}")
        elif share >= self._next:
            sys.stderr.write(f"indexing {share:.0%}  {what}\n")
            self._next = share + 0.1
        sys.stderr.flush()
        self._shown = True

    def close(self) -> None:
        """Takes the moving line away."""
        if self._shown and self._terminal:
            sys.stderr.write("\r\x1b[K")
        self._shown = False


def print_json(record: Record) -> None:
    """Prints a record for programs."""
    typer.echo(record.model_dump_json(indent=1))


# Numbers and texts as people read them.


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value:.0%}"


def number(value: float | None, digits: int = 2) -> str:
    """A number; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def counts(values: dict[str, int]) -> str:
    """Names with how often."""
    return ", ".join(f"{name} {n}" for name, n in values.items())


def short(text: str, most: int = 60) -> str:
    """A text's beginning in one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def from_zero(iteration: int | None) -> int | None:
    """An iteration as files count it."""
    if iteration is not None and iteration < 1:
        raise UserError(f"--iteration {iteration}: it counts from 1, as tables do")
    return None if iteration is None else iteration - 1


def print_total(total: int, offset: int, shown: int, what: str = "pairs") -> None:
    """Which part of a list was shown."""
    from rlaif.console import stdout_console

    last = offset + shown
    start = f"{offset + 1}-{last} of " if shown else ""
    stdout_console().print(f"{start}{total} {what}" + (f"; more with --offset {last}" if last < total else ""))
