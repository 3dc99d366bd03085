"""`rlaif judge attack`: how easily is a judge manipulated?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli.judge_common import (
    DEFAULT_LABELLED,
    Json,
    calibration_of,
    loader,
    open_asked,
    told_what_is_kept,
)
from rlaif.cli.judge_options import JudgeOptions
from rlaif.cli.options import with_options
from rlaif.console import stdout_console


@with_options
def attack(
    labelled: Annotated[Path, typer.Argument(help="Pairs to attack, JSONL.")] = DEFAULT_LABELLED,
    limit: Annotated[int, typer.Option(min=1, help="Pairs to take, evenly over the file.")] = 50,
    *,
    judge: JudgeOptions,
    json_: Json = False,
) -> None:
    """How often each attack on the losing answer flips a verdict that was stable, with Wilson 95 % intervals."""
    from rlaif.data.labelled import read_labelled
    from rlaif.judging.calibration import Asked
    from rlaif.trust import attacks
    from rlaif.trust.bench import as_judged

    settings = judge.settings()
    rows = read_labelled([labelled]).rows
    rows = attacks.evenly(as_judged(rows, settings.policy), limit)
    calibration = calibration_of(settings)
    ask, count = open_asked(settings, rows, judge.directory)
    count.total = None  # how many pairs there are to attack, the first votes tell
    with told_what_is_kept(settings), count.told():
        report = attacks.attack_judge(
            rows,
            ask,
            loader(judge.directory),
            settings.filters,
            settings.constitution,
            progress=count,
            calibration=calibration,
            system_prompt=settings.policy.system_prompt,
            asked=Asked.by(settings),
        )
    if json_:
        head = {"model": settings.judge.model, "labelled": str(labelled)}
        typer.echo(json.dumps(head | report.model_dump(), indent=1))
        return
    title = f"attacks on the {settings.judge.kind} judge {settings.judge.model}, {labelled}"
    stdout_console().print(attacks.table(report, title))
