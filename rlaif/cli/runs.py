"""`rlaif runs`: a folder's runs as a tree of branches, a line each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.audit.runs import RunRow


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder that holds runs.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """List the runs of a folder, each branch below the run that it went on from."""
    import json

    from rlaif.audit.runs import is_run, runs_in
    from rlaif.console import Listing, stdout_console, visible

    if is_run(folder):
        raise UserError(f"{folder}: this is a run, not a folder of them; `rlaif status {folder}` says where it stands")
    rows = runs_in(folder)
    if json_:
        typer.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=1))
        return
    if not rows:
        typer.echo(f"no run in {folder}; `rlaif run JOB` makes one", err=True)
        return
    probes = any(row.kept_share is not None for row in rows)
    kept = ("probes kept",) if probes else ()
    columns = ("run", "from", "iterations", "text", "win rate", "95%", "KL/token", *kept, "alarms", "size", "shared")
    right = ("iterations", "win rate", "KL/token", "probes kept", "alarms", "size", "shared")
    listing = Listing(*columns, right=right, spare=("shared", "95%", "from", "size", "KL/token", "probes kept"))
    for row in rows:
        listing.add(*_cells(row, probes))
    listing.print(stdout_console())
    for row in rows:
        if row.problem:
            print(visible(f"{row.run}: {row.problem}"), file=sys.stderr)


def _cells(row: RunRow, probes: bool) -> tuple[str, ...]:
    from rlaif.audit.disk import in_words

    low, high = row.win_interval or (None, None)
    return (
        f"{'  ' * row.depth}{row.run}",
        "" if row.at is None else f"after {row.at}",
        f"{row.iterations_done} of {row.iterations or '?'}",
        row.constitution or "-",
        "-" if row.win_rate is None else f"{row.win_rate:.2f}",
        "-" if low is None or high is None else f"{low:.2f}-{high:.2f}",
        "-" if row.kl_per_token is None else f"{row.kl_per_token:.3f}",
        *(["-" if row.kept_share is None else f"{row.kept_share:.0%}"] if probes else []),
        str(row.alarms),
        in_words(row.bytes),
        in_words(row.shared) if row.shared else "",
    )
