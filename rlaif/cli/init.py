"""`rlaif init DIR`: a project to work in, also where there is no clone of the repository."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlaif.project import Written


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder, which is made if it isn't there.")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of lines.")] = False,
) -> None:
    """Write a project to work in: constitutions, prompts, jobs, and a README of what to edit.

    Files that are there already are left alone, and named. A clone of the repository has all of them, and its own are
    what is copied there, edits included.
    """
    from rlaif.project import write_project

    done = write_project(folder)
    typer.echo(done.model_dump_json(indent=1) if json_ else "\n".join(_lines(done)))


def _lines(done: Written) -> list[str]:
    from rlaif.console import visible

    lines = [f"{done.folder}: {len(done.written)} files written, {len(done.left_alone)} left alone"]
    lines += [f"  written     {name}" for name in done.written]
    lines += [f"  left alone  {name}" for name in done.left_alone]
    if done.clone is not None:
        lines.append(f"copied from the clone {done.clone}, as its files are now")
    there = "" if Path(done.folder) == Path() else f"cd {shlex.quote(done.folder)} && "
    lines.append(f"next: {there}rlaif doctor && rlaif run jobs/quickstart.yaml")
    return [visible(line) for line in lines]
