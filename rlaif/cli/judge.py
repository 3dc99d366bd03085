"""`rlaif judge bench`: how far can a judge be trusted?"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from rlaif.cli.judge_attack import attack
from rlaif.errors import UserError

app = typer.Typer(help="Measure a judge on labelled pairs.", no_args_is_help=True, rich_markup_mode=None)
app.command()(attack)


@app.command()
def bench(
    labelled: Annotated[Path, typer.Argument(help="Labelled pairs, JSONL.")] = Path("prompts/judge_bench.jsonl"),
    split: Annotated[str, typer.Option(help="`dev` to tune on, `test` to report, `all`.")] = "dev",
    job: Annotated[Path | None, typer.Option(help="Take `judge` and `filters` from this job file.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: --set filters.min_margin=0.1")
    ] = None,
    directory: Annotated[Path, typer.Option("--dir", help="Folder that holds the constitutions.")] = Path(
        "constitutions"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Accuracy by principle on labelled pairs, before and after the filter, with Wilson 95 % intervals."""
    from rich.console import Console

    from rlaif import models
    from rlaif.config import apply_override, load_job, parse_job
    from rlaif.constitution import load_constitution
    from rlaif.judging import bench as judge_bench
    from rlaif.judging.likelihood import LikelihoodJudge

    if split not in ("dev", "test", "all"):
        raise UserError(f"--split {split}: expected dev, test or all")
    if job is not None:
        settings = load_job(job, set_)
    else:
        tree: dict[str, Any] = {"constitution": "assistant"}
        for override in set_ or []:
            apply_override(tree, override)
        settings = parse_job(tree, "--set")
    rows = judge_bench.read_labelled(labelled, None if split == "all" else cast("Literal['dev', 'test']", split))
    load = lru_cache(lambda reference: load_constitution(directory, reference))
    for reference in {r.constitution for r in rows}:  # a missing text is found before the model is loaded
        load(reference)

    console = Console(stderr=True)
    path = models.resolve(settings.judge.model, progress=lambda message, share: console.print(message))
    judge = LikelihoodJudge(str(path), settings.judge)
    votes = 0

    def progress(new: int) -> None:
        nonlocal votes
        votes += new
        if sys.stderr.isatty():
            console.print(f"{votes} votes", end="\r")

    judged = judge_bench.judge_rows(rows, judge, load, settings.filters, progress)
    results = judge_bench.slices(judged)
    if json_:
        sources = sorted({j.row.source for j in judged})
        typer.echo(
            json.dumps(
                {
                    "split": split,
                    "model": settings.judge.model,
                    "judge": settings.judge.model_dump(),
                    "filters": settings.filters.model_dump(),
                    "slices": [s.model_dump() for s in results],
                    "by_source": [
                        judge_bench.summarise(s, [j for j in judged if j.row.source == s]).model_dump() for s in sources
                    ],
                    "pairs": [
                        {"id": j.row.id, "label": j.row.label, "correct": j.correct, **j.decision.model_dump()}
                        for j in judged
                    ],
                },
                indent=1,
            )
        )
        return
    title = f"{settings.judge.kind} judge, {settings.judge.model}, {labelled} ({split})"
    Console(width=None if sys.stdout.isatty() else 160).print(judge_bench.table(results, title))
