"""`rlaif report RUN`: the run in one HTML file, to attach to a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli.audit_common import Building


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")],
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where to write it; report.html in the run when absent.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print what it says, as JSON for programs, and write no file.")
    ] = False,
) -> None:
    """Write a report: what was trained towards what, on what data, how far the labels can be trusted, what moved.

    One file with its pictures in it; it needs no network and no script. `rlaif compare RUN... --html FILE` reports on
    several runs.
    """
    from rlaif.audit.index import Index
    from rlaif.rundir.store import RunDir
    from rlaif.view.report import make_report, write_report

    opened = RunDir.open(run)
    with Building() as building, Index.open(opened, building.told) as index:
        building.close()
        made = make_report(index, opened)
        if json_:
            typer.echo(made.model_dump_json(indent=1))
            return
        typer.echo(str(write_report(made, to or opened.path / "report.html")))
