"""`rlaif audit RUN …`: every decision of a run, found, explained and checked, from its directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlaif.store import RunDir


class RunFirst(TyperGroup):
    """`rlaif audit RUN COMMAND`; `rlaif audit COMMAND RUN`, as other tools have it, is understood too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if len(args) > 1 and args[0] in self.commands and not args[1].startswith("-"):
            args = [args[1], args[0], *args[2:]]
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
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Without a command: the run on one screen."""
    ctx.obj = RunDir.open(run)
    if ctx.invoked_subcommand is None:
        raise NotImplementedError


def run_of(ctx: typer.Context) -> RunDir:
    """The run that a subcommand is about."""
    run: RunDir = ctx.obj
    return run


from rlaif.cli.audit_replay import replay  # noqa: E402
from rlaif.cli.audit_verify import verify  # noqa: E402

app.command()(verify)
app.command()(replay)
