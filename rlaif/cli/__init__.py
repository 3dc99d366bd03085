"""The command line: `rlaif`. Results go to stdout, progress and logs to stderr.

A user's mistake is one line and exit code 2, ours is one line and exit code 1. Nothing is imported before a command
needs it: a module here has typer, `errors` and the standard library at its top, so that help and a typing mistake take
a tenth of a second (tests/test_cli.py).
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from rlaif import __version__
from rlaif.cli import audit, branch, compare, constitution, init, judge, report, review, run, runs, view
from rlaif.errors import RlaifError, needs_extra

app = typer.Typer(
    help="Train a language model towards a written constitution, online.\n\n"
    "Start with `rlaif doctor`, then `rlaif run jobs/quickstart.yaml`. Without a clone of the repository, "
    "`rlaif init DIR` first: it writes the folders that jobs run in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(init.init)
run.register(app)
app.command()(runs.runs)
app.command()(branch.branch)
app.command()(branch.rollback)
app.command()(review.review)
app.add_typer(audit.app, name="audit")
app.add_typer(constitution.app, name="constitution")
app.add_typer(judge.app, name="judge")
app.command()(view.view)
app.command()(report.report)
app.command()(compare.compare)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlaif {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What stands before a command's name."""


def main() -> None:
    """Entry point of the `rlaif` command."""
    try:
        app(prog_name="rlaif")
    except RlaifError as e:
        print(f"rlaif: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("rlaif: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except ModuleNotFoundError as e:
        if (needed := needs_extra(e)) is None:
            raise
        print(f"rlaif: {needed}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        # A disk that is full, a folder that can't be read: no line of ours is at fault, a traceback helps nobody.
        full = "; free some and run the same command again" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"rlaif: {e.filename or 'a file'}: {e.strerror or e}{full}", file=sys.stderr)
        sys.exit(1)
