"""`rlaif audit RUN …`: every decision of a run, found, explained and checked, from its directory alone."""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlaif.cli import audit_pairs, audit_run
from rlaif.cli.audit_agreement import agreement
from rlaif.cli.audit_common import Json, opened, print_json
from rlaif.cli.audit_replay import replay
from rlaif.cli.audit_replay_set import replay_set
from rlaif.cli.audit_run import print_overview
from rlaif.cli.audit_verify import verify


class RunFirst(TyperGroup):
    """`rlaif audit RUN COMMAND`; `rlaif audit COMMAND RUN`, as other tools have it, is understood too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if len(args) > 1 and args[0] in self.commands and not args[1].startswith("-"):
            args = [args[1], args[0], *args[2:]]
        # A group takes its own options before its argument only: `RUN --json` is `--json RUN`.
        options = list(takewhile(lambda a: a in ("--json", "--help"), args[1:]))
        args = [*options, *args[:1], *args[1 + len(options) :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunFirst,
    help="Ask a run's log: why was this pair kept, by which votes, under which text, into which checkpoint?",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def overview(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")],
    json_: Json = False,
) -> None:
    """Without a command: the run on one screen."""
    from rlaif.rundir.store import RunDir

    if ctx.invoked_subcommand is not None and "--help" in sys.argv[1:]:
        return  # what a command does can be read without a run
    ctx.obj = RunDir.open(run)
    if ctx.invoked_subcommand is None:
        from rlaif.audit.overview import overview as ask

        with opened(ctx) as index:
            found = ask(index, index.run)
        if json_:
            print_json(found)
        else:
            print_overview(found)


app.command("list")(audit_pairs.list_)
app.command()(audit_pairs.show)
app.command()(audit_pairs.flips)
app.command()(audit_pairs.disagree)
app.command()(audit_run.trace)
app.command()(audit_run.compare)
app.command(cls=audit_run.WithTables, context_settings={"max_content_width": 120})(audit_run.sql)
app.command()(audit_run.export)
app.command()(verify)
app.command()(replay)
app.command("replay-set")(replay_set)
app.command()(agreement)
