"""`rlaif judge attack`: how easily is a judge manipulated?"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

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
    from rlaif.config import apply_override, load_job, parse_job
    from rlaif.constitution import load_constitution
    from rlaif.judging import attacks
    from rlaif.judging.bench import read_labelled

    if job is not None:
        settings = load_job(job, set_)
    else:
        tree: dict[str, Any] = {"constitution": "assistant"}
        for override in set_ or []:
            apply_override(tree, override)
        settings = parse_job(tree, "--set")
    rows = read_labelled(labelled)
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    load = lru_cache(lambda reference: load_constitution(directory, reference))
    for reference in {r.constitution for r in rows}:  # a missing text is found before anything is asked
        load(reference)
    judge, ballots = _judge(settings, [load(r) for r in {r.constitution for r in rows}])
    votes = 0

    def progress(new: int) -> None:
        nonlocal votes
        votes += new
        if sys.stderr.isatty():
            print(f"{votes} votes", end="\r", file=sys.stderr, flush=True)

    report = attacks.attack_judge(rows, judge, load, ballots, settings.filters, progress=progress)
    if json_:
        head = {"model": settings.judge.model, "labelled": str(labelled)}
        typer.echo(json.dumps(head | report.model_dump(), indent=1))
        return
    title = f"attacks on the {settings.judge.kind} judge {settings.judge.model}, {labelled}"
    stdout_console().print(attacks.table(report, title))


def _judge(settings: Any, constitutions: list[Any]) -> tuple[Any, Any]:
    """The job's judge, and who it is asked as."""
    from rlaif.errors import UserError
    from rlaif.judging.ballots import make_ballots, make_chat_ballots
    from rlaif.judging.templates import load_template, template_names

    judge = settings.judge
    if judge.kind == "chat":
        from rlaif.judging.chat import ChatJudge

        names = dict.fromkeys(n for c in constitutions for n in template_names(judge, c, "decide"))
        templates = {n: load_template(judge.templates_dir, n) for n in names}

        def chat_ballots(pairs: Any, constitution: Any) -> Any:
            mine = [templates[n] for n in template_names(judge, constitution, "decide")]
            by_principle = judge.votes_per_principle
            return make_chat_ballots(pairs, constitution, judge.jurors, mine, "decide", by_principle, settings.seed)

        return ChatJudge(judge, list(templates.values())), chat_ballots
    if judge.kind == "recorded":
        raise UserError("judge.kind: recorded votes can't be attacked; name a judge that answers (likelihood or chat)")
    from rlaif import models
    from rlaif.judging.likelihood import LikelihoodJudge

    path = models.resolve(judge.model, progress=lambda message, share: print(message, file=sys.stderr))
    return LikelihoodJudge(str(path), judge), lambda pairs, constitution: make_ballots(pairs, constitution, "attack")
