"""`rlaif branch | rollback`: going on from an earlier state of a run, beside it or in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")]
NewOptimizer = Annotated[
    bool,
    typer.Option("--new-optimizer", help="Go on from the policy alone, where the learner's state of then isn't kept."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def branch(
    run: RunPath,
    at: Annotated[int, typer.Option("--at", metavar="N", help="After so many iterations.")],
    name: Annotated[str, typer.Option(help="Name of the new run; its folder lies beside RUN.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting that is another one from there on."),
    ] = None,
    new_optimizer: NewOptimizer = False,
    json_: Json = False,
) -> None:
    """Start a run from the state of another one after N iterations.

    Those iterations are the new run's past; files are shared, nothing is deleted, and RUN may be at work meanwhile.
    """
    from rlaif.loop.branch import branch as make
    from rlaif.rundir.store import RunDir

    _tell(make(RunDir.open(run), at, name, set_ or [], new_optimizer).path, json_)


def rollback(
    run: RunPath,
    to: Annotated[int, typer.Option("--to", metavar="N", help="After so many iterations.")],
    new_optimizer: NewOptimizer = False,
    json_: Json = False,
) -> None:
    """Let a run go on from its own state after N iterations.

    What came after isn't lost: the run as it was is kept beside it, under the name that this prints.
    """
    from rlaif.loop.branch import rollback as make

    before = make(run, to, new_optimizer).path
    if not json_:
        typer.echo(f"as it was: {before}", err=True)
    _tell(run, json_)


def _tell(run: Path, as_json: bool) -> None:
    """Says where the run is, and how it goes on."""
    from rlaif.rundir.store import RunDir

    made = RunDir.open(run)
    parent, iterations = made.parent, made.header["job"]["iterations"]
    if as_json:
        typer.echo(json.dumps({"run": str(run), "parent": parent.model_dump() if parent else None}))
        return
    typer.echo(str(run))
    done = parent is not None and parent.iterations == iterations
    more = f" --set iterations={iterations + 1} --allow-change" if done else ""
    typer.echo(f"go on with: rlaif run {run}{more}", err=True)
