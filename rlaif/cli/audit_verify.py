"""`rlaif audit RUN verify`: was the log changed, cut or added to after it was written, and where?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rlaif.cli.audit_common import run_of
from rlaif.console import inert, stdout_console

_SHOWN = 200


def verify(
    ctx: typer.Context,
    head: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="A head that was noted elsewhere: is a tail missing since?")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Read the policies' weights too, where they are still there.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Check every digest and the chain of inputs; name the file and line that was changed, cut or added.

    Exit code 1 when something doesn't hold. Whoever can write the whole run can write its digests too: note the head
    that a run prints somewhere else, and check against it with --head.
    """
    from rlaif.audit.verify import verify as check

    tty = sys.stderr.isatty()
    told = (lambda folder: print(folder, end="\r", file=sys.stderr)) if tty else (lambda folder: None)
    report = check(run_of(ctx), head, told, weights)
    if json_:
        typer.echo(report.model_dump_json(indent=1))
    else:
        console = stdout_console()
        console.print(
            f"checked in {inert(report.run)}: {report.stages} stages with {report.rows} rows, {report.heads} heads, "
            f"{report.texts} texts, {report.templates} templates or wordings, {report.policies} policies"
        )
        for note in report.notes:
            console.print(f"note: {inert(note)}")
        for finding in report.findings[:_SHOWN]:
            console.print(f"[red]{inert(str(finding))}[/]")
        if len(report.findings) > _SHOWN:
            console.print(f"… {len(report.findings) - _SHOWN} more; --json has them all")
        if report.head:
            console.print(f"head {report.head}")
        if report.noted:
            console.print(f"the noted head: {inert(report.noted)}")
        console.print("everything holds" if report.holds else f"{len(report.findings)} findings")
    if not report.holds:
        raise typer.Exit(1)
