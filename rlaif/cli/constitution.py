"""`rlaif constitution list | show | check | diff`: read the rules before they train anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from rlaif.console import stdout_console
from rlaif.constitution import diff as diff_constitutions
from rlaif.constitution import list_constitutions, load_constitution

app = typer.Typer(help="List, show, check and compare constitutions.", no_args_is_help=True, rich_markup_mode=None)

Directory = Annotated[Path, typer.Option("--dir", help="Folder that holds the constitutions.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="For example assistant@2.")]
DEFAULT = Path("constitutions")


@app.command("list")
def list_(directory: Directory = DEFAULT, json_: Json = False) -> None:
    """All constitutions and their versions."""
    found = list_constitutions(directory)
    if json_:
        typer.echo(json.dumps([{**c.ref.model_dump(), "summary": c.summary} for c in found], indent=1))
        return
    table = Table("constitution", "hash", "principles", "summary")
    for c in found:
        table.add_row(str(c.ref), c.hash, str(len(c.principles)), escape(c.summary))
    stdout_console().print(table)


@app.command()
def show(reference: Reference, directory: Directory = DEFAULT, json_: Json = False) -> None:
    """One constitution, principle by principle."""
    text = load_constitution(directory, reference)
    if json_:
        typer.echo(text.model_dump_json(indent=1))
        return
    console = stdout_console()
    console.print(f"[bold]{text.ref}[/] {text.hash}  {escape(text.summary)}")
    for p in text.principles:
        role = "guard" if p.guard else f"weight {p.weight:g}"
        console.print(f"\n[bold]{p.id}[/] ({role})\n  {escape(p.rule)}")
        if p.prefer:
            console.print(f"  prefer: {escape(p.prefer)}\n  avoid:  {escape(p.avoid or '')}")
        if p.check:
            console.print(f"  check:  {escape(str(p.check.model_dump(exclude_none=True)))}")


@app.command()
def check(directory: Directory = DEFAULT) -> None:
    """Parse every constitution in a folder; exit code 2 names the first that is broken."""
    for c in list_constitutions(directory):
        typer.echo(f"{c.ref} {c.hash} ok")


@app.command()
def diff(a: Reference, b: Reference, directory: Directory = DEFAULT, json_: Json = False) -> None:
    """What changes between two texts, principle by principle."""
    changes = diff_constitutions(load_constitution(directory, a), load_constitution(directory, b))
    if json_:
        typer.echo(json.dumps([c.model_dump() for c in changes], indent=1))
        return
    console = stdout_console()
    if not changes:
        console.print("no difference")
    for c in changes:
        console.print(f"[bold]{c.principle or 'constitution'}[/] {c.kind}{f': {c.field}' if c.field else ''}")
        for sign, colour, value in (("-", "red", c.before), ("+", "green", c.after)):
            for line in _lines(value):
                console.print(f"  [{colour}]{sign}[/] {escape(line)}")


def _lines(value: Any) -> list[str]:
    """A value as YAML lines, the way a constitution file has it; empty parts are left out."""
    if value is None:
        return []
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v not in (None, [], ())}
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return [line for line in text.splitlines() if line != "..."]
