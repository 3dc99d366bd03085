"""`rlaif view RUN`: the run's pages, on loopback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli.audit_common import Building
from rlaif.errors import UserError

DEFAULT_PORT = 8321


def view(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart, or a folder of runs.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
) -> None:
    """See a run in the browser: pictures, held-out answers, every decision, the texts, the review queue. Also while it
    runs. Of a folder of runs: the tree of branches, and any of them side by side.

    Listens on this machine only. From another one: `ssh -L 8321:127.0.0.1:8321 HOST`, then open the same address there.
    """
    import socket

    from rlaif.audit.runs import is_run
    from rlaif.rundir.store import STARTING, RunDir

    holds_runs = run.is_dir() and not is_run(run) and any(is_run(path) for path in run.iterdir())
    if run.is_dir() and not holds_runs and not any((run / name).exists() for name in ("run.json", STARTING)):
        raise UserError(
            f"{run}: no run (there is no run.json in it), and no folder of runs either (nor in any folder in it); "
            "`rlaif run JOB` makes a run under runs/, and `rlaif view runs` shows all that are there"
        )
    opened = None if holds_runs else RunDir.open(run)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        raise UserError(f"--host {host} --port {port}: can't listen there ({e.strerror}); try --port 0") from e

    import uvicorn

    from rlaif.audit.index import Index
    from rlaif.view.app import is_loopback, make_app, make_folder_app

    if not is_loopback(host):
        print(
            f"rlaif: listening on {host}: everyone who reaches this address can read the run and label its pairs; "
            "there is no password. Better: --host 127.0.0.1 and an SSH tunnel",
            file=sys.stderr,
        )
    if opened is None:
        app = make_folder_app(run, host)
    else:
        with Building() as building:  # the first look at a large run takes a while
            index = Index.open(opened, building.told)
        app = make_app(opened, index, host)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"http://{shown}:{listening.getsockname()[1]}/")
    print(f"rlaif: showing {run}; Ctrl-C ends it", file=sys.stderr)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1)
    )
    server.run(sockets=[listening])
