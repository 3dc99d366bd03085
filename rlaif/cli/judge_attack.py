"""`rlaif judge attack`: how easily is a judge manipulated?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlaif.console import stdout_console


def attack(
    labelled: Annotated[Path, typer.Argument(help="Pairs to attack, JSONL.")] = Path("prompts/judge_bench.jsonl"),
    limit: Annotated[int, typer.Option(min=1, help="Pairs to take, evenly over the file.")] = 50,
    job: Annotated[Path | None, typer.Option(help="Take `judge` and `filters` from this job file.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: --set judge.model=gpt-4.1-mini")
    ] = None,
    directory: Annotated[Path, typer.Option("--dir", help="Folder that holds the constitutions.")] = Path(
        "constitutions"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """How often each attack on the losing answer flips a verdict that was stable, with Wilson 95 % intervals."""
    from rlaif.cli.judge import job_of, loader
    from rlaif.judging import attacks
    from rlaif.judging.labelled import read_labelled
    from rlaif.judging.opened import open_judge

    settings = job_of(job, set_)
    rows = read_labelled([labelled]).rows
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    load = loader(directory)
    texts = [load(r) for r in {r.constitution or settings.constitution for r in rows} if r is not None]
    ask = open_judge(settings, texts, Path.cwd(), lambda message: print(message, file=sys.stderr))
    votes = 0

    def progress(new: int) -> None:
        nonlocal votes
        votes += new
        if sys.stderr.isatty():
            print(f"{votes} votes", end="\r", file=sys.stderr, flush=True)

    report = attacks.attack_judge(rows, ask, load, settings.filters, settings.constitution, progress=progress)
    if json_:
        head = {"model": settings.judge.model, "labelled": str(labelled)}
        typer.echo(json.dumps(head | report.model_dump(), indent=1))
        return
    title = f"attacks on the {settings.judge.kind} judge {settings.judge.model}, {labelled}"
    stdout_console().print(attacks.table(report, title))
